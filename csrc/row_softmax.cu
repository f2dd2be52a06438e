#include <utility>

#include "launch.h"
#include "resident.cuh"

namespace fused_po {

namespace {

template <class E, bool kSoftcap, int kWanted>
void launch_softmax(const Logits& logits, RowArgs args, const Capabilities& gpu, int device, void* stream,
                    const std::string& what) {
  const auto geometry = [&](const Residence& plan) {
    return Geometry{logits.rows * plan.cluster, plan.threads, plan.cluster, plan.shared};
  };
  const Kernel resident = row_softmax_resident_kernel<E, kSoftcap, kWanted>;
  static Remembered<std::pair<int, int64_t>, Residence> plans;
  const int64_t vectors = row_vectors(logits);
  const Residence plan = plans.get({device, vectors}, [&] {
    const auto fitting = [&](const Residence& found) { return fits(resident, geometry(found)); };
    return plan_residence(vectors, gpu, code_of(resident), sizeof(Scratch), kResidentThreads, kLandings, fitting);
  });
  if (plan.cluster) {
    args.share_vectors = plan.share_vectors;
    args.chunk_vectors = plan.chunk_vectors;
    launch(resident, geometry(plan), args, stream, what);
  } else {
    const Geometry streamed{logits.rows, threads_for(vectors, 8, kMaxThreads), 1, sizeof(Scratch)};
    launch(row_softmax_kernel<E, kSoftcap, kWanted>, streamed, args, stream, what);
  }
}

}  // namespace

void row_softmax(const Logits& logits, const Output& out, unsigned outputs, float* partials, int device, void* stream) {
  const Capabilities gpu = capabilities(device);
  const std::string what = describe("row_softmax", logits, gpu);
  RowArgs args = common_args(logits, what);
  add_output(args, logits, out, what);
  args.partials = partials;
  if (logits.rows == 0) return;
  const CurrentDevice current(device);
  const int wanted = wanted_partials(outputs);
  dispatch(logits, [&](auto element, auto softcap) {
    using E = decltype(element);
    // three instances for sixteen combinations, as for row_stats
    if (wanted == 0) {
      launch_softmax<E, softcap.value, 0>(logits, args, gpu, device, stream, what);
    } else if (wanted == kWeighted) {
      launch_softmax<E, softcap.value, kWeighted>(logits, args, gpu, device, stream, what);
    } else {
      launch_softmax<E, softcap.value, kEverything>(logits, args, gpu, device, stream, what);
    }
  });
}

}  // namespace fused_po
