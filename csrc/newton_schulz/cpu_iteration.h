// Runs the iterations of any number of matrices on the CPU.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "common/buffer.h"
#include "newton_schulz/cpu_kernels.h"

namespace stepladder::newton_schulz {

// Keeps its memory from call to call, up to `kept_bytes`.
class CpuIteration {
 public:
  explicit CpuIteration(size_t kept_bytes) : kept_bytes_(kept_bytes) {}

  // In one parallel region: each thread works on a matrix of its own, and helps with the others' when none is left.
  // What a task throws is thrown again once all threads have stopped; matrices under way are then undefined.
  void run(const std::vector<Job>& jobs, const Engine& engine, int threads);

 private:
  size_t kept_bytes_;
  std::vector<std::unique_ptr<Buffer>> workspaces_, scratch_;
  std::mutex mutex_;
};

}  // namespace stepladder::newton_schulz
