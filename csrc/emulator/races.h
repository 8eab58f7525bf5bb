// Finds threads of a block or a cluster that meet in shared memory without a barrier between them. Active where kernels
// are compiled with -fsanitize=thread and SL_EMULATOR_RACES; the compiler's calls then come here.
#pragma once

#include <cstddef>
#include <string>

namespace emulator {
namespace races {

#if defined(SL_EMULATOR_RACES)
void begin_cluster(int blocks, int threads);
void end_block(unsigned rank);
void watch(const void* memory, size_t bytes, unsigned rank);  // of the block whose memory it is
void block_barrier(unsigned rank);
void cluster_barrier();
void warp_barrier(int first_thread, unsigned mask);
// What the emulator does in the running thread's name.
void read(const void* memory, size_t bytes);
void begin_copy(const void* memory, size_t bytes);
void end_copy(const void* memory, size_t bytes);
std::string found();  // the first race of this cluster, or nothing
#else
inline void begin_cluster(int, int) {}
inline void end_block(unsigned) {}
inline void watch(const void*, size_t, unsigned) {}
inline void block_barrier(unsigned) {}
inline void cluster_barrier() {}
inline void warp_barrier(int, unsigned) {}
inline void read(const void*, size_t) {}
inline void begin_copy(const void*, size_t) {}
inline void end_copy(const void*, size_t) {}
inline std::string found() { return {}; }
#endif

}  // namespace races
}  // namespace emulator
