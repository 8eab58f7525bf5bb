// Runs the tensors of a plan that live on one GPU: a launch for each rule and pair of (parameter, state)
// dtypes, whatever the groups.
#pragma once

#include <memory>
#include <vector>

#include "multi_tensor/executor.h"
#include "multi_tensor/gpu_kernels.h"

namespace stepladder {

// Memory on the device that grows and is kept.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(DeviceBuffer&& other) noexcept;
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept;
  ~DeviceBuffer();
  // Zeroed whenever it grows.
  void* at_least(size_t bytes);
  size_t bytes() const { return bytes_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

// Carries words to the device: a ring of pinned buffers, each reused only when its copy is done.
class UploadRing {
 public:
  ~UploadRing();
  void upload(uint64_t* to, const uint64_t* words, size_t count, gpu::Stream stream);

 private:
  static constexpr int kSlots = 4;
  struct Slot {
    void* memory = nullptr;
    size_t bytes = 0;
    gpu::Event done;
  };
  Slot slots_[kSlots];
  int next_ = 0;
};

// A table together with its copy on the device.
class PlacedTable {
 public:
  Table table;

  // Fills what a launch needs of the table: words in the arguments, or an address.
  void place(Launch* launch, UploadRing& ring, gpu::Stream stream);
  // After the table was built anew.
  void forget() { uploaded_.clear(); }

 private:
  DeviceBuffer device_;
  std::vector<uint64_t> uploaded_;  // what `device_` holds
  // Of captured steps, whose graphs may be replayed at any time: kept, and never written again.
  std::vector<DeviceBuffer> frozen_;
};

class GpuExecutor : public Executor {
 public:
  explicit GpuExecutor(int device) : device_(device) {}
  ~GpuExecutor() override;

  void schedule(const std::vector<Tensor>& tensors, const std::vector<std::vector<int>>& waves) override;
  void run(const std::vector<Tensor>& tensors, const GradientScale& scale, gpu::Stream stream) override;
  void measure(const std::vector<Tensor>& tensors, Norm kind, const GradientScale& scale, double max_norm,
               double* result, float* found_inf, gpu::Stream stream) override;
  const double* clip_factor() const override { return norm_.as<double>() + 1; }
  std::vector<double> partials(gpu::Stream stream, bool* finite) override;
  double norm(gpu::Stream stream) override;
  void scale_gradients(const std::vector<Tensor>& tensors, const double* factor_address, double factor,
                       gpu::Stream stream) override;

 private:
  struct PlacedBatch {
    const GpuKernels* kernels;
    Rule rule;
    PlacedTable placed;
    DeviceBuffer sums, ratios;
    bool captured = false;
  };

  // Around the launches of one call: tables and sums are the executor's own, so that work on another stream
  // must wait for the last.
  class Turn;

  int grid(const gpu::Kernel& kernel, int64_t work);
  void grow(DeviceBuffer& buffer, size_t bytes);
  void place_norms(const std::vector<Tensor>& tensors, Launch* launch, gpu::Stream stream);

  int device_;
  std::vector<std::unique_ptr<PlacedBatch>> batches_;  // in the order in which they run
  PlacedTable norms_;
  bool norms_current_ = false;
  DeviceBuffer norm_sums_, partials_, norm_, ticket_;
  UploadRing ring_;
  // Once a step was captured, its graph may be replayed at any time: what it points to is kept.
  bool captured_ = false;
  std::vector<std::unique_ptr<PlacedBatch>> retired_batches_;
  std::vector<DeviceBuffer> retired_buffers_;
  gpu::Event done_;
  gpu::Stream last_stream_ = nullptr;
  std::vector<std::pair<const void*, int>> grids_;  // kernel, blocks that run at once
};

}  // namespace stepladder
