// What test_cuda_runtime.py calls.
#include "runtime.h"

#include <cuda_runtime.h>

using namespace fused_po;

static std::string reason;

// all else is hidden, or several copies of this library would share their variables
#pragma GCC visibility push(default)

extern "C" {

void told(int ptx, int largest_cluster, int failures) {
  stand_in::ptx = ptx;
  stand_in::largest_cluster = largest_cluster;
  stand_in::failures = failures;
}

int calls(const char* name) { return stand_in::calls[name]; }
int most_shared() { return stand_in::most_shared; }
const char* last_reason() { return reason.c_str(); }

int code(const void* kernel, int device) {
  const CurrentDevice current(device);
  return kernel_code(kernel);
}

int fits(const void* kernel, int device, int cluster, int shared) {
  const CurrentDevice current(device);
  return kernel_fits(kernel, {cluster, 64, cluster, shared});
}

// 1: started
int launch(const void* kernel, int device, int cluster, int shared) {
  const CurrentDevice current(device);
  const int arguments = 0;
  try {
    launch_kernel(kernel, {cluster, 64, cluster, shared}, &arguments, nullptr, "a kernel of the test");
    return 1;
  } catch (const std::runtime_error& error) {
    reason = error.what();
    return 0;
  }
}

}  // extern "C"

#pragma GCC visibility pop
