#include "emulator/emulator.h"

#include <algorithm>
#include <deque>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "common/error.h"
#include "emulator/fiber.h"
#include "emulator/races.h"
#include "emulator/run.h"

namespace emulator {

using stepladder::Error;
using stepladder::fail;

namespace {

constexpr size_t kStack = 128 << 10;
constexpr int kWarp = 32;

const char* name(Collective kind) {
  switch (kind) {
    case Collective::block_barrier: return "__syncthreads";
    case Collective::cluster_barrier: return "a barrier of the cluster";
    case Collective::warp_barrier: return "__syncwarp";
    case Collective::shuffle: return "a shuffle";
    case Collective::ballot: return "a vote";
    case Collective::matrix_load: return "ldmatrix";
    case Collective::matrix_product: return "mma";
  }
  return "";
}

struct Copy {
  void* to;
  const void* from;
  int source_bytes;
};

struct Lane {
  Fiber fiber;
  Thread thread;
  bool done = false;
  bool waiting = false;
  Collective kind = Collective::block_barrier;
  unsigned mask = 0;
  uint64_t value = 0;
  std::vector<Copy> copies;              // not yet committed
  std::deque<std::vector<Copy>> groups;  // in flight
};

struct Shared {
  const void* site;
  std::unique_ptr<char[]> memory;
  size_t bytes;
};

class Block;

// The blocks that run together, and how many of their threads wait for each other.
struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  int arrived = 0, left = 0;
};

class Block {
 public:
  Block(Cluster& cluster, Call call, const void* function, const void* arguments, int threads, size_t shared_bytes)
      : cluster_(cluster),
        call_(call),
        function_(function),
        arguments_(arguments),
        shared_bytes_(shared_bytes),
        lanes_(threads),
        stacks_(new char[threads * kStack]) {}

  void start(unsigned block, unsigned grid, unsigned rank) {
    const int threads = static_cast<int>(lanes_.size());
    shared_.clear();
    block_ = block;
    rank_ = rank;
    arrived_ = running_ = 0;
    left_ = threads;
    error_ = nullptr;
    for (int i = 0; i < threads; ++i) {
      Lane& lane = lanes_[i];
      lane.done = lane.waiting = false;
      lane.copies.clear();
      lane.groups.clear();
      lane.thread.thread.x = i;
      lane.thread.block.x = block;
      lane.thread.block_dim.x = threads;
      lane.thread.grid_dim.x = grid;
      lane.thread.cluster_rank = rank;
      lane.thread.thread.y = lane.thread.thread.z = lane.thread.block.y = lane.thread.block.z = 0;
      // Tops are staggered: stacks a power of two apart would share their cache sets.
      lane.fiber.start(stacks_.get() + i * kStack, kStack - 64 * (i % 32), &Block::enter, this);
    }
  }

  // Until each thread has ended or waits; false where all did already.
  bool go_on() {
    if (left_ == 0 || !pick()) return false;
    main_.switch_to(lanes_[running_].fiber);
    if (error_) std::rethrow_exception(error_);
    return true;
  }

  bool ended() const { return left_ == 0; }

  std::string describe() const {
    std::string text = "block " + std::to_string(block_) + " cannot go on: ";
    for (Collective kind :
         {Collective::block_barrier, Collective::cluster_barrier, Collective::warp_barrier, Collective::shuffle,
          Collective::ballot, Collective::matrix_load, Collective::matrix_product}) {
      const auto n = std::count_if(lanes_.begin(), lanes_.end(),
                                   [&](const Lane& l) { return !l.done && l.waiting && l.kind == kind; });
      if (n > 0) text += std::to_string(n) + " threads wait in " + name(kind) + ", ";
    }
    return text + std::to_string(lanes_.size() - left_) + " have ended";
  }

  Lane& lane() { return lanes_[running_]; }
  int index() const { return running_; }

  void* shared(const void* site, size_t bytes) {
    for (const Shared& s : shared_)
      if (s.site == site && s.bytes == bytes) return s.memory.get();
    shared_.push_back({site, std::unique_ptr<char[]>(new char[bytes]), bytes});
    memset(shared_.back().memory.get(), 0xff, bytes);
    races::watch(shared_.back().memory.get(), bytes, rank_);
    return shared_.back().memory.get();
  }

  void* dynamic_shared() {
    static const char site = 0;
    if (shared_bytes_ == 0) fail(__FILE__, __LINE__, "the launch gave no dynamic shared memory");
    return shared(&site, shared_bytes_);
  }

  void* shared_of(unsigned rank, void* own) {
    if (rank >= cluster_.blocks.size())
      fail(__FILE__, __LINE__, "the cluster has ", cluster_.blocks.size(), " blocks, and none of rank ", rank);
    Block& other = *cluster_.blocks[rank];
    if (other.ended()) fail(__FILE__, __LINE__, "block ", other.block_, " of the cluster has ended");
    const auto at = reinterpret_cast<uintptr_t>(own);
    for (const Shared& s : shared_) {
      const auto begin = reinterpret_cast<uintptr_t>(s.memory.get());
      if (at >= begin && at < begin + s.bytes) return static_cast<char*>(other.shared(s.site, s.bytes)) + (at - begin);
    }
    fail(__FILE__, __LINE__, own, " is not in the block's shared memory");
  }

  // 16 aligned bytes of the block's shared memory.
  void check_shared(const char* what, const void* address) const {
    const auto at = reinterpret_cast<uintptr_t>(address);
    const bool inside = std::any_of(shared_.begin(), shared_.end(), [&](const Shared& s) {
      const auto begin = reinterpret_cast<uintptr_t>(s.memory.get());
      return at >= begin && at + 16 <= begin + s.bytes;
    });
    if (!inside) fail(__FILE__, __LINE__, what, ": 16 bytes at ", address, " are not in shared memory");
    if (at % 16 != 0) fail(__FILE__, __LINE__, what, ": ", address, " is not aligned to 16 bytes");
  }

  void block_barrier() {
    wait(Collective::block_barrier, 0, 0);
    ++arrived_;
    pass_block_barrier();
    yield();
  }

  void cluster_barrier() {
    wait(Collective::cluster_barrier, 0, 0);
    ++cluster_.arrived;
    pass_cluster_barrier();
    yield();
  }

  // Lanes that leave a warp's collective find each other's values in place: a lane comes to its next only
  // after it has read, and the last to come lets all go at once.
  // `together`: what the last to come does with all values.
  uint64_t warp_exchange(Collective kind, unsigned mask, uint64_t value, unsigned source,
                         void (*together)(const uint64_t* values) = nullptr) {
    const int warp = running_ / kWarp * kWarp;
    const unsigned self = running_ % kWarp;
    if (!(mask >> self & 1))
      fail(__FILE__, __LINE__, name(kind), ": the mask leaves out lane ", self, " that calls it");
    wait(kind, mask, value);
    bool complete = true;
    for (int l = 0; l < kWarp && complete; ++l) {
      if (!(mask >> l & 1)) continue;
      const bool exists = warp + l < static_cast<int>(lanes_.size());
      if (!exists || lanes_[warp + l].done)
        fail(__FILE__, __LINE__, name(kind), ": lane ", l, " is in the mask and has ended");
      const Lane& other = lanes_[warp + l];
      complete = other.waiting && other.kind == kind && other.mask == mask;
    }
    if (complete) {
      uint64_t values[kWarp] = {};
      for (int l = 0; l < kWarp; ++l)
        if (mask >> l & 1) values[l] = lanes_[warp + l].value;
      if (together != nullptr) together(values);
      unsigned votes = 0;
      for (int l = 0; l < kWarp; ++l) votes |= static_cast<unsigned>(values[l] != 0 && (mask >> l & 1)) << l;
      for (int l = 0; l < kWarp; ++l) {
        if (!(mask >> l & 1)) continue;
        Lane& other = lanes_[warp + l];
        other.waiting = false;
        other.value = kind == Collective::ballot ? votes : 0;
      }
      for (int l = 0; l < kWarp; ++l)
        if (mask >> l & 1) exchanged_[running_ / kWarp].values[l] = values[l];
      races::warp_barrier(warp, mask);
    }
    yield();
    if (kind == Collective::ballot) return lane().value;
    if (kind == Collective::shuffle && !(mask >> source & 1))
      fail(__FILE__, __LINE__, "a shuffle reads from lane ", source, ", which is not in its mask");
    return kind == Collective::shuffle ? exchanged_[running_ / kWarp].values[source] : 0;
  }

 private:
  static void enter(void* self) { static_cast<Block*>(self)->body(); }

  void body() {
    try {
      call_(function_, arguments_);
    } catch (...) {
      error_ = std::current_exception();
    }
    Lane& ended = lane();
    ended.done = true;
    --left_;
    --cluster_.left;
    if (left_ == 0) races::end_block(rank_);
    // Barriers count the threads that have not ended.
    pass_block_barrier();
    pass_cluster_barrier();
    if (left_ == 0 || error_ || !pick()) ended.fiber.switch_to(main_, true);
    ended.fiber.switch_to(lane().fiber, true);
  }

  void pass_block_barrier() {
    if (left_ == 0 || arrived_ < left_) return;
    arrived_ = 0;
    release(Collective::block_barrier);
    races::block_barrier(rank_);
  }

  void pass_cluster_barrier() {
    if (cluster_.left == 0 || cluster_.arrived < cluster_.left) return;
    cluster_.arrived = 0;
    for (auto& block : cluster_.blocks) block->release(Collective::cluster_barrier);
    races::cluster_barrier();
  }

  void release(Collective kind) {
    for (Lane& l : lanes_) l.waiting = l.waiting && l.kind != kind;
  }

  void wait(Collective kind, unsigned mask, uint64_t value) {
    Lane& self = lane();
    self.waiting = true;
    self.kind = kind;
    self.mask = mask;
    self.value = value;
  }

  // Goes on with this lane where it need not wait, else with another.
  void yield() {
    Lane& self = lane();
    if (!self.waiting) return;
    self.fiber.switch_to(pick() ? lane().fiber : main_);
  }

  bool pick() {
    const int threads = static_cast<int>(lanes_.size());
    for (int k = 0; k < threads; ++k) {
      const int i = (running_ + k) % threads;
      if (lanes_[i].done || lanes_[i].waiting) continue;
      running_ = i;
      return true;
    }
    return false;
  }

  struct Exchanged {
    uint64_t values[kWarp];
  };

  Cluster& cluster_;
  Call call_;
  const void* function_;
  const void* arguments_;
  size_t shared_bytes_;
  std::vector<Lane> lanes_;
  std::vector<Exchanged> exchanged_ = std::vector<Exchanged>((lanes_.size() + kWarp - 1) / kWarp);
  std::unique_ptr<char[]> stacks_;
  std::vector<Shared> shared_;
  Fiber main_;
  unsigned block_ = 0, rank_ = 0;
  int running_ = 0, arrived_ = 0, left_ = 0;
  std::exception_ptr error_;
};

thread_local Block* block = nullptr;

// Blocks from `first` on; one goes on until all of its threads wait, then the next.
void run_cluster(Cluster& cluster, unsigned first, unsigned grid, int threads) {
  const auto size = static_cast<unsigned>(cluster.blocks.size());
  races::begin_cluster(static_cast<int>(size), threads);
  cluster.arrived = 0;
  cluster.left = static_cast<int>(size) * threads;
  for (unsigned rank = 0; rank < size; ++rank) cluster.blocks[rank]->start(first + rank, grid, rank);
  while (cluster.left > 0) {
    bool moved = false;
    for (auto& one : cluster.blocks) {
      block = one.get();
      moved = one->go_on() || moved;
    }
    if (moved) continue;
    std::string text;
    for (auto& one : cluster.blocks) text += (text.empty() ? "" : "; ") + one->describe();
    fail(__FILE__, __LINE__, text);
  }
  if (const std::string race = races::found(); !race.empty()) fail(__FILE__, __LINE__, "block ", first, ": ", race);
}

constexpr unsigned kAllLanes = 0xffffffffu;

struct MatrixLoad {
  const void* row;
  int count;
  bool transposed;
  uint32_t* out;
};

void load_for_all(const uint64_t* values) {
  const MatrixLoad* loads[kWarp];
  for (int l = 0; l < kWarp; ++l) loads[l] = reinterpret_cast<const MatrixLoad*>(values[l]);
  for (int i = 0; i < loads[0]->count; ++i) {
    uint16_t matrix[8][8];
    for (int r = 0; r < 8; ++r) memcpy(matrix[r], loads[8 * i + r]->row, 16);
    for (int l = 0; l < kWarp; ++l) {
      const int r = l / 4, c = l % 4 * 2;
      const uint32_t first = loads[0]->transposed ? matrix[c][r] : matrix[r][c];
      const uint32_t second = loads[0]->transposed ? matrix[c + 1][r] : matrix[r][c + 1];
      loads[l]->out[i] = first | second << 16;
    }
  }
}

struct MatrixProduct {
  Half type;
  float* sum;
  const uint32_t *a, *b;
};

void widen(Half type, uint32_t word, float* pair) {
  for (int k = 0; k < 2; ++k) {
    const auto bits = static_cast<uint16_t>(word >> 16 * k);
    pair[k] = type == Half::bf16 ? to_float(stepladder::bf16{bits}) : to_float(stepladder::f16{bits});
  }
}

void multiply_for_all(const uint64_t* values) {
  float a[16][16], b[8][16];
  const MatrixProduct* products[kWarp];
  for (int l = 0; l < kWarp; ++l) {
    const MatrixProduct& p = *(products[l] = reinterpret_cast<const MatrixProduct*>(values[l]));
    const int group = l / 4, pair = l % 4 * 2;
    for (int k = 0; k < 4; ++k) widen(p.type, p.a[k], &a[group + k % 2 * 8][pair + k / 2 * 8]);
    for (int k = 0; k < 2; ++k) widen(p.type, p.b[k], &b[group][pair + k * 8]);
  }
  for (int l = 0; l < kWarp; ++l) {
    for (int k = 0; k < 4; ++k) {
      const float* const row = a[l / 4 + k / 2 * 8];
      const float* const column = b[l % 4 * 2 + k % 2];
      float sum = products[l]->sum[k];
      for (int i = 0; i < 16; ++i) sum += row[i] * column[i];
      products[l]->sum[k] = sum;
    }
  }
}

struct Tf32Product {
  float* sum;
  const uint32_t *a, *b;
};

void multiply_tf32_for_all(const uint64_t* values) {
  float a[16][8], b[8][8];
  const Tf32Product* products[kWarp];
  const auto taken = [](uint32_t word) { return stepladder::bit_cast<float>(word & 0xffffe000u); };
  for (int l = 0; l < kWarp; ++l) {
    const Tf32Product& p = *(products[l] = reinterpret_cast<const Tf32Product*>(values[l]));
    for (int k = 0; k < 4; ++k) a[l / 4 + k % 2 * 8][l % 4 + k / 2 * 4] = taken(p.a[k]);
    for (int k = 0; k < 2; ++k) b[l / 4][l % 4 + k * 4] = taken(p.b[k]);
  }
  for (int l = 0; l < kWarp; ++l) {
    for (int k = 0; k < 4; ++k) {
      const float* const row = a[l / 4 + k / 2 * 8];
      const float* const column = b[l % 4 * 2 + k % 2];
      float sum = products[l]->sum[k];
      for (int i = 0; i < 8; ++i) sum += row[i] * column[i];
      products[l]->sum[k] = sum;
    }
  }
}

struct WideProduct {
  double *sum, a, b;
};

void multiply_f64_for_all(const uint64_t* values) {
  double a[8][4], b[8][4];
  for (int l = 0; l < kWarp; ++l) {
    const auto& p = *reinterpret_cast<const WideProduct*>(values[l]);
    a[l / 4][l % 4] = p.a;
    b[l / 4][l % 4] = p.b;
  }
  for (int l = 0; l < kWarp; ++l) {
    double* const sum = reinterpret_cast<const WideProduct*>(values[l])->sum;
    for (int k = 0; k < 2; ++k)
      for (int i = 0; i < 4; ++i) sum[k] += a[l / 4][i] * b[l % 4 * 2 + k][i];
  }
}

}  // namespace

const Thread& current() { return block->lane().thread; }
unsigned lane() { return block->index() % kWarp; }
void* shared(const void* site, size_t bytes) { return block->shared(site, bytes); }
void* dynamic_shared() { return block->dynamic_shared(); }
void* shared_of(unsigned rank, void* own) { return block->shared_of(rank, own); }
void block_barrier() { block->block_barrier(); }
void cluster_barrier() { block->cluster_barrier(); }
uint64_t warp_exchange(Collective kind, unsigned mask, uint64_t value, unsigned source) {
  return block->warp_exchange(kind, mask, value, source);
}

void load_matrices(const void* row, int count, bool transposed, uint32_t* out) {
  if (static_cast<int>(lane()) < 8 * count) {
    block->check_shared("ldmatrix", row);
    races::read(row, 16);
  }
  const MatrixLoad load{row, count, transposed, out};
  block->warp_exchange(Collective::matrix_load, kAllLanes, reinterpret_cast<uintptr_t>(&load), 0, load_for_all);
}

void multiply_matrices(Half type, float* sum, const uint32_t* a, const uint32_t* b) {
  const MatrixProduct product{type, sum, a, b};
  block->warp_exchange(Collective::matrix_product, kAllLanes, reinterpret_cast<uintptr_t>(&product), 0,
                       multiply_for_all);
}

void multiply_tf32(float* sum, const uint32_t* a, const uint32_t* b) {
  const Tf32Product product{sum, a, b};
  block->warp_exchange(Collective::matrix_product, kAllLanes, reinterpret_cast<uintptr_t>(&product), 0,
                       multiply_tf32_for_all);
}

void multiply_f64(double* sum, double a, double b) {
  const WideProduct product{sum, a, b};
  block->warp_exchange(Collective::matrix_product, kAllLanes, reinterpret_cast<uintptr_t>(&product), 0,
                       multiply_f64_for_all);
}

void copy_async(void* to, const void* from, int source_bytes) {
  block->check_shared("cp.async", to);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0)
    fail(__FILE__, __LINE__, "cp.async: the source ", from, " is not aligned to 16 bytes");
  races::begin_copy(to, 16);
  block->lane().copies.push_back({to, from, source_bytes});
}

void commit_copies() {
  Lane& self = block->lane();
  self.groups.push_back(std::move(self.copies));
  self.copies.clear();
}

void wait_for_copies(int groups_left) {
  Lane& self = block->lane();
  for (; static_cast<int>(self.groups.size()) > groups_left; self.groups.pop_front()) {
    for (const Copy& copy : self.groups.front()) {
      memset(copy.to, 0, 16);
      if (copy.source_bytes > 0) memcpy(copy.to, copy.from, copy.source_bytes);
      races::end_copy(copy.to, 16);
    }
  }
}

void access(const void* address, void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
    fail(__FILE__, __LINE__, "an access of ", bytes, " bytes at ", address, " is not aligned to them");
  memcpy(to, from, bytes);
}

void run(Call call, const void* function, const void* arguments, unsigned blocks, unsigned threads, size_t shared_bytes,
         unsigned cluster) {
  if (cluster == 0 || blocks % cluster != 0)
    fail(__FILE__, __LINE__, blocks, " blocks are no whole number of clusters of ", cluster);
  Cluster together;
  for (unsigned rank = 0; rank < cluster; ++rank)
    together.blocks.emplace_back(
        new Block(together, call, function, arguments, static_cast<int>(threads), shared_bytes));
  Block* const outer = block;
  try {
    for (unsigned b = 0; b < blocks; b += cluster) run_cluster(together, b, blocks, static_cast<int>(threads));
  } catch (...) {
    block = outer;
    throw;
  }
  block = outer;
}

}  // namespace emulator

unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(
      emulator::warp_exchange(emulator::Collective::ballot, mask, predicate != 0, emulator::lane()));
}
