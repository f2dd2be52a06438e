#include <algorithm>

#include "gradient.cuh"
#include "launch.h"

namespace fused_po {

void row_grad(const Logits& logits, const Output& out, const float* anchors, const Coefficients& given, int device,
              void* stream) {
  const Capabilities gpu = capabilities(device);
  const std::string what = describe("row_grad", logits, gpu);
  RowArgs args = common_args(logits, what);
  add_output(args, logits, out, what);
  args.anchors = anchors;
  args.c = given.c;
  args.e = given.e;
  args.l = given.l;
  if (logits.rows == 0) return;
  const CurrentDevice current(device);
  const int threads = threads_for(row_vectors(logits), kInFlight, kGradThreads);
  // where rows of the output do not begin on 16 bytes, a vector may begin before the row
  const bool odd = misalignment(args.out) != 0 || args.out_stride % 16 != 0;
  const int64_t tiles = std::max<int64_t>(1, ceil_div(row_vectors(logits) + odd, threads * kInFlight * kGradPasses));
  args.tiles = static_cast<uint32_t>(tiles);
  const Geometry geometry{logits.rows * tiles, threads, 1, 0};
  dispatch(logits, [&](auto element, auto softcap) {
    using E = decltype(element);
    if (args.e) {
      launch(row_grad_kernel<E, softcap.value, true>, geometry, args, stream, what);
    } else {
      launch(row_grad_kernel<E, softcap.value, false>, geometry, args, stream, what);
    }
  });
}

}  // namespace fused_po
