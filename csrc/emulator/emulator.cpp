#include "emulator/emulator.h"

#include <algorithm>
#include <exception>
#include <memory>
#include <string>
#include <vector>

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
    case Collective::warp_barrier: return "__syncwarp";
    case Collective::shuffle: return "a shuffle";
    case Collective::ballot: return "a vote";
  }
  return "";
}

struct Lane {
  Fiber fiber;
  Thread thread;
  bool done = false;
  bool waiting = false;
  Collective kind = Collective::block_barrier;
  unsigned mask = 0;
  uint64_t value = 0;
};

struct Shared {
  const void* site;
  std::unique_ptr<char[]> memory;
  size_t bytes;
};

class Block {
 public:
  Block(Call call, const void* function, const void* arguments, int threads)
      : call_(call), function_(function), arguments_(arguments), lanes_(threads), stacks_(new char[threads * kStack]) {}

  void run(unsigned block, unsigned grid) {
    const int threads = static_cast<int>(lanes_.size());
    shared_.clear();
    arrived_ = running_ = 0;
    left_ = threads;
    error_ = nullptr;
    races::begin_block(threads);
    for (int i = 0; i < threads; ++i) {
      Lane& lane = lanes_[i];
      lane.done = lane.waiting = false;
      lane.thread.thread.x = i;
      lane.thread.block.x = block;
      lane.thread.block_dim.x = threads;
      lane.thread.grid_dim.x = grid;
      lane.thread.thread.y = lane.thread.thread.z = lane.thread.block.y = lane.thread.block.z = 0;
      // Tops are staggered: stacks a power of two apart would share their cache sets.
      lane.fiber.start(stacks_.get() + i * kStack, kStack - 64 * (i % 32), &Block::enter, this);
    }
    while (left_ > 0 && !error_) {
      if (!pick()) fail(__FILE__, __LINE__, "block ", block, " cannot go on: ", describe());
      main_.switch_to(lanes_[running_].fiber);
    }
    if (error_) std::rethrow_exception(error_);
    if (const std::string race = races::found(); !race.empty()) fail(__FILE__, __LINE__, "block ", block, ": ", race);
  }

  Lane& lane() { return lanes_[running_]; }
  int index() const { return running_; }

  void* shared(const void* site, size_t bytes) {
    for (const Shared& s : shared_)
      if (s.site == site && s.bytes == bytes) return s.memory.get();
    shared_.push_back({site, std::unique_ptr<char[]>(new char[bytes]), bytes});
    memset(shared_.back().memory.get(), 0xff, bytes);
    races::watch(shared_.back().memory.get(), bytes);
    return shared_.back().memory.get();
  }

  void block_barrier() {
    wait(Collective::block_barrier, 0, 0);
    if (++arrived_ == left_) {
      arrived_ = 0;
      for (Lane& l : lanes_) l.waiting = l.waiting && l.kind != Collective::block_barrier;
      races::block_barrier();
    }
    yield();
  }

  // Lanes that leave a warp's collective find each other's values in place: a lane comes to its next only
  // after it has read, and the last to come lets all go at once.
  uint64_t warp_exchange(Collective kind, unsigned mask, uint64_t value, unsigned source) {
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
    // A barrier counts the threads that have not ended.
    if (left_ > 0 && arrived_ == left_) {
      arrived_ = 0;
      for (Lane& l : lanes_) l.waiting = l.waiting && l.kind != Collective::block_barrier;
      races::block_barrier();
    }
    if (left_ == 0 || error_ || !pick()) ended.fiber.switch_to(main_, true);
    ended.fiber.switch_to(lane().fiber, true);
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

  std::string describe() const {
    std::string text;
    for (Collective kind :
         {Collective::block_barrier, Collective::warp_barrier, Collective::shuffle, Collective::ballot}) {
      const auto n = std::count_if(lanes_.begin(), lanes_.end(),
                                   [&](const Lane& l) { return !l.done && l.waiting && l.kind == kind; });
      if (n > 0) text += std::to_string(n) + " threads wait in " + name(kind) + ", ";
    }
    return text + std::to_string(lanes_.size() - left_) + " have ended";
  }

  struct Exchanged {
    uint64_t values[kWarp];
  };

  Call call_;
  const void* function_;
  const void* arguments_;
  std::vector<Lane> lanes_;
  std::vector<Exchanged> exchanged_ = std::vector<Exchanged>((lanes_.size() + kWarp - 1) / kWarp);
  std::unique_ptr<char[]> stacks_;
  std::vector<Shared> shared_;
  Fiber main_;
  int running_ = 0, arrived_ = 0, left_ = 0;
  std::exception_ptr error_;
};

thread_local Block* block = nullptr;

}  // namespace

const Thread& current() { return block->lane().thread; }
unsigned lane() { return block->index() % kWarp; }
void* shared(const void* site, size_t bytes) { return block->shared(site, bytes); }
void block_barrier() { block->block_barrier(); }
uint64_t warp_exchange(Collective kind, unsigned mask, uint64_t value, unsigned source) {
  return block->warp_exchange(kind, mask, value, source);
}

void access(const void* address, void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
    fail(__FILE__, __LINE__, "an access of ", bytes, " bytes at ", address, " is not aligned to them");
  memcpy(to, from, bytes);
}

void run(Call call, const void* function, const void* arguments, unsigned blocks, unsigned threads) {
  Block one(call, function, arguments, static_cast<int>(threads));
  Block* const outer = block;
  block = &one;
  try {
    for (unsigned b = 0; b < blocks; ++b) one.run(b, blocks);
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
