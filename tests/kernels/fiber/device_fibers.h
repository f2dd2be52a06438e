// The CPU twin of csrc/device.cuh.
#pragma once

#include <math.h>

#include "executor.h"

#define DEVICE inline
#define DEVICE_AND_HOST inline
#define KERNEL(threads, blocks) void
#define KERNEL_PARAMETER
#define FUSED_PO_CLUSTERS 1

namespace fused_po::device {

using fiber::executor;

constexpr int kWarp = 32;

template <class To, class From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

inline float as_float(uint32_t bits) { return bits_as<float>(bits); }
inline uint32_t as_bits(float value) { return bits_as<uint32_t>(value); }

inline int thread_index() { return executor.thread(); }
inline int thread_count() { return executor.threads(); }
inline uint32_t block_index() { return static_cast<uint32_t>(executor.block()); }
inline int cluster_rank() { return executor.rank(); }
inline uint32_t cluster_size() { return static_cast<uint32_t>(executor.cluster()); }
inline unsigned char* shared_memory() { return executor.shared(); }

inline void trap() { executor.require(false, "a trap"); }

inline void block_barrier() { executor.block_barrier(); }
inline void cluster_arrive() { executor.cluster_arrive(true); }
inline void cluster_arrive_relaxed() { executor.cluster_arrive(false); }
inline void cluster_wait() { executor.cluster_wait(); }

inline float shuffle_xor(float value, int mask) {
  return as_float(executor.exchange(as_bits(value), (executor.thread() % kWarp) ^ mask));
}

inline uint32_t shuffle_up(uint32_t value, int by) {
  const int lane = executor.thread() % kWarp;
  return executor.exchange(value, lane < by ? lane : lane - by);
}

inline float exp2_fast(float x) {
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}

inline float reciprocal_fast(float x) { return 1.0f / x; }
inline float with_sign(float size, float sign) { return copysignf(size, sign); }
inline float product(float a, float b) { return a * b; }

inline uint32_t funnel_right(uint32_t low, uint32_t high, unsigned bits) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (bits & 31));
}

inline void unpack_bf16(uint32_t word, float& first, float& second) {
  first = as_float(word << 16);
  second = as_float(word & 0xffff0000u);
}

inline void unpack_fp16(uint32_t word, float& first, float& second) {
  first = static_cast<float>(bits_as<_Float16>(static_cast<uint16_t>(word)));
  second = static_cast<float>(bits_as<_Float16>(static_cast<uint16_t>(word >> 16)));
}

// to the nearest, ties to even
inline uint32_t round_bf16(float value) {
  const uint32_t bits = as_bits(value);
  return value != value ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}

inline uint32_t pack_bf16(float first, float second) { return round_bf16(first) | round_bf16(second) << 16; }

inline uint32_t pack_fp16(float first, float second) {
  return bits_as<uint16_t>(static_cast<_Float16>(first)) |
         static_cast<uint32_t>(bits_as<uint16_t>(static_cast<_Float16>(second))) << 16;
}

template <class T>
T load_global(const T* address) {
  executor.check_global(address, sizeof(T), false);
  return *address;
}

inline Quad load_global_quad(const void* address) { return load_global(static_cast<const Quad*>(address)); }
inline Quad load_global_quad_cached(const void* address) { return load_global_quad(address); }

template <class T>
void store_global(void* address, T value) {
  executor.check_global(address, sizeof(T), true);
  std::memcpy(address, &value, sizeof value);
}

template <class T>
T load_shared(const void* address) {
  executor.check_shared(address, sizeof(T));
  T value;
  std::memcpy(&value, address, sizeof value);
  return value;
}

template <class T>
void store_shared(void* address, T value) {
  executor.check_shared(address, sizeof(T));
  executor.wrote_shared(address);
  std::memcpy(address, &value, sizeof value);
}

inline float load_peer(const float* place, int rank) {
  float value;
  std::memcpy(&value, executor.peer(place, rank), sizeof value);
  return value;
}

inline void landing_init(uint64_t* landing) { executor.landing_init(landing); }
inline void landing_publish() { executor.publish(); }
inline void landing_expect(uint64_t* landing, uint32_t bytes) { executor.landing_expect(landing, bytes); }
inline void landing_wait(uint64_t* landing) { executor.landing_wait(landing); }

inline void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* landing) {
  executor.bulk_load(static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes, landing);
}

}  // namespace fused_po::device
