// Steps the tensors of one device by tables that are handed to Python, whose kernels (Triton's) work through
// them.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>

#include "multi_tensor/executor.h"
#include "multi_tensor/gpu_table.h"

namespace stepladder {

// A table and what its launch serves, as Python sees it. Its words stay where they are for as long as it lives.
struct PlanTable {
  std::string rule;  // empty: gradients alone
  DType param = DType::f32, state = DType::f32;
  Table table;
};

class TableExecutor : public Executor {
 public:
  // An object with the methods of stepladder.triton_kernels.executor.Executor.
  explicit TableExecutor(pybind11::object kernels);

  void schedule(const std::vector<Tensor>& tensors, const std::vector<std::vector<int>>& waves) override;
  void run(const std::vector<Tensor>& tensors, const GradientScale& scale, gpu::Stream stream) override;
  void measure(const std::vector<Tensor>& tensors, Norm kind, const GradientScale& scale, double max_norm,
               double* result, float* found_inf, gpu::Stream stream) override;
  const double* clip_factor() const override;
  std::vector<double> partials(gpu::Stream stream, bool* finite) override;
  double norm(gpu::Stream stream) override;
  void scale_gradients(const std::vector<Tensor>& tensors, const double* factor_address, double factor,
                       gpu::Stream stream) override;

 private:
  void place_norms(const std::vector<Tensor>& tensors);

  pybind11::object kernels_;
  std::vector<std::shared_ptr<PlanTable>> tables_;
  std::shared_ptr<PlanTable> norms_;  // null: to be built
};

}  // namespace stepladder
