// What the plan asks of whoever steps the tensors of one GPU.
#pragma once

#include <vector>

#include "common/gpu_runtime.h"
#include "multi_tensor/tensor.h"

namespace stepladder {

class Executor {
 public:
  virtual ~Executor() = default;

  // To be called when a tensor, its layout or the active set has changed. `waves[w]`: indices of the tensors
  // on this device whose writes do not overlap, in order.
  virtual void schedule(const std::vector<Tensor>& tensors, const std::vector<std::vector<int>>& waves) = 0;

  // The step. `found_inf`: on the device, or null.
  virtual void run(const std::vector<Tensor>& tensors, const GradientScale& scale, gpu::Stream stream) = 0;

  // Measures the gradients of all scheduled tensors. The norm and the factor that clips to `max_norm` go to two
  // doubles on the device, `result` or, where that is null, the executor's own; `found_inf` is set to 0 or 1.
  virtual void measure(const std::vector<Tensor>& tensors, Norm kind, const GradientScale& scale, double max_norm,
                       double* result, float* found_inf, gpu::Stream stream) = 0;
  // Where measure() leaves the factor of its own.
  virtual const double* clip_factor() const = 0;
  // These wait for the device. Parts of the scheduled tensors, in their order, as measure() left them.
  virtual std::vector<double> partials(gpu::Stream stream, bool* finite) = 0;
  virtual double norm(gpu::Stream stream) = 0;
  // Multiplies the gradients by the factor that is on the device, or by `factor`.
  virtual void scale_gradients(const std::vector<Tensor>& tensors, const double* factor_address, double factor,
                               gpu::Stream stream) = 0;

  const std::vector<int>& scheduled() const { return all_; }

 protected:
  std::vector<int> all_;  // scheduled tensors, in order
};

}  // namespace stepladder
