// The CPU kernels, one table of functions for each vector width they were compiled for.
#pragma once

#include "multi_tensor/tensor.h"
#include "newton_schulz/normalised.h"

namespace stepladder {

struct CpuKernels {
  const char* isa;

  // Elementwise rules: the whole update. Norm-based rules: states and the sums of each leaf.
  using Update = void (*)(const Tensor&, int64_t begin, int64_t end, const GradientScale&);
  // Norm-based rules, after every leaf is summed: the tensor's ratio, then the update.
  using Ratio = double (*)(const Tensor&);
  Update update[kNumRules][2];
  Ratio ratio[kNumRules][2];
  Update apply[kNumRules][2];

  // Gradient norms: sums of one kind for each leaf; returns whether an element is not finite.
  bool (*measure[2])(const Tensor&, int64_t begin, int64_t end, Norm, double inverse_scale);
  double (*fold[2])(const Tensor&, Norm);
  void (*scale[2])(const Tensor&, int64_t begin, int64_t end, double factor);

  newton_schulz::Normalise normalise;
};

// Index into the tables' last dimension.
inline int arithmetic_index(const Tensor& t) { return t.arithmetic == DType::f64 ? 0 : 1; }

// The widest table that this processor runs; `isa` asks for one by name (nullptr if it cannot run).
const CpuKernels* cpu_kernels(const char* isa);
std::vector<const char*> supported_isas();

}  // namespace stepladder
