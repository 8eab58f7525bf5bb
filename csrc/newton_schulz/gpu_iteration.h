// Runs the iterations of any number of matrices on one GPU: matrices whose smaller side fits in shared memory by a
// launch for each size of block, all others together by three launches a step.
#pragma once

#include <functional>
#include <utility>
#include <vector>

#include "multi_tensor/gpu_executor.h"
#include "newton_schulz/gpu_matrix.h"
#include "newton_schulz/matrix.h"

namespace stepladder::newton_schulz {

class GpuIteration {
 public:
  // Memory on the device, aligned to 16 bytes, that lasts until the work on the stream is done. Asked for once at most.
  using Allocate = std::function<char*(int64_t bytes)>;

  // A block asks for at most `shared_limit` bytes of shared memory: with 0 nothing is iterated on chip. `clusters`: so
  // are matrices that take a cluster of blocks; an error where the device has none.
  GpuIteration(int device, int64_t shared_limit, bool clusters);
  ~GpuIteration();

  // Waits for nothing. A capture keeps the addresses that it was given.
  void run(const std::vector<Job>& jobs, const Allocate& allocate, gpu::Stream stream);

 private:
  // Matrices that one launch iterates.
  struct OnChip {
    int side;
    bool streamed;
    int64_t slots;
    std::vector<const Job*> jobs;
    size_t records;  // index of the first word
  };
  // Units of work of one operation.
  struct Units {
    size_t first;  // index of the first word
    int64_t count;
  };
  struct Batch {
    const Options* options;
    std::vector<OnChip> on_chip;
    std::vector<const Job*> grouped;
    size_t records;
    Units chunks, row_groups, symmetric, updates;
  };

  std::vector<Batch> sort(const std::vector<Job>& jobs) const;
  int64_t place(Batch& batch);  // into words_; gives the bytes of workspace
  const uint64_t* upload(gpu::Stream stream);
  void run_on_chip(const Batch& batch, const uint64_t* words, char* workspace, gpu::Stream stream);
  void run_grouped(const Batch& batch, const uint64_t* words, char* workspace, gpu::Stream stream);
  void launch(const gpu::Kernel& kernel, const void* arguments, int64_t work, gpu::Stream stream);

  int device_;
  int64_t shared_limit_;
  int sides_;  // of kSides, how many are iterated on chip
  std::vector<uint64_t> words_, uploaded_;
  DeviceBuffer table_;
  // Of captured iterations, whose graphs may be replayed at any time.
  std::vector<DeviceBuffer> frozen_;
  UploadRing ring_;
  gpu::Event done_;
  gpu::Stream last_stream_ = nullptr;
  struct Grid {
    const void* function;
    size_t shared_bytes;
    int places;  // blocks, or clusters
  };
  std::vector<Grid> grids_;
};

}  // namespace stepladder::newton_schulz
