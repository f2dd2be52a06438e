// What the host side asks of the CUDA runtime: devices, launches with checks, what this build holds.
#include <cuda_runtime.h>

#include <limits>
#include <utility>

#include "rows.h"
#include "runtime.h"

namespace fused_po {

namespace {

void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  // an error that only this call saw must not meet the next one
  cudaGetLastError();
  throw std::runtime_error(what + ": " + cudaGetErrorString(status));
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "attributes of device " + std::to_string(device));
  return value;
}

// the returned configuration points to `cluster`
cudaLaunchConfig_t configuration(const Geometry& geometry, cudaLaunchAttribute& cluster) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(geometry.blocks));
  config.blockDim = dim3(static_cast<unsigned>(geometry.threads));
  config.dynamicSmemBytes = static_cast<size_t>(geometry.shared);
  if (geometry.cluster > 1) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(geometry.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  return config;
}

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "the current CUDA device");
  return device;
}

Capabilities ask_capabilities(int device) {
  const int count = device_count();
  if (count == 0) throw std::runtime_error("the CUDA kernels need an NVIDIA GPU and its driver; none is visible");
  if (device < 0 || device >= count) {
    throw std::runtime_error("there is no CUDA device " + std::to_string(device) + ", only " + std::to_string(count));
  }
  Capabilities gpu{};
  gpu.major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  gpu.minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
  gpu.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  gpu.shared_per_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  gpu.shared_reserved = attribute(cudaDevAttrReservedSharedMemoryPerBlock, device);
  return gpu;
}

using KernelOnDevice = std::pair<const void*, int>;

// Shared memory over 48 KiB and clusters over 8 blocks are had only on request. Both are asked for at once and to the
// full: a later launch of another size finds them as they are.
void prepare(const void* kernel, const std::string& what) {
  static Remembered<KernelOnDevice, bool> prepared;
  const int device = current_device();
  prepared.get({kernel, device}, [&] {
    const Capabilities gpu = capabilities(device);
    cudaFuncAttributes own{};
    check(cudaFuncGetAttributes(&own, kernel), what);
    const int most = gpu.shared_per_block - static_cast<int>(own.sharedSizeBytes);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), what);
    if (gpu.major >= 9) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), what);
    // an error is not remembered
    return true;
  });
}

}  // namespace

Capabilities capabilities(int device) {
  static Remembered<int, Capabilities> known;
  return known.get(device, [&] { return ask_capabilities(device); });
}

CurrentDevice::CurrentDevice(int device) : device_(device) {
  check(cudaGetDevice(&before_), "the current CUDA device");
  if (device_ != before_) check(cudaSetDevice(device_), "CUDA device " + std::to_string(device_));
}

CurrentDevice::~CurrentDevice() {
  if (device_ != before_) cudaSetDevice(before_);
}

int kernel_code(const void* kernel) {
  static Remembered<KernelOnDevice, int> known;
  return known.get({kernel, current_device()}, [&] {
    cudaFuncAttributes own{};
    check(cudaFuncGetAttributes(&own, kernel), "attributes of a kernel");
    // what the driver compiled from PTX has the GPU's binaryVersion, and does what its PTX was made for
    return own.ptxVersion < own.binaryVersion ? own.ptxVersion : own.binaryVersion;
  });
}

bool kernel_fits(const void* kernel, const Geometry& geometry) {
  cudaLaunchAttribute cluster;
  cudaLaunchConfig_t config = configuration(geometry, cluster);
  int clusters = 1;
  try {
    prepare(kernel, "a kernel");
    if (geometry.cluster > 1) check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "clusters of a kernel");
  } catch (const std::runtime_error&) {
    return false;
  }
  return clusters > 0;
}

void launch_kernel(const void* kernel, const Geometry& geometry, const void* args, void* stream, const std::string& what) {
  if (geometry.blocks > std::numeric_limits<int32_t>::max()) throw std::runtime_error(what + ": too many blocks");
  constexpr int kFreeShared = 48 << 10;
  constexpr int kPortableCluster = 8;
  if (geometry.shared > kFreeShared || geometry.cluster > kPortableCluster) prepare(kernel, what);
  cudaLaunchAttribute cluster;
  cudaLaunchConfig_t config = configuration(geometry, cluster);
  config.stream = static_cast<cudaStream_t>(stream);
  // cudaLaunchKernelExC reads them and takes pointers to non-const
  void* parameters[] = {const_cast<void*>(args)};
  check(cudaLaunchKernelExC(&config, kernel, parameters), what);
}

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

std::vector<std::string> architectures() {
  std::vector<std::string> names;
  for (const int number : {__CUDA_ARCH_LIST__}) names.push_back("sm_" + std::to_string(number / 10));
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
