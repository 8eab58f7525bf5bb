// The GPU executor's kernels for one pair of storage dtypes, SL_PARAM and SL_STATE; compiled once for each.
// One persistent launch serves all tensors of a table: blocks take its chunks in turn. No rule is named here.
#include "multi_tensor/gpu_sums.h"

namespace stepladder {
namespace SL_PAIR {

using P = SL_PARAM;
using S = SL_STATE;
using T = std::conditional_t<std::is_same<P, double>::value, double, float>;

// Only bf16 parameters round stochastically.
constexpr bool kCanRound = std::is_same<P, bf16>::value;

SL_DEVICE void store_stochastic(bf16* to, float value, uint32_t random) { *to = to_bf16_stochastic(value, random); }
template <class Other>
SL_DEVICE void store_stochastic(Other*, T, uint32_t) {}

// Elementwise rules, and the last pass of norm-based ones: how either changes an element.
template <class R>
struct Update {
  typename R::template Scalars<T> scalars;
  SL_DEVICE void operator()(T& w, T g, T* states) const { R::update(scalars, w, g, states); }
};

template <class R>
struct Apply {
  typename R::template Scalars<T> scalars;
  T ratio;
  SL_DEVICE void operator()(T& w, T g, T* states) const { R::apply(scalars, ratio, w, g, states); }
};

template <class R, class Change>
SL_DEVICE void change_vector(const Record<R::kNumStates>& record, int64_t at, const GradientReader<T>& reader,
                             const Philox4& random, const Change& change) {
  T w[kVector], g[kVector], states[kVector][kMaxStates];
  Vector<P> weights;
  Vector<S> stored[R::kNumStates + 1];
  weights.load(record.columns[kParam], at);
  SL_UNROLL
  for (int s = 0; s < R::kNumStates; ++s) stored[s].load(record.columns[kState + s], at);
  load_vector(record.columns[kGrad], record.meta.grad_dtype(), at, g);
  if (reader.unscale) {
    SL_UNROLL
    for (int k = 0; k < kVector; ++k) g[k] = g[k] * reader.inverse;
    if (reader.write_back) store_vector(record.columns[kGrad], record.meta.grad_dtype(), at, g);
  }
  weights.widen(w);
  SL_UNROLL
  for (int s = 0; s < R::kNumStates; ++s) {
    T values[kVector];
    stored[s].widen(values);
    SL_UNROLL
    for (int k = 0; k < kVector; ++k) states[k][s] = values[k];
  }
  SL_UNROLL
  for (int k = 0; k < kVector; ++k) change(w[k], reader.seen(g[k], record.meta.negate()), states[k]);
  weights.narrow(w);
  if (kCanRound && record.meta.stochastic()) {
    SL_UNROLL
    for (int k = 0; k < kVector; ++k)
      store_stochastic(&weights.parts[k / weights.kPer16].values[k % weights.kPer16], w[k], random_bits(random, k));
  }
  weights.store(record.columns[kParam], at);
  SL_UNROLL
  for (int s = 0; s < R::kNumStates; ++s) {
    T values[kVector];
    SL_UNROLL
    for (int k = 0; k < kVector; ++k) values[k] = states[k][s];
    stored[s].narrow(values);
    stored[s].store(record.columns[kState + s], at);
  }
}

// The ends of tensors, misaligned views, and every other layout.
template <class R, class Change>
SL_DEVICE void change_element(const Words& words, const Record<R::kNumStates>& record, int64_t at,
                              const GradientReader<T>& reader, const Philox4& random, const Change& change) {
  const int64_t grad_at = record.offset(words, kGrad, at);
  T g = load_element<T>(record.columns[kGrad], record.meta.grad_dtype(), grad_at);
  if (reader.unscale) {
    g = g * reader.inverse;
    if (reader.write_back) store_element(record.columns[kGrad], record.meta.grad_dtype(), grad_at, g);
  }
  P* const weight = static_cast<P*>(record.columns[kParam]) + record.offset(words, kParam, at);
  S* stored[R::kNumStates + 1];
  T w = load_as<T>(*weight), states[kMaxStates];
  SL_UNROLL
  for (int s = 0; s < R::kNumStates; ++s) {
    stored[s] = static_cast<S*>(record.columns[kState + s]) + record.offset(words, kState + s, at);
    states[s] = load_as<T>(*stored[s]);
  }
  change(w, reader.seen(g, record.meta.negate()), states);
  store_as(weight, w);
  if (kCanRound && record.meta.stochastic())
    store_stochastic(weight, w, random_bits(random, static_cast<int>(at % kVector)));
  SL_UNROLL
  for (int s = 0; s < R::kNumStates; ++s) store_as(stored[s], states[s]);
}

// `make(scalars, tensor)` gives the change of one tensor's elements.
template <class R, class Make>
SL_DEVICE void change_all(const Launch& launch, Make make) {
  if (launch.found_inf != nullptr && *launch.found_inf != 0.0f) return;
  SL_SHARED(decltype(SharedScalars<R, T>()), shared);
  ScalarsOfBlock<R, T> scalars(shared);
  const Words words(launch);
  const GradientReader<T> reader(launch);
  for (int64_t chunk = blockIdx.x; chunk < launch.chunks; chunk += gridDim.x) {
    const int tensor = find_tensor(launch.shape, words, chunk);
    const Record<R::kNumStates> record(launch.shape, words, tensor);
    const int group = record.meta.group();
    scalars.update(words, group, next_time(launch.shape, words, tensor, record.meta));
    const auto change = make(shared.scalars, tensor);
    const uint32_t step = static_cast<uint32_t>(next_step(launch.shape, words, tensor, record.meta));
    const int64_t begin = (chunk - record.first_chunk) * launch.chunk_tiles * kTile;
    const int64_t end = min(record.numel, begin + launch.chunk_tiles * kTile);
    for (int64_t at = begin + int64_t{threadIdx.x} * kVector; at < end; at += kTile) {
      Philox4 random = {};
      if (kCanRound && record.meta.stochastic())
        random = rounding_bits(words[group * kGroupWords + kSeed], step, record.meta.index(), at / kVector);
      if (record.vectors && at + kVector <= end) {
        change_vector<R>(record, at, reader, random, change);
        continue;
      }
      SL_ROLLED
      for (int64_t i = at; i < min(end, at + kVector); ++i) change_element<R>(words, record, i, reader, random, change);
    }
  }
  if (is_last_block(launch.ticket)) count_steps(launch.shape, words);
}

template <class R>
SL_KERNEL(kTileThreads)
update(SL_ARGUMENTS(Launch) launch) {
  change_all<R>(launch, [](const typename R::template Scalars<T>& scalars, int) { return Update<R>{scalars}; });
}

template <class R>
SL_KERNEL(kTileThreads)
apply(SL_ARGUMENTS(Launch) launch) {
  change_all<R>(launch, [&](const typename R::template Scalars<T>& scalars, int tensor) {
    return Apply<R>{scalars, static_cast<T>(launch.ratios[tensor])};
  });
}

// The first pass of a norm-based rule: states, and the two sums of each leaf, by the fixed tree.
template <class R>
SL_KERNEL(kTileThreads)
prepare(SL_ARGUMENTS(Launch) launch) {
  if (launch.found_inf != nullptr && *launch.found_inf != 0.0f) return;
  SL_SHARED(decltype(SharedScalars<R, T>()), shared);
  ScalarsOfBlock<R, T> scalars(shared);
  const Words words(launch);
  const GradientReader<T> reader(launch);
  for (int64_t chunk = blockIdx.x; chunk < launch.chunks; chunk += gridDim.x) {
    const int tensor = find_tensor(launch.shape, words, chunk);
    const Record<R::kNumStates> record(launch.shape, words, tensor);
    scalars.update(words, record.meta.group(), next_time(launch.shape, words, tensor, record.meta));
    const int64_t leaf = (chunk - record.first_chunk) * (kSumTile / kLeaf) + threadIdx.x / kLeafThreads;
    LaneSums<T> first, second;
    for (int row = 0; row < kLeaf / kLanes; ++row) {
      const int64_t at = leaf * kLeaf + row * kLanes + threadIdx.x % kLeafThreads * kVector;
      if (at >= record.numel) break;
      const int64_t end = at + kVector < record.numel ? at + kVector : record.numel;
      T w[kVector] = {}, g[kVector] = {}, states[kVector][kMaxStates] = {};
      const bool vector = record.vectors && end - at == kVector;
      if (vector) {
        load_vector<P>(record.columns[kParam], at, w);
        load_vector(record.columns[kGrad], record.meta.grad_dtype(), at, g);
      } else {
        SL_UNROLL
        for (int k = 0; k < kVector; ++k) {
          if (at + k >= end) break;
          w[k] = load_as<T>(static_cast<const P*>(record.columns[kParam])[record.offset(words, kParam, at + k)]);
          g[k] = load_element<T>(record.columns[kGrad], record.meta.grad_dtype(), record.offset(words, kGrad, at + k));
        }
      }
      SL_UNROLL
      for (int k = 0; k < kVector; ++k) {
        if (reader.unscale) g[k] = g[k] * reader.inverse;
        g[k] = reader.seen(g[k], record.meta.negate());
      }
      SL_UNROLL
      for (int s = 0; s < R::kNumPrepared; ++s) {
        T values[kVector] = {};
        if (vector) {
          load_vector<S>(record.columns[kState + s], at, values);
        } else {
          SL_UNROLL
          for (int k = 0; k < kVector; ++k) {
            if (at + k >= end) break;
            const int64_t offset = record.offset(words, kState + s, at + k);
            values[k] = load_as<T>(static_cast<const S*>(record.columns[kState + s])[offset]);
          }
        }
        SL_UNROLL
        for (int k = 0; k < kVector; ++k) states[k][s] = values[k];
      }
      SL_UNROLL
      for (int k = 0; k < kVector; ++k) R::prepare(shared.scalars, g[k], states[k]);
      SL_UNROLL
      for (int s = 0; s < R::kNumPrepared; ++s) {
        // What follows sees the states as they are stored.
        Vector<S> stored;
        T values[kVector];
        SL_UNROLL
        for (int k = 0; k < kVector; ++k) values[k] = states[k][s];
        stored.narrow(values);
        stored.widen(values);
        SL_UNROLL
        for (int k = 0; k < kVector; ++k) states[k][s] = values[k];
        if (vector) {
          stored.store(record.columns[kState + s], at);
        } else {
          SL_UNROLL
          for (int k = 0; k < kVector; ++k) {
            if (at + k >= end) break;
            store_as(static_cast<S*>(record.columns[kState + s]) + record.offset(words, kState + s, at + k), values[k]);
          }
        }
      }
      SL_UNROLL
      for (int k = 0; k < kVector; ++k) {
        if (at + k >= end) break;
        T a, b;
        R::measure(shared.scalars, w[k], g[k], states[k], a, b);
        first.lanes[k] = AddSquare()(first.lanes[k], a);
        second.lanes[k] = AddSquare()(second.lanes[k], b);
      }
    }
    const T a = first.total(Add()), b = second.total(Add());
    const int64_t leaves = (record.numel + kLeaf - 1) / kLeaf;
    if (leaf < leaves && threadIdx.x % kLeafThreads == 0) {
      const int64_t sums = static_cast<int64_t>(words[launch.shape.sums + tensor]);
      sum_at<T>(launch.sums, sums + leaf) = a;
      sum_at<T>(launch.sums, sums + leaves + leaf) = b;
    }
  }
}

// One block for each tensor: its leaves folded, and the ratio from the two norms.
template <class R>
SL_KERNEL(kFoldThreads)
ratio(SL_ARGUMENTS(Launch) launch) {
  if (launch.found_inf != nullptr && *launch.found_inf != 0.0f) return;
  SL_SHARED(decltype(SharedScalars<R, T>()), shared);
  ScalarsOfBlock<R, T> scalars(shared);
  const Words words(launch);
  for (int tensor = blockIdx.x; tensor < launch.shape.tensors; tensor += gridDim.x) {
    const Meta meta{words[launch.shape.meta + tensor]};
    scalars.update(words, meta.group(), next_time(launch.shape, words, tensor, meta));
    const int64_t leaves = (static_cast<int64_t>(words[launch.shape.numel + tensor]) + kLeaf - 1) / kLeaf;
    const int64_t sums = static_cast<int64_t>(words[launch.shape.sums + tensor]);
    fold_leaves<T>(launch.sums, sums, leaves, Add());
    fold_leaves<T>(launch.sums, sums + leaves, leaves, Add());
    if (threadIdx.x == 0 && leaves > 0) {
      const T first = square_root(sum_at<T>(launch.sums, sums));
      const T second = square_root(sum_at<T>(launch.sums, sums + leaves));
      launch.ratios[tensor] = static_cast<double>(R::ratio(shared.scalars, first, second));
    }
  }
}

#define SL_STRINGIFY_(x) #x
#define SL_STRINGIFY(x) SL_STRINGIFY_(x)
#define SL_LABEL(kernel, rule) kernel "_" #rule "_" SL_STRINGIFY(SL_PAIR)

// A rule without states needs no kernel of its own for another dtype of states.
template <class R, class Kernels>
gpu::Kernel unless_redundant(Kernels make) {
  if constexpr (R::kNumStates > 0 || std::is_same<P, S>::value) return make(R());
  return gpu::Kernel{};
}

extern const GpuKernels kernels;
const GpuKernels kernels = {
    dtype_of<P>::value,
    dtype_of<S>::value,
    {
#define SL_RULE(name, ...) \
  unless_redundant<__VA_ARGS__>( \
      [](auto rule) { return gpu::kernel(SL_LABEL("update", name), kTileThreads, update<decltype(rule)>); }),
#define SL_NORM_RULE(name, ...) gpu::kernel(SL_LABEL("prepare", name), kTileThreads, prepare<__VA_ARGS__>),
#include "rules/rules.def"
    },
    {
#define SL_RULE(name, ...) gpu::Kernel{},
#define SL_NORM_RULE(name, ...) gpu::kernel(SL_LABEL("ratio", name), kFoldThreads, ratio<__VA_ARGS__>),
#include "rules/rules.def"
    },
    {
#define SL_RULE(name, ...) gpu::Kernel{},
#define SL_NORM_RULE(name, ...) gpu::kernel(SL_LABEL("apply", name), kTileThreads, apply<__VA_ARGS__>),
#include "rules/rules.def"
    },
};

}  // namespace SL_PAIR
}  // namespace stepladder
