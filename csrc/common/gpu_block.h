// What all threads of a block compute together.
#pragma once

#include "common/gpu.h"

namespace stepladder {

struct WarpSums {
  double of[32];
};

// A double of each thread, added in one order: within a warp in halves, then warp after warp. All threads of a block
// call it together with the same `scratch`, a double for each warp, and get the sum.
SL_DEVICE double block_sum(double value, double* scratch) {
  SL_UNROLL
  for (int half = 16; half > 0; half /= 2) value += __shfl_xor_sync(0xffffffffu, value, half);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0.0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += scratch[warp];
  return sum;
}

}  // namespace stepladder
