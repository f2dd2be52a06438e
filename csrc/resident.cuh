// row_softmax with the row in the shared memory of a cluster.
#pragma once

#include "rows.cuh"

namespace fused_po {

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
  const Units units(place.transform.scale);
  if (place.ignored) {
    store_zeros(place.out, args.out_code, 0, args.out_width, rank * threads + thread, size * threads);
    if (rank == 0 && thread == 0) store_partials(args, place.row, Sweep<kWanted>(units), -kInfinity);
    return;
  }
  const Share<E> share(args, place, device::shared_memory() + sizeof(Scratch), rank);
  share.load(args, scratch->landings);
  const Target target = load_target<E, kSoftcap>(args, place);
  device::block_barrier();
  Sweep<kWanted> sweep(units);
  uint64_t* landing = scratch->landings;
  // no vector is plain where each u needs another sign
  const int chunk = args.chunk_vectors * N, plain_end = !kSoftcap && units.flipped() ? 0 : args.width;
  for (int begin = share.first; begin < share.last; begin += chunk) {
    device::landing_wait(landing++);
    const int end = begin + chunk < share.last ? begin + chunk : share.last;
#pragma unroll(kUnrolled)
    for (int column = begin + thread * N; column < end; column += threads * N) {
      const bool plain = column + N <= plain_end && static_cast<unsigned>(place.target - column) >= N;
      absorb_vector<E, kSoftcap>(sweep, share.load_vector(column), args, place, column, plain);
    }
  }
  merge_block(sweep, scratch);
  if (size > 1) merge_cluster(sweep, scratch);
  const Softmax<E, kSoftcap> softmax(sweep, target, place.transform);
  const int start = share.first + first_stored<N>(place.out, args.out_code) + thread * N;
#pragma unroll(kUnrolled)
  for (int column = start; column < share.last; column += threads * N) {
    softmax.store(share.load_vector(column), args, place, column, share.first, share.last);
  }
  if (holds_target<N>(place, start, threads * N, share.first, share.last)) softmax.store_own(args, place);
  store_zeros(place.out, args.out_code, args.width, args.out_width, rank * threads + thread, size * threads);
  if (rank == 0 && thread == 0) store_partials(args, place.row, sweep, target.logit);
  if (size > 1) device::cluster_wait();
}

#endif  // FUSED_PO_CLUSTERS

template <class E, bool kSoftcap, int kWanted>
KERNEL(kResidentThreads, 3)
row_softmax_resident_kernel(const KERNEL_PARAMETER RowArgs args) {
#if FUSED_PO_CLUSTERS
  softmax_resident<E, kSoftcap, kWanted>(args);
#else
  // the host asks which code a GPU runs before it starts this: where it did not, better an error than raw logits
  device::trap();
#endif
}

}  // namespace fused_po
