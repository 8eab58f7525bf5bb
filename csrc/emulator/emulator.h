// A CUDA device on the CPU, for tests: kernels compiled by a C++ compiler run block after block, a fiber for
// each thread, and the blocks of a cluster side by side. Barriers, shuffles and votes check who takes part; a wait that
// cannot end, a misaligned vector access and an exception in a kernel become an Error. No toolkit header.
//
// Shared memory is poisoned before each block and allocated at its exact size, so that AddressSanitizer sees
// overruns. With SL_EMULATOR_RACES, kernels compiled with -fsanitize=thread have each access to shared
// memory checked: two threads may meet there only across a barrier, and nobody where a copy is in flight.
//
// An asynchronous copy is made as late as a device may make it: when its thread waits for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace emulator {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// Of the thread that runs.
struct Thread {
  Dim3 thread, block, block_dim, grid_dim;
  unsigned cluster_rank = 0;  // of the block
};
const Thread& current();

// A block's variable, told apart by the address of its site.
void* shared(const void* site, size_t bytes);
// What the launch asked for.
void* dynamic_shared();

void access(const void* address, void* to, const void* from, size_t bytes);

enum class Collective : int {
  block_barrier,
  cluster_barrier,
  warp_barrier,
  shuffle,
  ballot,
  matrix_load,
  matrix_product
};

void block_barrier();
void cluster_barrier();
// What another block of the cluster has in place of this address in shared memory. It must not have ended.
void* shared_of(unsigned rank, void* own);
// Waits until all lanes of `mask` have come with their values; then reads the value of `source`.
uint64_t warp_exchange(Collective kind, unsigned mask, uint64_t value, unsigned source);
unsigned lane();

// ldmatrix: lane 8i + r gives the address of row r of matrix i, 8 elements of 2 bytes; `out` has a word for each
// of `count` matrices.
void load_matrices(const void* row, int count, bool transposed, uint32_t* out);
enum class Half : int { bf16, f16 };
// mma.m16n8k16: sum += a b, in fp32.
void multiply_matrices(Half type, float* sum, const uint32_t* a, const uint32_t* b);
// mma.m16n8k8 of tf32, whose low 13 bits are not looked at, and mma.m8n8k4 of fp64.
void multiply_tf32(float* sum, const uint32_t* a, const uint32_t* b);
void multiply_f64(double* sum, double a, double b);

// cp.async: 16 bytes to shared memory, of which the first `source_bytes` are read and the rest are zero.
void copy_async(void* to, const void* from, int source_bytes);
void commit_copies();
void wait_for_copies(int groups_left);

template <class T>
uint64_t pack(T value) {
  static_assert(sizeof(T) <= 8, "shuffles move at most 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source) {
  const uint64_t bits = warp_exchange(Collective::shuffle, mask, pack(value), source);
  T result;
  memcpy(&result, &bits, sizeof(T));
  return result;
}

}  // namespace emulator

#define threadIdx (::emulator::current().thread)
#define blockIdx (::emulator::current().block)
#define blockDim (::emulator::current().block_dim)
#define gridDim (::emulator::current().grid_dim)

inline void __syncthreads() { ::emulator::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  ::emulator::warp_exchange(::emulator::Collective::warp_barrier, mask, 0, ::emulator::lane());
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const unsigned lane = ::emulator::lane();
  return ::emulator::shuffle(mask, value, (lane & ~(width - 1u)) | (static_cast<unsigned>(source) & (width - 1u)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const unsigned lane = ::emulator::lane(), source = lane ^ static_cast<unsigned>(lane_mask);
  return ::emulator::shuffle(mask, value, (source ^ lane) < static_cast<unsigned>(width) ? source : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = ::emulator::lane(), source = lane + delta;
  return ::emulator::shuffle(mask, value, (lane & (width - 1u)) + delta < static_cast<unsigned>(width) ? source : lane);
}
unsigned __ballot_sync(unsigned mask, int predicate);
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

template <class T>
T atomicAdd(T* address, T value) {
  static_assert(std::is_integral<T>::value, "results of floating-point atomics depend on their order");
  return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}
template <class T>
T atomicExch(T* address, T value) {
  static_assert(std::is_integral<T>::value, "atomics on integers only");
  return __atomic_exchange_n(address, value, __ATOMIC_SEQ_CST);
}
