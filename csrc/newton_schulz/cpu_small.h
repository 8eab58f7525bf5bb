// A matrix of one block's rows, iterated on in fp32.
#pragma once

#include <cmath>

#include "newton_schulz/cpu_memory.h"

namespace stepladder::newton_schulz {
namespace SL_UNIT {
namespace {

// Rows of x (m×n) times each other, into a (m×32), sixteen sums at a time.
void small_gram(const float* x, int m, int64_t n, float* a) {
  constexpr int kSide = 4;
  for (int i = 0; i < m; i += kSide) {
    for (int j = i; j < m; j += kSide) {
      __m512 sums[kSide][kSide] = {};
      for (int64_t k = 0; k < n; k += 16) {
        __m512 right[kSide];
        for (int s = 0; s < kSide; ++s) right[s] = _mm512_loadu_ps(x + (j + s) * n + k);
        for (int r = 0; r < kSide; ++r) {
          const __m512 left = _mm512_loadu_ps(x + (i + r) * n + k);
          for (int s = 0; s < kSide; ++s) sums[r][s] = _mm512_fmadd_ps(left, right[s], sums[r][s]);
        }
      }
      for (int r = 0; r < kSide; ++r) {
        for (int s = 0; s < kSide; ++s)
          a[(i + r) * kBlock + j + s] = a[(j + s) * kBlock + i + r] = _mm512_reduce_add_ps(sums[r][s]);
      }
    }
  }
}

// out ← factor·left·right + out, of 32 columns each at these strides; left m×m with rows of 32.
void small_multiply(const float* left, const float* right, int64_t right_stride, int m, float factor, float* out,
                    int64_t out_stride) {
  constexpr int kRows = 4;
  for (int i = 0; i < m; i += kRows) {
    __m512 sums[kRows][2] = {};
    for (int k = 0; k < m; ++k) {
      const __m512 a = _mm512_loadu_ps(right + k * right_stride), b = _mm512_loadu_ps(right + k * right_stride + 16);
      for (int r = 0; r < kRows; ++r) {
        const __m512 l = _mm512_set1_ps(left[(i + r) * kBlock + k]);
        sums[r][0] = _mm512_fmadd_ps(l, a, sums[r][0]);
        sums[r][1] = _mm512_fmadd_ps(l, b, sums[r][1]);
      }
    }
    const __m512 f = _mm512_set1_ps(factor);
    for (int r = 0; r < kRows; ++r) {
      for (int h = 0; h < 2; ++h) {
        float* const at = out + (i + r) * out_stride + h * 16;
        _mm512_storeu_ps(at, _mm512_fmadd_ps(f, sums[r][h], _mm512_loadu_ps(at)));
      }
    }
  }
}

void small(const Work& work, float* c, float* other, float* third) {
  float* const x = work.operands.small;
  float* const a = c;
  float* const b = other;
  const int64_t n = int64_t{work.program->n_blocks} * kBlock;
  const int m = (static_cast<int>(work.m) + 3) / 4 * 4;  // rows beyond the matrix's are zeros
  const Options& options = *work.job->options;
  memset(a, 0, kBlockFloats * sizeof(float));
  small_gram(x, m, n, a);
  if (options.aol) {
    for (int r = 0; r < m; ++r) {
      float sum = 0.0f;
      for (int j = 0; j < m; ++j) sum += std::fabs(a[r * kBlock + j]);
      const __m512 scale = _mm512_set1_ps(sum == 0.0f ? 1.0f : 1.0f / std::sqrt(sum));
      for (int64_t k = 0; k < n; k += 16)
        _mm512_storeu_ps(x + r * n + k, _mm512_mul_ps(scale, _mm512_loadu_ps(x + r * n + k)));
    }
    small_gram(x, m, n, a);
  }
  bool first = true;
  for (const Triple& t : options.steps) {
    if (!first) small_gram(x, m, n, a);
    first = false;
    for (int k = 0; k < kBlockFloats; ++k) b[k] = static_cast<float>(t.b) * a[k];
    small_multiply(a, a, kBlock, m, static_cast<float>(t.c), b, kBlock);
    for (int r = 0; r < m; ++r) b[r * kBlock + r] += static_cast<float>(t.a);
    for (int64_t j = 0; j < n; j += kBlock) {
      memset(third, 0, kBlockFloats * sizeof(float));
      small_multiply(b, x + j, n, m, 1.0f, third, kBlock);
      for (int r = 0; r < m; ++r) memcpy(x + r * n + j, third + r * kBlock, kBlock * sizeof(float));
    }
  }
  for (int64_t j = 0; j < n; j += kBlock) {
    for (int r = 0; r < kBlock; ++r) memcpy(third + r * kBlock, x + r * n + j, kBlock * sizeof(float));
    finish(work, 0, j, third, other);
  }
}

}  // namespace
}  // namespace SL_UNIT
}  // namespace stepladder::newton_schulz
