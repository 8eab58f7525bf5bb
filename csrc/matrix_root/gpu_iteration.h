// Computes the inverse roots of any number of matrices on one GPU: those that fit in shared memory by a launch for each
// size of block, all others together by a sequence of launches that is as long as the longest course can be.
#pragma once

#include <vector>

#include "matrix_root/gpu_launcher.h"
#include "matrix_root/gpu_roots.h"

namespace stepladder::matrix_root {

// Matrices [count, n, n] in memory, and where their results go.
struct Stack {
  const float* in = nullptr;
  int64_t count = 0, n = 0;
  int64_t stride = 0, row_stride = 0, column_stride = 0;  // elements
  float* out = nullptr;                                   // contiguous
  int32_t* iterations = nullptr;
  int8_t* status = nullptr;
};

class GpuRoots {
 public:
  // A block asks for at most `shared_limit` bytes of shared memory: with 0 nothing is iterated on chip. Matrices that
  // are not go together as far as their buffers fit in `buffer_limit` bytes.
  GpuRoots(int device, int64_t shared_limit, int64_t buffer_limit)
      : launcher_(device), shared_limit_(shared_limit), buffer_limit_(buffer_limit) {}

  // Waits for nothing. A capture keeps the addresses that it was given.
  void run(const std::vector<Stack>& stacks, const Options& options, const Allocate& allocate, gpu::Stream stream);

 private:
  // Matrices that one launch iterates.
  struct OnChip {
    int side;
    size_t first, count;  // of records_
  };
  // Units of work of one kind.
  struct Units {
    size_t first;  // index of the first word
    int64_t count;
  };
  // Matrices whose operations go together.
  struct Batch {
    bool wide_only;       // fp32 was tried on chip
    size_t first, count;  // of records_
    Units fast, wide, rows;
  };
  struct Turn;

  void sort(const std::vector<Stack>& stacks);
  void add_batches(size_t first, size_t count, bool wide_only);
  void place(Batch& batch);
  void run_batch(const Batch& batch, const Turn& turn);

  Launcher launcher_;
  int64_t shared_limit_, buffer_limit_;
  std::vector<RootRecord> records_;
  std::vector<OnChip> on_chip_;
  std::vector<Batch> batches_;
  int64_t buffer_bytes_ = 0, max_units_ = 0;
  std::vector<uint64_t> words_;
};

}  // namespace stepladder::matrix_root
