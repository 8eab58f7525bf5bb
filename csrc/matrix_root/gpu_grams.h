// Moving averages of Gram matrices on a GPU: L <- beta L + weight G G^T for many L at a time.
#pragma once

#include <vector>

#include "common/dtype.h"
#include "common/gpu_runtime.h"
#include "matrix_root/gpu_launcher.h"

namespace stepladder::matrix_root {

// A row of the table; uploaded as words. Strides in elements.
struct GramRecord {
  float* square;  // L, m x m
  int64_t square_row_stride, square_column_stride;
  const void* factor;  // G, m x n
  int64_t factor_row_stride, factor_column_stride;
  int64_t dtype;  // G's
  int64_t m, n;
};

// Units of work of matrix i, tiles on and below the diagonal, begin with first[i].
struct GramLaunch {
  const GramRecord* matrices = nullptr;
  const int64_t* first = nullptr;
  int64_t count = 0, work = 0;
  float beta = 0.0f, weight = 0.0f;
};

constexpr int kGramSide = 64;  // of a tile

const gpu::Kernel& gram_kernel();

class GpuGrams {
 public:
  explicit GpuGrams(int device) : launcher_(device) {}

  // In one launch; waits for nothing. A capture keeps the addresses that it was given.
  void run(const std::vector<GramRecord>& matrices, double beta, double weight, gpu::Stream stream);

 private:
  Launcher launcher_;
  WorkTable<GramRecord> table_;
};

}  // namespace stepladder::matrix_root
