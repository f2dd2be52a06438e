// What the host side asks of the CUDA runtime. Knows no kernel, so that it can be tested against a stand-in of CUDA.
#pragma once

#include <stdexcept>
#include <string>

#include "plan.h"

namespace fused_po {

// throws where there is no such GPU
Capabilities capabilities(int device);

// makes a device the current one of this thread, for a while
class CurrentDevice {
 public:
  explicit CurrentDevice(int device);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_ = 0;
  int device_ = 0;
};

// Of the current device. What is asked and set here is asked and set once for each kernel and device: a launch changes
// no state that another thread's launch or a captured graph depends on.

// the compute capability, such as 90, whose instructions a kernel was compiled for; a GPU may be newer
int kernel_code(const void* kernel);
bool kernel_fits(const void* kernel, const Geometry& geometry);
// `args` is the kernel's only parameter
void launch_kernel(const void* kernel, const Geometry& geometry, const void* args, void* stream, const std::string& what);

}  // namespace fused_po
