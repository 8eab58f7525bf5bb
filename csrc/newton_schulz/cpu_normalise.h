// Matrices divided by their norms. Included once by multi_tensor/cpu_kernels.cpp, which is compiled for each vector
// width: SL_ISA names it.
#pragma once

#include <algorithm>
#include <cmath>

#include "newton_schulz/normalised.h"

namespace stepladder {
namespace SL_ISA {
namespace newton_schulz {

using namespace stepladder::newton_schulz;

namespace {

constexpr int64_t kPart = 1 << 15;         // elements of a task, about
constexpr int64_t kPartColumns = 1 << 11;  // of them, at the most; a multiple of kLanes
constexpr int64_t kRows = 16;              // at a time, at the least
constexpr int64_t kLanes = 16;             // sums along a row
// Below the norm of any matrix of fp32 but that of zeros.
constexpr double kLeast = 0x1p-150;

// Rows and columns of a matrix.
struct Part {
  size_t matrix;
  int64_t row, rows, col, cols;
};

// What X is multiplied by: two factors, one of them a power of two, as their product need not be a normal number.
struct Factors {
  float power = 0.0f, rest = 0.0f;

  Factors() = default;
  Factors(double sum, double eps, double divisor) {
    const double norm = std::sqrt(sum), least = std::max(eps, kLeast);
    // Not std::max, which would take eps for a NaN.
    const double floor = (norm < least ? least : norm) * divisor;
    int exponent = 0;
    if (std::isfinite(floor)) std::frexp(floor, &exponent);
    const double whole = std::ldexp(1.0, -std::clamp(exponent, -126, 126));
    power = static_cast<float>(whole);
    rest = static_cast<float>(1.0 / (whole * floor));
  }
};

inline double square(double x) { return x * x; }

// Of at most kRows rows, in the same order whatever the strides: lanes of a row, what is left of it, row after row.
template <bool kDown, class T>
double squares(const T* x, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
  double lanes[kLanes * kRows] = {};
  const int64_t whole = cols / kLanes * kLanes;
  const auto lane = [](int64_t r, int64_t l) { return kDown ? l * kRows + r : r * kLanes + l; };
  if (kDown) {
    for (int64_t i = 0; i < whole; ++i)
      for (int64_t r = 0; r < rows; ++r) lanes[lane(r, i % kLanes)] += square(to_float(x[r + i * col_stride]));
  } else if (col_stride == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      const T* const row = x + r * row_stride;
      double* const sums = lanes + r * kLanes;
      for (int64_t i = 0; i < whole; i += kLanes)
        for (int64_t l = 0; l < kLanes; ++l) sums[l] += square(to_float(row[i + l]));
    }
  } else {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < whole; ++i)
        lanes[lane(r, i % kLanes)] += square(to_float(x[r * row_stride + i * col_stride]));
  }
  double total = 0.0;
  for (int64_t r = 0; r < rows; ++r) {
    double sum = 0.0;
    for (int64_t l = 0; l < kLanes; ++l) sum += lanes[lane(r, l)];
    for (int64_t i = whole; i < cols; ++i) sum += square(to_float(x[r * row_stride + i * col_stride]));
    total += sum;
  }
  return total;
}

template <class T>
double squares(const T* x, const Part& part, const View& view) {
  const bool down = view.row_stride == 1 && view.col_stride != 1;
  double sum = 0.0;
  for (int64_t r = 0; r < part.rows; r += kRows) {
    const int64_t rows = std::min(kRows, part.rows - r);
    const T* const at = x + (part.row + r) * view.row_stride + part.col * view.col_stride;
    sum += down ? squares<true>(at, rows, part.cols, view.row_stride, view.col_stride)
                : squares<false>(at, rows, part.cols, view.row_stride, view.col_stride);
  }
  return sum;
}

inline void store(float value, float* to) { *to = value; }
inline void store(float value, bf16* to) { *to = to_bf16(value); }

template <class From, class To>
void scale(const From* from, To* to, const Part& part, const Normalised& matrix, const Factors& factors) {
  const View &x = matrix.from, &y = matrix.to;
  const float power = factors.power, rest = factors.rest;
  from += part.row * x.row_stride + part.col * x.col_stride;
  to += part.row * y.row_stride + part.col * y.col_stride;
  if (x.col_stride == 1 && y.col_stride == 1) {
    for (int64_t r = 0; r < part.rows; ++r) {
      const From* const row = from + r * x.row_stride;
      To* const result = to + r * y.row_stride;
      for (int64_t i = 0; i < part.cols; ++i) store(to_float(row[i]) * power * rest, result + i);
    }
    return;
  }
  // As many rows at a time as leave their lines in the cache while columns go across them.
  for (int64_t begin = 0; begin < part.rows; begin += kRows) {
    const int64_t end = std::min(part.rows, begin + kRows);
    for (int64_t i = 0; i < part.cols; ++i)
      for (int64_t r = begin; r < end; ++r)
        store(to_float(from[r * x.row_stride + i * x.col_stride]) * power * rest,
              to + r * y.row_stride + i * y.col_stride);
  }
}

template <class Run>
void by_dtype(const View& view, Run run) {
  switch (view.dtype) {
    case DType::f32: return run(static_cast<const float*>(view.data));
    case DType::bf16: return run(static_cast<const bf16*>(view.data));
    default: return run(static_cast<const f16*>(view.data));
  }
}

}  // namespace

void normalise(const std::vector<Normalised>& matrices, double eps, double divisor, int threads) {
  std::vector<Part> parts;
  std::vector<size_t> first;
  for (size_t k = 0; k < matrices.size(); ++k) {
    const int64_t rows = matrices[k].rows, cols = matrices[k].cols;
    const int64_t wide = std::min(cols, kPartColumns), high = std::max(kRows, kPart / std::max<int64_t>(1, wide));
    first.push_back(parts.size());
    for (int64_t r = 0; r < rows; r += high)
      for (int64_t c = 0; c < cols; c += wide)
        parts.push_back({k, r, std::min(high, rows - r), c, std::min(wide, cols - c)});
  }
  first.push_back(parts.size());
  std::vector<double> sums(parts.size());
  std::vector<Factors> factors(matrices.size());
  const auto count = static_cast<int64_t>(parts.size());
  if (count < 2) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < count; ++t) {
      const View& from = matrices[parts[t].matrix].from;
      by_dtype(from, [&](const auto* x) { sums[t] = squares(x, parts[t], from); });
    }
#pragma omp single
    for (size_t k = 0; k < matrices.size(); ++k) {
      double sum = 0.0;
      for (size_t t = first[k]; t < first[k + 1]; ++t) sum += sums[t];
      factors[k] = Factors(sum, eps, divisor);
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < count; ++t) {
      const Normalised& matrix = matrices[parts[t].matrix];
      const Factors& own = factors[parts[t].matrix];
      by_dtype(matrix.from, [&](const auto* x) {
        if (matrix.to.dtype == DType::bf16)
          scale(x, static_cast<bf16*>(matrix.to.data), parts[t], matrix, own);
        else
          scale(x, static_cast<float*>(matrix.to.data), parts[t], matrix, own);
      });
    }
  }
}

}  // namespace newton_schulz
}  // namespace SL_ISA
}  // namespace stepladder
