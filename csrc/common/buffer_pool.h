// Memory that whoever is done with it leaves to the next.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "common/buffer.h"

namespace stepladder {

// Keeps at most `limit` bytes, those that came back last, until it is asked for more than the system has. Serves all
// threads, and nobody waits for another: a process may be forked while a thread is at work here.
class BufferPool {
 public:
  explicit BufferPool(size_t limit) : limit_(limit) {}

  // At least as large, and if it was kept at the most by a quarter larger.
  std::unique_ptr<Buffer> take(size_t bytes);
  void give_back(std::unique_ptr<Buffer> buffer) noexcept;
  size_t kept_bytes();

 private:
  std::vector<std::unique_ptr<Buffer>> emptied();

  size_t limit_, kept_bytes_ = 0;
  std::vector<std::unique_ptr<Buffer>> kept_;  // oldest first
  std::mutex mutex_;
};

}  // namespace stepladder
