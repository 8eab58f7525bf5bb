#include "multi_tensor/plan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "common/error.h"
#include "multi_tensor/regions.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace stepladder {

namespace {

constexpr int64_t kChunk = 16 * kLeaf;        // elements of a chunk
constexpr int64_t kItemBytes = 1 << 19;       // what a thread takes at a time
constexpr int64_t kBytesPerThread = 1 << 17;  // below this a further thread costs more than it gains

template <class R, class T>
void make_scalars(const double* values, int64_t step, void* out) {
  typename R::Hyper hyper;
  memcpy(&hyper, values, sizeof(hyper));
  const auto scalars = R::template scalars<T>(hyper, step);
  static_assert(sizeof(scalars) <= 128, "a rule's scalars outgrow their slot");
  memcpy(out, &scalars, sizeof(scalars));
}

using MakeScalars = void (*)(const double*, int64_t, void*);
const MakeScalars kMakeScalars[kNumRules][2] = {
#define SL_RULE(name, ...) {make_scalars<__VA_ARGS__, double>, make_scalars<__VA_ARGS__, float>},
#define SL_NORM_RULE(name, ...) {make_scalars<__VA_ARGS__, double>, make_scalars<__VA_ARGS__, float>},
#include "rules/rules.def"
};

template <class R>
RuleInfo describe(const char* name, bool norms, int num_prepared) {
  static_assert(sizeof(typename R::Hyper) <= kMaxHyper * sizeof(double), "raise kMaxHyper");
  static_assert(R::kNumStates <= kMaxStates, "raise kMaxStates");
  return {name, R::kHyper, R::kStates, sizeof(typename R::Hyper) / sizeof(double), R::kNumStates, num_prepared, norms};
}

const RuleInfo kRules[kNumRules] = {
#define SL_RULE(name, ...) describe<__VA_ARGS__>(#name, false, 0),
#define SL_NORM_RULE(name, ...) describe<__VA_ARGS__>(#name, true, __VA_ARGS__::kNumPrepared),
#include "rules/rules.def"
};

// Partial norms folded in halves, in index order; overwrites them.
double fold_partials(std::vector<double>& x, Norm kind) {
  size_t n = x.size();
  while (n > 1) {
    const size_t half = (n + 1) / 2;
    for (size_t j = 0; j < n - half; ++j) x[j] = kind == Norm::inf ? maximum(x[j], x[j + half]) : x[j] + x[j + half];
    n = half;
  }
  return x.empty() ? 0.0 : x[0];
}

const auto nothing = [] {};

int useful_threads(int64_t bytes, int threads) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, bytes / kBytesPerThread)));
}

int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

Kernel kernel_of(const Tensor& t, const char* pass) {
  const DType state = t.num_columns > kState ? t.columns[kState].dtype : t.columns[kParam].dtype;
  return {pass, t.rule, t.columns[kParam].dtype, t.columns[kGrad].dtype, state};
}

}  // namespace

const RuleInfo& rule_info(Rule rule) { return kRules[static_cast<int>(rule)]; }

void Plan::set_scalars(int i, const double* hyper, int64_t step, int reuse) {
  Tensor& tensor = tensors[i];
  if (reuse >= 0) {
    tensor.scalars = tensors[reuse].scalars;
    return;
  }
  kMakeScalars[static_cast<int>(tensor.rule)][arithmetic_index(tensor)](hyper, step, scalars_[i].bytes);
  tensor.scalars = scalars_[i].bytes;
}

// Parameters that share memory (tied by storage, overlapping views) must be stepped one after another, in
// order; all others may run at once. Bounding address ranges decide.
std::vector<int> Plan::assign_waves() const {
  struct Range {
    uintptr_t begin, end;
    int tensor;
  };
  std::vector<Range> ranges;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    if (!active[i] || t.numel == 0) continue;
    const int64_t item = item_size(t.columns[kParam].dtype);
    const uintptr_t data = reinterpret_cast<uintptr_t>(t.columns[kParam].data);
    int64_t low = 0, high = t.contiguous ? t.numel - 1 : 0;
    if (!t.contiguous) {
      for (size_t d = 0; d < t.layout.sizes.size(); ++d) {
        const int64_t reach = (t.layout.sizes[d] - 1) * t.layout.strides[kParam][d];
        (reach < 0 ? low : high) += reach;
      }
    }
    ranges.push_back({data + low * item, data + (high + 1) * item, static_cast<int>(i)});
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  std::vector<int> wave(tensors.size(), 0);
  size_t group = 0;
  uintptr_t reach = 0;
  for (size_t r = 0; r <= ranges.size(); ++r) {
    if (r < ranges.size() && (r == group || ranges[r].begin < reach)) {
      reach = std::max(reach, ranges[r].end);
      continue;
    }
    // [group, r) hang together: number them in parameter order.
    std::vector<int> members;
    for (size_t k = group; k < r; ++k) members.push_back(ranges[k].tensor);
    std::sort(members.begin(), members.end());
    for (size_t k = 0; k < members.size(); ++k) wave[members[k]] = static_cast<int>(k);
    if (r == ranges.size()) break;
    group = r;
    reach = ranges[r].end;
  }
  return wave;
}

void Plan::schedule() {
  scalars_.resize(tensors.size());
  chunks_.clear();
  waves_.clear();
  norm_waves_.clear();
  partials_.assign(tensors.size(), 0.0);
  total_bytes_ = 0;

  int64_t slots = 0;
  for (size_t i = 0; i < tensors.size(); ++i)
    if (works(i)) slots += 2 * tensors[i].num_leaves();
  leaves_.resize(slots);
  slots = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!works(i)) continue;
    tensors[i].leaves = leaves_.data() + slots;
    slots += 2 * tensors[i].num_leaves();
  }

  const std::vector<int> wave_of = assign_waves();
  const int num_waves = wave_of.empty() ? 0 : *std::max_element(wave_of.begin(), wave_of.end()) + 1;
  for (int wave = 0; wave < num_waves; ++wave) {
    waves_.emplace_back();
    norm_waves_.emplace_back();
    for (bool norms : {true, false}) {
      int64_t bytes = kItemBytes;  // starts a new item
      for (size_t i = 0; i < tensors.size(); ++i) {
        const Tensor& t = tensors[i];
        const bool is_norm = t.rule != Rule::count && rule_info(t.rule).norms;
        if (!works(i) || wave_of[i] != wave || is_norm != norms) continue;
        for (int64_t begin = 0; begin < t.numel; begin += kChunk) {
          const int64_t end = std::min(begin + kChunk, t.numel);
          if (bytes >= kItemBytes) {
            const Item item{static_cast<int32_t>(chunks_.size()), static_cast<int32_t>(chunks_.size())};
            waves_.back().push_back(item);
            if (norms) norm_waves_.back().push_back(item);
            bytes = 0;
          }
          chunks_.push_back({static_cast<int32_t>(i), begin, end});
          ++waves_.back().back().last;
          if (norms) ++norm_waves_.back().back().last;
          bytes += (end - begin) * t.bytes_per_element();
          total_bytes_ += (end - begin) * t.bytes_per_element();
        }
      }
    }
  }
}

template <class Body>
void Plan::work(const Item& item, const char* pass, RegionThread* record, Body body) const {
  if (record == nullptr) {
    for (int32_t c = item.first; c < item.last; ++c) body(chunks_[c]);
    return;
  }
  // The clock is read where an item begins or its kernel changes, so that chunks of small tensors are not slowed.
  int64_t begin = monotonic_nanoseconds();
  for (int32_t c = item.first; c < item.last;) {
    const Kernel kernel = kernel_of(tensors[chunks_[c].tensor], pass);
    int64_t elements = 0;
    const int32_t first = c;
    do {
      elements += chunks_[c].end - chunks_[c].begin;
      body(chunks_[c++]);
    } while (c < item.last && kernel == kernel_of(tensors[chunks_[c].tensor], pass));
    const int64_t end = monotonic_nanoseconds();
    record->add(kernel, end - begin, elements, c - first);
    begin = end;
  }
}

template <class Body, class Prologue>
void Plan::for_each_chunk(const std::vector<Item>& items, int threads, const char* pass, Body body,
                          Prologue prologue) const {
  const int64_t n = static_cast<int64_t>(items.size());
  const int used = static_cast<int>(std::min<int64_t>(useful_threads(total_bytes_, threads), n));
  const bool records = recording();
  if (used <= 1) prologue();
  Region region;
  if (records) {
    region.threads.resize(std::max(used, 1));
    region.begin = monotonic_nanoseconds();
  }
  const auto take_part = [&](auto each_item) {
    RegionThread* const record = records ? &region.threads[thread_number()] : nullptr;
    if (record != nullptr) record->begin = monotonic_nanoseconds();
    each_item(record);
    if (record != nullptr) record->end = monotonic_nanoseconds();
  };
  if (used <= 1) {
    take_part([&](RegionThread* record) {
      for (int64_t i = 0; i < n; ++i) work(items[i], pass, record, body);
    });
  } else {
#pragma omp parallel num_threads(used)
    {
#pragma omp master
      prologue();
      take_part([&](RegionThread* record) {
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t i = 0; i < n; ++i) work(items[i], pass, record, body);
      });
    }
  }
  if (records) {
    region.end = monotonic_nanoseconds();
    keep(std::move(region));
  }
}

void Plan::measure(Norm kind, double inverse_scale, const CpuKernels& kernels, int threads, bool* finite) {
  int not_finite = 0;
  for (const auto& items : waves_) {
    for_each_chunk(
        items, threads, "measure",
        [&](const Chunk& chunk) {
          const Tensor& t = tensors[chunk.tensor];
          if (kernels.measure[arithmetic_index(t)](t, chunk.begin, chunk.end, kind, inverse_scale)) {
            __atomic_store_n(&not_finite, 1, __ATOMIC_RELAXED);
          }
        },
        nothing);
  }
  *finite = not_finite == 0;
  for (size_t i = 0; i < tensors.size(); ++i)
    if (works(i)) partials_[i] = kernels.fold[arithmetic_index(tensors[i])](tensors[i], kind);
}

double Plan::total_norm(Norm kind) {
  std::vector<double>& folded = fold_scratch_;
  folded.clear();
  for (size_t i = 0; i < tensors.size(); ++i)
    if (active[i]) folded.push_back(partials_[i]);
  const double total = fold_partials(folded, kind);
  return kind == Norm::l2 ? std::sqrt(total) : total;
}

void Plan::scale(double factor, const CpuKernels& kernels, int threads) {
  for (const auto& items : waves_) {
    for_each_chunk(
        items, threads, "scale",
        [&](const Chunk& chunk) {
          const Tensor& t = tensors[chunk.tensor];
          kernels.scale[arithmetic_index(t)](t, chunk.begin, chunk.end, factor);
        },
        nothing);
  }
}

void Plan::run(const GradientScale& scale, const CpuKernels& kernels, int threads,
               const std::function<void()>& prologue) {
  if (waves_.empty()) prologue();
  for (size_t wave = 0; wave < waves_.size(); ++wave) {
    for_each_chunk(
        waves_[wave], threads, "update",
        [&](const Chunk& chunk) {
          const Tensor& t = tensors[chunk.tensor];
          kernels.update[static_cast<int>(t.rule)][arithmetic_index(t)](t, chunk.begin, chunk.end, scale);
        },
        [&] {
          if (wave == 0) prologue();
        });
    if (norm_waves_[wave].empty()) continue;
    for (const Item& item : norm_waves_[wave]) {
      for (int32_t c = item.first; c < item.last; ++c) {
        Tensor& t = tensors[chunks_[c].tensor];
        if (chunks_[c].begin == 0) t.ratio = kernels.ratio[static_cast<int>(t.rule)][arithmetic_index(t)](t);
      }
    }
    for_each_chunk(
        norm_waves_[wave], threads, "apply",
        [&](const Chunk& chunk) {
          const Tensor& t = tensors[chunk.tensor];
          kernels.apply[static_cast<int>(t.rule)][arithmetic_index(t)](t, chunk.begin, chunk.end, scale);
        },
        nothing);
  }
}

}  // namespace stepladder
