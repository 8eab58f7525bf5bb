// What a kernel source includes: CUDA's own declarations under nvcc, the emulator's under a C++ compiler.
#pragma once

#include <algorithm>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#define SL_DEVICE __device__ __forceinline__
#define SL_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
// Registers are spared so that a multiprocessor takes two blocks.
#define SL_KERNEL_OF_TWO(threads) __global__ void __launch_bounds__(threads, 2)
// A kernel's only parameter: read in place, never copied to the stack.
#define SL_ARGUMENTS(type) const __grid_constant__ type
#define SL_SHARED(type, name) __shared__ type name
#define SL_UNROLL _Pragma("unroll")
#define SL_ROLLED _Pragma("unroll 1")
#else
#include "emulator/emulator.h"

#define SL_DEVICE inline
#define SL_KERNEL(threads) void
#define SL_KERNEL_OF_TWO(threads) void
#define SL_ARGUMENTS(type) const type&
#define SL_SHARED(type, name) \
  static const char name##_site = 0; \
  type& name = *static_cast<type*>(::emulator::shared(&name##_site, sizeof(type)))
#define SL_UNROLL
#define SL_ROLLED

using std::min;
#endif

#include "common/dtype.h"
#include "common/gpu_runtime.h"

namespace stepladder {
namespace gpu {

// A kernel as the host sees it; bytes of dynamic shared memory of a block.
template <class Arguments>
Kernel kernel(const char* name, int threads, void (*function)(Arguments), int64_t shared_bytes = 0) {
  using Plain = std::remove_cv_t<std::remove_reference_t<Arguments>>;
#if defined(__CUDACC__)
  const Kernel::Call call = nullptr;
#else
  const Kernel::Call call = [](const void* f, const void* arguments) {
    reinterpret_cast<void (*)(Arguments)>(reinterpret_cast<uintptr_t>(f))(*static_cast<const Plain*>(arguments));
  };
#endif
  const auto* const address = reinterpret_cast<const void*>(function);
  return {name, threads, sizeof(Plain), address, call, static_cast<size_t>(shared_bytes)};
}

// threadIdx.x, read anew each time: what is computed from it need not be kept in registers meanwhile.
SL_DEVICE int thread_anew() {
#if defined(__CUDA_ARCH__)
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
#else
  return static_cast<int>(threadIdx.x);
#endif
}

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

// One access of 16 bytes; the address must be aligned to them.
SL_DEVICE Bytes16 load16(const void* from) {
  Bytes16 value = {};
#if defined(__CUDA_ARCH__)
  // PTX, as the compiler may otherwise merge this path with the one for single elements, and split the access.
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]), "=r"(value.word[3])
               : "l"(__cvta_generic_to_global(from))
               : "memory");
#elif !defined(__CUDACC__)
  ::emulator::access(from, &value, from, sizeof(value));
#endif
  return value;
}

SL_DEVICE void store16(void* to, const Bytes16& value) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(value.word[0]),
               "r"(value.word[1]), "r"(value.word[2]), "r"(value.word[3])
               : "memory");
#elif !defined(__CUDACC__)
  ::emulator::access(to, to, &value, sizeof(value));
#endif
}

// The dynamic shared memory that the launch gave the block.
SL_DEVICE char* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ __align__(128) char bytes[];
  return bytes;
#else
  return static_cast<char*>(::emulator::dynamic_shared());
#endif
}

// ldmatrix: matrices of 8x8 elements of 2 bytes in shared memory. Lane 8i + r gives the address of row r of matrix
// i, aligned to 16 bytes, and gets elements 2(lane % 4) and the next of row lane / 4 of each matrix, or of its
// transpose.
template <int kCount, bool kTransposed>
SL_DEVICE void load_matrices(const void* row, uint32_t* out) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "ldmatrix takes 1, 2 or 4 matrices");
#if defined(__CUDA_ARCH__)
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if (kCount == 1 && !kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(out[0]) : "r"(address));
  if (kCount == 1 && kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(out[0]) : "r"(address));
  if (kCount == 2 && !kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(address));
  if (kCount == 2 && kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(address));
  if (kCount == 4 && !kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address));
  if (kCount == 4 && kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address));
#elif !defined(__CUDACC__)
  ::emulator::load_matrices(row, kCount, kTransposed, out);
#endif
}

// mma.m16n8k16: sum += a b, in fp32. Lane 4g + t holds of a the pairs at (g, 2t), (g+8, 2t), (g, 2t+8), (g+8, 2t+8), of
// b those at (2t, g), (2t+8, g), one below the other, of the sum those at (g, 2t), (g+8, 2t).
#if defined(__CUDA_ARCH__)
#define SL_MMA(type) \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#endif
SL_DEVICE void multiply_bf16(float* sum, const uint32_t* a, const uint32_t* b) {
#if defined(__CUDA_ARCH__)
  SL_MMA("bf16");
#elif !defined(__CUDACC__)
  ::emulator::multiply_matrices(::emulator::Half::bf16, sum, a, b);
#endif
}
SL_DEVICE void multiply_f16(float* sum, const uint32_t* a, const uint32_t* b) {
#if defined(__CUDA_ARCH__)
  SL_MMA("f16");
#elif !defined(__CUDACC__)
  ::emulator::multiply_matrices(::emulator::Half::f16, sum, a, b);
#endif
}

// The nearest number of 11 bits of mantissa, halves away from zero, as mma takes it.
SL_DEVICE uint32_t round_to_tf32(float value) {
#if defined(__CUDA_ARCH__)
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
#endif
}

// mma.m16n8k8: sum += a b in fp32, of operands in tf32. Lane 4g + t holds of a the elements (g, t), (g+8, t), (g, t+4),
// (g+8, t+4), of b (t, g), (t+4, g), of the sum the pairs at (g, 2t), (g+8, 2t).
SL_DEVICE void multiply_tf32(float* sum, const uint32_t* a, const uint32_t* b) {
#if defined(__CUDA_ARCH__)
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif !defined(__CUDACC__)
  ::emulator::multiply_tf32(sum, a, b);
#endif
}

// mma.m8n8k4: sum += a b in fp64. Lane 4g + t holds a's element (g, t), b's (t, g), and the sum's pair at (g, 2t).
SL_DEVICE void multiply_f64(double* sum, double a, double b) {
#if defined(__CUDA_ARCH__)
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(sum[0]), "+d"(sum[1])
               : "d"(a), "d"(b));
#elif !defined(__CUDACC__)
  ::emulator::multiply_f64(sum, a, b);
#endif
}

// cp.async: 16 bytes from global to shared memory, both aligned to them; zeros where not `inside`, and then nothing
// is read. They are there, for this thread, when it has waited for the group that it committed them in.
SL_DEVICE void copy_async(void* to, const void* from, bool inside) {
#if defined(__CUDA_ARCH__)
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(__cvta_generic_to_global(from)), "r"(inside ? 16 : 0)
      : "memory");
#elif !defined(__CUDACC__)
  ::emulator::copy_async(to, from, inside ? 16 : 0);
#endif
}
SL_DEVICE void commit_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif !defined(__CUDACC__)
  ::emulator::commit_copies();
#endif
}
// Until at most the last `kGroups` committed groups are in flight.
template <int kGroups>
SL_DEVICE void wait_for_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#elif !defined(__CUDACC__)
  ::emulator::wait_for_copies(kGroups);
#endif
}

// movmatrix: a matrix of 8x8 elements of 2 bytes, spread over the warp as load_matrices does it, to its transpose.
SL_DEVICE uint32_t transpose_matrix(uint32_t pair) {
#if defined(__CUDA_ARCH__)
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
#else
  // Lane 4g + t gets (2t, g) and (2t + 1, g): halves of what lanes 8t + g / 2 and 8t + 4 + g / 2 hold.
  const int lane = static_cast<int>(threadIdx.x % 32), from = lane % 4 * 8 + lane / 8, half = lane / 4 % 2 * 16;
  const uint32_t first = __shfl_sync(0xffffffffu, pair, from), second = __shfl_sync(0xffffffffu, pair, from + 4);
  return (first >> half & 0xffffu) | (second >> half & 0xffffu) << 16;
#endif
}

// Clusters: blocks that run at the same time and reach each other's shared memory, from sm_90 on. The host launches
// nothing that needs them elsewhere.
#if defined(__CUDACC__)
SL_DEVICE unsigned no_cluster() {
  __trap();
  return 0;
}
#endif

// Of the block in its cluster.
SL_DEVICE unsigned cluster_rank() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#elif defined(__CUDACC__)
  return no_cluster();
#else
  return ::emulator::current().cluster_rank;
#endif
}

// All threads of all blocks of the cluster; what one wrote before it, in any block's memory, all see after it.
SL_DEVICE void cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
#elif defined(__CUDACC__)
  no_cluster();
#else
  ::emulator::cluster_barrier();
#endif
}

// What block `rank` of the cluster has in place of `own` in its shared memory, for ordinary accesses. That block must
// have begun, and must not end: a barrier of the cluster stands before the first access and after the last.
template <class T>
SL_DEVICE T* shared_of(unsigned rank, T* own) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  T* address;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(own), "r"(rank));
  return address;
#elif defined(__CUDACC__)
  no_cluster();
  return own;
#else
  return static_cast<T*>(::emulator::shared_of(rank, own));
#endif
}

// Two bf16 in a word, `low` at the lower address, rounded to nearest even.
SL_DEVICE uint32_t pack_bf16(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return static_cast<uint32_t>(to_bf16(low).bits) | static_cast<uint32_t>(to_bf16(high).bits) << 16;
#endif
}

}  // namespace gpu
}  // namespace stepladder
