// How a row is laid over threads, blocks and clusters: plain arithmetic, so that it can be tested without a GPU.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>

namespace fused_po {

// what the plan asks of a GPU
struct Capabilities {
  int major;  // compute capability
  int minor;
  int shared_per_block;           // bytes of shared memory that a block can have
  int shared_per_multiprocessor;  // bytes
  int shared_reserved;            // bytes of each block that the driver takes
};

struct Geometry {
  int64_t blocks;
  int threads;  // of a block
  int cluster;  // blocks
  int shared;   // bytes of a block
};

// a row resident in the shared memory of `cluster` blocks; 0 blocks: it is streamed twice
struct Residence {
  int cluster = 0;
  int threads = 0;
  int shared = 0;
  int share_vectors = 0;  // of 16 bytes, in each block
  int chunk_vectors = 0;  // of a bulk copy
};

// answers that do not change, each worked out once; threads wait for one another
template <class Key, class Answer>
class Remembered {
 public:
  template <class Ask>
  Answer get(const Key& key, Ask ask) {
    const std::lock_guard<std::mutex> hold(mutex_);
    const auto found = answers_.find(key);
    return found != answers_.end() ? found->second : answers_.emplace(key, ask()).first->second;
  }

 private:
  std::mutex mutex_;
  std::map<Key, Answer> answers_;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// threads with about `each` vectors for one of them: a power of two, or `most`
inline int threads_for(int64_t vectors, int each, int most) {
  int threads = 64;
  while (threads < most && static_cast<int64_t>(threads) * each < vectors) threads *= 2;
  return threads < most ? threads : most;
}

// Where a row of `vectors` goes. The loads of one row overlap the stores of another where a multiprocessor holds blocks
// of several rows, so a larger cluster with smaller shares comes before fewer rows at a time. Clusters of 16 are not
// portable, `fits` has the last word on each candidate. `code`: the compute capability that the kernel was compiled for;
// a GPU with clusters also runs PTX of before them, in which the kernel is empty.
inline Residence plan_residence(int64_t vectors, const Capabilities& gpu, int code, int scratch, int most_threads,
                                int most_chunks, const std::function<bool(const Residence&)>& fits) {
  struct Attempt {
    int rows_per_multiprocessor;
    int largest_cluster;
  };
  if (gpu.major < 9 || code < 90) return {};
  for (const Attempt attempt : {Attempt{3, 8}, Attempt{2, 8}, Attempt{3, 16}, Attempt{2, 16}, Attempt{1, 8}, Attempt{1, 16}}) {
    int budget = gpu.shared_per_multiprocessor / attempt.rows_per_multiprocessor - gpu.shared_reserved;
    if (budget > gpu.shared_per_block) budget = gpu.shared_per_block;
    for (int cluster = 1; cluster <= attempt.largest_cluster; cluster *= 2) {
      Residence plan;
      plan.cluster = cluster;
      const int64_t share = ceil_div(vectors, cluster);
      // a row that does not begin on 16 bytes reaches into one quad more, and is read in vectors that go beyond it
      const int64_t bytes = scratch + 16 * (share + 3);
      if (bytes > budget) continue;
      plan.shared = static_cast<int>(bytes);
      plan.share_vectors = static_cast<int>(share);
      plan.threads = threads_for(share, 8, most_threads);
      // whole passes of the block over a chunk
      plan.chunk_vectors = plan.threads * static_cast<int>(ceil_div(share, static_cast<int64_t>(plan.threads) * most_chunks));
      if (fits(plan)) return plan;
    }
  }
  return {};
}

}  // namespace fused_po
