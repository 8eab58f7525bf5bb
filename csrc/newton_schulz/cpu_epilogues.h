// What becomes of a block of a product: sums, one rounding, and the tiles that later products read. Each is cut into
// pieces, done one after another while the next block is multiplied.
#pragma once

#include <algorithm>
#include <new>

#include "newton_schulz/cpu_memory.h"

namespace stepladder::newton_schulz {
namespace SL_UNIT {
namespace {

inline char* tile(char* base, int64_t strip, int64_t k, int64_t strip_tiles) {
  return base + (strip * strip_tiles + k) * kTileBytes;
}

// The tile whose rows are another's columns of pairs.
void turn_tile(const char* from, char* to) {
  __m512i v[16];
  for (int r = 0; r < 16; ++r) v[r] = _mm512_load_si512(from + r * 64);
  transpose_lanes(v);
  for (int r = 0; r < 16; ++r) _mm512_store_si512(to + r * 64, v[r]);
}

// Pairs of rows that a piece does, unrolled, so that it takes about as long as the products that it is done beside.
constexpr unsigned kPairsAtOnce = 4;
constexpr int kRowPieces = kBlock / 2 / kPairsAtOnce;

// Rows 2p and 2p + 1 of a block.
struct Rows {
  __m512 v[2][2];  // row, half of the columns

  static Rows load(const float* c, unsigned p) {
    const float* const at = c + 2 * p * kBlock;
    return {{{_mm512_load_ps(at), _mm512_load_ps(at + 16)}, {_mm512_load_ps(at + 32), _mm512_load_ps(at + 48)}}};
  }
  void store(float* c, unsigned p) const {
    for (int s = 0; s < 2; ++s)
      for (int h = 0; h < 2; ++h) _mm512_store_ps(c + (2 * p + s) * kBlock + h * 16, v[s][h]);
  }
};

// The same in bf16. `left` has a row's columns in pairs, `across` the columns' pairs of rows, 16 columns a tile.
struct RoundedRows {
  __m512i even, odd;

  explicit RoundedRows(const Rows& rows)
      : even(as_ints(_mm512_cvtne2ps_pbh(rows.v[0][1], rows.v[0][0]))),
        odd(as_ints(_mm512_cvtne2ps_pbh(rows.v[1][1], rows.v[1][0]))) {}

  void store_left(char* const tiles[2], unsigned p) const {
    char* const at = tiles[p / 8] + p % 8 * 128;
    _mm512_store_si512(at, even);
    _mm512_store_si512(at + 64, odd);
  }
  void store_across(char* const tiles[2], unsigned p) const {
    alignas(64) static constexpr int16_t kIndex[2][32] = {
        {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
        {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
         24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
    for (int h = 0; h < 2; ++h)
      _mm512_store_si512(tiles[h] + p * 64, _mm512_permutex2var_epi16(even, _mm512_load_si512(kIndex[h]), odd));
  }
};

// Row r of a block in tiles, 16 columns of it.
inline __m512 tile_row(const char* const tiles[2], unsigned r, int half) {
  return widen(_mm256_load_si256(reinterpret_cast<const __m256i*>(tiles[r / 16] + r % 16 * 64 + half * 32)));
}

// Where a block of X goes.
struct XTiles {
  char *left[2], *across[2];

  XTiles() = default;
  XTiles(const Work& work, int i, int j, int parity) {
    const Program& program = *work.program;
    const Operands& o = work.operands;
    for (int h = 0; h < 2; ++h) {
      left[h] = tile(o.left, 2 * i + h, j, program.n_blocks);
      across[h] = tile(o.across[parity], 2 * j + h, i, program.m_blocks);
    }
  }
  void store(const Rows& rows, unsigned p) const {
    const RoundedRows rounded(rows);
    rounded.store_left(left, p);
    rounded.store_across(across, p);
  }
};

// X ← acc·c + add·X, where c lacks what the diagonal of the left operand gives; times the scale that X lacks.
struct NextX {
  const Work* work;
  const char* x[2];  // the block's tiles of X, pairs of rows
  XTiles to;
  float *c, *other;
  alignas(64) float factors[kBlock];  // of X's rows
  float acc;
  int i, j;
  bool last;

  NextX() = default;
  NextX(const Work& w, const Step& step, int row, int col, float* block, float* spare)
      : work(&w), c(block), other(spare), i(row), j(col), last(step.last) {
    const float scale = step.unscaled ? w.scale : 1.0f;
    acc = step.acc * scale;
    const Operands& o = w.operands;
    if (!last) to = XTiles(w, i, j, step.parity ^ 1);
    for (int h = 0; h < 2; ++h) x[h] = tile(o.across[step.parity], 2 * j + h, i, w.program->m_blocks);
    const __m512 a = _mm512_set1_ps(acc), b = _mm512_set1_ps(step.add * scale);
    for (int h = 0; h < 2; ++h)
      _mm512_store_ps(factors + 16 * h,
                      _mm512_fmadd_ps(a, _mm512_loadu_ps(o.diagonal[step.left] + i * kBlock + 16 * h), b));
  }
  int pieces() const { return kRowPieces + last; }
  void piece(int number) const {
    if (number == kRowPieces) return finish(*work, int64_t{i} * kBlock, int64_t{j} * kBlock, c, other);
    if (acc != 1.0f)
      last ? add<true, true>(number) : add<false, true>(number);
    else
      last ? add<true, false>(number) : add<false, false>(number);
  }

 private:
  template <bool kLast, bool kScaled>
  void add(unsigned number) const {
    const __m512 scale = _mm512_set1_ps(acc);
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
#pragma GCC unroll 4
    for (unsigned q = 0; q < kPairsAtOnce; ++q) {
      const unsigned p = number * kPairsAtOnce + q;
      Rows rows = Rows::load(c, p);
      const __m512 f = _mm512_set1_ps(factors[2 * p]), g = _mm512_set1_ps(factors[2 * p + 1]);
      for (int h = 0; h < 2; ++h) {
        const __m512i pairs = _mm512_load_si512(x[h] + p * 64);
        const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
        const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, high));
        rows.v[0][h] = _mm512_fmadd_ps(f, even, kScaled ? _mm512_mul_ps(scale, rows.v[0][h]) : rows.v[0][h]);
        rows.v[1][h] = _mm512_fmadd_ps(g, odd, kScaled ? _mm512_mul_ps(scale, rows.v[1][h]) : rows.v[1][h]);
      }
      kLast ? rows.store(c, p) : to.store(rows, p);
    }
  }
};

// A block of a symmetric matrix and its mirror image ← acc·c + add·S, where c lacks what the diagonals of its operands
// give; of XXᵀ ← c, times the square of the scale that X lacks.
struct NextSymmetric {
  // To the sums: nothing, a factor, or terms of one matrix that is left, right and added, or of three.
  enum class Terms { none, scale, same, any };

  const Work* work;
  const Step* step;
  float* c;
  char *left[2][2], *mirrored[2][2];  // of `to` and of `also`
  char* across[2];
  const char *of_left[2], *of_right[2], *of_added[2];
  const float *diagonal_of_left, *diagonal_of_right;
  __m512 diagonal[2];
  Terms terms;
  int i, j;

  NextSymmetric() = default;
  NextSymmetric(const Work& w, const Step& s, int row, int col, float* block, char* spare)
      : work(&w), step(&s), c(block), i(row), j(col) {
    const Operands& o = w.operands;
    const int mb = w.program->m_blocks;
    terms = s.phase != Phase::gram ? (s.left == s.right && s.left == s.added ? Terms::same : Terms::any)
            : s.unscaled           ? Terms::scale
                                   : Terms::none;
    for (int h = 0; h < 2; ++h) {
      for (int b = 0; b < buffers(); ++b) {
        const int to = b == 0 ? s.to : s.also;
        left[b][h] = tile(o.symmetric[to], 2 * i + h, j, mb);
        mirrored[b][h] = tile(o.symmetric[to], 2 * j + h, i, mb);
      }
      across[h] = spare + h * kTileBytes;
      of_left[h] = tile(o.symmetric[s.left], 2 * i + h, j, mb);
      of_right[h] = tile(o.symmetric[s.right], 2 * i + h, j, mb);
      of_added[h] = tile(o.symmetric[s.added], 2 * i + h, j, mb);
      diagonal[h] = _mm512_setzero_ps();
    }
    diagonal_of_left = o.diagonal[s.left] + i * kBlock;
    diagonal_of_right = o.diagonal[s.right] + j * kBlock;
    // Rounded factors no longer commute: what later products read by rows and by columns must be one matrix.
    if (terms == Terms::any && i == j) symmetrise();
  }
  int buffers() const { return step->also >= 0 ? 2 : 1; }
  int pieces() const { return kRowPieces + (i == j ? 0 : 2); }

  void piece(int number) {
    if (number >= kRowPieces) return mirror(number - kRowPieces);
    switch (terms) {
      case Terms::none: i == j ? add<Terms::none, true>(number) : add<Terms::none, false>(number); break;
      case Terms::scale: i == j ? add<Terms::scale, true>(number) : add<Terms::scale, false>(number); break;
      case Terms::same: i == j ? add<Terms::same, true>(number) : add<Terms::same, false>(number); break;
      case Terms::any: add<Terms::any, false>(number); break;
    }
    if (i == j && number == kRowPieces - 1) store_diagonal();
  }

 private:
  template <Terms kTerms, bool kDiagonal>
  void add(unsigned number) {
#pragma GCC unroll 4
    for (unsigned q = 0; q < kPairsAtOnce; ++q) {
      const unsigned p = number * kPairsAtOnce + q;
      Rows rows = Rows::load(c, p);
      add_terms<kTerms>(rows, p);
      if (kDiagonal) take_diagonal(rows, p);
      const RoundedRows rounded(rows);
      rounded.store_left(left[0], p);
      if (step->also >= 0) rounded.store_left(left[1], p);
      if (!kDiagonal) rounded.store_across(across, p);
    }
  }

  void mirror(int half) const {
    for (int b = 0; b < buffers(); ++b) turn_tile(across[half], mirrored[b][half]);
  }

  template <Terms kTerms>
  void add_terms(Rows& rows, unsigned p) const {
    if (kTerms == Terms::none) return;
    if (kTerms == Terms::scale) {
      const __m512 square = _mm512_set1_ps(work->scale * work->scale);
      for (auto& row : rows.v)
        for (__m512& v : row) v = _mm512_mul_ps(v, square);
      return;
    }
    const __m512 acc = _mm512_set1_ps(step->acc), add = _mm512_set1_ps(step->add);
    for (int s = 0; s < 2; ++s) {
      const unsigned r = 2 * p + s;
      const __m512 row = _mm512_set1_ps(diagonal_of_left[r]);
      for (int h = 0; h < 2; ++h) {
        __m512& v = rows.v[s][h];
        const __m512 column = _mm512_loadu_ps(diagonal_of_right + 16 * h);
        v = _mm512_mul_ps(acc, v);
        if (kTerms == Terms::same) {
          // The sum first: its mirror image is then the same to the last bit.
          const __m512 factor = _mm512_fmadd_ps(acc, _mm512_add_ps(row, column), add);
          v = _mm512_fmadd_ps(factor, tile_row(of_left, r, h), v);
        } else {
          v = _mm512_fmadd_ps(_mm512_mul_ps(acc, row), tile_row(of_right, r, h), v);
          v = _mm512_fmadd_ps(_mm512_mul_ps(acc, column), tile_row(of_left, r, h), v);
          v = _mm512_fmadd_ps(add, tile_row(of_added, r, h), v);
        }
      }
    }
  }

  void symmetrise() {
    for (int p = 0; p < kBlock / 2; ++p) {
      Rows rows = Rows::load(c, p);
      add_terms<Terms::any>(rows, p);
      rows.store(c, p);
    }
    terms = Terms::none;
    for (int r = 0; r < kBlock; ++r)
      for (int k = 0; k < r; ++k) c[r * kBlock + k] = c[k * kBlock + r];
  }

  void take_diagonal(Rows& rows, unsigned p) {
    for (int s = 0; s < 2; ++s) {
      const auto at = static_cast<__mmask16>(1u << (2 * p + s) % 16);
      __m512& half = p < 8 ? rows.v[s][0] : rows.v[s][1];
      __m512& taken = p < 8 ? diagonal[0] : diagonal[1];
      taken = _mm512_mask_mov_ps(taken, at, half);
      half = _mm512_maskz_mov_ps(static_cast<__mmask16>(~at), half);
    }
  }

  void store_diagonal() const {
    const Operands& o = work->operands;
    for (int h = 0; h < 2; ++h) {
      __m512 sum = diagonal[h];
      if (step->phase != Phase::gram) {
        const __m512 product =
            _mm512_mul_ps(_mm512_loadu_ps(diagonal_of_left + 16 * h), _mm512_loadu_ps(diagonal_of_right + 16 * h));
        const __m512 added = _mm512_loadu_ps(o.diagonal[step->added] + i * kBlock + 16 * h);
        sum = _mm512_fmadd_ps(_mm512_set1_ps(step->acc), product, sum);
        sum = _mm512_fmadd_ps(_mm512_set1_ps(step->add), added, sum);
      }
      for (int b = 0; b < buffers(); ++b) {
        float* const to = o.diagonal[b == 0 ? step->to : step->also] + i * kBlock + 16 * h;
        _mm512_storeu_ps(to, b == 0 ? sum : _mm512_add_ps(sum, _mm512_set1_ps(step->diagonal)));
      }
    }
  }
};

// The epilogue of the block before, under way.
template <class Epilogue>
class Pending {
 public:
  // Once for each of `depth` steps, in which all pieces are done.
  void advance(int depth) {
    for (credit_ += total_; credit_ >= depth && done_ < total_; credit_ -= depth) epilogue_.piece(done_++);
  }
  // Made in place: a copy would read what was just written in smaller pieces, and wait for every store before it.
  template <class Make>
  void begin(Make make) {
    new (&epilogue_) Epilogue(make());
    total_ = epilogue_.pieces();
    done_ = credit_ = 0;
  }
  void finish() {
    while (done_ < total_) epilogue_.piece(done_++);
  }

 private:
  Epilogue epilogue_;
  int total_ = 0, done_ = 0, credit_ = 0;
};

}  // namespace
}  // namespace SL_UNIT
}  // namespace stepladder::newton_schulz
