// The GPU kernels as the host sees them: one table for each pair of storage dtypes, filled by
// gpu_kernels.cu, which is compiled once for each.
#pragma once

#include "common/gpu_runtime.h"
#include "multi_tensor/gpu_table.h"

namespace stepladder {

constexpr int kTileThreads = 128;
constexpr int64_t kTile = int64_t{kTileThreads} * kVector;  // elements that a block takes at a time
// Of the kernels that sum: 16 threads hold the 128 lanes of a leaf.
constexpr int kLeafThreads = kLanes / kVector;
constexpr int64_t kSumTile = int64_t{kTileThreads} / kLeafThreads * kLeaf;
constexpr int kFoldThreads = 256;

struct GpuKernels {
  DType param, state;
  // Elementwise rules: the whole update. Norm-based rules: states and sums, then ratios, then the update.
  gpu::Kernel update[kNumRules];
  gpu::Kernel ratio[kNumRules];
  gpu::Kernel apply[kNumRules];
};

// Gradient norms, whatever the dtypes: sums of each leaf, norm and clip factor from them, scaling in place.
struct GpuNormKernels {
  gpu::Kernel measure, fold, scale;
};

// nullptr where no such pair was compiled.
const GpuKernels* gpu_kernels(DType param, DType state);
const GpuNormKernels& gpu_norm_kernels();

}  // namespace stepladder
