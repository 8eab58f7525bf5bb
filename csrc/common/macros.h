// Compiler differences, in one place.
#pragma once

#if defined(__CUDACC__)
#define SL_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// Always inlined: the CPU kernels are compiled once for each vector width, and an out-of-line copy
// shared between them would be whichever the linker met first.
#define SL_HD inline __attribute__((always_inline))
#else
#define SL_HD inline
#endif

#if defined(__GNUC__) && !defined(__CUDA_ARCH__)
#define SL_RESTRICT __restrict__
#else
#define SL_RESTRICT
#endif

// Before a loop whose iterations are independent, where `omp simd` would keep local arrays in memory.
#if defined(__clang__)
#define SL_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define SL_INDEPENDENT _Pragma("GCC ivdep")
#else
#define SL_INDEPENDENT
#endif
