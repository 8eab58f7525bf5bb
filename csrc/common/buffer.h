// Memory that is kept from call to call: new pages can cost more than what is computed in them.
#pragma once

#include <cstddef>

namespace stepladder {

// Memory aligned to pages, large ones to huge pages.
class Buffer {
 public:
  Buffer() = default;
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  // Forgets what was in it where it grows.
  char* at_least(size_t bytes);
  void release();
  size_t bytes() const { return bytes_; }

 private:
  char* memory_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace stepladder
