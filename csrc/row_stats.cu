#include "launch.h"

namespace fused_po {

void row_stats(const Logits& logits, unsigned outputs, float* partials, int device, void* stream) {
  const Capabilities gpu = capabilities(device);
  const std::string what = describe("row_stats", logits, gpu);
  RowArgs args = common_args(logits, what);
  args.partials = partials;
  if (logits.rows == 0) return;
  const CurrentDevice current(device);
  const Geometry geometry{logits.rows, threads_for(row_vectors(logits), 8, kMaxThreads), 1, sizeof(Scratch)};
  const int wanted = wanted_partials(outputs);
  dispatch(logits, [&](auto element, auto softcap) {
    using E = decltype(element);
    // three instances for sixteen combinations: what is made beyond the wish costs arithmetic, no memory traffic
    if (wanted == 0) {
      launch(row_stats_kernel<E, softcap.value, 0>, geometry, args, stream, what);
    } else if (wanted == kWeighted) {
      launch(row_stats_kernel<E, softcap.value, kWeighted>, geometry, args, stream, what);
    } else {
      launch(row_stats_kernel<E, softcap.value, kEverything>, geometry, args, stream, what);
    }
  });
}

}  // namespace fused_po
