// Matrices divided by their norms. Included once by cpu_kernels.cpp, which is compiled for each vector width: SL_ISA
// names it.
#pragma once

#include <algorithm>
#include <cmath>

#include "newton_schulz/normalised.h"

namespace stepladder {
namespace SL_ISA {
namespace newton_schulz {

using namespace stepladder::newton_schulz;

namespace {

constexpr int64_t kPart = 1 << 15;  // elements of a task, about
constexpr int64_t kLeastLines = 16;
constexpr int kLanes = 16;  // sums that a vector or two of any processor holds
// Below the norm of any matrix of fp32 but that of zeros.
constexpr double kLeast = 0x1p-150;

// A matrix as lines of neighbours in memory.
struct Lines {
  int64_t count, length, from_line, to_line, from_stride, to_stride;

  explicit Lines(const Normalised& m) {
    const bool down = m.from.col_stride != 1 && m.from.row_stride == 1;
    count = down ? m.cols : m.rows;
    length = down ? m.rows : m.cols;
    from_line = down ? m.from.col_stride : m.from.row_stride;
    to_line = down ? m.to.col_stride : m.to.row_stride;
    from_stride = down ? m.from.row_stride : m.from.col_stride;
    to_stride = down ? m.to.row_stride : m.to.col_stride;
  }
  int64_t per_task() const { return std::max(kLeastLines, kPart / std::max<int64_t>(1, length)); }
  int64_t tasks() const { return length == 0 ? 0 : (count + per_task() - 1) / per_task(); }
};

struct Task {
  size_t matrix;
  int64_t begin, end;  // lines
};

// ‖from‖F and what it makes of X: two factors, one of them a power of two, as their product need not be a normal
// number.
struct Factors {
  float power, rest;

  Factors(double sum, double eps, double divisor) {
    const double norm = std::sqrt(sum);
    // Not std::max, which would take eps for a NaN.
    const double least = std::max(eps, kLeast), floor = (norm < least ? least : norm) * divisor;
    int exponent = 0;
    if (std::isfinite(floor)) std::frexp(floor, &exponent);
    const double whole = std::ldexp(1.0, -std::clamp(exponent, -126, 126));
    power = static_cast<float>(whole);
    rest = static_cast<float>(1.0 / (whole * floor));
  }
};

template <class T>
double squares(const T* x, int64_t n, int64_t stride) {
  double sums[kLanes] = {};
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kLanes <= n; i += kLanes) {
      for (int l = 0; l < kLanes; ++l) {
        const double v = to_float(x[i + l]);
        sums[l] += v * v;
      }
    }
  }
  double sum = 0.0;
  for (double s : sums) sum += s;
  for (; i < n; ++i) {
    const double v = to_float(x[i * stride]);
    sum += v * v;
  }
  return sum;
}

inline void store(float value, float* to) { *to = value; }
inline void store(float value, bf16* to) { *to = to_bf16(value); }

// Lines [0, count) of one matrix.
template <class From, class To>
void scale(const From* x, To* to, int64_t count, const Lines& lines, const Factors& factors) {
  const float power = factors.power, rest = factors.rest;
  if (lines.from_stride == 1 && lines.to_stride == 1) {
    for (int64_t l = 0; l < count; ++l) {
      const From* const from_line = x + l * lines.from_line;
      To* const to_line = to + l * lines.to_line;
      for (int64_t i = 0; i < lines.length; ++i) store(to_float(from_line[i]) * power * rest, to_line + i);
    }
    return;
  }
  // As many lines at a time as leave them in the cache: those that are written may go across.
  for (int64_t begin = 0; begin < count; begin += kLeastLines) {
    const int64_t end = std::min(count, begin + kLeastLines);
    for (int64_t i = 0; i < lines.length; ++i) {
      for (int64_t l = begin; l < end; ++l)
        store(to_float(x[l * lines.from_line + i * lines.from_stride]) * power * rest,
              to + l * lines.to_line + i * lines.to_stride);
    }
  }
}

template <class Run>
void by_dtype(DType dtype, const void* data, Run run) {
  switch (dtype) {
    case DType::f32: return run(static_cast<const float*>(data));
    case DType::bf16: return run(static_cast<const bf16*>(data));
    default: return run(static_cast<const f16*>(data));
  }
}

}  // namespace

void normalise(const std::vector<Normalised>& matrices, double eps, double divisor, int threads) {
  std::vector<Task> tasks;
  std::vector<size_t> first;
  for (size_t k = 0; k < matrices.size(); ++k) {
    const Lines lines(matrices[k]);
    first.push_back(tasks.size());
    for (int64_t t = 0; t < lines.tasks(); ++t)
      tasks.push_back({k, t * lines.per_task(), std::min(lines.count, (t + 1) * lines.per_task())});
  }
  first.push_back(tasks.size());
  std::vector<double> sums(tasks.size());
  const auto count = static_cast<int64_t>(tasks.size());
  const bool together = threads > 1 && count > 1;
#pragma omp parallel num_threads(threads) if (together)
  {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < count; ++t) {
      const Task& task = tasks[t];
      const Lines lines(matrices[task.matrix]);
      const View& from = matrices[task.matrix].from;
      by_dtype(from.dtype, from.data, [&](const auto* x) {
        double sum = 0.0;
        for (int64_t l = task.begin; l < task.end; ++l)
          sum += squares(x + l * lines.from_line, lines.length, lines.from_stride);
        sums[t] = sum;
      });
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < count; ++t) {
      const Task& task = tasks[t];
      const Lines lines(matrices[task.matrix]);
      const View &from = matrices[task.matrix].from, &to = matrices[task.matrix].to;
      double sum = 0.0;
      for (size_t part = first[task.matrix]; part < first[task.matrix + 1]; ++part) sum += sums[part];
      const Factors factors(sum, eps, divisor);
      by_dtype(from.dtype, from.data, [&](const auto* x) {
        const auto* const begin = x + task.begin * lines.from_line;
        const int64_t at = task.begin * lines.to_line, lines_here = task.end - task.begin;
        if (to.dtype == DType::bf16)
          scale(begin, static_cast<bf16*>(to.data) + at, lines_here, lines, factors);
        else
          scale(begin, static_cast<float*>(to.data) + at, lines_here, lines, factors);
      });
    }
  }
}

}  // namespace newton_schulz
}  // namespace SL_ISA
}  // namespace stepladder
