#include "emulator/races.h"

#if defined(SL_EMULATOR_RACES)

#include <cstdint>
#include <vector>

#include "emulator/emulator.h"

namespace emulator {
namespace races {

namespace {

// When a thread touched a byte: how many barriers its cluster, its block and its warp had passed. Threads are numbered
// through the cluster.
struct Touch {
  int thread = -1;
  uint32_t cluster_epoch = 0, block_epoch = 0, warp_epoch = 0;
};

struct Cell {
  Touch write, read;
  bool many_readers = false;
  bool in_flight = false;  // `write` began a copy that has not been waited for
};

struct Region {
  uintptr_t begin;
  std::vector<Cell> cells;
  int block;
};

std::vector<Region> regions;
std::vector<uint32_t> warp_epochs, block_epochs;
std::vector<bool> ended;
uint32_t cluster_epoch = 0;
int threads_of_block = 0;
std::string first;

int block_of(int thread) { return thread / threads_of_block; }
int warp_of(int thread) { return block_of(thread) * ((threads_of_block + 31) / 32) + thread % threads_of_block / 32; }

// Whether no barrier of both blocks was passed since.
bool current_for(const Touch& before, int thread) {
  const int block = block_of(thread);
  return before.cluster_epoch == cluster_epoch &&
         (block_of(before.thread) != block || before.block_epoch == block_epochs[block]);
}

bool ordered(const Touch& before, int thread) {
  if (before.thread < 0 || before.thread == thread || !current_for(before, thread)) return true;
  return warp_of(before.thread) == warp_of(thread) && before.warp_epoch != warp_epochs[warp_of(thread)];
}

Touch now_by(int thread) {
  return {thread, cluster_epoch, block_epochs[block_of(thread)], warp_epochs[warp_of(thread)]};
}

void report(const char* what, const Touch& before, int thread, size_t offset,
            const char* why = "no barrier stands between them") {
  if (!first.empty()) return;
  first = "threads " + std::to_string(before.thread) + " and " + std::to_string(thread) + " race (" + what +
          ") at byte " + std::to_string(offset) + " of a shared variable: " + why;
}

void report_peer(const Region& region, int thread, const char* when) {
  if (!first.empty()) return;
  first = "thread " + std::to_string(thread) + " touches the memory of block " + std::to_string(region.block) +
          " of its cluster, which " + when;
}

// A block's memory is there for others from the first barrier of the cluster on, until it ends.
void check_peer(const Region& region, int thread) {
  if (cluster_epoch == 0) report_peer(region, thread, "need not have begun");
  if (ended[region.block]) report_peer(region, thread, "has ended");
}

enum class Flight { none, begins, ends };

void touch(const void* address, size_t bytes, bool write, Flight flight = Flight::none) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  for (Region& region : regions) {
    if (at < region.begin || at >= region.begin + region.cells.size()) continue;
    const int thread =
        static_cast<int>(current().cluster_rank) * threads_of_block + static_cast<int>(current().thread.x);
    const Touch now = now_by(thread);
    if (region.block != block_of(thread)) check_peer(region, thread);
    for (size_t b = at - region.begin; b < at - region.begin + bytes && b < region.cells.size(); ++b) {
      Cell& cell = region.cells[b];
      if (flight == Flight::ends) {
        cell.in_flight = false;
        cell.write = now;
        continue;
      }
      if (cell.in_flight) {
        report(write ? "a copy, then a write" : "a copy, then a read", cell.write, thread, b,
               "the copy was not waited for");
        continue;
      }
      if (!ordered(cell.write, thread)) report(write ? "two writes" : "a write, then a read", cell.write, thread, b);
      if (write) {
        if (!ordered(cell.read, thread) || (cell.many_readers && current_for(cell.read, thread)))
          report("a read, then a write", cell.read, thread, b);
        cell.write = now;
        cell.many_readers = false;
        cell.in_flight = flight == Flight::begins;
      } else {
        cell.many_readers = !ordered(cell.read, thread) || (cell.many_readers && current_for(cell.read, thread));
        cell.read = now;
      }
    }
    return;
  }
}

}  // namespace

void begin_cluster(int blocks, int threads) {
  regions.clear();
  warp_epochs.assign(blocks * ((threads + 31) / 32), 0);
  block_epochs.assign(blocks, 0);
  ended.assign(blocks, false);
  cluster_epoch = 0;
  threads_of_block = threads;
  first.clear();
}

void end_block(unsigned rank) {
  ended[rank] = true;
  if (ended.size() == 1) return;
  for (const Region& region : regions) {
    if (region.block != static_cast<int>(rank)) continue;
    for (const Cell& cell : region.cells)
      for (const Touch& touch : {cell.write, cell.read})
        if (touch.thread >= 0 && block_of(touch.thread) != region.block && touch.cluster_epoch == cluster_epoch)
          return report_peer(region, touch.thread, "may have ended");
  }
}

void watch(const void* memory, size_t bytes, unsigned rank) {
  regions.push_back({reinterpret_cast<uintptr_t>(memory), std::vector<Cell>(bytes), static_cast<int>(rank)});
}

void block_barrier(unsigned rank) { ++block_epochs[rank]; }

void cluster_barrier() { ++cluster_epoch; }

void warp_barrier(int first_thread, unsigned mask) {
  const int thread = static_cast<int>(current().cluster_rank) * threads_of_block + first_thread;
  if (mask == 0xffffffffu) ++warp_epochs[warp_of(thread)];
}

void read(const void* memory, size_t bytes) { touch(memory, bytes, false); }
void begin_copy(const void* memory, size_t bytes) { touch(memory, bytes, true, Flight::begins); }
void end_copy(const void* memory, size_t bytes) { touch(memory, bytes, true, Flight::ends); }

std::string found() { return first; }

}  // namespace races
}  // namespace emulator

// What -fsanitize=thread makes the compiler call, in place of its runtime.
#define SL_HOOK(n) \
  void __tsan_read##n(void* p) { emulator::races::touch(p, n, false); } \
  void __tsan_write##n(void* p) { emulator::races::touch(p, n, true); } \
  void __tsan_unaligned_read##n(void* p) { emulator::races::touch(p, n, false); } \
  void __tsan_unaligned_write##n(void* p) { emulator::races::touch(p, n, true); }
#define SL_HOOK_ATOMIC(n, type) \
  type __tsan_atomic##n##_fetch_add(volatile type* p, type v, int) { \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); \
  } \
  type __tsan_atomic##n##_exchange(volatile type* p, type v, int) { \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); \
  }

extern "C" {
SL_HOOK(1)
SL_HOOK(2)
SL_HOOK(4)
SL_HOOK(8)
SL_HOOK(16)
SL_HOOK_ATOMIC(32, uint32_t)
SL_HOOK_ATOMIC(64, uint64_t)
uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* p, size_t n) { emulator::races::touch(p, n, false); }
void __tsan_write_range(void* p, size_t n) { emulator::races::touch(p, n, true); }
void __tsan_atomic_thread_fence(int) {}
}

#endif
