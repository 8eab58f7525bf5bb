// What every sequence of launches over a table of matrices needs of the host.
#pragma once

#include <cstring>
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

// Records of matrices, then the first unit of work of each, as words.
template <class Record>
class WorkTable {
 public:
  void clear() {
    words_.clear();
    first_.clear();
    work_ = 0;
  }

  void add(const Record& record, int64_t units) {
    static_assert(sizeof(Record) % sizeof(uint64_t) == 0, "the table is made of words");
    words_.resize(words_.size() + sizeof(Record) / sizeof(uint64_t));
    memcpy(words_.data() + words_.size() - sizeof(Record) / sizeof(uint64_t), &record, sizeof(Record));
    first_.push_back(static_cast<uint64_t>(work_));
    work_ += units;
  }

  // Where they are then, and how many.
  template <class Launch>
  void upload(Launcher& launcher, Launch& launch, gpu::Stream stream) {
    const size_t records = words_.size();
    words_.insert(words_.end(), first_.begin(), first_.end());
    const uint64_t* const words = launcher.upload(words_, stream);
    launch.matrices = reinterpret_cast<const Record*>(words);
    launch.first = reinterpret_cast<const int64_t*>(words + records);
    launch.count = static_cast<int64_t>(first_.size());
    launch.work = work_;
  }

  bool empty() const { return first_.empty(); }

 private:
  std::vector<uint64_t> words_, first_;
  int64_t work_ = 0;
};

}  // namespace stepladder::matrix_root
