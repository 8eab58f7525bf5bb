// What every sequence of launches over a table of matrices needs of the host.
#pragma once

#include <functional>
#include <vector>

#include "multi_tensor/gpu_executor.h"

namespace stepladder::matrix_root {

// Memory on the device, aligned to 16 bytes, that lasts until the work on the stream is done.
using Allocate = std::function<char*(int64_t bytes)>;

inline int64_t parts(int64_t size, int64_t part) { return (size + part - 1) / part; }
// Up to where another part of a workspace may begin.
inline int64_t aligned(int64_t bytes) { return parts(bytes, 256) * 256; }
// Tiles of so many rows, on and below the diagonal.
inline int64_t triangle(int64_t n, int64_t side) { return parts(n, side) * (parts(n, side) + 1) / 2; }

void check_address(const void* address, size_t item, const char* name);
char* checked_workspace(const Allocate& allocate, int64_t bytes);

class Launcher {
 public:
  explicit Launcher(int device) : device_(device) {}
  ~Launcher();
  int device() const { return device_; }

  // The words on the device. Work on another stream than the last waits for it, as the table is the launcher's own; a
  // capture gets one that is not written again.
  const uint64_t* upload(const std::vector<uint64_t>& words, gpu::Stream stream);
  // As many blocks as fit, or as there are units of work; nothing without work.
  void launch(const gpu::Kernel& kernel, const void* arguments, int64_t work, gpu::Stream stream);
  // After the last launch that reads the table.
  void end(gpu::Stream stream);

 private:
  int device_;
  std::vector<uint64_t> uploaded_;
  DeviceBuffer table_;
  // Of captured calls, whose graphs may be replayed at any time.
  std::vector<DeviceBuffer> frozen_;
  UploadRing ring_;
  gpu::Event done_;
  gpu::Stream last_stream_ = nullptr;
  struct Grid {
    const void* function;
    int blocks;
  };
  std::vector<Grid> grids_;
};

}  // namespace stepladder::matrix_root
