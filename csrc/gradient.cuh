// row_grad: dL/dx from what is known of a row.
#pragma once

#include "rows.cuh"

namespace fused_po {

// What turns logits into dL/dx. All elements are made alike, then the target's is written over.
template <class E, bool kSoftcap, bool kEntropy>
struct Gradient {
  float own;    // log p_y
  float shift;  // log p_v = (z_v - shift) + gap
  float gap;
  float entropy;
  float c, e, l;
  // dL/dx_v = p_v (factor - weight (log p_v + entropy)) times the bend of the slope
  float factor;
  float weight;

  DEVICE Gradient(const RowArgs& args, const Place& place) {
    const int64_t row = place.row;
    own = device::load_global(args.anchors + row);
    shift = device::load_global(args.anchors + args.rows + row);
    gap = device::load_global(args.anchors + 2 * args.rows + row);
    entropy = kEntropy ? device::load_global(args.anchors + 3 * args.rows + row) : 0.0f;
    c = args.c ? device::load_global(args.c + row) : 0.0f;
    e = kEntropy ? device::load_global(args.e + row) : 0.0f;
    l = args.l ? device::load_global(args.l + row) : 0.0f;
    factor = device::product(l - c, place.transform.slope);
    weight = device::product(e, place.transform.slope);
  }

  DEVICE void store(const Quad& quad, const RowArgs& args, const Place& place, int column) const {
    constexpr int N = kColumns<E>;
    const float bits = device::product(gap, kLog2e);
    float g[N];
    decode<E>(quad, g);
#pragma unroll
    for (int i = 0; i < N; i++) {
      float bend;
      const float above = to_logit<kSoftcap>(g[i], place.transform, bend) - shift;
      if constexpr (kEntropy) {
        const float log_p = above + gap;
        // the clamp acts where p is 0, and there p log p is 0
        g[i] = device::product(exp_shift(log_p), fmaf(-weight, fmaxf(log_p, -1e4f) + entropy, factor));
      } else {
        g[i] = device::product(device::exp2_fast(fmaf(above, kLog2e, bits)), factor);
      }
      if constexpr (kSoftcap) g[i] = device::product(g[i], bend);
    }
    store_vector(place.out, args.out_code, column, g, 0, args.width);
  }

  // After `store`, by the thread that wrote the target's column. c (1 - p_y) comes as a whole: c - c p_y would cancel at
  // peaked rows.
  DEVICE void store_own(const RowArgs& args, const Place& place, float slope) const {
    const float others = kEntropy ? fmaf(-e, fmaxf(own, -1e4f) + entropy, l) : l;
    const float value = fmaf(expf(own), others, -device::product(c, expm1f(own)));
    store_element(place.out, args.out_code, place.target, device::product(value, slope));
  }
};

// dL/dx from anchors and coefficients: one read, one write, no reduction.
template <class E, bool kSoftcap, bool kEntropy>
KERNEL(kGradThreads, 3)
row_grad_kernel(const KERNEL_PARAMETER RowArgs args) {
  constexpr int N = kColumns<E>;
  const int thread = device::thread_index(), threads = device::thread_count();
  const int tile = static_cast<int>(device::block_index() % args.tiles), tiles = static_cast<int>(args.tiles);
  const Place place(args, device::block_index() / args.tiles, kSoftcap);
  const int zeros = place.ignored ? 0 : args.width;
  store_zeros(place.out, args.out_code, zeros, args.out_width, tile * threads + thread, tiles * threads);
  if (place.ignored) return;
  const Gradient<E, kSoftcap, kEntropy> gradient(args, place);
  const int step = threads * N, pass = kInFlight * step, whole_tile = kGradPasses * pass;
  const int first = first_stored<N>(place.out, args.out_code) + tile * whole_tile + thread * N;
  const int end = first + whole_tile < args.width ? first + whole_tile : args.width;
  // read by the thread that writes there, and before it does: the rows may be written in place
  const bool owner = holds_target<N>(place, first, step, 0, end);
  const float slope = owner ? load_target<E, kSoftcap>(args, place).slope : 0.0f;
#pragma unroll 1
  for (int column = first; column < end; column += pass) {
    Quad quads[kInFlight];
    const bool whole = column >= 0 && column + (kInFlight - 1) * step + N <= args.width;
    load_vectors<E>(quads, place.x, args.width, column, step, whole);
#pragma unroll
    for (int u = 0; u < kInFlight; u++) {
      if (!whole && column + u * step >= args.width) break;
      gradient.store(quads[u], args, place, column + u * step);
    }
  }
  if (owner) gradient.store_own(args, place, slope);
}

}  // namespace fused_po
