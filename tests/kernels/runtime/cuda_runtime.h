// A stand-in of the CUDA runtime, as much as csrc/runtime.cu uses: two GPUs that count what they are asked.
#pragma once

#include <cstddef>
#include <map>
#include <string>

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  // as CUDA's own: not explicit
  dim3(unsigned count = 1) : x(count) {}
};

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int ptxVersion, binaryVersion;
};

enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrReservedSharedMemoryPerBlock,
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };

namespace stand_in {

inline int device = 0;
// the version of the PTX that kernels were made of, blocks of the largest cluster that fits, calls that still fail
inline int ptx = 90, largest_cluster = 16, failures = 0;
inline std::map<std::string, int> calls;
inline int last_shared = 0, most_shared = 0;

inline cudaError_t answer(const char* call) {
  calls[call]++;
  if (failures == 0) return cudaSuccess;
  failures--;
  return cudaErrorInvalidValue;
}

}  // namespace stand_in

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "as the stand-in was told"; }

inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 2;
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = stand_in::device;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
  stand_in::device = device;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  const int values[] = {9, 0, 227 << 10, 228 << 10, 1 << 10};
  *value = values[name];
  return stand_in::answer("device");
}

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {256, stand_in::ptx, 90};
  return stand_in::answer("attributes");
}

inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute name, int value) {
  if (name == cudaFuncAttributeMaxDynamicSharedMemorySize) stand_in::most_shared = value;
  return stand_in::answer(name == cudaFuncAttributeMaxDynamicSharedMemorySize ? "shared" : "cluster");
}

inline cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* config) {
  *clusters = static_cast<int>(config->attrs->val.clusterDim.x) <= stand_in::largest_cluster;
  return stand_in::answer("occupancy");
}

inline cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  stand_in::last_shared = static_cast<int>(config->dynamicSmemBytes);
  return stand_in::answer("launch");
}
