// The fixed reduction tree on a GPU: 16 threads hold the 128 lanes of a leaf, 8 each, and add its rows one
// after another; lanes are folded in halves by shuffles, leaves in halves by a block.
#pragma once

#include "multi_tensor/gpu_access.h"
#include "multi_tensor/sums.h"

namespace stepladder {

template <class T>
SL_DEVICE T& sum_at(void* sums, int64_t i) {
  return *reinterpret_cast<T*>(static_cast<char*>(sums) + 8 * i);
}

template <class T>
struct LaneSums {
  T lanes[kVector] = {};

  // Complete in the first of the leaf's threads. All threads of the warp call it together.
  template <class Join>
  SL_DEVICE T total(Join join) {
    SL_UNROLL
    for (int half = kLeafThreads / 2; half > 0; half /= 2) {
      SL_UNROLL
      for (int k = 0; k < kVector; ++k)
        lanes[k] = join(lanes[k], __shfl_down_sync(0xffffffffu, lanes[k], half, kLeafThreads));
    }
    SL_UNROLL
    for (int half = kVector / 2; half > 0; half /= 2) {
      SL_UNROLL
      for (int k = 0; k < half; ++k) lanes[k] = join(lanes[k], lanes[k + half]);
    }
    return lanes[0];
  }
};

// Folds sums [begin, begin + n) in halves, in index order, into the first. All threads of a block call it
// together, and see the result.
template <class T, class Join>
SL_DEVICE void fold_leaves(void* sums, int64_t begin, int64_t n, Join join) {
  __syncthreads();
  while (n > 1) {
    const int64_t half = (n + 1) / 2;
    for (int64_t j = threadIdx.x; j < n - half; j += blockDim.x)
      sum_at<T>(sums, begin + j) = join(sum_at<T>(sums, begin + j), sum_at<T>(sums, begin + j + half));
    n = half;
    __syncthreads();
  }
}

}  // namespace stepladder
