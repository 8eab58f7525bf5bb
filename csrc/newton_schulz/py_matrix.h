// Matrices as Python hands them over.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <variant>
#include <vector>

#include "common/error.h"
#include "newton_schulz/matrix.h"

namespace stepladder::newton_schulz {

// Of a tensor [..., m, n]: address, dtype, shape, strides.
using PyTensor = std::tuple<uintptr_t, std::string, std::vector<int64_t>, std::vector<int64_t>>;
// Address of a learning rate on the device, whether it is a double, weight decay, scale.
using PyRate = std::tuple<uintptr_t, bool, double, double>;
// Buffer, momentum, whether it averages, Nesterov's form, the gradient's scale, decay, step or what makes both.
using PyMuon = std::tuple<PyTensor, double, bool, bool, double, double, std::variant<double, PyRate>>;
// In, out, options, and what Muon adds or None.
using PyMatrices = std::tuple<PyTensor, PyTensor, std::shared_ptr<Options>, std::optional<PyMuon>>;

inline DType matrix_dtype(const std::string& name) {
  if (name == "bfloat16") return DType::bf16;
  if (name == "float16") return DType::f16;
  SL_CHECK(name == "float32", "a matrix has the dtype '", name, "', expected float32, bfloat16 or float16");
  return DType::f32;
}

// Every matrix of a tensor, in the order of its leading dimensions.
inline std::vector<View> views_of(const PyTensor& tensor) {
  const auto& [address, name, shape, strides] = tensor;
  SL_CHECK(shape.size() >= 2 && shape.size() == strides.size(), "a tensor has ", shape.size(), " sizes and ",
           strides.size(), " strides, expected as many of both and at least two");
  const DType dtype = matrix_dtype(name);
  const size_t leading = shape.size() - 2;
  std::vector<int64_t> offsets{0};
  for (size_t d = 0; d < leading; ++d) {
    std::vector<int64_t> next;
    for (int64_t offset : offsets)
      for (int64_t k = 0; k < shape[d]; ++k) next.push_back(offset + k * strides[d]);
    offsets = std::move(next);
  }
  std::vector<View> views;
  for (int64_t offset : offsets)
    views.push_back(
        {reinterpret_cast<void*>(address + offset * item_size(dtype)), dtype, strides[leading], strides[leading + 1]});
  return views;
}

inline Muon muon_of(const PyMuon& added) {
  const auto& [buffer, momentum, averages, nesterov, grad_scale, decay, step] = added;
  Muon muon;
  muon.active = true;
  muon.momentum = static_cast<float>(momentum);
  muon.grad_weight = static_cast<float>(1.0 - momentum);
  muon.averages = averages;
  muon.nesterov = nesterov;
  muon.grad_scale = static_cast<float>(grad_scale);
  muon.decay = static_cast<float>(decay);
  if (const double* number = std::get_if<double>(&step)) {
    muon.step = static_cast<float>(*number);
  } else {
    const auto& [address, is_double, weight_decay, scale] = std::get<PyRate>(step);
    muon.rate = {reinterpret_cast<const void*>(address), is_double, weight_decay, scale};
  }
  return muon;
}

// A job for each matrix. The jobs point to the options.
inline std::vector<Job> jobs_of(const std::vector<PyMatrices>& given) {
  std::vector<Job> jobs;
  for (const auto& [in, out, options, added] : given) {
    const auto& shape = std::get<2>(in);
    const std::vector<View> from = views_of(in), to = views_of(out);
    const std::vector<View> buffers = added ? views_of(std::get<0>(*added)) : std::vector<View>();
    SL_CHECK(shape == std::get<2>(out), "matrices and their results have different shapes");
    SL_CHECK(!added || shape == std::get<2>(std::get<0>(*added)), "matrices and their momentum have different shapes");
    Job job;
    job.rows = shape[shape.size() - 2];
    job.cols = shape[shape.size() - 1];
    job.options = options.get();
    if (added) job.muon = muon_of(*added);
    for (size_t k = 0; k < from.size(); ++k) {
      job.in = from[k];
      job.out = to[k];
      if (added) job.muon.buffer = buffers[k];
      jobs.push_back(job);
    }
  }
  return jobs;
}

}  // namespace stepladder::newton_schulz
