// Orthonormal bases of the columns of any number of matrices on one GPU.
#pragma once

#include <vector>

#include "matrix_root/gpu_bases.h"
#include "matrix_root/gpu_launcher.h"

namespace stepladder::matrix_root {

// Matrices [count, m, n] in memory, and where their results go.
struct BasisStack {
  const float* in = nullptr;
  int64_t count = 0, m = 0, n = 0;
  int64_t stride = 0, row_stride = 0, column_stride = 0;  // elements
  float* out = nullptr;                                   // contiguous
  bool* fallback = nullptr;
  bool* finite = nullptr;
};

class GpuBases {
 public:
  // Matrices go together as far as their buffers fit in `buffer_limit` bytes.
  GpuBases(int device, int64_t buffer_limit) : launcher_(device), buffer_limit_(buffer_limit) {}

  // `shift`: of the first pass, relative to the trace; `limit`: of a basis's distance from an orthonormal one. Waits
  // for nothing. A capture keeps the addresses that it was given.
  void run(const std::vector<BasisStack>& stacks, bool householder, double shift, double limit,
           const Allocate& allocate, gpu::Stream stream);

 private:
  // Units of work of one kind.
  struct Units {
    size_t first;  // index of the first word
    int64_t count;
  };
  // Matrices that go together.
  struct Batch {
    size_t first, count;  // of records_
    int64_t blocks;       // of the widest
    Units tiles, columns, rows;
  };

  void sort(const std::vector<BasisStack>& stacks);
  void place(Batch& batch);
  void run_batch(const Batch& batch, BasisLaunch launch, const uint64_t* words, double shift, gpu::Stream stream);

  Launcher launcher_;
  int64_t buffer_limit_;
  std::vector<BasisRecord> records_;
  std::vector<Batch> batches_;
  int64_t buffer_bytes_ = 0, max_tiles_ = 0;
  std::vector<uint64_t> words_;
};

}  // namespace stepladder::matrix_root
