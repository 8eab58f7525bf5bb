#include "table_executor.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <utility>

#include "multi_tensor/plan.h"

namespace py = pybind11;

namespace stepladder {

namespace {

constexpr int64_t kMaxChunkTiles = 16;

uintptr_t word_of(const void* address) { return reinterpret_cast<uintptr_t>(address); }

}  // namespace

TableExecutor::TableExecutor(py::object kernels) : kernels_(std::move(kernels)) {}

void TableExecutor::schedule(const std::vector<Tensor>& tensors, const std::vector<std::vector<int>>& waves) {
  const py::gil_scoped_acquire gil;
  tables_.clear();
  norms_.reset();
  all_.clear();
  for (const std::vector<int>& wave : waves) all_.insert(all_.end(), wave.begin(), wave.end());
  std::sort(all_.begin(), all_.end());
  const auto tile = kernels_.attr("tile").cast<int64_t>();
  const auto sum_tile = kernels_.attr("sum_tile").cast<int64_t>();
  const auto programs = kernels_.attr("programs").cast<int64_t>();
  for (const Batch& batch : make_batches(tensors, waves)) {
    if (batch.rule == Rule::count) continue;  // gradients alone
    const RuleInfo& info = rule_info(batch.rule);
    int64_t elements = 0;
    for (int i : batch.members) elements += tensors[i].numel;
    const int64_t chunk_tiles = info.norms ? 1 : std::clamp<int64_t>(elements / tile / programs, 1, kMaxChunkTiles);
    auto placed = std::make_shared<PlanTable>();
    placed->rule = info.name;
    placed->param = batch.param;
    placed->state = batch.state;
    placed->table.build(tensors, batch.members, info.num_states, info.norms ? sum_tile : tile, chunk_tiles,
                        info.norms ? 2 : 0);
    tables_.push_back(std::move(placed));
  }
  kernels_.attr("schedule")(tables_);
}

void TableExecutor::run(const std::vector<Tensor>& tensors, const GradientScale& scale, gpu::Stream) {
  const py::gil_scoped_acquire gil;
  for (const auto& placed : tables_) placed->table.refresh(tensors);
  kernels_.attr("run")(scale);
}

void TableExecutor::place_norms(const std::vector<Tensor>& tensors) {
  if (norms_ != nullptr) {
    norms_->table.refresh(tensors);
    return;
  }
  norms_ = std::make_shared<PlanTable>();
  norms_->table.build(tensors, all_, 0, kernels_.attr("sum_tile").cast<int64_t>(), 1, 1);
  kernels_.attr("schedule_norms")(norms_);
}

void TableExecutor::measure(const std::vector<Tensor>& tensors, Norm kind, const GradientScale& scale, double max_norm,
                            double* result, float* found_inf, gpu::Stream) {
  const py::gil_scoped_acquire gil;
  place_norms(tensors);
  kernels_.attr("measure")(static_cast<int>(kind), scale, max_norm, word_of(result), word_of(found_inf));
}

const double* TableExecutor::clip_factor() const {
  const py::gil_scoped_acquire gil;
  return reinterpret_cast<const double*>(kernels_.attr("clip_factor")().cast<uintptr_t>());
}

std::vector<double> TableExecutor::partials(gpu::Stream, bool* finite) {
  const py::gil_scoped_acquire gil;
  auto [values, all_finite] = kernels_.attr("partials")().cast<std::pair<std::vector<double>, bool>>();
  *finite = all_finite;
  return values;
}

double TableExecutor::norm(gpu::Stream) {
  const py::gil_scoped_acquire gil;
  return kernels_.attr("norm")().cast<double>();
}

void TableExecutor::scale_gradients(const std::vector<Tensor>& tensors, const double* factor_address, double factor,
                                    gpu::Stream) {
  const py::gil_scoped_acquire gil;
  place_norms(tensors);
  kernels_.attr("scale_gradients")(word_of(factor_address), factor);
}

}  // namespace stepladder
