// What an executor is told of one parameter and its companions. Plain data: no Python, no torch.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "common/dtype.h"
#include "rules/rules.h"

namespace stepladder {

constexpr int kLanes = 128;  // lanes of the fixed reduction tree
constexpr int kLeaf = 4096;  // elements of one of its leaves
constexpr int kColumns = 2 + kMaxStates;

enum ColumnIndex : int { kParam = 0, kGrad = 1, kState = 2 };

struct Column {
  void* data = nullptr;
  DType dtype = DType::f32;
};

// Sizes and strides, in elements, of a tensor that is not plainly contiguous; the last dimension is
// innermost. Complex tensors have gained a last dimension of 2.
struct Layout {
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides[kColumns];
};

// What every parameter of a group shares on a GPU.
struct GroupValues {
  double hyper[kMaxHyper] = {};
  const void* lr_address = nullptr;  // of a learning rate on the device, in place of hyper[0]
  bool lr_is_double = false;
  uint64_t seed = 0;
};

constexpr int kOnCpu = -1;

struct Tensor {
  Column columns[kColumns];
  int64_t numel = 0;
  int num_columns = kColumns;
  Rule rule = Rule::count;
  int executor = kOnCpu;          // else the GPU executor that steps it
  DType arithmetic = DType::f32;  // f64 for fp64 parameters, else f32

  // Contiguous: memory order is logical order in every column. Uniform: some other dense order that all
  // columns share, so that elementwise work may ignore the layout.
  bool contiguous = true;
  bool uniform = true;
  Layout layout;

  const void* scalars = nullptr;  // Rule::Scalars<T> of this tensor's group and step count
  bool negate = false;            // maximize: the gradient enters with its sign changed

  bool stochastic = false;  // bf16 parameter stores round stochastically
  uint64_t seed = 0;
  uint32_t step = 0;
  uint32_t index = 0;
  int64_t first = 0;  // logical index of element 0 in the whole that this is a shard of

  // On a GPU the kernels count: the optimizer's step count, or null, and the count by which the rule tells
  // time, float where it is another.
  void* step_data = nullptr;
  void* clock = nullptr;
  bool step_is_double = false;
  const GroupValues* group = nullptr;

  void* leaves = nullptr;  // two sums for each leaf, in the arithmetic type: [2, num_leaves]
  double ratio = 1.0;      // of a norm-based rule, made from its norms

  int64_t num_leaves() const { return (numel + kLeaf - 1) / kLeaf; }
  int64_t bytes_per_element() const {
    int64_t bytes = 0;
    for (int c = 0; c < num_columns; ++c) bytes += item_size(columns[c].dtype);
    return bytes;
  }
};

// How gradients are read in one launch: unscale, then clip. On a GPU by numbers that are there, where an
// address is given.
struct GradientScale {
  bool unscale = false;  // multiply by inverse_scale and write the result back
  bool clip = false;
  double inverse_scale = 1.0;
  double clip_factor = 1.0;
  const float* grad_scale = nullptr;
  const double* clip_address = nullptr;
  const float* found_inf = nullptr;  // not 0: nothing is stepped
};

enum class Norm : int { l1 = 0, l2 = 1, inf = 2 };

}  // namespace stepladder
