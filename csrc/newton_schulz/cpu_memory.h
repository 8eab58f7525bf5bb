// Blocks of 32×32 between memory and fp32, and Muon's part in them.
#pragma once

#include <algorithm>

#include "newton_schulz/cpu_tiles.h"

namespace stepladder::newton_schulz {
namespace SL_UNIT {
namespace {

inline __m512 widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }

inline __m512 load16(DType dtype, const void* data, int64_t at, __mmask16 mask) {
  switch (dtype) {
    case DType::f32: return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(data) + at);
    case DType::bf16: return widen(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(data) + at));
    default: return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(data) + at));
  }
}

// `past_caches`: fp32 that nobody reads soon; whole lines of it then go to memory without being read first.
inline void store16(DType dtype, void* data, int64_t at, __mmask16 mask, __m512 value, bool past_caches) {
  switch (dtype) {
    case DType::f32: {
      float* const to = static_cast<float*>(data) + at;
      if (past_caches && mask == 0xffff && reinterpret_cast<uintptr_t>(to) % 64 == 0)
        _mm512_stream_ps(to, value);
      else
        _mm512_mask_storeu_ps(to, mask, value);
      break;
    }
    case DType::bf16: {
      // The instruction for it flushes subnormal numbers.
      const __m512i bits = _mm512_castps_si512(value);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
      const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
      const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
      const __m512i rounded = _mm512_srli_epi32(_mm512_mask_mov_epi32(up, nan, quiet), 16);
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(data) + at, mask, _mm512_cvtepi32_epi16(rounded));
      break;
    }
    default:
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(data) + at, mask,
                               _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
}

inline float load1(const View& view, int64_t at) {
  switch (view.dtype) {
    case DType::f32: return static_cast<const float*>(view.data)[at];
    case DType::bf16: return to_float(static_cast<const bf16*>(view.data)[at]);
    default: return to_float(static_cast<const f16*>(view.data)[at]);
  }
}

inline void store1(const View& view, int64_t at, float value) {
  switch (view.dtype) {
    case DType::f32: static_cast<float*>(view.data)[at] = value; break;
    case DType::bf16: static_cast<bf16*>(view.data)[at] = to_bf16(value); break;
    default: static_cast<f16*>(view.data)[at] = to_f16(value);
  }
}

void transpose_block(float* c) {
  __m512i v[2][2][16];
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      for (int r = 0; r < 16; ++r) v[i][j][r] = _mm512_load_si512(c + (16 * i + r) * kBlock + 16 * j);
      transpose_lanes(v[i][j]);
    }
  }
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j)
      for (int r = 0; r < 16; ++r) _mm512_store_si512(c + (16 * i + r) * kBlock + 16 * j, v[j][i][r]);
  }
}

// The block at (i, j) of an m×n view; zeros beyond its end.
void read_block(const View& view, int64_t m, int64_t n, int64_t i, int64_t j, float* c) {
  const int64_t rows = std::min<int64_t>(kBlock, m - i), cols = std::min<int64_t>(kBlock, n - j);
  const bool across = view.col_stride != 1 && view.row_stride == 1;
  if (view.col_stride != 1 && !across) {
    memset(c, 0, kBlockFloats * sizeof(float));
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t k = 0; k < cols; ++k)
        c[r * kBlock + k] = load1(view, (i + r) * view.row_stride + (j + k) * view.col_stride);
    }
    return;
  }
  const int64_t lines = across ? cols : rows, length = across ? rows : cols;
  const int64_t stride = across ? view.col_stride : view.row_stride;
  const int64_t start = across ? j * stride + i : i * stride + j;
  for (int64_t r = 0; r < kBlock; ++r) {
    for (int h = 0; h < 2; ++h) {
      const __mmask16 mask = r < lines ? first_lanes(length - 16 * h) : 0;
      _mm512_store_ps(c + r * kBlock + h * 16, mask == 0
                                                   ? _mm512_setzero_ps()
                                                   : load16(view.dtype, view.data, start + r * stride + 16 * h, mask));
    }
  }
  if (across) transpose_block(c);
}

// Overwrites c.
void write_block(const View& view, int64_t m, int64_t n, int64_t i, int64_t j, float* c, bool past_caches = false) {
  const int64_t rows = std::min<int64_t>(kBlock, m - i), cols = std::min<int64_t>(kBlock, n - j);
  const bool across = view.col_stride != 1 && view.row_stride == 1;
  if (view.col_stride != 1 && !across) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t k = 0; k < cols; ++k)
        store1(view, (i + r) * view.row_stride + (j + k) * view.col_stride, c[r * kBlock + k]);
    }
    return;
  }
  if (across) transpose_block(c);
  const int64_t lines = across ? cols : rows, length = across ? rows : cols;
  const int64_t stride = across ? view.col_stride : view.row_stride;
  const int64_t start = across ? j * stride + i : i * stride + j;
  for (int64_t r = 0; r < lines; ++r) {
    for (int h = 0; h < 2; ++h) {
      const __mmask16 mask = first_lanes(length - 16 * h);
      if (mask != 0)
        store16(view.dtype, view.data, start + r * stride + 16 * h, mask, _mm512_load_ps(c + r * kBlock + h * 16),
                past_caches);
    }
  }
}

// As torch has it: from the nearer end, in one rounding.
inline __m512 lerp(__m512 start, __m512 end, float weight) {
  const __m512 way = _mm512_sub_ps(end, start);
  return weight < 0.5f ? _mm512_fmadd_ps(_mm512_set1_ps(weight), way, start)
                       : _mm512_fmadd_ps(_mm512_set1_ps(weight - 1.0f), way, end);
}

// What is orthogonalised: X itself, or Muon's update from gradient and momentum. `advance`: the momentum is still
// the last step's, and is moved.
void read_update(const Work& work, int64_t i, int64_t j, bool advance, float* c, float* other) {
  read_block(work.in, work.m, work.n, i, j, c);
  const Muon& muon = work.job->muon;
  if (!muon.active) return;
  read_block(work.buffer, work.m, work.n, i, j, other);
  const __m512 scale = _mm512_set1_ps(muon.grad_scale), momentum = _mm512_set1_ps(muon.momentum);
  const auto advanced = [&](__m512 g, __m512 u) {
    return muon.averages ? lerp(u, g, muon.grad_weight) : _mm512_add_ps(_mm512_mul_ps(momentum, u), g);
  };
  const auto ahead = [&](__m512 g, __m512 u) {
    return muon.averages ? lerp(g, u, muon.momentum) : _mm512_add_ps(g, _mm512_mul_ps(momentum, u));
  };
  if (advance) {
    for (int k = 0; k < kBlockFloats; k += 16) {
      const __m512 g = _mm512_mul_ps(scale, _mm512_load_ps(c + k));
      _mm512_store_ps(other + k, advanced(g, _mm512_load_ps(other + k)));
    }
    write_block(work.buffer, work.m, work.n, i, j, other);
    // What follows sees the momentum as it is stored.
    read_block(work.buffer, work.m, work.n, i, j, other);
  }
  for (int k = 0; k < kBlockFloats; k += 16) {
    const __m512 g = _mm512_mul_ps(scale, _mm512_load_ps(c + k)), u = _mm512_load_ps(other + k);
    _mm512_store_ps(c + k, muon.nesterov ? ahead(g, u) : u);
  }
}

void finish(const Work& work, int64_t i, int64_t j, float* c, float* other) {
  const Muon& muon = work.job->muon;
  if (muon.active) {
    read_block(work.out, work.m, work.n, i, j, other);
    const __m512 decay = _mm512_set1_ps(muon.decay), step = _mm512_set1_ps(muon.step);
    for (int k = 0; k < kBlockFloats; k += 16) {
      const __m512 w = _mm512_mul_ps(decay, _mm512_load_ps(other + k));
      _mm512_store_ps(c + k, _mm512_sub_ps(w, _mm512_mul_ps(step, _mm512_load_ps(c + k))));
    }
  }
  write_block(work.out, work.m, work.n, i, j, c, work.past_caches && !muon.active);
}

}  // namespace
}  // namespace SL_UNIT
}  // namespace stepladder::newton_schulz
