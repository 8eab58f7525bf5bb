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

// Address, dtype, row stride, column stride.
using PyView = std::tuple<uintptr_t, std::string, int64_t, int64_t>;
// Address of a learning rate on the device, whether it is a double, weight decay, scale.
using PyRate = std::tuple<uintptr_t, bool, double, double>;
// Buffer, momentum, whether it averages, Nesterov's form, the gradient's scale, decay, step or what makes both.
using PyMuon = std::tuple<PyView, double, bool, bool, double, double, std::variant<double, PyRate>>;
// Rows, columns, in, out, options, and what Muon adds or None.
using PyMatrix = std::tuple<int64_t, int64_t, PyView, PyView, std::shared_ptr<Options>, std::optional<PyMuon>>;

inline View view_of(const PyView& v) {
  const auto& [address, dtype, row_stride, col_stride] = v;
  View view{reinterpret_cast<void*>(address), DType::f32, row_stride, col_stride};
  if (dtype == "bfloat16") {
    view.dtype = DType::bf16;
  } else if (dtype == "float16") {
    view.dtype = DType::f16;
  } else {
    SL_CHECK(dtype == "float32", "a matrix has the dtype '", dtype, "', expected float32, bfloat16 or float16");
  }
  return view;
}

// The jobs point to the matrices' options.
inline std::vector<Job> jobs_of(const std::vector<PyMatrix>& matrices) {
  std::vector<Job> jobs;
  for (const auto& [rows, cols, in, out, options, added] : matrices) {
    Job job;
    job.rows = rows;
    job.cols = cols;
    job.in = view_of(in);
    job.out = view_of(out);
    job.options = options.get();
    if (added) {
      const auto& [buffer, momentum, averages, nesterov, grad_scale, decay, step] = *added;
      Muon& muon = job.muon;
      muon.active = true;
      muon.buffer = view_of(buffer);
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
    }
    jobs.push_back(job);
  }
  return jobs;
}

}  // namespace stepladder::newton_schulz
