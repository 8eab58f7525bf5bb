// The whole course of a small matrix in one launch, a block for each: M, T and X stay in shared memory. In fp32, and by
// a second launch in fp64 for the matrices that fp32 does not reach and that still fit.
#include "matrix_root/gpu_course.h"
#include "matrix_root/gpu_products.h"

namespace stepladder::matrix_root {

namespace {

// How the warps of a block share a product of kSide x kSide.
template <int kSide>
struct Shape;
template <>
struct Shape<32> {
  static constexpr int kThreads = 64, kRows = 32, kColumns = 16;
};
template <>
struct Shape<64> {
  static constexpr int kThreads = 128, kRows = 32, kColumns = 32;
};
template <>
struct Shape<128> {
  static constexpr int kThreads = 256, kRows = 64, kColumns = 32;
};

template <class E, int kSide>
class OnChip {
 public:
  SL_DEVICE explicit OnChip(const RootLaunch& launch)
      : options_(launch.options),
        m_(reinterpret_cast<E*>(gpu::dynamic_shared())),
        t_(m_ + kSquare),
        x_(t_ + kSquare),
        scratch_(reinterpret_cast<double*>(x_ + kSquare)),
        row_(threadIdx.x / 32 / kWarpsInRow * S::kRows),
        column_(threadIdx.x / 32 % kWarpsInRow * S::kColumns) {}

  SL_DEVICE void begin(const RootRecord& matrix, RootState& s) {
    begin_course(options_, matrix.n, largest_magnitude(matrix, scratch_), s);
    if (s.phase == Phase::top) begin_first_attempt(options_, matrix.n, find_top(matrix, s), s);
  }

  // In this arithmetic; `s` is the same in all threads.
  SL_DEVICE void iterate(const RootRecord& matrix, RootState& s) {
    const Attempt& attempt = kWide ? options_.wide : options_.fast;
    const int n = static_cast<int>(matrix.n), p = options_.p;
    load(matrix, s.unit, s.delta);
    P part;
    multiply(part, m_, m_, n);
    s.scale = scale_of(sum_of_squares(part, n, 1.0, 0.0));
    s.start = first_start(attempt, known_condition(s));
    ++s.steps;
    {
      const Start& start = attempt.starts[s.start];
      put_polynomial(part, n, start.c / s.scale / s.scale, start.b / s.scale, start.a, t_, x_);
    }
    double alpha = 1.0 / s.scale;  // M stands for D still
    for (;;) {
      for (int q = p; q > 1; q /= 2) {
        multiply(part, t_, t_, n);
        __syncthreads();
        put(part, n, 1.0, t_);
      }
      multiply(part, t_, m_, n);
      const double distance = sqrt(sum_of_squares(part, n, alpha, 1.0));
      put(part, n, alpha, m_);
      alpha = 1.0;
      if (s.start + 1 < attempt.num_starts) {
        const Start& start = attempt.starts[++s.start];
        ++s.steps;
        multiply(part, m_, m_, n);
        put_polynomial(part, n, start.c, start.b, start.a, t_, nullptr);
      } else {
        bool nearer;
        const Verdict verdict = judge(options_, attempt, distance, s, &nearer);
        s.last = verdict == Verdict::last_step;
        // Kept in memory, as what follows may be further away.
        if (nearer && !s.last) write(matrix, 1.0);
        if (verdict == Verdict::end) break;
        put_newton(n);
      }
      multiply(part, x_, t_, n);
      __syncthreads();
      put(part, n, 1.0, x_);
      if (s.last) break;
    }
    const bool last = s.last;
    const double factor = result_factor(options_, s);
    end_attempt(options_, s);
    if (s.phase != (kWide ? Phase::wide_done : Phase::fast_done)) return;
    if (last) return write(matrix, factor);
    for_elements(n, [&](int r, int c) {
      float& to = matrix.out[r * n + c];
      to = static_cast<float>(static_cast<double>(to) * factor);
    });
  }

  SL_DEVICE void end(const RootRecord& matrix, const RootState& s) {
    const int n = static_cast<int>(matrix.n);
    if (s.phase == Phase::nothing) for_elements(n, [&](int r, int c) { matrix.out[r * n + c] = NAN; });
    if (s.phase == Phase::wide || threadIdx.x != 0) return;
    *matrix.iterations = s.steps;
    *matrix.status = static_cast<int8_t>(s.status);
  }

 private:
  using S = Shape<kSide>;
  using P = Part<E, S::kRows, S::kColumns>;
  static constexpr bool kWide = sizeof(E) == sizeof(double);
  static constexpr int kWarpsInRow = kSide / S::kColumns;
  static constexpr int kStride = kSide + kPad, kSquare = kSide * kStride;
  static_assert(S::kThreads == kSide / S::kRows * kWarpsInRow * 32, "a warp for each part");

  // Each thread has the same elements every time.
  template <class Visit>
  SL_DEVICE static void for_elements(int n, Visit visit) {
    for (int r = threadIdx.x / 32; r < n; r += S::kThreads / 32)
      for (int c = threadIdx.x % 32; c < n; c += 32) visit(r, c);
  }

  // M = A / unit + delta I, from A's lower half; T and X zero, as their padding has to be.
  SL_DEVICE void load(const RootRecord& matrix, double unit, double delta) {
    __syncthreads();
    for (int k = threadIdx.x; k < kSquare; k += S::kThreads) {
      const int r = k / kStride, c = k % kStride;
      double value = 0.0;
      if (r < matrix.n && c < matrix.n) {
        const int64_t row = r > c ? r : c, column = r > c ? c : r;
        value = static_cast<double>(matrix.in[row * matrix.row_stride + column * matrix.column_stride]) / unit;
        if (r == c) value += delta;
      }
      m_[k] = static_cast<E>(value);
      t_[k] = x_[k] = E(0);
    }
    __syncthreads();
  }

  SL_DEVICE bool active(int n) const { return row_ < n && column_ < n && column_ < row_ + S::kRows; }

  SL_DEVICE void multiply(P& part, const E* left, const E* right, int n) const {
    clear(part);
    if (active(n))
      part.add_product(left + row_ * kStride, kStride, right + column_ * kStride, kStride,
                       (n + P::kStep - 1) / P::kStep * P::kStep);
  }

  // `visit(row, column, value)` for this thread's elements on and below the diagonal.
  template <class Visit>
  SL_DEVICE void for_lower(P& part, int n, Visit visit) const {
    if (!active(n)) return;
    part.for_pairs([&](int r, int c, E& low, E& high) {
      r += row_;
      c += column_;
      if (r < n && c <= r) visit(r, c, low);
      if (r < n && c + 1 <= r) visit(r, c + 1, high);
    });
  }

  // ||alpha product - shift I||^2; all threads have read the product's operands then.
  SL_DEVICE double sum_of_squares(P& part, int n, double alpha, double shift) {
    double sum = 0.0;
    for_lower(part, n, [&](int r, int c, E& value) {
      const double x = static_cast<double>(static_cast<E>(alpha) * value - (r == c ? static_cast<E>(shift) : E(0)));
      sum += (r == c ? 1.0 : 2.0) * x * x;
    });
    return block_sum(sum, scratch_);
  }

  SL_DEVICE static void put(int r, int c, E value, E* to) {
    to[r * kStride + c] = value;
    to[c * kStride + r] = value;
  }

  // Where nobody reads any more.
  SL_DEVICE void put(P& part, int n, double alpha, E* to) {
    for_lower(part, n, [&](int r, int c, E& value) { put(r, c, static_cast<E>(alpha) * value, to); });
    __syncthreads();
  }

  // c product + b M + a I.
  SL_DEVICE void put_polynomial(P& part, int n, double c2, double c1, double c0, E* to, E* also) {
    for_lower(part, n, [&](int r, int c, E& value) {
      E x = static_cast<E>(c2) * value + static_cast<E>(c1) * m_[r * kStride + c];
      if (r == c) x += static_cast<E>(c0);
      put(r, c, x, to);
      if (also != nullptr) put(r, c, x, also);
    });
    __syncthreads();
  }

  // T = ((p + 1) I - M) / p.
  SL_DEVICE void put_newton(int n) {
    const E factor = static_cast<E>(-1.0 / options_.p), diagonal = static_cast<E>((options_.p + 1.0) / options_.p);
    for_elements(
        n, [&](int r, int c) { t_[r * kStride + c] = factor * m_[r * kStride + c] + (r == c ? diagonal : E(0)); });
    __syncthreads();
  }

  SL_DEVICE void write(const RootRecord& matrix, double factor) {
    const int n = static_cast<int>(matrix.n);
    for_elements(n, [&](int r, int c) {
      matrix.out[r * n + c] = static_cast<float>(static_cast<double>(x_[r * kStride + c]) * factor);
    });
  }

  // The largest eigenvalue of A / top_unit, by squarings and the power method.
  SL_DEVICE double find_top(const RootRecord& matrix, const RootState& s) {
    const int n = static_cast<int>(matrix.n);
    load(matrix, s.top_unit, 0.0);
    P part;
    double sum = 1.0;
    for (int k = 0; k < options_.squarings; ++k) {
      const E* const from = k == 0 ? m_ : t_;
      multiply(part, from, from, n);
      const double squares = sum_of_squares(part, n, 1.0 / sum, 0.0);
      put(part, n, 1.0 / sum, t_);
      sum = squares;
    }
    E* const v = x_;
    E* const w = x_ + kStride;
    for (int k = threadIdx.x; k < n; k += S::kThreads) v[k] = static_cast<E>(probe_at(k));
    __syncthreads();
    for (int k = 0; k < options_.multiplications; ++k) {
      const double norm = sqrt(multiply_vector(t_, n, v, w, w));
      for (int j = threadIdx.x; j < n; j += S::kThreads) v[j] = static_cast<E>(static_cast<double>(w[j]) / norm);
      __syncthreads();
    }
    const double top = multiply_vector(m_, n, v, w, v);
    double squares = 0.0;
    for (int k = threadIdx.x; k < n; k += S::kThreads) squares += static_cast<double>(v[k]) * static_cast<double>(v[k]);
    return top / block_sum(squares, scratch_);
  }

  // w = square v; returns its inner product with `other`. Columns, which are rows: neighbours in different banks.
  SL_DEVICE double multiply_vector(const E* square, int n, const E* v, E* w, const E* other) {
    double sum = 0.0;
    for (int r = threadIdx.x; r < n; r += S::kThreads) {
      E value = E(0);
      for (int c = 0; c < n; ++c) value += square[c * kStride + r] * v[c];
      w[r] = value;
      sum += static_cast<double>(value) * static_cast<double>(other[r]);
    }
    return block_sum(sum, scratch_);
  }

  const Options& options_;
  E* const m_;
  E* const t_;
  E* const x_;
  double* const scratch_;
  const int row_, column_;  // corner of this warp's part
};

template <class E, int kSide>
SL_DEVICE void iterate_all(const RootLaunch& launch) {
  constexpr bool kWide = sizeof(E) == sizeof(double);
  OnChip<E, kSide> worker(launch);
  for (int64_t i = blockIdx.x; i < launch.count; i += gridDim.x) {
    const RootRecord& matrix = launch.matrices[i];
    RootState s = {};
    if (kWide) {
      s = launch.states[i];
      if (s.phase != Phase::wide) continue;
    } else {
      worker.begin(matrix, s);
    }
    __syncthreads();
    if (s.phase == (kWide ? Phase::wide : Phase::fast)) worker.iterate(matrix, s);
    worker.end(matrix, s);
    __syncthreads();
    if (threadIdx.x == 0) launch.states[i] = s;
  }
}

#define SL_ON_CHIP(side, type, element) \
  SL_KERNEL(Shape<side>::kThreads) \
  roots_##side##_##type(SL_ARGUMENTS(RootLaunch) launch) { iterate_all<element, side>(launch); }
SL_ON_CHIP(32, f32, float)
SL_ON_CHIP(64, f32, float)
SL_ON_CHIP(128, f32, float)
SL_ON_CHIP(32, f64, double)
SL_ON_CHIP(64, f64, double)

#define SL_NAMED(side, type, element) \
  gpu::kernel("roots_" #side "_" #type, Shape<side>::kThreads, roots_##side##_##type, \
              on_chip_bytes(side, sizeof(element)))

}  // namespace

const gpu::Kernel& on_chip_kernel(int side, bool wide) {
  static const gpu::Kernel fast[] = {SL_NAMED(32, f32, float), SL_NAMED(64, f32, float), SL_NAMED(128, f32, float)};
  static const gpu::Kernel in_fp64[] = {SL_NAMED(32, f64, double), SL_NAMED(64, f64, double)};
  return wide ? in_fp64[side] : fast[side];
}

}  // namespace stepladder::matrix_root
