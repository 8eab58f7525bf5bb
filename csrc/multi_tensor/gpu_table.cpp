#include "multi_tensor/gpu_table.h"

#include <algorithm>

namespace stepladder {

namespace {

uint64_t word_of(const void* address) { return reinterpret_cast<uintptr_t>(address); }
uint64_t word_of(double value) { return bit_cast<uint64_t>(value); }
uint64_t word_of(int64_t value) { return static_cast<uint64_t>(value); }

// Memory order serves where all columns share it, unless the update depends on the logical index.
bool is_flat(const Tensor& t, bool in_order) { return t.contiguous || (t.uniform && !in_order); }

uint64_t make_meta(const Tensor& t, int group) {
  return static_cast<uint64_t>(t.columns[kGrad].dtype) << Meta::kGradDtype |
         static_cast<uint64_t>(t.negate) << Meta::kNegate | static_cast<uint64_t>(t.stochastic) << Meta::kStochastic |
         static_cast<uint64_t>(t.step_is_double) << Meta::kStepIsDouble |
         static_cast<uint64_t>(t.arithmetic == DType::f64) << Meta::kWide |
         static_cast<uint64_t>(group) << Meta::kGroup | static_cast<uint64_t>(t.index) << Meta::kIndex;
}

}  // namespace

std::vector<Batch> make_batches(const std::vector<Tensor>& tensors, const std::vector<std::vector<int>>& waves) {
  std::vector<Batch> batches;
  for (const std::vector<int>& wave : waves) {
    const size_t first = batches.size();
    for (int i : wave) {
      const Tensor& t = tensors[i];
      const DType param = t.columns[kParam].dtype;
      const DType state = t.num_columns > kState ? t.columns[kState].dtype : param;
      const auto known = std::find_if(batches.begin() + first, batches.end(), [&](const Batch& b) {
        return b.rule == t.rule && b.param == param && b.state == state;
      });
      if (known == batches.end()) {
        batches.push_back({t.rule, param, state, {i}});
      } else {
        known->members.push_back(i);
      }
    }
  }
  return batches;
}

void Table::build(const std::vector<Tensor>& tensors, const std::vector<int>& members, int num_states, int64_t tile,
                  int64_t chunk_tiles, int sums_per_leaf) {
  members_ = members;
  groups_.clear();
  words_.clear();
  chunks_ = num_sums_ = 0;
  chunk_tiles_ = static_cast<int32_t>(chunk_tiles);
  shape_ = TableShape();
  shape_.tensors = static_cast<int32_t>(members.size());
  shape_.states = num_states;

  std::vector<int> group_of;
  bool clocks = false, layouts = false;
  for (int i : members) {
    const Tensor& t = tensors[i];
    const auto known = std::find(groups_.rbegin(), groups_.rend(), t.group);  // mostly the one before
    group_of.push_back(static_cast<int>(known == groups_.rend() ? groups_.size() : groups_.rend() - known - 1));
    if (known == groups_.rend()) groups_.push_back(t.group);
    clocks = clocks || t.clock != t.step_data;
    layouts = layouts || !is_flat(t, sums_per_leaf > 0 || t.stochastic);
  }
  shape_.groups = static_cast<int32_t>(groups_.size());

  int32_t at = shape_.groups * kGroupWords;
  const auto place = [&](bool present, int32_t size) {
    const int32_t begin = present ? at : 0;
    at += present ? size : 0;
    return begin;
  };
  const int32_t n = shape_.tensors;
  shape_.grad = place(true, n);
  shape_.param = place(true, n * (1 + num_states));
  shape_.step = place(true, n);
  shape_.clock = place(clocks, n);
  shape_.first = place(true, n + 1);
  shape_.numel = place(true, n);
  shape_.meta = place(true, n);
  shape_.layout = place(layouts, n);
  shape_.sums = place(sums_per_leaf > 0, n);
  words_.resize(at);

  for (int32_t k = 0; k < n; ++k) {
    const Tensor& t = tensors[members[k]];
    for (int c = 0; c < 2 + num_states; ++c) words_[shape_.column(c) + k] = word_of(t.columns[c].data);
    words_[shape_.step + k] = word_of(t.step_data);
    if (clocks) words_[shape_.clock + k] = word_of(t.clock);
    words_[shape_.first + k] = word_of(chunks_);
    words_[shape_.numel + k] = word_of(t.numel);
    words_[shape_.meta + k] = make_meta(t, group_of[k]);
    if (sums_per_leaf > 0) words_[shape_.sums + k] = word_of(num_sums_);
    num_sums_ += sums_per_leaf * t.num_leaves();
    chunks_ += (t.numel + tile * chunk_tiles - 1) / (tile * chunk_tiles);
    if (is_flat(t, sums_per_leaf > 0 || t.stochastic)) continue;
    words_[shape_.layout + k] = words_.size();
    words_.push_back(t.layout.sizes.size());
    for (int64_t size : t.layout.sizes) words_.push_back(word_of(size));
    for (int c = 0; c < 2 + num_states; ++c)
      for (int64_t stride : t.layout.strides[c]) words_.push_back(word_of(stride));
  }
  words_[shape_.first + n] = word_of(chunks_);
  refresh(tensors);
}

void Table::refresh(const std::vector<Tensor>& tensors) {
  for (size_t g = 0; g < groups_.size(); ++g) {
    uint64_t* words = words_.data() + g * kGroupWords;
    const GroupValues* values = groups_[g];
    if (values == nullptr) continue;
    for (int h = 0; h < kMaxHyper; ++h) words[h] = word_of(values->hyper[h]);
    words[kLrAddress] = word_of(values->lr_address);
    words[kLrIsDouble] = values->lr_is_double;
    words[kSeed] = values->seed;
  }
  for (size_t k = 0; k < members_.size(); ++k)
    words_[shape_.grad + k] = word_of(tensors[members_[k]].columns[kGrad].data);
}

}  // namespace stepladder
