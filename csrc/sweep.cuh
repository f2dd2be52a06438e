// The partial statistics of a row: one read, online over vectors in a thread, then merged over warps, block and cluster.
// What each number is: fused_po/kernels/contract.py.
#pragma once

#include <cfloat>

#include "elements.cuh"
#include "transform.cuh"

namespace fused_po {

// warps of a block and bulk copies of a row's share, at most
constexpr int kWarps = 16;
constexpr int kLandings = 8;

// which partials are made beside maximum, sum and target; the others stay 0
enum Wanted : int { kWeighted = 1, kSquare = 2, kTotal = 4, kBefore = 8, kEverything = 15 };

// A sweep's sums are relative to its origin, which follows the maximum from this far: most new maxima of a row are little
// above the one before, and changing the origin costs more than a vector's other arithmetic. Small enough that what is
// subtracted when it follows at last takes no digits from `weighted`.
constexpr float kSlack = 2.0f;

// What a sweep counts in: u with the sign of the scale, so that z = |scale| u.
struct Units {
  float scale;
  float bits;  // log2(e^z) for each u

  DEVICE explicit Units(float scale) : scale(scale) {
    // where the scale is 0, a masked class stays masked
    const float size = fabsf(scale);
    bits = device::product(size < FLT_MIN ? FLT_MIN : size, kLog2e);
  }

  DEVICE bool flipped() const { return scale < 0.0f; }
  DEVICE float sign() const { return flipped() ? -1.0f : 1.0f; }
  DEVICE float slack() const { return device::product(kSlack * kLog2e, device::reciprocal_fast(bits)); }
  DEVICE float logit(float u) const { return u == -kInfinity ? u : device::product(u, fabsf(scale)); }
};

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

// All values are in the units of `units`: e^(z - m) = 2^((u - origin) bits).
template <int kWanted>
struct Sweep {
  Units units;
  float top = -kInfinity;  // the maximum so far over the classes other than the target
  float origin = 0.0f;     // 0 while all classes are masked: -inf - -inf is NaN
  float limit = -kInfinity;
  float sum = 0.0f;
  float sum_low = 0.0f;  // of the merges, what did not fit into `sum`
  float weighted = 0.0f;
  float square = 0.0f;
  float total = 0.0f;
  float before = -kInfinity;

  DEVICE explicit Sweep(const Units& units) : units(units) {}

  // of a difference in full float32: folding the factor into what is subtracted would round logits far from 0
  DEVICE float exp_above(float above) const { return device::exp2_fast(device::product(above, units.bits)); }

  // make the sums relative to `next`, which is finite
  DEVICE void move(float next) {
    const bool empty = limit == -kInfinity;
    const float shift = empty ? 0.0f : origin - next;
    // multiplied, not replaced: a NaN stays
    const float scale = empty ? 0.0f : exp_above(shift);
    if (kWanted & kWeighted) weighted = device::product(scale, fmaf(shift, sum, weighted));
    if (kWanted & kSquare) square = device::product(device::product(scale, scale), square);
    sum = device::product(scale, sum);
    sum_low = device::product(scale, sum_low);
    origin = next;
    limit = next + units.slack();
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

  // One vector u whose first element is `column`; `target` is the target's column, -1 or `width` where it is another
  // shard's. It lies within the row and does not hold the target, and the sign of the units is 1.
  template <int N>
  DEVICE void absorb_plain(const float (&u)[N], int column, int target) {
    const float best = tree_max(u);
    if (kWanted & kTotal) total += tree_sum(u);
    if ((kWanted & kBefore) && column < target) before = fmaxf(before, best);
    add(u, best);
  }

  // one vector of x or tanh(inner x), wherever it lies; `sign` is that of the units
  template <int N>
  DEVICE void absorb(float (&u)[N], int column, int width, int target, float sign) {
    const int left = width - column, own = target - column, first = own < left ? own : left;
#pragma unroll
    for (int i = 0; i < N; i++) {
      u[i] = device::product(u[i], sign);
      if ((kWanted & kTotal) && i < left) total += u[i];
      if ((kWanted & kBefore) && i < first) before = fmaxf(before, u[i]);
      if (i >= left || i == own) u[i] = -kInfinity;
    }
    add(u, tree_max(u));
  }

  template <int N>
  DEVICE void add(const float (&u)[N], float best) {
    top = fmaxf(top, best);
    if (best > limit) move(best);
    float e[N], weights = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < N; i++) {
      const float above = u[i] - origin;
      e[i] = exp_above(above);
      if (kWanted & kWeighted) weights = fmaf(e[i], above, weights);
      if (kWanted & kSquare) squares = fmaf(e[i], e[i], squares);
    }
    sum += tree_sum(e);
    if ((kWanted & kWeighted) && weights != weights) {
      // a masked class: 0 times -inf; or NaN, which stays
      weights = 0.0f;
#pragma unroll
      for (int i = 0; i < N; i++) weights = fmaf(e[i], fmaxf(u[i] - origin, -FLT_MAX), weights);
    }
    if (kWanted & kWeighted) weighted += weights;
    if (kWanted & kSquare) square += squares;
  }
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
DEVICE Sweep<kWanted> load_sweep(const Units& units, const float* place, Load load) {
  Sweep<kWanted> sweep(units);
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
  sweep = Sweep<kWanted>(sweep.units);
  if (lane < device::thread_count() / device::kWarp) {
    sweep = load_sweep<kWanted>(sweep.units, scratch->warps[lane], device::load_shared<float>);
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
    sweep = Sweep<kWanted>(sweep.units);
    if (lane < static_cast<int>(device::cluster_size())) {
      const auto load = [lane](const float* place) { return device::load_peer(place, lane); };
      sweep = load_sweep<kWanted>(sweep.units, scratch->block, load);
    }
    merge_lanes(sweep);
    if (lane == 0) store_sweep(scratch->cluster, sweep);
  }
  device::cluster_arrive_relaxed();
  device::block_barrier();
  sweep = load_sweep<kWanted>(sweep.units, scratch->cluster, device::load_shared<float>);
}

#endif  // FUSED_PO_CLUSTERS

}  // namespace fused_po
