// Compiled once for each matrix unit: SL_UNIT names it, SL_AMX chooses tiles. Needs AVX-512 with bf16.
#include "newton_schulz/cpu_kernels.h"

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(SL_EMULATED_AMX)
#include "emulator/amx.h"
#endif

namespace stepladder::newton_schulz {
namespace SL_UNIT {

namespace {

constexpr int kPairs = 16;  // rows of a right tile
constexpr int kDepth = 16;  // tiles along k that are kept in the first cache
constexpr int kBlockFloats = kBlock * kBlock;

inline __m512bh as_bf16(__m512i v) { return reinterpret_cast<__m512bh>(v); }
inline __m512i as_ints(__m512bh v) { return reinterpret_cast<__m512i>(v); }

// c (32×32, fp32) = or += left (two strips of tiles) · right (two strips), `depth` tiles along k.
#if defined(SL_AMX)

struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
// Eight tiles of 16 rows of 64 bytes. A constant: of a local one GCC sees only the first 8 bytes read, and leaves the
// stores of the others out.
alignas(64) constexpr TileConfig kTiles{1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

void enter() { _tile_loadconfig(&kTiles); }

void leave() { _tile_release(); }

void multiply_block(float* c, const char* left0, const char* left1, const char* right0, const char* right1, int depth,
                    bool accumulate) {
  constexpr int kRow = kBlock * sizeof(float);
  // The compiler does not know that loading a tile reads memory.
  asm volatile("" ::: "memory");
  if (accumulate) {
    _tile_loadd(0, c, kRow);
    _tile_loadd(1, c + 16, kRow);
    _tile_loadd(2, c + 16 * kBlock, kRow);
    _tile_loadd(3, c + 16 * kBlock + 16, kRow);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int k = 0; k < depth; ++k) {
    _tile_loadd(4, left0 + k * kTileBytes, 64);
    _tile_loadd(6, right0 + k * kTileBytes, 64);
    _tile_loadd(7, right1 + k * kTileBytes, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, left1 + k * kTileBytes, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, kRow);
  _tile_stored(1, c + 16, kRow);
  _tile_stored(2, c + 16 * kBlock, kRow);
  _tile_stored(3, c + 16 * kBlock + 16, kRow);
}

#else

void enter() {}
void leave() {}

// Eight rows at a time: sixteen sums in registers hide the latency of the products.
void multiply_block(float* c, const char* left0, const char* left1, const char* right0, const char* right1, int depth,
                    bool accumulate) {
  constexpr int kRows = 8;
  for (int part = 0; part < kBlock / kRows; ++part) {
    const char* const left = (part < 2 ? left0 : left1) + part % 2 * kRows * 64;
    float* const rows = c + part * kRows * kBlock;
    __m512 sums[kRows][2];
    for (int r = 0; r < kRows; ++r) {
      for (int h = 0; h < 2; ++h)
        sums[r][h] = accumulate ? _mm512_load_ps(rows + r * kBlock + h * 16) : _mm512_setzero_ps();
    }
    for (int k = 0; k < depth; ++k) {
      const char* const a = left + k * kTileBytes;
      const char* const b0 = right0 + k * kTileBytes;
      const char* const b1 = right1 + k * kTileBytes;
      for (int p = 0; p < kPairs; ++p) {
        const __m512bh columns0 = as_bf16(_mm512_load_si512(b0 + p * 64));
        const __m512bh columns1 = as_bf16(_mm512_load_si512(b1 + p * 64));
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          int pair;
          memcpy(&pair, a + r * 64 + p * 4, sizeof(pair));
          const __m512bh row = as_bf16(_mm512_set1_epi32(pair));
          sums[r][0] = _mm512_dpbf16_ps(sums[r][0], row, columns0);
          sums[r][1] = _mm512_dpbf16_ps(sums[r][1], row, columns1);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int h = 0; h < 2; ++h) _mm512_store_ps(rows + r * kBlock + h * 16, sums[r][h]);
    }
  }
}

#endif

// Columns of 32 bits become rows, 16×16.
inline void transpose_pairs(__m512i v[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    v[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    v[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// A block of a product, rounded to bf16, on its way to the tiles of operands. Each pointer is to a tile, or null.
struct Rounded {
  __m512i rows[kBlock];  // 32 elements each

  explicit Rounded(const float* c) {
    for (int r = 0; r < kBlock; ++r)
      rows[r] = as_ints(_mm512_cvtne2ps_pbh(_mm512_load_ps(c + r * kBlock + 16), _mm512_load_ps(c + r * kBlock)));
  }
  // Rows 16·half...: k along the columns.
  void store_left(int half, char* left, char* right) const {
    __m512i v[16];
    for (int r = 0; r < 16; ++r) {
      v[r] = rows[16 * half + r];
      _mm512_store_si512(left + r * 64, v[r]);
    }
    if (right == nullptr) return;
    transpose_pairs(v);
    for (int r = 0; r < 16; ++r) _mm512_store_si512(right + r * 64, v[r]);
  }
  // Columns 16·half...: k along the rows. `left` gets what is left tile of the transpose.
  void store_across(int half, char* left, char* right) const {
    alignas(64) static constexpr int16_t kIndex[2][32] = {
        {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
        {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
         24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
    const __m512i index = _mm512_load_si512(kIndex[half]);
    __m512i v[16];
    for (int p = 0; p < 16; ++p) v[p] = _mm512_permutex2var_epi16(rows[2 * p], index, rows[2 * p + 1]);
    if (right != nullptr)
      for (int p = 0; p < 16; ++p) _mm512_store_si512(right + p * 64, v[p]);
    if (left == nullptr) return;
    transpose_pairs(v);
    for (int p = 0; p < 16; ++p) _mm512_store_si512(left + p * 64, v[p]);
  }
};

inline __m512 widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }

// c += rows[r] · a block of a symmetric operand, from its two left tiles.
void add_rows(float* c, const float* rows, const char* tile0, const char* tile1) {
  for (int r = 0; r < kBlock; ++r) {
    const __m512 f = _mm512_set1_ps(rows[r]);
    const char* const row = (r < 16 ? tile0 : tile1) + r % 16 * 64;
    for (int h = 0; h < 2; ++h) {
      float* const at = c + r * kBlock + h * 16;
      const __m512 x = widen(_mm256_load_si256(reinterpret_cast<const __m256i*>(row + h * 32)));
      _mm512_store_ps(at, _mm512_fmadd_ps(f, x, _mm512_load_ps(at)));
    }
  }
}

// The same with factor · (columns[j] + added).
void add_columns(float* c, float factor, const float* columns, float added, const char* tile0, const char* tile1) {
  __m512 f[2];
  for (int h = 0; h < 2; ++h)
    f[h] = _mm512_fmadd_ps(_mm512_set1_ps(factor), _mm512_loadu_ps(columns + h * 16), _mm512_set1_ps(added));
  for (int r = 0; r < kBlock; ++r) {
    const char* const row = (r < 16 ? tile0 : tile1) + r % 16 * 64;
    for (int h = 0; h < 2; ++h) {
      float* const at = c + r * kBlock + h * 16;
      const __m512 x = widen(_mm256_load_si256(reinterpret_cast<const __m256i*>(row + h * 32)));
      _mm512_store_ps(at, _mm512_fmadd_ps(f[h], x, _mm512_load_ps(at)));
    }
  }
}

// c += rows[r] · a block of X, from its two right tiles with k along the rows.
void add_pairs(float* c, const float* rows, const char* tile0, const char* tile1) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int p = 0; p < kPairs; ++p) {
    const __m512 f = _mm512_set1_ps(rows[2 * p]), g = _mm512_set1_ps(rows[2 * p + 1]);
    for (int h = 0; h < 2; ++h) {
      const __m512i pairs = _mm512_load_si512((h == 0 ? tile0 : tile1) + p * 64);
      float* const even = c + 2 * p * kBlock + h * 16;
      float* const odd = even + kBlock;
      const __m512 a = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
      const __m512 b = _mm512_castsi512_ps(_mm512_and_si512(pairs, high));
      _mm512_store_ps(even, _mm512_fmadd_ps(f, a, _mm512_load_ps(even)));
      _mm512_store_ps(odd, _mm512_fmadd_ps(g, b, _mm512_load_ps(odd)));
    }
  }
}

void scale_block(float* c, float factor) {
  const __m512 f = _mm512_set1_ps(factor);
  for (int i = 0; i < kBlockFloats; i += 16) _mm512_store_ps(c + i, _mm512_mul_ps(f, _mm512_load_ps(c + i)));
}

// Memory.

inline __m512 load16(DType dtype, const void* data, int64_t at, __mmask16 mask) {
  switch (dtype) {
    case DType::f32: return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(data) + at);
    case DType::bf16: return widen(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(data) + at));
    default: return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(data) + at));
  }
}

inline void store16(DType dtype, void* data, int64_t at, __mmask16 mask, __m512 value) {
  switch (dtype) {
    case DType::f32: _mm512_mask_storeu_ps(static_cast<float*>(data) + at, mask, value); break;
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
      transpose_pairs(v[i][j]);
    }
  }
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j)
      for (int r = 0; r < 16; ++r) _mm512_store_si512(c + (16 * i + r) * kBlock + 16 * j, v[j][i][r]);
  }
}

inline __mmask16 first(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
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
      const __mmask16 mask = r < lines ? first(length - 16 * h) : 0;
      _mm512_store_ps(c + r * kBlock + h * 16, mask == 0
                                                   ? _mm512_setzero_ps()
                                                   : load16(view.dtype, view.data, start + r * stride + 16 * h, mask));
    }
  }
  if (across) transpose_block(c);
}

// Overwrites c.
void write_block(const View& view, int64_t m, int64_t n, int64_t i, int64_t j, float* c) {
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
      const __mmask16 mask = first(length - 16 * h);
      if (mask != 0)
        store16(view.dtype, view.data, start + r * stride + 16 * h, mask, _mm512_load_ps(c + r * kBlock + h * 16));
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

// Tasks.

struct Range {
  int begin, end;
};

Range macro_range(int macro, int size, int blocks) { return {macro * size, std::min((macro + 1) * size, blocks)}; }

char* tile(char* base, int64_t strip, int64_t k, int64_t strip_tiles) {
  return base + (strip * strip_tiles + k) * kTileBytes;
}

void norm(const Work& work, int task, float* c, float* other) {
  const Program& program = *work.program;
  const Range rows = macro_range(task / program.pack_columns(), program.macro, program.m_blocks);
  const Range cols = macro_range(task % program.pack_columns(), kPackCols, program.n_blocks);
  __m512d sum = _mm512_setzero_pd();
  for (int i = rows.begin; i < rows.end; ++i) {
    for (int j = cols.begin; j < cols.end; ++j) {
      read_update(work, int64_t{i} * kBlock, int64_t{j} * kBlock, true, c, other);
      for (int k = 0; k < kBlockFloats; k += 8) {
        const __m512d x = _mm512_cvtps_pd(_mm256_load_ps(c + k));
        sum = _mm512_fmadd_pd(x, x, sum);
      }
    }
  }
  work.operands.partials[task] = _mm512_reduce_add_pd(sum);
}

void store_x(const Work& work, int i, int j, int parity, const float* c) {
  const Program& program = *work.program;
  const Operands& o = work.operands;
  const Rounded block(c);
  for (int h = 0; h < 2; ++h) {
    block.store_left(h, tile(o.left, 2 * i + h, j, program.n_blocks), tile(o.right, 2 * i + h, j, program.n_blocks));
    block.store_across(h, nullptr, tile(o.right_of_b[parity], 2 * j + h, i, program.m_blocks));
  }
}

void pack(const Work& work, bool scaled_rows, int task, float* c, float* other) {
  const Program& program = *work.program;
  const Range rows = macro_range(task / program.pack_columns(), program.macro, program.m_blocks);
  const Range cols = macro_range(task % program.pack_columns(), kPackCols, program.n_blocks);
  const __m512 scale0 = _mm512_set1_ps(work.scales[0]), scale1 = _mm512_set1_ps(work.scales[1]);
  for (int i = rows.begin; i < rows.end; ++i) {
    for (int j = cols.begin; j < cols.end; ++j) {
      read_update(work, int64_t{i} * kBlock, int64_t{j} * kBlock, false, c, other);
      for (int r = 0; r < kBlock; ++r) {
        const __m512 row = _mm512_set1_ps(scaled_rows ? work.operands.row_scale[i * kBlock + r] : 1.0f);
        for (int h = 0; h < 2; ++h) {
          float* const at = c + r * kBlock + h * 16;
          const __m512 x = _mm512_mul_ps(_mm512_mul_ps(_mm512_load_ps(at), scale0), scale1);
          _mm512_store_ps(at, _mm512_mul_ps(x, row));
        }
      }
      if (program.small) {
        for (int r = 0; r < kBlock; ++r)
          memcpy(work.operands.small + (int64_t{r} * program.n_blocks + j) * kBlock, c + r * kBlock,
                 kBlock * sizeof(float));
      } else {
        store_x(work, i, j, 0, c);
      }
    }
  }
}

// 1/√(Σⱼ|Aᵢⱼ|) of each row of the first symmetric matrix; 1 for a row of zeros.
void sum_rows(const Work& work) {
  const Program& program = *work.program;
  for (int strip = 0; strip < 2 * program.m_blocks; ++strip) {
    for (int r = 0; r < 16; ++r) {
      __m512 sum = _mm512_setzero_ps();
      for (int k = 0; k < program.m_blocks; ++k) {
        const char* const row = tile(work.operands.symmetric_left[0], strip, k, program.m_blocks) + r * 64;
        for (int h = 0; h < 2; ++h)
          sum = _mm512_add_ps(sum,
                              _mm512_abs_ps(widen(_mm256_load_si256(reinterpret_cast<const __m256i*>(row + h * 32)))));
      }
      const float total = _mm512_reduce_add_ps(sum) + std::fabs(work.operands.diagonal[0][strip * 16 + r]);
      work.operands.row_scale[strip * 16 + r] = total == 0.0f ? 1.0f : 1.0f / std::sqrt(total);
    }
  }
}

// Blocks of left·right over [rows) × [cols), one after another in c; with `upper`, those on and above the diagonal.
void multiply_macro(const char* left, const char* right, int depth, Range rows, Range cols, bool upper, float* c) {
  const int64_t strip = int64_t{depth} * kTileBytes;
  for (int k = 0; k < depth; k += kDepth) {
    for (int j = cols.begin; j < cols.end; ++j) {
      for (int i = rows.begin; i < rows.end; ++i) {
        if (upper && j < i) continue;
        const char* const l = left + 2 * i * strip + int64_t{k} * kTileBytes;
        const char* const r = right + 2 * j * strip + int64_t{k} * kTileBytes;
        float* const block = c + ((i - rows.begin) * kMacro + (j - cols.begin)) * kBlockFloats;
        multiply_block(block, l, l + strip, r, r + strip, std::min(kDepth, depth - k), k > 0);
      }
    }
  }
}

// `c` without its diagonal, and that apart with `added`.
void store_symmetric(const Work& work, int to, bool needs_right, int i, int j, const float* c, const float* diagonal,
                     float added) {
  const int mb = work.program->m_blocks;
  char* const left = work.operands.symmetric_left[to];
  char* const right = work.operands.symmetric_right[to];
  const Rounded block(c);
  for (int h = 0; h < 2; ++h) {
    block.store_left(h, tile(left, 2 * i + h, j, mb), needs_right ? tile(right, 2 * i + h, j, mb) : nullptr);
    if (i != j)
      block.store_across(h, tile(left, 2 * j + h, i, mb), needs_right ? tile(right, 2 * j + h, i, mb) : nullptr);
  }
  if (i == j)
    for (int r = 0; r < kBlock; ++r) work.operands.diagonal[to][i * kBlock + r] = diagonal[r] + added;
}

// c ← acc·(left·right) + add·S, where c has the product of what is off the diagonals.
void add_symmetric(const Work& work, const Step& step, int i, int j, float* c) {
  const Operands& o = work.operands;
  const int mb = work.program->m_blocks;
  const float* const left = o.diagonal[step.left] + i * kBlock;
  const float* const right = o.diagonal[step.right] + j * kBlock;
  const auto tile_of = [&](int s, int half) { return tile(o.symmetric_left[s], 2 * i + half, j, mb); };
  float rows[kBlock];
  for (int r = 0; r < kBlock; ++r) rows[r] = step.acc * left[r];
  scale_block(c, step.acc);
  add_rows(c, rows, tile_of(step.right, 0), tile_of(step.right, 1));
  const bool same = step.added == step.left;
  add_columns(c, step.acc, right, same ? step.add : 0.0f, tile_of(step.left, 0), tile_of(step.left, 1));
  if (!same) {
    std::fill(rows, rows + kBlock, step.add);
    add_rows(c, rows, tile_of(step.added, 0), tile_of(step.added, 1));
  }
  if (i != j) return;
  const float* const added = o.diagonal[step.added] + i * kBlock;
  for (int r = 0; r < kBlock; ++r) c[r * kBlock + r] += step.acc * left[r] * right[r] + step.add * added[r];
}

void symmetric(const Work& work, const Step& step, int task, float* c) {
  const Program& program = *work.program;
  const Operands& o = work.operands;
  int first = 0;
  for (int length = program.m_macros(); task >= length; --length) {
    task -= length;
    ++first;
  }
  const Range rows = macro_range(first, program.macro, program.m_blocks);
  const Range cols = macro_range(first + task, program.macro, program.m_blocks);
  const bool gram = step.phase == Phase::gram;
  const int depth = gram ? program.n_blocks : program.m_blocks;
  multiply_macro(gram ? o.left : o.symmetric_left[step.left], gram ? o.right : o.symmetric_right[step.right], depth,
                 rows, cols, true, c);
  for (int i = rows.begin; i < rows.end; ++i) {
    for (int j = std::max(i, cols.begin); j < cols.end; ++j) {
      float* const block = c + ((i - rows.begin) * kMacro + (j - cols.begin)) * kBlockFloats;
      if (!gram) add_symmetric(work, step, i, j, block);
      float diagonal[kBlock];
      if (i == j) {
        for (int r = 0; r < kBlock; ++r) {
          diagonal[r] = block[r * kBlock + r];
          block[r * kBlock + r] = 0.0f;
          // Rounded factors no longer commute: what later products read by rows and by columns must be one matrix.
          for (int k = 0; k < r; ++k) block[r * kBlock + k] = block[k * kBlock + r];
        }
      }
      store_symmetric(work, step.to, step.needs_right, i, j, block, diagonal, 0.0f);
      if (step.also >= 0) store_symmetric(work, step.also, step.needs_right, i, j, block, diagonal, step.diagonal);
    }
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
  write_block(work.out, work.m, work.n, i, j, c);
}

void multiply(const Work& work, const Step& step, int task, float* c, float* other) {
  const Program& program = *work.program;
  const Operands& o = work.operands;
  const Range rows = macro_range(task % program.m_macros(), program.macro, program.m_blocks);
  const Range cols = macro_range(task / program.m_macros(), program.macro, program.n_blocks);
  char* const x = o.right_of_b[step.parity];
  multiply_macro(o.symmetric_left[step.left], x, program.m_blocks, rows, cols, false, c);
  for (int i = rows.begin; i < rows.end; ++i) {
    for (int j = cols.begin; j < cols.end; ++j) {
      float* const block = c + ((i - rows.begin) * kMacro + (j - cols.begin)) * kBlockFloats;
      if (step.acc != 1.0f) scale_block(block, step.acc);
      float factors[kBlock];
      for (int r = 0; r < kBlock; ++r) factors[r] = step.add + step.acc * o.diagonal[step.left][i * kBlock + r];
      add_pairs(block, factors, tile(x, 2 * j, i, program.m_blocks), tile(x, 2 * j + 1, i, program.m_blocks));
      if (step.last) {
        finish(work, int64_t{i} * kBlock, int64_t{j} * kBlock, block, other);
      } else {
        store_x(work, i, j, step.parity ^ 1, block);
      }
    }
  }
}

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

void run(const Work& work, const Step& step, int task, char* scratch) {
  float* const c = reinterpret_cast<float*>(scratch);
  float* const first_block = c + kMacro * kMacro * kBlockFloats;
  float* const second_block = first_block + kBlockFloats;
  switch (step.phase) {
    case Phase::norm: return norm(work, task, first_block, second_block);
    case Phase::pack: return pack(work, step.scaled_rows, task, first_block, second_block);
    case Phase::rows: return sum_rows(work);
    case Phase::gram:
    case Phase::product: return symmetric(work, step, task, c);
    case Phase::multiply: return multiply(work, step, task, c, first_block);
    case Phase::small: return small(work, c, first_block, second_block);
  }
}

}  // namespace

extern const Engine engine;
#define SL_STRINGIFY_(x) #x
#define SL_STRINGIFY(x) SL_STRINGIFY_(x)
const Engine engine = {SL_STRINGIFY(SL_UNIT), enter, leave, run};

}  // namespace SL_UNIT
}  // namespace stepladder::newton_schulz
