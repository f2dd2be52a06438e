// Host side of the row kernels.
#include "rows.h"

#include <cuda_runtime.h>

#include <stdexcept>

namespace fused_po {

void row_stats(const Logits&, unsigned, float*, int, void*) { throw std::runtime_error("row_stats: not there yet"); }

void row_softmax(const Logits&, const Output&, unsigned, float*, int, void*) {
  throw std::runtime_error("row_softmax: not there yet");
}

void row_grad(const Logits&, const Output&, const float*, const Coefficients&, int, void*) {
  throw std::runtime_error("row_grad: not there yet");
}

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

std::vector<std::string> architectures() {
  std::vector<std::string> names;
  for (int number : {__CUDA_ARCH_LIST__}) names.push_back("sm_" + std::to_string(number / 10));
  return names;
}

std::map<std::string, std::string> build_info() {
  std::map<std::string, std::string> info;
  info["nvcc"] = std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__) + "." +
                 std::to_string(__CUDACC_VER_BUILD__);
#ifdef FUSED_PO_FLAGS
  info["flags"] = FUSED_PO_FLAGS;
#endif
  return info;
}

}  // namespace fused_po
