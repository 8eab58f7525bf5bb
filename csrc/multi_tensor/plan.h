// The plan of a step: which chunks of which tensors are worked on, in what order, with which scalars.
// Plain host C++; executors consume it.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "multi_tensor/kernels.h"
#include "multi_tensor/tensor.h"

namespace stepladder {

struct Chunk {
  int32_t tensor;
  int64_t begin, end;  // logical elements; begin is a multiple of kLeaf
};

// Consecutive chunks that one thread takes at a time.
struct Item {
  int32_t first, last;
};

struct RegionThread;

struct RuleInfo {
  const char* name;
  const char* hyper;   // names, separated by blanks
  const char* states;  // names, separated by blanks
  int num_hyper;       // doubles: a pair such as betas counts twice
  int num_states;
  int num_prepared;  // of them, those that the first pass of a norm-based rule changes
  bool norms;
};

const RuleInfo& rule_info(Rule rule);

class Plan {
 public:
  std::vector<Tensor> tensors;
  std::vector<char> active;  // which tensors the next step works on

  // Fills tensor i's scalars for the step about to be taken. `reuse` names an active tensor with the same
  // rule, hyper-parameters and step count, or -1.
  void set_scalars(int i, const double* hyper, int64_t step, int reuse);

  // To be called when a tensor, its layout or the active set has changed, before norm(), scale(), run(), which
  // take the tensors that are on the CPU.
  void schedule();
  // Of each tensor: parameters that share memory must be stepped one after another, in waves.
  std::vector<int> assign_waves() const;

  // Parts of the norm of all active gradients times inverse_scale, by the fixed tree; `finite` looks at elements.
  void measure(Norm kind, double inverse_scale, const CpuKernels& kernels, int threads, bool* finite);
  // One tensor's part of it: the sum of squares or magnitudes, or the largest magnitude. After norm().
  double partial(int i) const { return partials_[i]; }
  void set_partial(int i, double value) { partials_[i] = value; }
  // Of all active tensors, wherever they are.
  double total_norm(Norm kind);

  void scale(double factor, const CpuKernels& kernels, int threads);
  // `prologue` is called once, by the calling thread, while others already work.
  void run(const GradientScale& scale, const CpuKernels& kernels, int threads, const std::function<void()>& prologue);

 private:
  struct alignas(64) Slot {
    char bytes[128];
  };

  bool works(size_t i) const { return active[i] && tensors[i].executor == kOnCpu; }
  // `pass` names what is done, for a profiler; its `record` is null unless it listens.
  template <class Body>
  void work(const Item& item, const char* pass, RegionThread* record, Body body) const;
  template <class Body, class Prologue>
  void for_each_chunk(const std::vector<Item>& items, int threads, const char* pass, Body body,
                      Prologue prologue) const;

  std::vector<Chunk> chunks_;
  std::vector<std::vector<Item>> waves_;       // items whose writes do not overlap; waves run one after another
  std::vector<std::vector<Item>> norm_waves_;  // the same for tensors with norm-based rules alone
  std::vector<Slot> scalars_;
  std::vector<double> leaves_;
  std::vector<double> partials_;
  std::vector<double> fold_scratch_;
  int64_t total_bytes_ = 0;
};

}  // namespace stepladder
