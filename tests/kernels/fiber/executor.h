// Runs a kernel on the CPU with one fiber for each thread of a cluster, so that the barriers, shuffles and copies of the
// CUDA sources are real: a fiber runs until it waits, which one goes on is drawn from a seed, and bulk copies land when
// they are drawn. A missing barrier shows as a result that moves with the seed. Accesses are checked against the memory
// that the launch was given; shared memory begins as NaN.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace fused_po::fiber {

constexpr int kLanes = 32;
constexpr size_t kStack = 64 << 10;
constexpr int kAll = -1;

// `rows` pieces of `bytes` in global memory, `stride` apart
struct Range {
  uintptr_t base;
  int64_t rows;
  int64_t bytes;
  int64_t stride;
  bool writable;
};

// fibers that wait for others
struct Meeting {
  int expected = 0;
  int arrived = 0;
  uint64_t generation = 0;
  std::vector<int> waiting;
};

// a barrier that opens when its bytes have come
struct Landing {
  bool armed = false;
  int64_t missing = 0;
  std::vector<int> waiting;
};

struct Warp {
  Meeting meeting;
  // two sets: a fiber enters the next exchange only when all have read the one before the last
  uint32_t values[2][kLanes] = {};
};

struct Block {
  std::unique_ptr<unsigned char[]> memory;
  unsigned char* shared = nullptr;
  int bytes = 0;
  int unfinished = 0;
  bool published = false;
  Meeting meeting;
  std::map<const void*, Landing> landings;
  // words stored but not yet released to the cluster: the fiber that wrote them, or kAll after a barrier of the block
  std::map<const void*, int> unreleased;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
  int thread = 0;
  int block = 0;
  int exchanges = 0;
  bool arrived = false;
  uint64_t token = 0;
};

struct Copy {
  int block;
  unsigned char* to;
  const unsigned char* from;
  uint32_t bytes;
  const void* landing;
};

class Executor {
 public:
  uint64_t seed = 1;
  std::vector<Range> ranges;

  // runs `body` in blocks * threads fibers; blocks of a cluster run together, clusters one after the other
  void run(int64_t blocks, int threads, int cluster, int shared, const std::function<void()>& body) {
    random_ = seed * 0x9e3779b97f4a7c15u + 0x1234567u;
    body_ = &body;
    threads_ = threads;
    cluster_ = cluster;
    for (first_block_ = 0; first_block_ < blocks; first_block_ += cluster) run_cluster(shared);
  }

  // what a kernel sees
  int thread() const { return fiber().thread; }
  int threads() const { return threads_; }
  int64_t block() const { return first_block_ + fiber().block; }
  int rank() const { return fiber().block; }
  int cluster() const { return cluster_; }
  unsigned char* shared() { return own().shared; }

  void block_barrier() {
    Block& block = own();
    // the last one in: what any of them wrote, each of them may now release
    if (block.meeting.arrived + 1 == block.meeting.expected) {
      for (auto& word : block.unreleased) word.second = kAll;
    }
    meet(block.meeting);
  }

  uint32_t exchange(uint32_t value, int lane_from) {
    Fiber& me = fiber();
    Warp& warp = warps_[static_cast<size_t>((me.block * threads_ + me.thread) / kLanes)];
    const int set = me.exchanges++ % 2, lane = me.thread % kLanes;
    warp.values[set][lane] = value;
    meet(warp.meeting);
    return warp.values[set][lane_from];
  }

  // a relaxed arrival publishes nothing
  void cluster_arrive(bool release) {
    Fiber& me = fiber();
    if (release) {
      auto& words = own().unreleased;
      for (auto word = words.begin(); word != words.end();) {
        word = word->second == kAll || word->second == me.thread ? words.erase(word) : std::next(word);
      }
    }
    require(!me.arrived, "two arrivals at the cluster barrier without a wait");
    me.arrived = true;
    me.token = all_.generation;
    if (++all_.arrived == all_.expected) open(all_);
  }

  void cluster_wait() {
    Fiber& me = fiber();
    require(me.arrived, "a wait at the cluster barrier without an arrival");
    me.arrived = false;
    if (all_.generation == me.token) sleep(all_.waiting);
  }

  void landing_init(const void* place) {
    own().landings[place] = {};
    own().published = false;
  }

  void publish() { own().published = true; }

  void landing_expect(const void* place, uint32_t bytes) {
    Landing& landing = find(own(), place);
    landing.armed = true;
    landing.missing += bytes;
    settle(landing);
  }

  void landing_wait(const void* place) {
    Landing& landing = find(own(), place);
    if (!landing.armed || landing.missing != 0) sleep(landing.waiting);
  }

  void bulk_load(unsigned char* to, const unsigned char* from, uint32_t bytes, const void* landing) {
    require(own().published, "a bulk copy to barriers that its engine may not see yet");
    require(bytes % 16 == 0 && reinterpret_cast<uintptr_t>(to) % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0,
            "a bulk copy that is not made of aligned 16 bytes");
    check_shared(to, bytes);
    check_global(from, bytes, false);
    find(own(), landing);
    copies_.push_back({fiber().block, to, from, bytes, landing});
    // fibers count up from 0, copies down from -1
    ready_.push_back(-static_cast<int>(copies_.size()));
  }

  // the same place in the shared memory of another block
  const unsigned char* peer(const void* place, int rank) {
    check_shared(place, 4);
    require(rank >= 0 && rank < cluster_, "a block outside the cluster");
    Block& other = blocks_[static_cast<size_t>(rank)];
    require(other.unfinished > 0, "shared memory of a block that has ended");
    const unsigned char* there = other.shared + (static_cast<const unsigned char*>(place) - own().shared);
    require(other.unreleased.count(there) == 0, "shared memory of another block that was written but not released");
    return there;
  }

  void wrote_shared(const void* place) { own().unreleased[place] = fiber().thread; }

  void check_shared(const void* place, int64_t bytes) {
    const Block& block = own();
    const auto address = reinterpret_cast<uintptr_t>(place);
    require(address % static_cast<uintptr_t>(bytes < 16 ? bytes : 16) == 0, "a misaligned access to shared memory");
    const auto offset = static_cast<const unsigned char*>(place) - block.shared;
    require(offset >= 0 && offset + bytes <= block.bytes, "out of bounds in shared memory");
  }

  void check_global(const void* place, int64_t bytes, bool write) {
    const auto address = reinterpret_cast<uintptr_t>(place);
    require(address % static_cast<uintptr_t>(bytes < 16 ? bytes : 16) == 0, "a misaligned access to global memory");
    for (const Range& range : ranges) {
      const auto offset = static_cast<int64_t>(address - range.base);
      if ((write && !range.writable) || offset < 0 || range.rows == 0) continue;
      const int64_t row = range.stride > 0 ? std::min(offset / range.stride, range.rows - 1) : 0;
      if (offset - row * range.stride + bytes <= range.bytes) return;
    }
    fail(write ? "a write out of bounds in global memory" : "a read out of bounds in global memory");
  }

  void require(bool holds, const char* otherwise) {
    if (!holds) fail(otherwise);
  }

 private:
  Fiber& fiber() { return fibers_[static_cast<size_t>(current_)]; }
  const Fiber& fiber() const { return fibers_[static_cast<size_t>(current_)]; }
  Block& own() { return blocks_[static_cast<size_t>(fiber().block)]; }

  Landing& find(Block& block, const void* place) {
    const auto found = block.landings.find(place);
    require(found != block.landings.end(), "a barrier that was not initialised");
    return found->second;
  }

  void run_cluster(int shared) {
    const int count = cluster_ * threads_;
    blocks_.clear();
    blocks_.resize(static_cast<size_t>(cluster_));
    for (Block& block : blocks_) {
      block.memory = std::make_unique<unsigned char[]>(static_cast<size_t>(shared) + 128);
      // NaN in every type
      std::memset(block.memory.get(), 0xff, static_cast<size_t>(shared) + 128);
      block.shared = block.memory.get() + (128 - reinterpret_cast<uintptr_t>(block.memory.get()) % 128);
      block.bytes = shared;
      block.unfinished = block.meeting.expected = threads_;
    }
    warps_.assign(static_cast<size_t>(count / kLanes), Warp());
    for (Warp& warp : warps_) warp.meeting.expected = kLanes;
    all_ = Meeting();
    all_.expected = count;
    copies_.clear();
    ready_.clear();
    // with every second seed one block of a cluster lags
    slow_ = seed % 2 == 0 && cluster_ > 1 ? static_cast<int>(draw(static_cast<uint64_t>(cluster_))) : -1;
    if (fibers_.size() < static_cast<size_t>(count)) fibers_.resize(static_cast<size_t>(count));
    for (int i = 0; i < count; i++) {
      Fiber& fiber = fibers_[static_cast<size_t>(i)];
      if (!fiber.stack) fiber.stack = std::make_unique<unsigned char[]>(kStack);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      fiber.thread = i % threads_;
      fiber.block = i / threads_;
      fiber.exchanges = 0;
      fiber.arrived = false;
      makecontext(&fiber.context, &Executor::enter, 0);
      ready_.push_back(i);
    }
    unfinished_ = count;
    failure_.clear();
    running_ = this;
    current_ = next();
    swapcontext(&main_, &fiber().context);
    if (!failure_.empty()) throw std::runtime_error(failure_);
  }

  static void enter() {
    Executor* executor = running_;
    (*executor->body_)();
    executor->own().unfinished--;
    if (--executor->unfinished_ == 0) setcontext(&executor->main_);
    executor->current_ = executor->next();
    setcontext(&executor->fiber().context);
  }

  uint64_t draw(uint64_t count) {
    random_ ^= random_ << 13, random_ ^= random_ >> 7, random_ ^= random_ << 17;
    return random_ % count;
  }

  int block_of(int ready) const {
    return ready >= 0 ? ready / threads_ : copies_[static_cast<size_t>(-ready - 1)].block;
  }

  // a fiber that can go on; copies that are drawn land on the way
  int next() {
    while (!ready_.empty()) {
      size_t drawn = draw(ready_.size());
      // a block that lags finds the others at their end
      for (int retry = 0; retry < 8 && block_of(ready_[drawn]) == slow_; retry++) drawn = draw(ready_.size());
      const int found = ready_[drawn];
      ready_[drawn] = ready_.back();
      ready_.pop_back();
      if (found >= 0) return found;
      const Copy copy = copies_[static_cast<size_t>(-found - 1)];
      std::memcpy(copy.to, copy.from, copy.bytes);
      Landing& landing = find(blocks_[static_cast<size_t>(copy.block)], copy.landing);
      landing.missing -= copy.bytes;
      settle(landing);
    }
    fail("all threads wait: a barrier that not all of them reach");
    return 0;
  }

  void settle(Landing& landing) {
    if (landing.armed && landing.missing == 0) wake(landing.waiting);
  }

  void meet(Meeting& meeting) {
    if (++meeting.arrived == meeting.expected) {
      open(meeting);
    } else {
      sleep(meeting.waiting);
    }
  }

  void open(Meeting& meeting) {
    meeting.arrived = 0;
    meeting.generation++;
    wake(meeting.waiting);
  }

  void wake(std::vector<int>& waiting) {
    ready_.insert(ready_.end(), waiting.begin(), waiting.end());
    waiting.clear();
  }

  void sleep(std::vector<int>& waiting) {
    waiting.push_back(current_);
    Fiber& me = fiber();
    current_ = next();
    if (&fiber() != &me) swapcontext(&me.context, &fiber().context);
  }

  // fibers hold nothing that must be given back, so they are left where they are
  [[noreturn]] void fail(const std::string& what) {
    failure_ = what + " (block " + std::to_string(block()) + ", thread " + std::to_string(thread()) + ")";
    setcontext(&main_);
    std::abort();
  }

  inline static Executor* running_ = nullptr;
  const std::function<void()>* body_ = nullptr;
  ucontext_t main_;
  std::vector<Fiber> fibers_;
  std::vector<Block> blocks_;
  std::vector<Warp> warps_;
  std::vector<Copy> copies_;
  std::vector<int> ready_;
  Meeting all_;
  std::string failure_;
  uint64_t random_ = 0;
  int64_t first_block_ = 0;
  int threads_ = 0, cluster_ = 1, current_ = 0, unfinished_ = 0, slow_ = -1;
};

inline Executor executor;

// which of the bugs that a test put into its build is active; 0: none
inline int planted = 0;

}  // namespace fused_po::fiber
