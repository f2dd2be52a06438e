// The CPU twin of the launches in csrc/launch.h: devices are made up, so that small rows take every path.
#pragma once

#include <dlfcn.h>

#include <type_traits>

#include "executor.h"
#include "plan.h"

namespace fused_po {

// 0 has no clusters; 1 is a Hopper GPU, where every test row fits into one block; 2 has so little shared memory that
// rows of a few hundred columns take a cluster, and those of 9000 columns in float32 do not fit into any; 3 is 1 with a
// build that has no code for it, so that the driver compiles that of an older GPU; 4 is 2 where no cluster of more than
// two blocks finds room
inline Capabilities capabilities(int device) {
  switch (device) {
    case 0:
      return {8, 0, 163 << 10, 164 << 10, 1 << 10};
    case 1:
    case 3:
      return {9, 0, 227 << 10, 228 << 10, 1 << 10};
    case 2:
    case 4:
      return {9, 0, 2736, 2736, 0};
    default:
      throw std::runtime_error("there is no such device");
  }
}

inline int current_device = 0;
// asked of the runtime so far
inline int questions = 0;

struct CurrentDevice {
  explicit CurrentDevice(int device) { current_device = device; }
};

using Kernel = void (*)(RowArgs);

inline int code_of(Kernel) {
  questions++;
  return current_device == 0 ? 80 : current_device == 3 ? 89 : 90;
}

inline bool fits(Kernel, const Geometry& geometry) {
  questions++;
  return geometry.shared <= capabilities(current_device).shared_per_block &&
         geometry.cluster <= (current_device == 4 ? 2 : 16);
}

inline Geometry last_launch{};

// A launch that is noted instead of run, for those who run the kernel in another way: its name is that of the symbol,
// which both compilers make alike.
struct Note {
  bool wanted = false;
  std::string kernel;
  RowArgs args;
};

inline Note note;

inline void launch(Kernel kernel, const Geometry& geometry, const RowArgs& args, void*, const std::string& what) {
  if (note.wanted) {
    Dl_info found{};
    if (!dladdr(reinterpret_cast<void*>(kernel), &found) || !found.dli_sname) throw std::runtime_error("no symbol");
    note.kernel = found.dli_sname;
    note.args = args;
    last_launch = geometry;
    return;
  }
  const auto bytes = [](int code) { return code == kFloat32 ? 4 : 2; };
  auto& ranges = fiber::executor.ranges;
  ranges.clear();
  const auto add = [&](const void* base, int64_t rows, int64_t row_bytes, int64_t stride, bool writable) {
    if (base) ranges.push_back({reinterpret_cast<uintptr_t>(base), rows, row_bytes, stride, writable});
  };
  add(args.x, args.rows, static_cast<int64_t>(args.width) * bytes(args.x_code), args.x_stride, false);
  add(args.out, args.rows, static_cast<int64_t>(args.out_width) * bytes(args.out_code), args.out_stride, true);
  for (const float* numbers : {args.temperatures, args.c, args.e, args.l}) add(numbers, 1, 4 * args.rows, 0, false);
  add(args.labels, 1, 8 * args.rows, 0, false);
  add(args.anchors, 1, 4 * 4 * args.rows, 0, false);
  add(args.partials, 1, 7 * 4 * args.rows, 0, true);
  last_launch = geometry;
  const Capabilities gpu = capabilities(current_device);
  const bool resident = geometry.cluster > 1 || geometry.shared > static_cast<int>(sizeof(Scratch));
  // what hardware does: older code ends in a trap, and what does not fit is not started
  if (resident && (gpu.major < 9 || current_device == 3)) throw std::runtime_error(what + ": the resident kernel is a trap");
  if (geometry.shared > gpu.shared_per_block) throw std::runtime_error(what + ": too much shared memory");
  try {
    fiber::executor.run(geometry.blocks, geometry.threads, geometry.cluster, geometry.shared, [&] { kernel(args); });
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(what + ": " + error.what());
  }
}

}  // namespace fused_po
