// What a Newton-Schulz iteration is given: matrices in memory, and the coefficients of its steps.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace stepladder::newton_schulz {

// Elements of a matrix in memory.
struct View {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t row_stride = 0, col_stride = 0;  // elements

  View transposed() const { return {data, dtype, col_stride, row_stride}; }
};

// X ← aX + (bA + cA²)X, A = XXᵀ.
struct Triple {
  double a, b, c;
};

struct Options {
  std::vector<Triple> steps;
  double eps = 0.0;
  double divisor = 1.0;
  bool aol = false;
  bool gram = false;  // the Gram form, else the standard one
};

// A learning rate on the device, read there when the kernels run, and what it is multiplied by.
struct Rate {
  const void* address = nullptr;
  int64_t is_double = 0;
  double weight_decay = 0.0, scale = 1.0;
};

// How a matrix of Muon's goes in and out: its momentum is updated as its gradient is read, and the parameter as the
// orthogonal factor is written.
struct Muon {
  bool active = false;
  View buffer;  // momentum
  float momentum = 0.0f;
  bool averages = true;      // u ← lerp(u, g, 1 − μ), Nesterov lerp(g, u, μ); else u ← μu + g, Nesterov g + μu
  float grad_weight = 0.0f;  // 1 − μ
  bool nesterov = false;
  float grad_scale = 1.0f;
  float decay = 1.0f;  // what the parameter is multiplied by
  float step = 0.0f;   // what is subtracted for each unit of the factor
  Rate rate;           // where it has an address, decay and step are made of it; on a GPU only
};

struct Job {
  int64_t rows = 0, cols = 0;
  View in;   // X, or the gradient
  View out;  // the result, or the parameter
  const Options* options = nullptr;
  Muon muon;
};

}  // namespace stepladder::newton_schulz
