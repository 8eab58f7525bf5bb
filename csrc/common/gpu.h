// What a kernel source includes: CUDA's own declarations under nvcc, the emulator's under a C++ compiler.
#pragma once

#include <algorithm>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#define SL_DEVICE __device__ __forceinline__
#define SL_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
// A kernel's only parameter: read in place, never copied to the stack.
#define SL_ARGUMENTS(type) const __grid_constant__ type
#define SL_SHARED(type, name) __shared__ type name
#define SL_UNROLL _Pragma("unroll")
#define SL_ROLLED _Pragma("unroll 1")
#else
#include "emulator/emulator.h"

#define SL_DEVICE inline
#define SL_KERNEL(threads) void
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

// A kernel as the host sees it.
template <class Arguments>
Kernel kernel(const char* name, int threads, void (*function)(Arguments)) {
  using Plain = std::remove_cv_t<std::remove_reference_t<Arguments>>;
#if defined(__CUDACC__)
  return {name, threads, sizeof(Plain), reinterpret_cast<const void*>(function), nullptr};
#else
  return {
      name, threads, sizeof(Plain), reinterpret_cast<const void*>(function), [](const void* f, const void* arguments) {
        reinterpret_cast<void (*)(Arguments)>(reinterpret_cast<uintptr_t>(f))(*static_cast<const Plain*>(arguments));
      }};
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

}  // namespace gpu
}  // namespace stepladder
