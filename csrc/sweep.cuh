// The partial statistics of a row: one read, online over vectors in a thread, then merged over warps, block and cluster.
// What each number is: fused_po/kernels/contract.py.
#pragma once

#include <cmath>

#include "elements.cuh"

namespace fused_po {

constexpr float kInfinity = INFINITY;
constexpr float kLog2e = 1.4426950408889634f;

// warps of a block and bulk copies of a row's share, at most
constexpr int kWarps = 16;
constexpr int kLandings = 8;

// which partials are made beside maximum, sum and target; the others stay 0
enum Wanted : int { kWeighted = 1, kSquare = 2, kTotal = 4, kBefore = 8, kEverything = 15 };

// e^shift. The shift comes from a subtraction in full float32: folding log2(e) into the logits first
// would round logits far from 0.
DEVICE float exp_shift(float shift) { return device::exp2_fast(device::product(shift, kLog2e)); }

// from raw head output to logits: z = scale x, or scale tanh(inner x)
struct Transform {
  float scale;
  float inner;
  float slope;  // dz/dx, at 0 where there is a softcap
};

// `bend`: dz/dx over `slope`, 1 without a softcap
template <bool kSoftcap>
DEVICE float to_logit(float x, const Transform& transform, float& bend) {
  if constexpr (kSoftcap) {
    const float a = device::product(x, transform.inner);
    // up to 0.9 a fit of tanh(a) / a in a^2, relative error 1e-9: beyond, what 1 - tanh|a| is off by weighs little
    constexpr float kFit[] = {-0.000455454574f, 0.00258265249f, -0.00826452672f, 0.0216635335f,
                              -0.0539292991f,   0.133329779f,   -0.333333224f};
    const float a2 = device::product(a, a), size = fabsf(a);
    float fit = kFit[0];
#pragma unroll
    for (int k = 1; k < 7; k++) fit = fmaf(fit, a2, kFit[k]);
    const float small = fmaf(device::product(fit, a2), a, a);
    // 2 e^(-2|a|), then 1 - tanh|a|, of which 1 - tanh^2 is made without a difference
    const float twice = device::exp2_fast(fmaf(size, -2.0f * kLog2e, 1.0f));
    const float rest = device::product(twice, device::reciprocal_fast(fmaf(0.5f, twice, 1.0f)));
    const float large = 1.0f - rest;
    const bool is_small = size < 0.9f;
    const float tanh = is_small ? small : device::with_sign(large, a);
    bend = is_small ? fmaf(-tanh, tanh, 1.0f) : fmaf(rest, large, rest);
    return device::product(tanh, transform.scale);
  } else {
    bend = 1.0f;
    return device::product(x, transform.scale);
  }
}

template <int N>
DEVICE float tree_sum(const float (&values)[N]) {
  float sums[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; i++) sums[i] = values[2 * i] + values[2 * i + 1];
  if constexpr (N == 2) {
    return sums[0];
  } else {
    return tree_sum(sums);
  }
}

template <int N>
DEVICE float tree_max(const float (&values)[N]) {
  float best = values[0];
#pragma unroll
  for (int i = 1; i < N; i++) best = fmaxf(best, values[i]);
  return best;
}

// A sweep's sums are relative to its origin, which follows the maximum from this far: most new maxima of a row are little
// above the one before, and changing the origin costs more than a vector's other arithmetic. Small enough that what is
// subtracted when it follows at last takes no digits from `weighted`.
constexpr float kSlack = 2.0f;

template <int kWanted>
struct Sweep {
  float top = -kInfinity;  // the maximum so far over the classes other than the target
  float origin = 0.0f;     // 0 while all classes are masked: -inf - -inf is NaN
  float limit = -kInfinity;
  float sum = 0.0f;
  float sum_low = 0.0f;  // of the merges, what did not fit into `sum`
  float weighted = 0.0f;
  float square = 0.0f;
  float total = 0.0f;
  float before = -kInfinity;

  // make the sums relative to `next`, which is finite
  DEVICE void move(float next) {
    const bool empty = limit == -kInfinity;
    const float shift = empty ? 0.0f : origin - next;
    // multiplied, not replaced: a NaN stays
    const float scale = empty ? 0.0f : exp_shift(shift);
    if (kWanted & kWeighted) weighted = device::product(scale, fmaf(shift, sum, weighted));
    if (kWanted & kSquare) square = device::product(device::product(scale, scale), square);
    sum = device::product(scale, sum);
    sum_low = device::product(scale, sum_low);
    origin = next;
    limit = next + kSlack;
  }

  // make the sums relative to a maximum that is no smaller
  DEVICE void raise(float best) {
    top = best;
    if (best == -kInfinity) {
      // nothing was summed, but a NaN stays
      move(0.0f);
      limit = -kInfinity;
    } else {
      move(best);
    }
  }

  // One vector whose first element is `column`; `target` is the target's column, -1 or `width` where it is another
  // shard's. `plain`: it lies within the row and does not hold the target.
  template <int N>
  DEVICE void absorb(float (&z)[N], int column, int width, int target, bool plain) {
    if (!plain) {
#pragma unroll
      for (int i = 0; i < N; i++) {
        if ((kWanted & kTotal) && column + i < width) total += z[i];
        if ((kWanted & kBefore) && column + i < min_of(target, width)) before = fmaxf(before, z[i]);
        if (column + i >= width || column + i == target) z[i] = -kInfinity;
      }
    }
    const float best = tree_max(z);
    if ((kWanted & kTotal) && plain) total += tree_sum(z);
    if ((kWanted & kBefore) && plain && column < target) before = fmaxf(before, best);
    top = fmaxf(top, best);
    if (best > limit) move(best);
    float e[N], weights = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < N; i++) {
      const float shift = z[i] - origin;
      e[i] = exp_shift(shift);
      if (kWanted & kWeighted) weights = fmaf(e[i], shift, weights);
      if (kWanted & kSquare) squares = fmaf(e[i], e[i], squares);
    }
    sum += tree_sum(e);
    if ((kWanted & kWeighted) && weights != weights) {
      // a masked class: 0 times -inf; or NaN, which stays
      weights = 0.0f;
#pragma unroll
      for (int i = 0; i < N; i++) weights = fmaf(e[i], fmaxf(z[i] - origin, -1e4f), weights);
    }
    if (kWanted & kWeighted) weighted += weights;
    if (kWanted & kSquare) square += squares;
  }

  static DEVICE int min_of(int a, int b) { return a < b ? a : b; }
};

// shared memory of a block, the row's share follows
struct alignas(128) Scratch {
  uint64_t landings[kLandings];
  float warps[kWarps][8];
  float block[8];
  float cluster[8];
};

DEVICE float warp_max(float value) {
#pragma unroll
  for (int mask = device::kWarp / 2; mask > 0; mask /= 2) value = fmaxf(value, device::shuffle_xor(value, mask));
  return value;
}

DEVICE float warp_sum(float value) {
#pragma unroll
  for (int mask = device::kWarp / 2; mask > 0; mask /= 2) value += device::shuffle_xor(value, mask);
  return value;
}

// With (high, low) a sum in two floats: the sum of peaked rows is little more than 1, and each of a dozen roundings on
// the way to it would show in the log-prob.
DEVICE void warp_sum(float& high, float& low) {
#pragma unroll
  for (int mask = device::kWarp / 2; mask > 0; mask /= 2) {
    const float other = device::shuffle_xor(high, mask), other_low = device::shuffle_xor(low, mask);
    const float sum = high + other, part = sum - high;
    // what the addition rounded off, exactly
    const float lost = (high - (sum - part)) + (other - part);
    low = (low + other_low) + lost;
    high = sum;
  }
}

// Every thread of a warp: its lanes' sweeps as one.
template <int kWanted>
DEVICE void merge_lanes(Sweep<kWanted>& sweep) {
  sweep.raise(warp_max(sweep.top));
  warp_sum(sweep.sum, sweep.sum_low);
  if (kWanted & kWeighted) sweep.weighted = warp_sum(sweep.weighted);
  if (kWanted & kSquare) sweep.square = warp_sum(sweep.square);
  if (kWanted & kTotal) sweep.total = warp_sum(sweep.total);
  if (kWanted & kBefore) sweep.before = warp_max(sweep.before);
}

template <int kWanted>
DEVICE void store_sweep(float* place, const Sweep<kWanted>& sweep) {
  device::store_shared(place, sweep.top);
  device::store_shared(place + 1, sweep.sum);
  if (kWanted & kWeighted) device::store_shared(place + 2, sweep.weighted);
  if (kWanted & kSquare) device::store_shared(place + 3, sweep.square);
  if (kWanted & kTotal) device::store_shared(place + 4, sweep.total);
  if (kWanted & kBefore) device::store_shared(place + 5, sweep.before);
  device::store_shared(place + 6, sweep.sum_low);
}

// `load` turns a place of `store_sweep` into its value
template <int kWanted, class Load>
DEVICE Sweep<kWanted> load_sweep(const float* place, Load load) {
  Sweep<kWanted> sweep;
  sweep.top = sweep.limit = load(place);
  sweep.origin = sweep.top == -kInfinity ? 0.0f : sweep.top;
  sweep.sum = load(place + 1);
  if (kWanted & kWeighted) sweep.weighted = load(place + 2);
  if (kWanted & kSquare) sweep.square = load(place + 3);
  if (kWanted & kTotal) sweep.total = load(place + 4);
  if (kWanted & kBefore) sweep.before = load(place + 5);
  sweep.sum_low = load(place + 6);
  return sweep;
}

// Every thread of a block: the threads' sweeps as one, in every thread. Each warp merges the warps' sweeps for itself,
// in the same order.
template <int kWanted>
DEVICE void merge_block(Sweep<kWanted>& sweep, Scratch* scratch) {
  const int lane = device::thread_index() % device::kWarp, warp = device::thread_index() / device::kWarp;
  merge_lanes(sweep);
  if (lane == 0) store_sweep(scratch->warps[warp], sweep);
  device::block_barrier();
  sweep = Sweep<kWanted>();
  if (lane < device::thread_count() / device::kWarp) {
    sweep = load_sweep<kWanted>(scratch->warps[lane], [](const float* p) { return device::load_shared<float>(p); });
  }
  merge_lanes(sweep);
}

#if FUSED_PO_CLUSTERS

// Every thread of a cluster: the blocks' sweeps as one, in every thread. Arrives at the cluster barrier a second time
// without waiting: before its end a block must wait, since others may still be reading its shared memory.
template <int kWanted>
DEVICE void merge_cluster(Sweep<kWanted>& sweep, Scratch* scratch) {
  const int lane = device::thread_index() % device::kWarp, warp = device::thread_index() / device::kWarp;
  if (device::thread_index() == 0) store_sweep(scratch->block, sweep);
  device::cluster_arrive();
  device::cluster_wait();
  if (warp == 0) {
    sweep = Sweep<kWanted>();
    if (lane < static_cast<int>(device::cluster_size())) {
      sweep = load_sweep<kWanted>(scratch->block, [lane](const float* p) { return device::load_peer(p, lane); });
    }
    merge_lanes(sweep);
    if (lane == 0) store_sweep(scratch->cluster, sweep);
  }
  device::cluster_arrive_relaxed();
  device::block_barrier();
  sweep = load_sweep<kWanted>(scratch->cluster, [](const float* p) { return device::load_shared<float>(p); });
}

#endif  // FUSED_PO_CLUSTERS

}  // namespace fused_po
