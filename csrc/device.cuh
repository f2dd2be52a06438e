// Everything that the kernels ask of the hardware, and nothing else does: who a thread is, barriers, shuffles, clusters,
// bulk copies, 16-byte accesses, fast exp2. With FUSED_PO_FIBERS the same names come from a CPU twin, for tests.
#pragma once

#include <cstdint>

// 16 bytes of memory
struct alignas(16) Quad {
  uint32_t word[4];
};

#ifdef FUSED_PO_FIBERS
#include "device_fibers.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define DEVICE __device__ __forceinline__
#define DEVICE_AND_HOST __host__ __device__ __forceinline__
// at most `threads` in a block, registers for at least `blocks` of them on a multiprocessor
#define KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
// by reference in constant memory
#define KERNEL_PARAMETER __grid_constant__

// clusters, bulk copies and their barriers came with compute capability 9.0
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FUSED_PO_CLUSTERS 1
#else
#define FUSED_PO_CLUSTERS 0
#endif

namespace fused_po::device {

constexpr int kWarp = 32;

DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
DEVICE int thread_count() { return static_cast<int>(blockDim.x); }
// unsigned 32 bits: dividing 64 takes a hundred instructions
DEVICE uint32_t block_index() { return blockIdx.x; }

// dynamic shared memory, 128-byte aligned
DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

// ends the kernel with an error that the host sees
DEVICE void trap() { __trap(); }

DEVICE void block_barrier() { __syncthreads(); }
DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE uint32_t shuffle_up(uint32_t value, int by) { return __shfl_up_sync(0xffffffffu, value, by); }

// 2^x, relative error below 2^-22; what would be denormal is 0
DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1/x, one unit in the last place
DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// the size of one number with the sign of another
DEVICE float with_sign(float size, float sign) {
  float y;
  asm("copysign.f32 %0, %1, %2;" : "=f"(y) : "f"(sign), "f"(size));
  return y;
}

// a product that stays one: not contracted with a sum, so that every instance of a template rounds alike
DEVICE float product(float a, float b) { return __fmul_rn(a, b); }

// the high 32 bits of (high : low) << (32 - bits)
DEVICE uint32_t funnel_right(uint32_t low, uint32_t high, unsigned bits) { return __funnelshift_r(low, high, bits); }

// two 16-bit floats in a word, the first one in the low half
DEVICE void unpack_bf16(uint32_t word, float& first, float& second) {
  first = __uint_as_float(word << 16);
  second = __uint_as_float(word & 0xffff0000u);
}

DEVICE void unpack_fp16(uint32_t word, float& first, float& second) {
  const __half2_raw raw{static_cast<unsigned short>(word), static_cast<unsigned short>(word >> 16)};
  const float2 pair = __half22float2(raw);
  first = pair.x, second = pair.y;
}

DEVICE uint32_t pack_bf16(float first, float second) {
  const __nv_bfloat162_raw raw = __floats2bfloat162_rn(first, second);
  return raw.x | static_cast<uint32_t>(raw.y) << 16;
}

DEVICE uint32_t pack_fp16(float first, float second) {
  const __half2_raw raw = __floats2half2_rn(first, second);
  return raw.x | static_cast<uint32_t>(raw.y) << 16;
}

DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }

// volatile, here and below: a row that is written in place is read again, and loads must stay above its stores
DEVICE Quad load_global_quad(const void* address) {
  Quad q;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(q.word[0]), "=r"(q.word[1]), "=r"(q.word[2]), "=r"(q.word[3])
               : "l"(address)
               : "memory");
  return q;
}

// neighbours read the same 16 bytes too: kept in L1
DEVICE Quad load_global_quad_cached(const void* address) {
  Quad q;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(q.word[0]), "=r"(q.word[1]), "=r"(q.word[2]), "=r"(q.word[3])
               : "l"(address)
               : "memory");
  return q;
}

template <class T>
DEVICE T load_global(const T* address) {
  return *address;
}

// T: 2, 4, 8 or 16 bytes
template <class T>
DEVICE void store_global(void* address, T value) {
  *static_cast<T*>(address) = value;
}

template <class T>
DEVICE T load_shared(const void* address) {
  return *static_cast<const T*>(address);
}

template <class T>
DEVICE void store_shared(void* address, T value) {
  *static_cast<T*>(address) = value;
}

#if FUSED_PO_CLUSTERS

DEVICE uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

DEVICE uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
  return size;
}

// all threads of the cluster; writes before the arrival are seen after the wait
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
// nothing to publish, so no wait for writes under way
DEVICE void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// the float at the same place of another block's shared memory
DEVICE float load_peer(const float* place, int rank) {
  uint32_t address;
  float value;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(place)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

// A barrier in shared memory that one thread arms with a number of bytes, and that opens when bulk copies have brought
// them. Each is used once, so its phase is always 0.
DEVICE void landing_init(uint64_t* landing) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(landing)) : "memory");
}

// after the inits and before the first copy, by the same thread: the copy engine sees the initialised barriers
DEVICE void landing_publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DEVICE void landing_expect(uint64_t* landing, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(landing)), "r"(bytes)
               : "memory");
}

DEVICE void landing_wait(uint64_t* landing) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(landing))
      : "memory");
}

// both addresses and the number of bytes are multiples of 16
DEVICE void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* landing) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(landing))
               : "memory");
}

#endif  // FUSED_PO_CLUSTERS

}  // namespace fused_po::device

#endif  // FUSED_PO_FIBERS
