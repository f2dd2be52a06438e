// The row kernels. A block or a cluster of blocks works on one row; a label below 0 leaves its row unread.
#pragma once

#include "sweep.cuh"

namespace fused_po {

// vectors that a streaming thread has in flight
constexpr int kInFlight = 4;
// at the second read, which the cache answers
constexpr int kInFlightAgain = 2;
constexpr int kMaxThreads = kWarps * device::kWarp;
// of a block with a resident row: three such blocks leave 56 registers to a thread, and 512 threads would leave 40
constexpr int kResidentThreads = 384;
constexpr int kGradThreads = 256;
// times that a thread of row_grad has its vectors in flight
constexpr int kGradPasses = 2;

struct RowArgs {
  const unsigned char* x;
  unsigned char* out;
  const int64_t* labels;
  const float* temperatures;
  float* partials;       // (7, rows)
  const float* anchors;  // (4, rows)
  const float* c;        // (rows,) each
  const float* e;
  const float* l;
  int64_t rows;
  int64_t x_stride;  // in bytes
  int64_t out_stride;
  int64_t start;
  float inverse;  // 1 / temperature
  float softcap;
  float logit_scale;
  int width;      // columns that stand for classes
  int out_width;  // columns of out
  int out_code;
  int share_vectors;  // of a row in each block of a cluster
  int chunk_vectors;  // of a bulk copy
  uint32_t tiles;     // blocks of a row
  int x_code;
};

// what a block knows of its row
struct Place {
  int64_t row;
  const unsigned char* x;
  unsigned char* out;
  int target;  // column; -1 or `width` where the target is another shard's
  bool ignored;
  Transform transform;

  DEVICE Place(const RowArgs& args, int64_t row, bool softcap)
      : row(row), x(args.x + row * args.x_stride), out(args.out + row * args.out_stride) {
    const int64_t label = device::load_global(args.labels + row);
    const int64_t column = label - args.start;
    ignored = label < 0;
    target = column < 0 ? -1 : column > args.width ? args.width : static_cast<int>(column);
    const float inverse = args.temperatures ? 1.0f / device::load_global(args.temperatures + row) : args.inverse;
    transform.slope = device::product(args.logit_scale, inverse);
    transform.scale = softcap ? device::product(args.softcap, inverse) : transform.slope;
    transform.inner = softcap ? args.logit_scale / args.softcap : 0.0f;
  }

  DEVICE bool has_target(const RowArgs& args) const { return target >= 0 && target < args.width; }
};

struct Target {
  float logit = -kInfinity;  // where it is another shard's
  float slope = 0.0f;        // dz/dx
};

template <class E, bool kSoftcap>
DEVICE Target load_target(const RowArgs& args, const Place& place) {
  Target target;
  if (place.has_target(args)) {
    const float x = load_element<E>(place.x + static_cast<int64_t>(place.target) * E::kBytes);
    target.logit = to_logit<kSoftcap>(x, place.transform, target.slope);
    target.slope = device::product(target.slope, place.transform.slope);
  }
  return target;
}

// Whether the target is among a thread's columns [begin, end): vectors of N, `step` columns apart from `first` on.
template <int N>
DEVICE bool holds_target(const Place& place, int first, int step, int begin, int end) {
  const int target = place.target;
  return target >= begin && target < end && target >= first && (target - first) % step < N;
}

template <int kWanted>
DEVICE void store_partials(const RowArgs& args, int64_t row, const Sweep<kWanted>& sweep, float target) {
  const Units& units = sweep.units;
  const float sum = sweep.sum + sweep.sum_low, size = fabsf(units.scale);
  const float values[7] = {units.logit(sweep.top), sum, target, device::product(sweep.weighted, size), sweep.square,
                           device::product(sweep.total, size), units.logit(sweep.before)};
#pragma unroll
  for (int i = 0; i < 7; i++) device::store_global(args.partials + i * args.rows + row, values[i]);
}

template <class E, bool kSoftcap, int kWanted>
DEVICE void absorb_vector(Sweep<kWanted>& sweep, const Quad& quad, const RowArgs& args, const Place& place, int column,
                          bool plain) {
  float u[kColumns<E>], bend;
  decode<E>(quad, u);
#pragma unroll
  for (int i = 0; i < kColumns<E>; i++) u[i] = unscaled_logit<kSoftcap>(u[i], place.transform, bend);
  if (plain) {
    sweep.absorb_plain(u, column, place.target);
  } else {
    // a softcap is positive
    sweep.absorb(u, column, args.width, place.target, kSoftcap ? 1.0f : sweep.units.sign());
  }
}

// A block reads a row from global memory once.
template <class E, bool kSoftcap, int kWanted>
DEVICE void stream_row(Sweep<kWanted>& sweep, const RowArgs& args, const Place& place) {
  constexpr int N = kColumns<E>;
  const int first = device::thread_index() * N, step = device::thread_count() * N, pass = kInFlight * step;
  for (int column = first; column < args.width; column += pass) {
    Quad quads[kInFlight];
    const bool whole = column + (kInFlight - 1) * step + N <= args.width;
    load_vectors<E>(quads, place.x, args.width, column, step, whole);
    const unsigned ahead = static_cast<unsigned>(place.target - column);
    const bool elsewhere = ahead >= static_cast<unsigned>(pass) || ahead % static_cast<unsigned>(step) >= N;
    if (whole && elsewhere && (kSoftcap || !sweep.units.flipped())) {
#pragma unroll
      for (int u = 0; u < kInFlight; u++) {
        absorb_vector<E, kSoftcap>(sweep, quads[u], args, place, column + u * step, true);
      }
    } else {
#pragma unroll
      for (int u = 0; u < kInFlight; u++) {
        if (column + u * step >= args.width) break;
        absorb_vector<E, kSoftcap>(sweep, quads[u], args, place, column + u * step, false);
      }
    }
  }
}

// What turns logits into G = (1[v = y] - p) J. All elements are made alike, then the target's is written over.
template <class E, bool kSoftcap>
struct Softmax {
  float base;    // -p_v = factor 2^((u_v - base) bits), here with the sign of the scale in `bits`
  float bits;
  float own;     // the target's element: 1 - p_y, exact at both ends, times its slope
  float factor;  // times the slope, without its bend

  template <int kWanted>
  DEVICE Softmax(const Sweep<kWanted>& sweep, const Target& target, const Transform& transform) {
    const Units& units = sweep.units;
    const float sum = sweep.sum + sweep.sum_low;
    const float margin = (units.logit(sweep.top) - target.logit) + logf(sum);
    base = device::product(sweep.origin, units.sign());
    bits = device::product(units.bits, units.sign());
    own = 1.0f / (1.0f + expf(-margin));
    const float rest = sum == 0.0f ? 0.0f : -(own / sum);
    own = device::product(own, target.slope);
    factor = device::product(rest, transform.slope);
  }

  DEVICE void store(const Quad& quad, const RowArgs& args, const Place& place, int column, int begin, int end) const {
    constexpr int N = kColumns<E>;
    float g[N];
    decode<E>(quad, g);
#pragma unroll
    for (int i = 0; i < N; i++) {
      float bend;
      const float u = unscaled_logit<kSoftcap>(g[i], place.transform, bend);
      g[i] = device::product(factor, device::exp2_fast(device::product(u - base, bits)));
      if constexpr (kSoftcap) g[i] = device::product(g[i], bend);
    }
    store_vector(place.out, args.out_code, column, g, begin, end);
  }

  // after `store`, by the thread that wrote the target's column
  DEVICE void store_own(const RowArgs& args, const Place& place) const {
    store_element(place.out, args.out_code, place.target, own);
  }
};

template <class E, bool kSoftcap, int kWanted>
KERNEL(kMaxThreads, 2)
row_stats_kernel(const KERNEL_PARAMETER RowArgs args) {
  Scratch* scratch = reinterpret_cast<Scratch*>(device::shared_memory());
  const Place place(args, device::block_index(), kSoftcap);
  Sweep<kWanted> sweep{Units(place.transform.scale)};
  Target target;
  if (!place.ignored) {
    stream_row<E, kSoftcap>(sweep, args, place);
    if (device::thread_index() == 0) target = load_target<E, kSoftcap>(args, place);
    merge_block(sweep, scratch);
  }
  if (device::thread_index() == 0) store_partials(args, place.row, sweep, target.logit);
}

// Two reads, the second mostly from the cache, and one write: for GPUs without clusters and rows that no cluster holds.
// A thread writes only the columns that it has read again itself.
template <class E, bool kSoftcap, int kWanted>
KERNEL(kMaxThreads, 2)
row_softmax_kernel(const KERNEL_PARAMETER RowArgs args) {
  constexpr int N = kColumns<E>;
  Scratch* scratch = reinterpret_cast<Scratch*>(device::shared_memory());
  const int thread = device::thread_index(), threads = device::thread_count();
  const Place place(args, device::block_index(), kSoftcap);
  Sweep<kWanted> sweep{Units(place.transform.scale)};
  Target target;
  if (!place.ignored) {
    stream_row<E, kSoftcap>(sweep, args, place);
    target = load_target<E, kSoftcap>(args, place);
    merge_block(sweep, scratch);
    const Softmax<E, kSoftcap> softmax(sweep, target, place.transform);
    const int first = first_stored<N>(place.out, args.out_code) + thread * N, step = threads * N;
    for (int column = first; column < args.width; column += kInFlightAgain * step) {
      Quad quads[kInFlightAgain];
      const bool whole = column >= 0 && column + (kInFlightAgain - 1) * step + N <= args.width;
      load_vectors<E>(quads, place.x, args.width, column, step, whole);
#pragma unroll
      for (int u = 0; u < kInFlightAgain; u++) {
        if (!whole && column + u * step >= args.width) break;
        softmax.store(quads[u], args, place, column + u * step, 0, args.width);
      }
    }
    if (holds_target<N>(place, first, step, 0, args.width)) softmax.store_own(args, place);
  }
  store_zeros(place.out, args.out_code, place.ignored ? 0 : args.width, args.out_width, thread, threads);
  if (thread == 0) store_partials(args, place.row, sweep, target.logit);
}

}  // namespace fused_po
