// The table that a GPU kernel works through: plain 64-bit words, the same for CUDA and Triton, in the
// kernel's arguments where they fit and otherwise in device memory.
//
// Columns of one word for each tensor, after the groups: what moves at every step stands first, so that one
// short copy refreshes it.
//   groups   kGroupWords each: hyper-parameters as doubles, address of a learning rate on the device or 0
//   grad     address
//   param    address
//   state    address, for each state of the rule
//   step     address of the step count
//   clock    address of the count by which the rule tells time; left out where it is the step count
//   first    the tensor's first chunk; one word more closes the last tensor
//   numel
//   meta     flags, group, parameter index (Meta)
//   layout   index of the first word of its layout, or 0; left out where all tensors are flat
//   sums     index of its first sum; left out where the rule takes no norms
// Then the layouts: number of dimensions, sizes, strides of each column.
#pragma once

#include <vector>

#include "common/philox.h"
#include "multi_tensor/tensor.h"

namespace stepladder {

constexpr int kVector = 8;  // consecutive elements of one thread: 16 bytes of the narrowest dtype
static_assert(kVector == kPhiloxElements, "one call of the generator serves one thread");
constexpr int kGroupWords = kMaxHyper + 3;
constexpr int kInlineWords = 1536;

enum GroupWord : int { kLrAddress = kMaxHyper, kLrIsDouble, kSeed };

struct Meta {
  // Bits of the word.
  static constexpr int kGradDtype = 0, kNegate = 2, kStochastic = 3, kStepIsDouble = 4, kWide = 5, kGroup = 8,
                       kIndex = 32;
  uint64_t word;
  SL_HD DType grad_dtype() const { return static_cast<DType>((word >> kGradDtype) & 3); }
  SL_HD bool negate() const { return (word >> kNegate) & 1; }
  SL_HD bool stochastic() const { return (word >> kStochastic) & 1; }
  SL_HD bool step_is_double() const { return (word >> kStepIsDouble) & 1; }
  SL_HD bool wide() const { return (word >> kWide) & 1; }  // arithmetic in double
  SL_HD int group() const { return static_cast<int>((word >> kGroup) & 0xffffff); }
  SL_HD uint32_t index() const { return static_cast<uint32_t>(word >> kIndex); }
};

// Where the columns begin, in words. An absent column is 0.
struct TableShape {
  int32_t tensors = 0, groups = 0, states = 0;
  int32_t grad = 0, param = 0, step = 0, clock = 0, first = 0, numel = 0, meta = 0, layout = 0, sums = 0;
  SL_HD int32_t column(int c) const {
    return c == kGrad ? grad : c == kParam ? param : param + tensors * (c - kState + 1);
  }
};

// A kernel's one argument.
struct Launch {
  TableShape shape;
  int32_t chunk_tiles = 1;
  int64_t chunks = 0;
  const uint64_t* table = nullptr;  // in device memory; null: `words`

  // How gradients are read: unscaled, then clipped. On the device, or as numbers where the address is null.
  const float* grad_scale = nullptr;
  const float* found_inf = nullptr;  // not 0: the step is skipped
  const double* clip_address = nullptr;
  double inverse_scale = 1.0;
  double clip_factor = 1.0;
  bool unscale = false;
  bool clip = false;
  bool write_back = false;  // the unscaled gradient

  uint32_t* ticket = nullptr;  // counts the blocks that are done; 0 between launches
  void* sums = nullptr;        // of each leaf, 8 bytes each whatever the arithmetic type
  double* ratios = nullptr;    // of a norm-based rule, one for each tensor

  uint64_t words[kInlineWords];
};

// What the norm kernels are told beyond the table.
struct NormLaunch {
  Norm kind = Norm::l2;
  double max_norm = 0.0;
  double* partials = nullptr;  // one for each tensor
  double* norm = nullptr;      // on the device: the norm, then the factor by which gradients are clipped
  float* found_inf = nullptr;  // set to 1 where an element is not finite, else to 0; may be null
  uint32_t* not_finite = nullptr;
  Launch launch;
};

// Tensors that one launch can serve: same wave, rule and dtypes.
struct Batch {
  Rule rule;
  DType param, state;  // storage; a rule without states has the parameter's
  std::vector<int> members;
};

// waves[w]: indices of tensors whose writes do not overlap. In the order in which the launches must run.
std::vector<Batch> make_batches(const std::vector<Tensor>& tensors, const std::vector<std::vector<int>>& waves);

// The words of one launch. `build` writes all of them, `refresh` those that move at every step.
class Table {
 public:
  // `norms`: keep sums of the leaves, `sums_per_leaf` for each. `tile`: elements of one.
  void build(const std::vector<Tensor>& tensors, const std::vector<int>& members, int num_states, int64_t tile,
             int64_t chunk_tiles, int sums_per_leaf);
  void refresh(const std::vector<Tensor>& tensors);

  const TableShape& shape() const { return shape_; }
  const std::vector<uint64_t>& words() const { return words_; }
  const std::vector<int>& members() const { return members_; }
  int64_t chunks() const { return chunks_; }
  int32_t chunk_tiles() const { return chunk_tiles_; }
  int64_t num_sums() const { return num_sums_; }

 private:
  TableShape shape_;
  std::vector<int> members_;
  std::vector<const GroupValues*> groups_;
  std::vector<uint64_t> words_;
  int64_t chunks_ = 0, num_sums_ = 0;
  int32_t chunk_tiles_ = 1;
};

}  // namespace stepladder
