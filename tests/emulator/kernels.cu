// Kernels right and wrong, for the test of the emulator itself: `kernels NAME` runs one and prints its result,
// or what was wrong with it.
#include "common/gpu.h"

#include <cstdio>
#include <cstring>
#include <vector>

#include "common/error.h"
#include "emulator/run.h"

using namespace stepladder;

namespace {

constexpr int kThreads = 96;

struct Values {
  int of[kThreads];
  int& operator[](unsigned i) { return of[i]; }
};

struct Arguments {
  int* out;
};

// Adds what all threads of a block put down.
SL_KERNEL(kThreads)
reduction(SL_ARGUMENTS(Arguments) a) {
  SL_SHARED(Values, values);
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  for (unsigned n = kThreads; n > 1; n = (n + 1) / 2) {
    const unsigned half = (n + 1) / 2;
    if (threadIdx.x < n - half) values[threadIdx.x] += values[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) atomicAdd(a.out, values[0]);
}

SL_KERNEL(kThreads)
missing_barrier(SL_ARGUMENTS(Arguments) a) {
  SL_SHARED(Values, values);
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  atomicAdd(a.out, values[(threadIdx.x + 1) % kThreads]);
}

// The barrier that keeps fast threads from overwriting what slow ones still read.
SL_KERNEL(kThreads)
missing_second_barrier(SL_ARGUMENTS(Arguments) a) {
  SL_SHARED(Values, values);
  for (int round = 0; round < 2; ++round) {
    values[threadIdx.x] = round;
    __syncthreads();
    atomicAdd(a.out, values[(threadIdx.x + 1) % kThreads]);
  }
}

// A barrier of one warp does not order another's.
SL_KERNEL(kThreads)
barrier_of_a_warp(SL_ARGUMENTS(Arguments) a) {
  SL_SHARED(Values, values);
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncwarp();
  atomicAdd(a.out, values[(threadIdx.x + 32) % kThreads]);
}

SL_KERNEL(kThreads)
within_a_warp(SL_ARGUMENTS(Arguments) a) {
  SL_SHARED(Values, values);
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncwarp();
  atomicAdd(a.out, values[threadIdx.x ^ 1]);
}

SL_KERNEL(kThreads)
out_of_bounds(SL_ARGUMENTS(Arguments) a) {
  SL_SHARED(Values, values);
  values[threadIdx.x + 1] = 1;
  __syncthreads();
  atomicAdd(a.out, values[threadIdx.x]);
}

SL_KERNEL(kThreads)
beyond_global_memory(SL_ARGUMENTS(Arguments) a) { a.out[threadIdx.x] = 1; }

SL_KERNEL(kThreads)
misaligned(SL_ARGUMENTS(Arguments) a) { gpu::load16(reinterpret_cast<const char*>(a.out) + 4); }

// Half of the threads wait where the other half never comes.
SL_KERNEL(kThreads)
divergent_barrier(SL_ARGUMENTS(Arguments) a) {
  if (threadIdx.x < 48) __syncthreads();
  __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x), 0);
  atomicAdd(a.out, 1);
}

SL_KERNEL(kThreads)
lane_that_has_ended(SL_ARGUMENTS(Arguments) a) {
  if (threadIdx.x == 5) return;
  atomicAdd(a.out, __shfl_xor_sync(0xffffffffu, 1, 4));
}

SL_KERNEL(kThreads)
lane_outside_of_mask(SL_ARGUMENTS(Arguments) a) { atomicAdd(a.out, __shfl_sync(0x0000ffffu, 1, 0)); }

// Halves of a warp exchange apart; votes count.
SL_KERNEL(kThreads)
collectives(SL_ARGUMENTS(Arguments) a) {
  const unsigned lane = threadIdx.x % 32, mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  int sum = static_cast<int>(lane);
  for (int half = 8; half > 0; half /= 2) sum += __shfl_xor_sync(mask, sum, half);
  const int expected = lane < 16 ? 120 : 376;
  const bool right = sum == expected && __shfl_down_sync(0xffffffffu, lane, 1u) == (lane == 31 ? 31 : lane + 1) &&
                     __ballot_sync(0xffffffffu, lane % 3 == 0) == 0x49249249u && __any_sync(0xffffffffu, lane == 7) &&
                     !__all_sync(0xffffffffu, lane == 7);
  atomicAdd(a.out, right ? 1 : 0);
}

const gpu::Kernel kKernels[] = {
    gpu::kernel("reduction", kThreads, reduction),
    gpu::kernel("missing_barrier", kThreads, missing_barrier),
    gpu::kernel("missing_second_barrier", kThreads, missing_second_barrier),
    gpu::kernel("barrier_of_a_warp", kThreads, barrier_of_a_warp),
    gpu::kernel("within_a_warp", kThreads, within_a_warp),
    gpu::kernel("out_of_bounds", kThreads, out_of_bounds),
    gpu::kernel("beyond_global_memory", kThreads, beyond_global_memory),
    gpu::kernel("misaligned", kThreads, misaligned),
    gpu::kernel("divergent_barrier", kThreads, divergent_barrier),
    gpu::kernel("lane_that_has_ended", kThreads, lane_that_has_ended),
    gpu::kernel("lane_outside_of_mask", kThreads, lane_outside_of_mask),
    gpu::kernel("collectives", kThreads, collectives),
};

}  // namespace

int main(int, char** names) {
  for (const gpu::Kernel& kernel : kKernels) {
    if (strcmp(kernel.name, names[1]) != 0) continue;
    std::vector<int> out(8);
    const Arguments arguments{out.data()};
    try {
      emulator::run(kernel.call, kernel.function, &arguments, 2, kernel.threads);
      printf("result %d\n", out[0]);
    } catch (const Error& error) {
      printf("error: %s\n", error.what());
    }
    return 0;
  }
  return 1;
}
