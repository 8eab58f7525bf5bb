// Finds threads of a block that meet in shared memory without a barrier between them. Active where kernels
// are compiled with -fsanitize=thread and SL_EMULATOR_RACES; the compiler's calls then come here.
#pragma once

#include <cstddef>
#include <string>

namespace emulator {
namespace races {

#if defined(SL_EMULATOR_RACES)
void begin_block(int threads);
void watch(const void* memory, size_t bytes);
void block_barrier();
void warp_barrier(int first_thread, unsigned mask);
// What the emulator does in the running thread's name.
void read(const void* memory, size_t bytes);
void begin_copy(const void* memory, size_t bytes);
void end_copy(const void* memory, size_t bytes);
std::string found();  // the first race of this block, or nothing
#else
inline void begin_block(int) {}
inline void watch(const void*, size_t) {}
inline void block_barrier() {}
inline void warp_barrier(int, unsigned) {}
inline void read(const void*, size_t) {}
inline void begin_copy(const void*, size_t) {}
inline void end_copy(const void*, size_t) {}
inline std::string found() { return {}; }
#endif

}  // namespace races
}  // namespace emulator
