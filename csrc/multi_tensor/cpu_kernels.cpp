// The CPU executor's kernels. Compiled once for each vector width, with SL_ISA naming the width and the
// compiler's target flags set to match; nothing here may be visible to another width's copy.
//
// A chunk is walked in blocks that fit the L1 cache. A column whose storage dtype is the arithmetic type
// and whose elements are consecutive is used in place; any other is staged: converted or gathered into a
// buffer, updated there, and stored back with one rounding. Every rule thus compiles to one vectorised
// loop for each arithmetic type, whatever the dtypes and layouts around it.
#include "multi_tensor/kernels.h"

#include <utility>

#include "common/philox.h"
#include "multi_tensor/sums.h"
#include "newton_schulz/cpu_normalise.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace stepladder {
namespace SL_ISA {

constexpr int kBlock =
    256;  // elements, few enough that memory is still read as one stream; a multiple of kLanes and of kPhiloxElements
constexpr int kMaxDims = 64;

template <class T, int kElements = kBlock>
struct Stage {
  alignas(64) T columns[kColumns][kElements];
};

template <class T, class S>
static inline void load_array(const S* SL_RESTRICT in, int64_t n, T* SL_RESTRICT out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = load_as<T>(in[i]);
}

template <class T, class S>
static inline void store_array(S* SL_RESTRICT out, int64_t n, const T* SL_RESTRICT in) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store_as(&out[i], in[i]);
}

#if defined(__AVX512BW__)
// The same conversions, 16 at a time; compilers shuffle more than they need to. The processor's own for fp16
// give the same bits, NaN payloads apart; its bf16 instruction does not, as it flushes subnormal numbers.
struct Half16 {
  static __m512 load(const bf16* in) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in))), 16));
  }
  static __m512 load(const f16* in) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
  }

  static void store(bf16* out, __m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i kept = _mm512_srli_epi32(bits, 16);
    const __m512i bias = _mm512_add_epi32(_mm512_and_si512(kept, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    const __m512i result =
        _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), kept, _mm512_set1_epi32(0x40));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(result));
  }
  static void store(f16* out, __m512 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                        _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

template <class S>
static inline void load_halves(const S* SL_RESTRICT in, int64_t n, float* SL_RESTRICT out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) _mm512_storeu_ps(out + i, Half16::load(in + i));
  for (; i < n; ++i) out[i] = to_float(in[i]);
}

template <class S>
static inline void store_halves(S* SL_RESTRICT out, int64_t n, const float* SL_RESTRICT in) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) Half16::store(out + i, _mm512_loadu_ps(in + i));
  for (; i < n; ++i) store_as(&out[i], in[i]);
}

static inline void load_array(const bf16* in, int64_t n, float* out) { load_halves(in, n, out); }
static inline void load_array(const f16* in, int64_t n, float* out) { load_halves(in, n, out); }
static inline void store_array(bf16* out, int64_t n, const float* in) { store_halves(out, n, in); }
static inline void store_array(f16* out, int64_t n, const float* in) { store_halves(out, n, in); }
#elif defined(__F16C__)
// The processor's own conversions give the same bits (NaN payloads apart) and are faster.
static inline void load_array(const f16* SL_RESTRICT in, int64_t n, float* SL_RESTRICT out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  for (; i < n; ++i) out[i] = to_float(in[i]);
}

static inline void store_array(f16* SL_RESTRICT out, int64_t n, const float* SL_RESTRICT in) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  for (; i < n; ++i) out[i] = to_f16(in[i]);
}
#endif

// Calls visit(offset, run, stride, position) for each stretch of the innermost dimension that lies in
// the logical elements [begin, begin + n).
template <class Visit>
static inline void for_each_run(const Layout& layout, int column, int64_t begin, int64_t n, Visit visit) {
  const int last = static_cast<int>(layout.sizes.size()) - 1;
  const int64_t* sizes = layout.sizes.data();
  const int64_t* strides = layout.strides[column].data();
  int64_t at[kMaxDims];
  int64_t rest = begin, offset = 0;
  for (int d = last; d >= 0; --d) {
    at[d] = rest % sizes[d];
    rest /= sizes[d];
    offset += at[d] * strides[d];
  }
  for (int64_t done = 0; done < n;) {
    const int64_t left = sizes[last] - at[last];
    const int64_t run = left < n - done ? left : n - done;
    visit(offset, run, strides[last], done);
    done += run;
    at[last] += run;
    offset += run * strides[last];
    for (int d = last; d > 0 && at[d] == sizes[d]; --d) {
      offset += strides[d - 1] - at[d] * strides[d];
      at[d] = 0;
      ++at[d - 1];
    }
  }
}

template <class T>
struct Access {
  const Tensor& tensor;
  bool in_order;  // walk the logical order even where memory order would do

  bool flat() const { return tensor.contiguous || (tensor.uniform && !in_order); }

  template <class S>
  void load(int column, int64_t begin, int64_t n, T* out) const {
    const S* data = static_cast<const S*>(tensor.columns[column].data);
    if (flat()) {
      load_array(data + begin, n, out);
      return;
    }
    for_each_run(tensor.layout, column, begin, n, [&](int64_t offset, int64_t run, int64_t stride, int64_t at) {
      for (int64_t i = 0; i < run; ++i) out[at + i] = load_as<T>(data[offset + i * stride]);
    });
  }

  template <class S>
  void store(int column, int64_t begin, int64_t n, const T* in) const {
    S* data = static_cast<S*>(tensor.columns[column].data);
    if (flat()) {
      store_array(data + begin, n, in);
      return;
    }
    for_each_run(tensor.layout, column, begin, n, [&](int64_t offset, int64_t run, int64_t stride, int64_t at) {
      for (int64_t i = 0; i < run; ++i) store_as(&data[offset + i * stride], in[at + i]);
    });
  }

  bool in_place(int column) const { return flat() && tensor.columns[column].dtype == dtype_of<T>::value; }

  // The column's elements [begin, begin + n) in the arithmetic type: in place, or copied to `buffer`.
  T* open(int column, int64_t begin, int64_t n, T* buffer) const {
    if (in_place(column)) return static_cast<T*>(tensor.columns[column].data) + begin;
    copy_in(column, begin, n, buffer);
    return buffer;
  }

  void copy_in(int column, int64_t begin, int64_t n, T* buffer) const {
    switch (tensor.columns[column].dtype) {
      case DType::f64: return load<double>(column, begin, n, buffer);
      case DType::f32: return load<float>(column, begin, n, buffer);
      case DType::bf16: return load<bf16>(column, begin, n, buffer);
      case DType::f16: return load<f16>(column, begin, n, buffer);
    }
  }

  void copy_out(int column, int64_t begin, int64_t n, const T* buffer) const {
    switch (tensor.columns[column].dtype) {
      case DType::f64: return store<double>(column, begin, n, buffer);
      case DType::f32: return store<float>(column, begin, n, buffer);
      case DType::bf16: return store<bf16>(column, begin, n, buffer);
      case DType::f16: return store<f16>(column, begin, n, buffer);
    }
  }

  // Stores what open() staged.
  void close(int column, int64_t begin, int64_t n, const T* buffer) const {
    if (in_place(column)) return;
    if (column == kParam && tensor.stochastic) return store_stochastic(begin, n, buffer);
    copy_out(column, begin, n, buffer);
  }

  void store_stochastic(int64_t begin, int64_t n, const T* in) const {
    uint32_t random[kBlock + kPhiloxElements];
    const uint64_t first = static_cast<uint64_t>(tensor.first + begin) / kPhiloxElements;
    const int64_t skipped = (tensor.first + begin) % kPhiloxElements;
    const int64_t calls = (skipped + n + kPhiloxElements - 1) / kPhiloxElements;
#pragma omp simd
    for (int64_t call = 0; call < calls; ++call) {
      const Philox4 bits = rounding_bits(tensor.seed, tensor.step, tensor.index, first + call);
      for (int word = 0; word < 4; ++word) {
        random[call * kPhiloxElements + 2 * word] = bits.word[word] & 0xffffu;
        random[call * kPhiloxElements + 2 * word + 1] = bits.word[word] >> 16;
      }
    }
    bf16 rounded[kBlock];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) rounded[i] = to_bf16_stochastic(static_cast<float>(in[i]), random[skipped + i]);
    bf16* data = static_cast<bf16*>(tensor.columns[kParam].data);
    if (flat()) {
      memcpy(data + begin, rounded, n * sizeof(bf16));
      return;
    }
    for_each_run(tensor.layout, kParam, begin, n, [&](int64_t offset, int64_t run, int64_t stride, int64_t at) {
      for (int64_t i = 0; i < run; ++i) data[offset + i * stride] = rounded[at + i];
    });
  }

  // The gradient as the rule sees it: unscaled, clipped, negated for maximize. The last pass over a chunk
  // writes the unscaled gradient back; an earlier one must not, as storing may round.
  const T* gradient(int64_t begin, int64_t n, const GradientScale& scale, bool write_back, T* buffer) const {
    if (!scale.unscale && !scale.clip && !tensor.negate) return open(kGrad, begin, n, buffer);
    copy_in(kGrad, begin, n, buffer);
    if (scale.unscale) {
      const T inverse = static_cast<T>(scale.inverse_scale);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) buffer[i] *= inverse;
      if (write_back) copy_out(kGrad, begin, n, buffer);
    }
    const T factor = scale.clip ? static_cast<T>(scale.clip_factor) : T(1);
    const T signed_factor = tensor.negate ? -factor : factor;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) buffer[i] *= signed_factor;
    return buffer;
  }
};

// A chunk whose columns are all used in place needs no blocks.
template <class T>
static int64_t block_size(const Access<T>& access, const GradientScale& scale, int64_t whole) {
  if (scale.unscale || scale.clip || access.tensor.negate) return kBlock;
  for (int c = 0; c < access.tensor.num_columns; ++c)
    if (!access.in_place(c)) return kBlock;
  return whole;
}

// body(w, g, state) for each element, every pointer in the arithmetic type.
template <int kStates, class T, class Body>
static inline void for_each_element(int64_t n, T* SL_RESTRICT w, const T* SL_RESTRICT g, T* const* states, Body body) {
  T* SL_RESTRICT s0 = states[0];
  T* SL_RESTRICT s1 = states[1];
  T* SL_RESTRICT s2 = states[2];
  SL_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    T state[kMaxStates];
    if constexpr (kStates > 0) state[0] = s0[i];
    if constexpr (kStates > 1) state[1] = s1[i];
    if constexpr (kStates > 2) state[2] = s2[i];
    T weight = w[i];
    body(weight, g[i], state);
    w[i] = weight;
    if constexpr (kStates > 0) s0[i] = state[0];
    if constexpr (kStates > 1) s1[i] = state[1];
    if constexpr (kStates > 2) s2[i] = state[2];
  }
}

// Half-precision columns that lie as they are worked on, a short span at a time and in a loop of fixed length:
// conversions then overlap with divisions and roots. P stores parameter and gradient, S the states.
constexpr int kSpan = 128;  // elements

template <class S>
static inline void load_span(const S* in, float* out) {
  load_array(in, kSpan, out);
}
template <class S>
static inline void store_span(S* out, const float* in) {
  store_array(out, kSpan, in);
}
#if defined(__AVX512BW__)
template <class S>
static inline void load_half_span(const S* in, float* out) {
  for (int i = 0; i < kSpan; i += 16) _mm512_storeu_ps(out + i, Half16::load(in + i));
}
template <class S>
static inline void store_half_span(S* out, const float* in) {
  for (int i = 0; i < kSpan; i += 16) Half16::store(out + i, _mm512_loadu_ps(in + i));
}
static inline void load_span(const bf16* in, float* out) { load_half_span(in, out); }
static inline void load_span(const f16* in, float* out) { load_half_span(in, out); }
static inline void store_span(bf16* out, const float* in) { store_half_span(out, in); }
static inline void store_span(f16* out, const float* in) { store_half_span(out, in); }
#elif defined(__F16C__)
static inline void load_span(const f16* in, float* out) {
  for (int i = 0; i < kSpan; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
}
static inline void store_span(f16* out, const float* in) {
  for (int i = 0; i < kSpan; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#endif

template <class R, class P, class S>
static void update_spans(const Tensor& tensor, int64_t begin, int64_t end) {
  const auto scalars = *static_cast<const typename R::template Scalars<float>*>(tensor.scalars);
  const auto column = [&](int c, auto type) { return static_cast<decltype(type)*>(tensor.columns[c].data); };
  P* const weights = column(kParam, P());
  const P* const grads = column(kGrad, P());
  Stage<float, kSpan> stage;
  float* states[kMaxStates];
  for (int k = 0; k < kMaxStates; ++k) states[k] = stage.columns[kState + k];
  for (int64_t at = begin; at < end; at += kSpan) {
    load_span(weights + at, stage.columns[kParam]);
    load_span(grads + at, stage.columns[kGrad]);
    for (int k = 0; k < R::kNumStates; ++k) load_span(column(kState + k, S()) + at, states[k]);
    for_each_element<R::kNumStates>(kSpan, stage.columns[kParam], stage.columns[kGrad], states,
                                    [&](float& w, float g, float* state) { R::update(scalars, w, g, state); });
    store_span(weights + at, stage.columns[kParam]);
    for (int k = 0; k < R::kNumStates; ++k) store_span(column(kState + k, S()) + at, states[k]);
  }
}

// Does what update_spans can do of a chunk; returns where it stopped.
template <class R>
static int64_t update_whole_spans(const Access<float>& access, int64_t begin, int64_t end, const GradientScale& scale) {
  const Tensor& tensor = access.tensor;
  const int64_t whole = begin + (end - begin) / kSpan * kSpan;
  if (!access.flat() || tensor.stochastic || tensor.negate || scale.unscale || scale.clip) return begin;
  const DType dtype = tensor.columns[kParam].dtype;
  const DType state = R::kNumStates > 0 ? tensor.columns[kState].dtype : dtype;
  bool alike = tensor.columns[kGrad].dtype == dtype;
  for (int c = kState; c < tensor.num_columns; ++c) alike = alike && tensor.columns[c].dtype == state;
  if (!alike) return begin;
  if (dtype == DType::bf16 && state == DType::bf16) return update_spans<R, bf16, bf16>(tensor, begin, whole), whole;
  if (dtype == DType::f16 && state == DType::f16) return update_spans<R, f16, f16>(tensor, begin, whole), whole;
  if (dtype == DType::bf16 && state == DType::f32) return update_spans<R, bf16, float>(tensor, begin, whole), whole;
  return begin;
}

template <class R, class T>
static void update(const Tensor& tensor, int64_t begin, int64_t end, const GradientScale& scale) {
  const auto scalars = *static_cast<const typename R::template Scalars<T>*>(tensor.scalars);
  const Access<T> access{tensor, tensor.stochastic};
  if constexpr (std::is_same<T, float>::value) begin = update_whole_spans<R>(access, begin, end, scale);
  const int64_t block = block_size(access, scale, end - begin);
  Stage<T> stage;
  for (int64_t at = begin; at < end; at += block) {
    const int64_t n = end - at < block ? end - at : block;
    const T* g = access.gradient(at, n, scale, true, stage.columns[kGrad]);
    T* w = access.open(kParam, at, n, stage.columns[kParam]);
    T* states[kMaxStates] = {};
    for (int k = 0; k < R::kNumStates; ++k) states[k] = access.open(kState + k, at, n, stage.columns[kState + k]);
    for_each_element<R::kNumStates>(n, w, g, states,
                                    [&](T& weight, T grad, T* state) { R::update(scalars, weight, grad, state); });
    access.close(kParam, at, n, w);
    for (int k = 0; k < R::kNumStates; ++k) access.close(kState + k, at, n, states[k]);
  }
}

// The fixed reduction tree. A leaf: 128 lanes summed row after row, lanes folded in halves.
template <class T>
struct LeafSum {
  alignas(64) T lanes[kLanes] = {};

  template <class Combine>
  void add(const T* SL_RESTRICT values, int64_t n, Combine combine) {
    for (int64_t row = 0; row < n; row += kLanes) {
      const int64_t width = n - row < kLanes ? n - row : kLanes;
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) lanes[j] = combine(lanes[j], values[row + j]);
    }
  }

  template <class Join>
  T total(Join join) {
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int j = 0; j < half; ++j) lanes[j] = join(lanes[j], lanes[j + half]);
    return lanes[0];
  }
};

// Leaves folded in halves, in index order; overwrites them.
template <class T, class Join>
static T fold_leaves(T* leaves, int64_t n, Join join) {
  if (n == 0) return T(0);
  while (n > 1) {
    const int64_t half = (n + 1) / 2;
    for (int64_t j = 0; j < n - half; ++j) leaves[j] = join(leaves[j], leaves[j + half]);
    n = half;
  }
  return leaves[0];
}

template <class R, class T>
static void prepare(const Tensor& tensor, int64_t begin, int64_t end, const GradientScale& scale) {
  const auto scalars = *static_cast<const typename R::template Scalars<T>*>(tensor.scalars);
  const Access<T> access{tensor, true};
  T* sums = static_cast<T*>(tensor.leaves);
  Stage<T> stage;
  alignas(64) T first[kBlock], second[kBlock];
  for (int64_t leaf = begin; leaf < end; leaf += kLeaf) {
    const int64_t leaf_end = leaf + kLeaf < end ? leaf + kLeaf : end;
    LeafSum<T> first_sum, second_sum;
    for (int64_t at = leaf; at < leaf_end; at += kBlock) {
      const int64_t n = leaf_end - at < kBlock ? leaf_end - at : kBlock;
      const T* g = access.gradient(at, n, scale, false, stage.columns[kGrad]);
      T* w = access.open(kParam, at, n, stage.columns[kParam]);
      T* states[kMaxStates] = {};
      for (int k = 0; k < R::kNumPrepared; ++k) states[k] = access.open(kState + k, at, n, stage.columns[kState + k]);
      for_each_element<R::kNumPrepared>(n, w, g, states,
                                        [&](T&, T grad, T* state) { R::prepare(scalars, grad, state); });
      for (int k = 0; k < R::kNumPrepared; ++k) {
        access.close(kState + k, at, n, states[k]);
        if (!access.in_place(kState + k)) access.copy_in(kState + k, at, n, states[k]);
      }
      SL_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) {
        T state[kMaxStates] = {};
        for (int k = 0; k < R::kNumPrepared; ++k) state[k] = states[k][i];
        T a, b;
        R::measure(scalars, w[i], g[i], state, a, b);
        first[i] = a;
        second[i] = b;
      }
      first_sum.add(first, n, AddSquare());
      second_sum.add(second, n, AddSquare());
    }
    sums[leaf / kLeaf] = first_sum.total(Add());
    sums[tensor.num_leaves() + leaf / kLeaf] = second_sum.total(Add());
  }
}

template <class R, class T>
static double ratio(const Tensor& tensor) {
  const auto scalars = *static_cast<const typename R::template Scalars<T>*>(tensor.scalars);
  T* sums = static_cast<T*>(tensor.leaves);
  const T first = square_root(fold_leaves(sums, tensor.num_leaves(), Add()));
  const T second = square_root(fold_leaves(sums + tensor.num_leaves(), tensor.num_leaves(), Add()));
  return static_cast<double>(R::ratio(scalars, first, second));
}

template <class R, class T>
static void apply(const Tensor& tensor, int64_t begin, int64_t end, const GradientScale& scale) {
  const auto scalars = *static_cast<const typename R::template Scalars<T>*>(tensor.scalars);
  const T ratio = static_cast<T>(tensor.ratio);
  const Access<T> access{tensor, true};
  Stage<T> stage;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = end - at < kBlock ? end - at : kBlock;
    const T* g = access.gradient(at, n, scale, true, stage.columns[kGrad]);
    T* w = access.open(kParam, at, n, stage.columns[kParam]);
    T* states[kMaxStates] = {};
    for (int k = 0; k < R::kNumStates; ++k) states[k] = access.open(kState + k, at, n, stage.columns[kState + k]);
    for_each_element<R::kNumStates>(
        n, w, g, states, [&](T& weight, T grad, T* state) { R::apply(scalars, ratio, weight, grad, state); });
    access.close(kParam, at, n, w);
    for (int k = 0; k < R::kNumStates; ++k) access.close(kState + k, at, n, states[k]);
  }
}

template <class T>
static bool measure(const Tensor& tensor, int64_t begin, int64_t end, Norm norm, double inverse_scale) {
  const Access<T> access{tensor, true};
  const T inverse = static_cast<T>(inverse_scale);
  T* sums = static_cast<T*>(tensor.leaves);
  alignas(64) T buffer[kBlock];
  int not_finite = 0;
  for (int64_t leaf = begin; leaf < end; leaf += kLeaf) {
    const int64_t leaf_end = leaf + kLeaf < end ? leaf + kLeaf : end;
    LeafSum<T> sum;
    for (int64_t at = leaf; at < leaf_end; at += kBlock) {
      const int64_t n = leaf_end - at < kBlock ? leaf_end - at : kBlock;
      const T* g = access.open(kGrad, at, n, buffer);
#pragma omp simd reduction(| : not_finite)
      for (int64_t i = 0; i < n; ++i) not_finite |= g[i] - g[i] != T(0);
      if (inverse != T(1)) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) buffer[i] = g[i] * inverse;
        g = buffer;
      }
      switch (norm) {
        case Norm::l1: sum.add(g, n, AddMagnitude()); break;
        case Norm::l2: sum.add(g, n, AddSquare()); break;
        case Norm::inf: sum.add(g, n, MaxMagnitude()); break;
      }
    }
    sums[leaf / kLeaf] = norm == Norm::inf ? sum.total(Max()) : sum.total(Add());
  }
  return not_finite != 0;
}

template <class T>
static double fold(const Tensor& tensor, Norm norm) {
  T* sums = static_cast<T*>(tensor.leaves);
  const int64_t n = tensor.num_leaves();
  return static_cast<double>(norm == Norm::inf ? fold_leaves(sums, n, Max()) : fold_leaves(sums, n, Add()));
}

template <class T>
static void scale(const Tensor& tensor, int64_t begin, int64_t end, double factor) {
  const Access<T> access{tensor, false};
  const T multiplier = static_cast<T>(factor);
  alignas(64) T buffer[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = end - at < kBlock ? end - at : kBlock;
    T* g = access.open(kGrad, at, n, buffer);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) g[i] *= multiplier;
    access.close(kGrad, at, n, g);
  }
}

#define SL_STRINGIFY_(x) #x
#define SL_STRINGIFY(x) SL_STRINGIFY_(x)

extern const CpuKernels kernels;
const CpuKernels kernels = {
    SL_STRINGIFY(SL_ISA),
    {
#define SL_RULE(name, ...) {update<__VA_ARGS__, double>, update<__VA_ARGS__, float>},
#define SL_NORM_RULE(name, ...) {prepare<__VA_ARGS__, double>, prepare<__VA_ARGS__, float>},
#include "rules/rules.def"
    },
    {
#define SL_RULE(name, ...) {nullptr, nullptr},
#define SL_NORM_RULE(name, ...) {ratio<__VA_ARGS__, double>, ratio<__VA_ARGS__, float>},
#include "rules/rules.def"
    },
    {
#define SL_RULE(name, ...) {nullptr, nullptr},
#define SL_NORM_RULE(name, ...) {apply<__VA_ARGS__, double>, apply<__VA_ARGS__, float>},
#include "rules/rules.def"
    },
    {measure<double>, measure<float>},
    {fold<double>, fold<float>},
    {scale<double>, scale<float>},
    newton_schulz::normalise,
};

}  // namespace SL_ISA
}  // namespace stepladder
