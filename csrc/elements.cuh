// Element types, and 16-byte accesses to rows that begin at any element.
//
// A row is cut into vectors of 16 bytes counted from its first column, whatever its address, so that a thread holds the
// same columns and a result has the same bits however memory is laid out. Where a row does not begin on 16 bytes, a
// vector is put together from the two aligned quads that it lies in.
#pragma once

#include "device.cuh"
#include "rows.h"

namespace fused_po {

struct Float32 {
  static constexpr int kCode = kFloat32;
  static constexpr int kBytes = 4;
};

struct BFloat16 {
  static constexpr int kCode = kBFloat16;
  static constexpr int kBytes = 2;
};

struct Float16 {
  static constexpr int kCode = kFloat16;
  static constexpr int kBytes = 2;
};

// columns of a vector
template <class E>
constexpr int kColumns = 16 / E::kBytes;

template <class E>
DEVICE void decode(const Quad& quad, float (&values)[kColumns<E>]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (E::kCode == kFloat32) values[i] = device::as_float(quad.word[i]);
    if constexpr (E::kCode == kBFloat16) device::unpack_bf16(quad.word[i], values[2 * i], values[2 * i + 1]);
    if constexpr (E::kCode == kFloat16) device::unpack_fp16(quad.word[i], values[2 * i], values[2 * i + 1]);
  }
}

// bits of one element, in the low half where it has 16
template <class E>
DEVICE uint32_t load_bits(const unsigned char* address) {
  if constexpr (E::kBytes == 4) {
    return device::load_global(reinterpret_cast<const uint32_t*>(address));
  } else {
    return device::load_global(reinterpret_cast<const uint16_t*>(address));
  }
}

template <class E>
DEVICE float load_element(const unsigned char* address) {
  float value, unused = 0.0f;
  const uint32_t bits = load_bits<E>(address);
  if constexpr (E::kCode == kFloat32) value = device::as_float(bits);
  if constexpr (E::kCode == kBFloat16) device::unpack_bf16(bits, value, unused);
  if constexpr (E::kCode == kFloat16) device::unpack_fp16(bits, value, unused);
  return value;
}

DEVICE_AND_HOST unsigned misalignment(const void* address) {
  return static_cast<unsigned>(reinterpret_cast<uintptr_t>(address) & 15);
}

// the 16 bytes that begin `shift` bytes into (low, high); selections instead of an index keep the words in registers
DEVICE Quad extract(const Quad& low, const Quad& high, unsigned shift) {
  uint32_t word[7];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    word[i] = shift & 8 ? (i < 2 ? low.word[(i + 2) & 3] : high.word[(i + 2) & 3]) : low.word[i];
  }
#pragma unroll
  for (int i = 4; i < 6; i++) word[i] = shift & 8 ? high.word[i - 2] : high.word[i - 4];
  word[6] = 0;
  Quad result;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t first = shift & 4 ? word[i + 1] : word[i];
    const uint32_t second = shift & 4 ? word[i + 2] : word[i + 1];
    result.word[i] = device::funnel_right(first, second, 8 * (shift & 3));
  }
  return result;
}

// Columns [column, column + kColumns) of a row of `width` columns in global memory, undefined beyond both ends. No byte
// outside the row is read.
template <class E>
DEVICE Quad load_vector(const unsigned char* row, int width, int column) {
  const unsigned char* address = row + static_cast<int64_t>(column) * E::kBytes;
  const unsigned shift = misalignment(address);
  if (shift == 0 && column >= 0 && column + kColumns<E> <= width) return device::load_global_quad(address);
  const unsigned char* aligned = address - shift;
  if (shift != 0 && aligned >= row && aligned + 32 <= row + static_cast<int64_t>(width) * E::kBytes) {
    return extract(device::load_global_quad_cached(aligned), device::load_global_quad_cached(aligned + 16), shift);
  }
  Quad quad = {{0, 0, 0, 0}};
#pragma unroll
  for (int i = 0; i < kColumns<E>; i++) {
    if (column + i >= 0 && column + i < width) {
      const uint32_t bits = load_bits<E>(address + i * E::kBytes);
      if constexpr (E::kBytes == 4) quad.word[i] = bits;
      if constexpr (E::kBytes == 2) quad.word[i / 2] |= bits << (16 * (i % 2));
    }
  }
  return quad;
}

// U vectors, `step` columns apart from `column` on, each as load_vector gives it; `whole`: all of them lie within the
// row. Every load is under way before the first result is used, where rows do not begin on 16 bytes too.
template <class E, int U>
DEVICE void load_vectors(Quad (&quads)[U], const unsigned char* row, int width, int column, int step, bool whole) {
  const unsigned char* address = row + static_cast<int64_t>(column) * E::kBytes;
  const int64_t stride = static_cast<int64_t>(step) * E::kBytes;
  const unsigned shift = misalignment(address);
  const unsigned char* low = address - shift;
  const unsigned char* end = row + static_cast<int64_t>(width) * E::kBytes;
  if (whole && shift == 0) {
#pragma unroll
    for (int u = 0; u < U; u++) quads[u] = device::load_global_quad(address + u * stride);
  } else if (whole && low >= row && low + (U - 1) * stride + 32 <= end) {
    Quad high[U];
#pragma unroll
    for (int u = 0; u < U; u++) quads[u] = device::load_global_quad_cached(low + u * stride);
#pragma unroll
    for (int u = 0; u < U; u++) high[u] = device::load_global_quad_cached(low + u * stride + 16);
#pragma unroll
    for (int u = 0; u < U; u++) quads[u] = extract(quads[u], high[u], shift);
  } else {
#pragma unroll
    for (int u = 0; u < U; u++) quads[u] = load_vector<E>(row, width, column + u * step);
  }
}

// What is written is cut into vectors so that they are aligned in `out`: the first vector begins at this column, up to
// N - 1 columns before the row. Values do not depend on the cut, since each column's is its own.
template <int N>
DEVICE int first_stored(const unsigned char* out, int code) {
  const unsigned bytes = code == kFloat32 ? 4 : 2;
  const unsigned piece = N * bytes < 16 ? N * bytes : 16;
  return -static_cast<int>(misalignment(out) % piece / bytes);
}

// `address` is aligned to 16 bytes, or to all of the words where they are fewer
template <int N>
DEVICE void store_words(unsigned char* address, const uint32_t (&words)[N]) {
  if constexpr (N >= 4) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      device::store_global(address + 4 * i, Quad{{words[i], words[i + 1], words[i + 2], words[i + 3]}});
    }
  } else {
    device::store_global(address, words[0] | static_cast<uint64_t>(words[1]) << 32);
  }
}

// those of N values that stand for columns in [begin, end), into a row of elements of type `code`
template <int N>
DEVICE void store_vector(unsigned char* row, int code, int column, const float (&values)[N], int begin, int end) {
  const bool whole = column >= begin && column + N <= end;
  if (code == kFloat32) {
    unsigned char* address = row + static_cast<int64_t>(column) * 4;
    uint32_t words[N];
#pragma unroll
    for (int i = 0; i < N; i++) words[i] = device::as_bits(values[i]);
    if (whole) {
      store_words(address, words);
    } else {
#pragma unroll
      for (int i = 0; i < N; i++) {
        if (column + i >= begin && column + i < end) device::store_global(address + 4 * i, words[i]);
      }
    }
    return;
  }
  unsigned char* address = row + static_cast<int64_t>(column) * 2;
  uint32_t words[N / 2];
  if (code == kBFloat16) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) words[i] = device::pack_bf16(values[2 * i], values[2 * i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < N / 2; i++) words[i] = device::pack_fp16(values[2 * i], values[2 * i + 1]);
  }
  if (whole) {
    store_words(address, words);
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) {
      const auto half = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
      if (column + i >= begin && column + i < end) device::store_global(address + 2 * i, half);
    }
  }
}

// one element, into a row of elements of type `code`
DEVICE void store_element(unsigned char* row, int code, int column, float value) {
  if (code == kFloat32) {
    device::store_global(row + static_cast<int64_t>(column) * 4, device::as_bits(value));
  } else {
    const uint32_t word = code == kBFloat16 ? device::pack_bf16(value, 0.0f) : device::pack_fp16(value, 0.0f);
    device::store_global(row + static_cast<int64_t>(column) * 2, static_cast<uint16_t>(word));
  }
}

// Zero in columns [first, last), written by `count` threads together; 0 has the same bits in every type.
DEVICE void store_zeros(unsigned char* row, int code, int first, int last, int thread, int count) {
  if (first >= last) return;
  const int bytes = code == kFloat32 ? 4 : 2;
  unsigned char* begin = row + static_cast<int64_t>(first) * bytes;
  unsigned char* end = row + static_cast<int64_t>(last) * bytes;
  unsigned char* body = begin + (16 - misalignment(begin)) % 16;
  if (body > end) body = end;
  unsigned char* tail = end - misalignment(end);
  if (tail < body) tail = body;
  for (unsigned char* p = begin + 2 * thread; p < body; p += 2 * count) device::store_global<uint16_t>(p, 0);
  for (unsigned char* p = body + 16 * static_cast<int64_t>(thread); p < tail; p += 16 * static_cast<int64_t>(count)) {
    device::store_global(p, Quad{{0, 0, 0, 0}});
  }
  for (unsigned char* p = tail + 2 * thread; p < end; p += 2 * count) device::store_global<uint16_t>(p, 0);
}

}  // namespace fused_po
