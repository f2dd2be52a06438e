// The row kernels. A block or a cluster of blocks works on one row; a label below 0 leaves its row unread.
#pragma once

#include "sweep.cuh"

namespace fused_po {

// vectors that a streaming thread has in flight
constexpr int kInFlight = 4;
constexpr int kMaxThreads = kWarps * device::kWarp;
// of a block with a resident row: three such blocks leave 56 registers to a thread, and 512 threads would leave 40
constexpr int kResidentThreads = 384;
constexpr int kGradThreads = 256;

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

// the target's logit, -inf where it is another shard's
template <class E, bool kSoftcap>
DEVICE float target_logit(const RowArgs& args, const Place& place) {
  if (!place.has_target(args)) return -kInfinity;
  float slope;
  return to_logit<kSoftcap>(load_element<E>(place.x + static_cast<int64_t>(place.target) * E::kBytes), place.transform,
                            slope);
}

template <int kWanted>
DEVICE void store_partials(const RowArgs& args, int64_t row, const Sweep<kWanted>& sweep, float target) {
  const float sum = sweep.sum + sweep.sum_low;
  const float values[7] = {sweep.top, sum, target, sweep.weighted, sweep.square, sweep.total, sweep.before};
#pragma unroll
  for (int i = 0; i < 7; i++) device::store_global(args.partials + i * args.rows + row, values[i]);
}

template <class E, bool kSoftcap, int kWanted>
DEVICE void absorb_vector(Sweep<kWanted>& sweep, const Quad& quad, const RowArgs& args, const Place& place, int column) {
  float z[kColumns<E>], slope;
  decode<E>(quad, z);
#pragma unroll
  for (int i = 0; i < kColumns<E>; i++) z[i] = to_logit<kSoftcap>(z[i], place.transform, slope);
  sweep.absorb(z, column, args.width, place.target);
}

// A block reads a row from global memory once.
template <class E, bool kSoftcap, int kWanted>
DEVICE void stream_row(Sweep<kWanted>& sweep, const RowArgs& args, const Place& place) {
  constexpr int N = kColumns<E>;
  const int threads = device::thread_count();
  const bool aligned = misalignment(place.x) == 0;
  for (int first = 0; first < args.width; first += kInFlight * threads * N) {
    const int column = first + device::thread_index() * N;
    Quad quads[kInFlight];
    if (aligned && first + kInFlight * threads * N <= args.width) {
#pragma unroll
      for (int u = 0; u < kInFlight; u++) {
        quads[u] = device::load_global_quad(place.x + static_cast<int64_t>(column + u * threads * N) * E::kBytes);
      }
    } else {
#pragma unroll
      for (int u = 0; u < kInFlight; u++) quads[u] = load_vector<E>(place.x, args.width, column + u * threads * N);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; u++) {
      if (column + u * threads * N < args.width) {
        absorb_vector<E, kSoftcap>(sweep, quads[u], args, place, column + u * threads * N);
      }
    }
  }
}

// what turns logits into G = (1[v = y] - p) J
struct Softmax {
  float base;
  float own;   // 1 - p_y, exact at both ends
  float rest;  // -p_v e^{base - z_v}

  template <int kWanted>
  DEVICE Softmax(const Sweep<kWanted>& sweep, float target) {
    const float sum = sweep.sum + sweep.sum_low;
    const float margin = (sweep.top - target) + logf(sum);
    base = sweep.base();
    own = 1.0f / (1.0f + expf(-margin));
    rest = sum == 0.0f ? 0.0f : -(own / sum);
  }

  template <class E, bool kSoftcap>
  DEVICE void store(const Quad& quad, const RowArgs& args, const Place& place, int column, int begin, int end) const {
    constexpr int N = kColumns<E>;
    float g[N];
    decode<E>(quad, g);
    const bool holds_target = static_cast<unsigned>(place.target - column) < N;
#pragma unroll
    for (int i = 0; i < N; i++) {
      float slope;
      const float z = to_logit<kSoftcap>(g[i], place.transform, slope);
      const float other = device::product(rest, exp_shift(z - base));
      g[i] = device::product(holds_target && column + i == place.target ? own : other, slope);
    }
    store_vector(place.out, args.out_code, column, g, begin, end);
  }
};

template <class E, bool kSoftcap, int kWanted>
KERNEL(kMaxThreads, 2)
row_stats_kernel(const KERNEL_PARAMETER RowArgs args) {
  Scratch* scratch = reinterpret_cast<Scratch*>(device::shared_memory());
  const Place place(args, device::block_index(), kSoftcap);
  Sweep<kWanted> sweep;
  float target = -kInfinity;
  if (!place.ignored) {
    target = target_logit<E, kSoftcap>(args, place);
    stream_row<E, kSoftcap>(sweep, args, place);
    merge_block(sweep, scratch);
  }
  if (device::thread_index() == 0) store_partials(args, place.row, sweep, target);
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
  Sweep<kWanted> sweep;
  float target = -kInfinity;
  if (!place.ignored) {
    target = target_logit<E, kSoftcap>(args, place);
    stream_row<E, kSoftcap>(sweep, args, place);
    merge_block(sweep, scratch);
    const Softmax softmax(sweep, target);
    const int start = first_stored<N>(place.out, args.out_code);
    for (int first = start + thread * N; first < args.width; first += 2 * threads * N) {
      // two loads in flight; the second is a vector beyond the row at its end, which reads nothing
      const int second = first + threads * N;
      const Quad early = load_vector<E>(place.x, args.width, first), late = load_vector<E>(place.x, args.width, second);
      softmax.store<E, kSoftcap>(early, args, place, first, 0, args.width);
      if (second < args.width) softmax.store<E, kSoftcap>(late, args, place, second, 0, args.width);
    }
  }
  store_zeros(place.out, args.out_code, place.ignored ? 0 : args.width, args.out_width, thread, threads);
  if (thread == 0) store_partials(args, place.row, sweep, target);
}

#if FUSED_PO_CLUSTERS

// The part of a row that a block of a cluster keeps in shared memory, at the distance from a 16-byte boundary that it
// has in global memory. Whole quads come by bulk copies, in chunks that are waited for one after the other; a quad that
// reaches over an end of the row has its elements copied one by one.
template <class E>
struct Share {
  const unsigned char* row;
  unsigned char* memory;
  unsigned shift;
  int first;  // columns [first, last)
  int last;

  DEVICE Share(const RowArgs& args, const Place& place, unsigned char* memory, int rank)
      : row(place.x), memory(memory), shift(misalignment(place.x)) {
    constexpr int N = kColumns<E>;
    const int64_t begin = static_cast<int64_t>(rank) * args.share_vectors * N;
    first = static_cast<int>(begin < args.width ? begin : args.width);
    last = static_cast<int>(begin + args.share_vectors * N < args.width ? begin + args.share_vectors * N : args.width);
  }

  // Thread 0 starts the copies, the first threads carry the odd elements; a block barrier must follow.
  DEVICE void load(const RowArgs& args, uint64_t* landings) const {
    const unsigned char* begin = row + static_cast<int64_t>(first) * E::kBytes;
    const unsigned char* end = row + static_cast<int64_t>(last) * E::kBytes;
    const unsigned char* row_end = row + static_cast<int64_t>(args.width) * E::kBytes;
    const unsigned char* origin = begin - shift;
    const unsigned char* body = origin >= row ? origin : origin + 16;
    const unsigned char* tail = end - misalignment(end);
    if (tail != end && tail + 16 <= row_end) tail += 16;
    if (tail < body) tail = body;
    const int thread = device::thread_index();
    if (thread == 0) {
      for (int k = 0; k < kLandings; k++) device::landing_init(landings + k);
      device::landing_publish();
      const unsigned char* from = body;
      for (int column = first; column < last; column += args.chunk_vectors * kColumns<E>) {
        // up to a boundary at or after the chunk's last byte
        const unsigned char* to = origin + (column - first) * E::kBytes + 16 * args.chunk_vectors + (shift ? 16 : 0);
        if (to > tail) to = tail;
        const uint32_t bytes = to > from ? static_cast<uint32_t>(to - from) : 0;
        device::landing_expect(landings, bytes);
        if (bytes) device::bulk_load(memory + (from - origin), from, bytes, landings);
        if (to > from) from = to;
        landings++;
      }
    }
    copy_element(begin, body < end ? body : end, origin, thread);
    copy_element(tail, end, origin, thread);
  }

  // columns of a vector that begins in the share or less than a quad before it, undefined outside the share
  DEVICE Quad load_vector(int column) const {
    const int offset = static_cast<int>(shift) + (column - first) * E::kBytes, odd = offset & 15;
    const unsigned char* place = memory + (offset - odd);
    const Quad low = device::load_shared<Quad>(place);
    return odd == 0 ? low : extract(low, device::load_shared<Quad>(place + 16), static_cast<unsigned>(odd));
  }

 private:
  DEVICE void copy_element(const unsigned char* begin, const unsigned char* end, const unsigned char* origin,
                           int thread) const {
    const unsigned char* from = begin + thread * E::kBytes;
    if (from >= end) return;
    const uint32_t bits = load_bits<E>(from);
    if constexpr (E::kBytes == 4) device::store_shared(memory + (from - origin), bits);
    if constexpr (E::kBytes == 2) device::store_shared(memory + (from - origin), static_cast<uint16_t>(bits));
  }
};

// One read and one write: the row stays in the shared memory of a cluster between the sweep and the gradient.
template <class E, bool kSoftcap, int kWanted>
DEVICE void softmax_resident(const RowArgs& args) {
  constexpr int N = kColumns<E>;
  // a softcap needs the registers for itself
  [[maybe_unused]] constexpr int kUnrolled = kSoftcap ? 1 : 2;
  Scratch* scratch = reinterpret_cast<Scratch*>(device::shared_memory());
  const int thread = device::thread_index(), threads = device::thread_count();
  const int rank = device::cluster_rank(), size = static_cast<int>(device::cluster_size());
  const Place place(args, device::block_index() / device::cluster_size(), kSoftcap);
  if (place.ignored) {
    store_zeros(place.out, args.out_code, 0, args.out_width, rank * threads + thread, size * threads);
    if (rank == 0 && thread == 0) store_partials(args, place.row, Sweep<kWanted>(), -kInfinity);
    return;
  }
  const Share<E> share(args, place, device::shared_memory() + sizeof(Scratch), rank);
  share.load(args, scratch->landings);
  const float target = target_logit<E, kSoftcap>(args, place);
  device::block_barrier();
  Sweep<kWanted> sweep;
  uint64_t* landing = scratch->landings;
  const int chunk = args.chunk_vectors * N;
  for (int begin = share.first; begin < share.last; begin += chunk) {
    device::landing_wait(landing++);
    const int end = begin + chunk < share.last ? begin + chunk : share.last;
#pragma unroll(kUnrolled)
    for (int column = begin + thread * N; column < end; column += threads * N) {
      absorb_vector<E, kSoftcap>(sweep, share.load_vector(column), args, place, column);
    }
  }
  merge_block(sweep, scratch);
  if (size > 1) merge_cluster(sweep, scratch);
  const Softmax softmax(sweep, target);
  const int start = first_stored<N>(place.out, args.out_code);
#pragma unroll(kUnrolled)
  for (int column = share.first + start + thread * N; column < share.last; column += threads * N) {
    softmax.store<E, kSoftcap>(share.load_vector(column), args, place, column, share.first, share.last);
  }
  store_zeros(place.out, args.out_code, args.width, args.out_width, rank * threads + thread, size * threads);
  if (rank == 0 && thread == 0) store_partials(args, place.row, sweep, target);
  if (size > 1) device::cluster_wait();
}

#endif  // FUSED_PO_CLUSTERS

template <class E, bool kSoftcap, int kWanted>
KERNEL(kResidentThreads, 3)
row_softmax_resident_kernel(const KERNEL_PARAMETER RowArgs args) {
  // the host never starts it on an older GPU
#if FUSED_PO_CLUSTERS
  softmax_resident<E, kSoftcap, kWanted>(args);
#endif
}

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
  const int64_t row = place.row;
  const float own = device::load_global(args.anchors + row);
  const float shift = device::load_global(args.anchors + args.rows + row);
  const float gap = device::load_global(args.anchors + 2 * args.rows + row);
  const float entropy = kEntropy ? device::load_global(args.anchors + 3 * args.rows + row) : 0.0f;
  const float c = args.c ? device::load_global(args.c + row) : 0.0f;
  const float e = kEntropy ? device::load_global(args.e + row) : 0.0f;
  const float l = args.l ? device::load_global(args.l + row) : 0.0f;
  const float factor = l - c;
  const int first = first_stored<N>(place.out, args.out_code) + (tile * kInFlight * threads + thread) * N;
  Quad quads[kInFlight];
#pragma unroll
  for (int u = 0; u < kInFlight; u++) quads[u] = load_vector<E>(place.x, args.width, first + u * threads * N);
#pragma unroll
  for (int u = 0; u < kInFlight; u++) {
    const int column = first + u * threads * N;
    if (column >= args.width) break;
    float g[N];
    decode<E>(quads[u], g);
    const bool holds_target = static_cast<unsigned>(place.target - column) < N;
#pragma unroll
    for (int i = 0; i < N; i++) {
      float slope;
      const bool is_target = holds_target && column + i == place.target;
      const float z = to_logit<kSoftcap>(g[i], place.transform, slope);
      const float log_p = is_target ? own : (z - shift) + gap;
      const float p = exp_shift(log_p);
      // the clamp acts where p is 0, and there p log p is 0
      const float others = kEntropy ? fmaf(-e, fmaxf(log_p, -1e4f) + entropy, factor) : factor;
      g[i] = device::product(p, others);
      // c (1 - p_y) as a whole: c - c p_y would cancel at peaked rows
      if (is_target && args.c) g[i] = fmaf(expf(own), others + c, -device::product(c, expm1f(own)));
      g[i] = device::product(g[i], slope);
    }
    store_vector(place.out, args.out_code, column, g, 0, args.width);
  }
}

}  // namespace fused_po
