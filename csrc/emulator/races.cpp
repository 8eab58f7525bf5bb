#include "emulator/races.h"

#if defined(SL_EMULATOR_RACES)

#include <cstdint>
#include <vector>

#include "emulator/emulator.h"

namespace emulator {
namespace races {

namespace {

// When a thread touched a byte: how many barriers its block and its warp had passed.
struct Touch {
  int thread = -1;
  uint32_t block_epoch = 0, warp_epoch = 0;
};

struct Cell {
  Touch write, read;
  bool many_readers = false;
  bool in_flight = false;  // `write` began a copy that has not been waited for
};

struct Region {
  uintptr_t begin;
  std::vector<Cell> cells;
};

std::vector<Region> regions;
std::vector<uint32_t> warp_epochs;
uint32_t block_epoch = 0;
std::string first;

bool ordered(const Touch& before, int thread) {
  if (before.thread < 0 || before.thread == thread || before.block_epoch != block_epoch) return true;
  return before.thread / 32 == thread / 32 && before.warp_epoch != warp_epochs[thread / 32];
}

void report(const char* what, const Touch& before, int thread, size_t offset,
            const char* why = "no barrier stands between them") {
  if (!first.empty()) return;
  first = "threads " + std::to_string(before.thread) + " and " + std::to_string(thread) + " race (" + what +
          ") at byte " + std::to_string(offset) + " of a shared variable: " + why;
}

enum class Flight { none, begins, ends };

void touch(const void* address, size_t bytes, bool write, Flight flight = Flight::none) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  for (Region& region : regions) {
    if (at < region.begin || at >= region.begin + region.cells.size()) continue;
    const int thread = static_cast<int>(current().thread.x);
    const Touch now{thread, block_epoch, warp_epochs[thread / 32]};
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
        if (!ordered(cell.read, thread) || (cell.many_readers && cell.read.block_epoch == block_epoch))
          report("a read, then a write", cell.read, thread, b);
        cell.write = now;
        cell.many_readers = false;
        cell.in_flight = flight == Flight::begins;
      } else {
        cell.many_readers = !ordered(cell.read, thread) || (cell.many_readers && cell.read.block_epoch == block_epoch);
        cell.read = now;
      }
    }
    return;
  }
}

}  // namespace

void begin_block(int threads) {
  regions.clear();
  warp_epochs.assign((threads + 31) / 32, 0);
  block_epoch = 0;
  first.clear();
}

void watch(const void* memory, size_t bytes) {
  regions.push_back({reinterpret_cast<uintptr_t>(memory), std::vector<Cell>(bytes)});
}

void block_barrier() { ++block_epoch; }

void warp_barrier(int first_thread, unsigned mask) {
  if (mask == 0xffffffffu) ++warp_epochs[first_thread / 32];
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
