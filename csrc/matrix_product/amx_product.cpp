// A product of fp32 matrices on tiles of bf16. An fp32 number is the sum of three bf16, exactly: high, middle and low
// with 8 bits each. Of the nine products of the parts the six largest are summed, in fp32; what is left out is at most
// 2^-24 of a product, as its rounding in fp32 is.
//
// Tiles flush subnormal numbers: both operands are scaled by powers of two that bring their largest elements as high as
// sums allow. Where the smallest ones are then still too low, fp32 multiplies, as it does where something is not
// finite.
#include <immintrin.h>

#include <algorithm>
#include <cmath>

#include "common/amx.h"
#include "common/avx512.h"
#include "common/buffer.h"
#include "common/dtype.h"
#include "matrix_product/product.h"

namespace stepladder::matrix_product {

namespace amx {

namespace {

constexpr int kTile = 16;       // vectors in a tile
constexpr int kTileDepth = 32;  // elements of each in a tile, as 16 pairs of elements 16 apart
constexpr int kTileBytes = kTile * kTileDepth * 2;
constexpr int kParts = 3;
constexpr int kStep = kParts * kTileBytes;  // high, middle and low tile of the same elements stand together
constexpr int kBlock = 2 * kTile;           // side of a block of the product: four tiles of sums
constexpr int64_t kDepth = 768;             // packed at a time, of
constexpr int64_t kTaskColumns = 256;       // columns of B, 1.1 MiB, which stay in L2, and
constexpr int64_t kPanel = 3072;            // rows of A, 14 MiB, which all threads share
constexpr int64_t kTogether = 4;            // strips of A that a thread packs
constexpr int kScaled = 58;   // exponent of the largest element: kDepth products of two are below the largest fp32
constexpr int kLeast = -103;  // the least exponent of an element whose lowest bit is a normal number
constexpr int kLeastProduct = -102;  // the least one of a product that loses nothing by what is flushed
constexpr int32_t kInfinity = 0x7f800000;

int64_t over(int64_t size, int64_t part) { return (size + part - 1) / part; }

// Rows of A, or columns of B.
struct Vectors {
  const float* data;
  int64_t stride, element_stride, count;

  Vectors from(int64_t vector, int64_t element, int64_t limit) const {
    return {data + vector * stride + element * element_stride, stride, element_stride, std::min(limit, count - vector)};
  }
};

// Magnitudes as the bits of floats, whose order is theirs; of NaN's the largest.
struct Range {
  int32_t least = INT32_MAX, most = 0;  // of those that are not zero

  bool empty() const { return most == 0; }
  bool finite() const { return most < kInfinity; }
  // By which power of two it is multiplied.
  int scale() const { return empty() ? 0 : kScaled - std::ilogb(bit_cast<float>(most)); }
  // Exponent of the smallest one then.
  int lowest() const { return empty() ? kScaled : std::ilogb(bit_cast<float>(least)) + scale(); }
};

Range range_of(const Vectors& v, int64_t depth, int threads) {
  // Lines of neighbours in memory.
  const bool along = v.element_stride == 1 || v.stride != 1;
  const int64_t lines = along ? v.count : depth, length = along ? depth : v.count;
  const int64_t line_stride = along ? v.stride : v.element_stride, stride = along ? v.element_stride : v.stride;
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  int32_t least = INT32_MAX, most = 0;
#pragma omp parallel for schedule(static) reduction(max : most) reduction(min : least) \
    num_threads(threads) if (threads > 1)
  for (int64_t line = 0; line < lines; ++line) {
    const float* const x = v.data + line * line_stride;
    if (stride == 1) {
      __m512i low = magnitude, high = _mm512_setzero_si512();
      for (int64_t i = 0; i < length; i += 16) {
        const __m512i bits = _mm512_and_si512(magnitude, _mm512_maskz_loadu_epi32(first_lanes(length - i), x + i));
        high = _mm512_max_epi32(high, bits);
        low = _mm512_mask_min_epi32(low, _mm512_test_epi32_mask(bits, bits), low, bits);
      }
      most = std::max(most, _mm512_reduce_max_epi32(high));
      least = std::min(least, _mm512_reduce_min_epi32(low));
    } else {
      for (int64_t i = 0; i < length; ++i) {
        const int32_t bits = bit_cast<int32_t>(x[i * stride]) & 0x7fffffff;
        most = std::max(most, bits);
        if (bits != 0) least = std::min(least, bits);
      }
    }
  }
  return {least, most};
}

// Whether tiles multiply these as fp32 does.
bool serves(const Range& a, const Range& b) {
  return a.finite() && b.finite() && a.lowest() >= kLeast && b.lowest() >= kLeast &&
         a.lowest() + b.lowest() >= kLeastProduct;
}

// 16 rows of as many elements, with zeros beyond the given ones.
inline void fetch(const float* from, int64_t row_stride, int64_t stride, int64_t rows, int64_t columns,
                  __m512 (&to)[16]) {
  if (stride == 1) {
    for (int64_t r = 0; r < 16; ++r)
      to[r] = r < rows ? _mm512_maskz_loadu_ps(first_lanes(columns), from + r * row_stride) : _mm512_setzero_ps();
  } else if (row_stride == 1) {
    __m512i lanes[16];
    for (int64_t c = 0; c < 16; ++c)
      lanes[c] = c < columns ? _mm512_maskz_loadu_epi32(first_lanes(rows), from + c * stride) : _mm512_setzero_si512();
    transpose_lanes(lanes);
    for (int r = 0; r < 16; ++r) to[r] = _mm512_castsi512_ps(lanes[r]);
  } else {
    alignas(64) float row[16];
    for (int64_t r = 0; r < 16; ++r) {
      for (int64_t c = 0; c < 16; ++c) row[c] = r < rows && c < columns ? from[r * row_stride + c * stride] : 0.0f;
      to[r] = _mm512_load_ps(row);
    }
  }
}

// x rounded to 8 bits (Dekker's way: there is no fp32 between the two).
inline __m512 leading(__m512 x) {
  const __m512 wide = _mm512_mul_ps(x, _mm512_set1_ps(65537.0f));
  return _mm512_sub_ps(wide, _mm512_sub_ps(wide, x));
}

// bf16 in pairs, of numbers that are already rounded.
inline __m512i pairs(__m512 low, __m512 high) {
  return _mm512_or_si512(_mm512_castps_si512(high), _mm512_srli_epi32(_mm512_castps_si512(low), 16));
}

// A strip of up to 16 vectors as tiles: of the left operand a row is a vector, of the right one a column is.
template <bool kRight>
void pack(const Vectors& v, int64_t depth, int scale, char* to) {
  const int64_t row_stride = kRight ? v.element_stride : v.stride, stride = kRight ? v.stride : v.element_stride;
  const __m512 power = _mm512_set1_ps(static_cast<float>(scale));
  for (int64_t d = 0; d < depth; d += kTileDepth, to += kStep) {
    __m512 halves[2][16];
    for (int h = 0; h < 2; ++h) {
      const int64_t begin = d + 16 * h, left = depth - begin;
      fetch(left > 0 ? v.data + begin * v.element_stride : v.data, row_stride, stride, kRight ? left : v.count,
            kRight ? v.count : left, halves[h]);
    }
    for (int r = 0; r < 16; ++r) {
      __m512 parts[2][kParts];
      for (int h = 0; h < 2; ++h) {
        const __m512 x = _mm512_scalef_ps(halves[h][r], power);
        parts[h][0] = leading(x);
        const __m512 rest = _mm512_sub_ps(x, parts[h][0]);
        parts[h][1] = leading(rest);
        parts[h][2] = _mm512_sub_ps(rest, parts[h][1]);
      }
      for (int p = 0; p < kParts; ++p)
        _mm512_store_si512(to + p * kTileBytes + r * 64, pairs(parts[0][p], parts[1][p]));
    }
  }
}

// Strips of vectors, which lie `strip` bytes apart. Where neighbours in memory are elements of different vectors, all
// strips are packed a tile at a time: whole lines of memory are then read at once.
template <bool kRight>
void pack_strips(const Vectors& v, int64_t depth, int scale, int64_t strips, int64_t strip, char* to) {
  const int64_t run = v.stride == 1 ? kTileDepth : depth;
  for (int64_t d = 0; d < depth; d += run)
    for (int64_t s = 0; s < strips; ++s)
      pack<kRight>(v.from(std::min(s * kTile, v.count), d, kTile), std::min(run, depth - d), scale,
                   to + s * strip + d / kTileDepth * kStep);
}

// C <- alpha 2^-scale sums + beta C of the block before, a part after each tile along k: the matrix unit works beside
// the others.
class Updates {
 public:
  Updates(float alpha, float beta, int scale, int64_t stride)
      : alpha_(_mm512_set1_ps(alpha)),
        beta_(_mm512_set1_ps(beta)),
        read_(beta != 0.0f),
        scale_(_mm512_set1_ps(static_cast<float>(-scale))),
        stride_(stride) {}

  // Where the next block's sums go.
  float* next_sums() { return sums_[turn_]; }

  // The next block is multiplied, and is now the one before.
  void push(float* c, int64_t rows, int64_t columns) {
    from_ = sums_[turn_];
    turn_ ^= 1;
    c_ = c;
    rows_ = rows;
    masks_[0] = first_lanes(columns);
    masks_[1] = first_lanes(columns - 16);
  }

  // Part t of so many.
  void advance(int64_t t, int64_t parts) const {
    const int64_t end = std::min(rows_, kBlock * (t + 1) / parts);
    for (int64_t r = kBlock * t / parts; r < end; ++r) {
      for (int h = 0; h < 2; ++h) {
        float* const to = c_ + r * stride_ + 16 * h;
        __m512 value = _mm512_mul_ps(alpha_, _mm512_scalef_ps(_mm512_load_ps(from_ + r * kBlock + 16 * h), scale_));
        if (read_) value = _mm512_fmadd_ps(beta_, _mm512_maskz_loadu_ps(masks_[h], to), value);
        _mm512_mask_storeu_ps(to, masks_[h], value);
      }
    }
  }

 private:
  alignas(64) float sums_[2][kBlock * kBlock];
  __m512 alpha_, beta_;
  bool read_;
  __m512 scale_;
  int64_t stride_, rows_ = 0;
  int turn_ = 0;
  const float* from_ = nullptr;
  float* c_ = nullptr;
  __mmask16 masks_[2] = {};
};

// 32×32 sums of six products of parts, from two strips of each operand.
// Meanwhile the rows of C that they are for are fetched.
inline void multiply_block(const char* left, const char* right, int64_t strip, int64_t tiles, const float* c,
                           int64_t c_stride, int64_t rows, Updates& updates) {
  constexpr int kRow = kBlock * sizeof(float);
  // The compiler does not know that tiles are loaded from memory, and stored to it.
  asm volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
#define SL_LEFT(part) \
  _tile_loadd(4, left + (part) * kTileBytes, 64); \
  _tile_loadd(5, left + strip + (part) * kTileBytes, 64)
#define SL_RIGHT(part) \
  _tile_loadd(6, right + (part) * kTileBytes, 64); \
  _tile_loadd(7, right + strip + (part) * kTileBytes, 64)
#define SL_MULTIPLY() \
  _tile_dpbf16ps(0, 4, 6); \
  _tile_dpbf16ps(1, 4, 7); \
  _tile_dpbf16ps(2, 5, 6); \
  _tile_dpbf16ps(3, 5, 7)
  for (int64_t t = 0; t < tiles; ++t, left += kStep, right += kStep) {
    // In an order in which one product shares an operand with the next.
    SL_LEFT(0);
    SL_RIGHT(2);
    SL_MULTIPLY();
    SL_RIGHT(0);
    SL_MULTIPLY();
    SL_RIGHT(1);
    SL_MULTIPLY();
    SL_LEFT(1);
    SL_MULTIPLY();
    SL_RIGHT(0);
    SL_MULTIPLY();
    SL_LEFT(2);
    SL_MULTIPLY();
    for (int64_t r = kBlock * t / tiles; r < std::min(rows, kBlock * (t + 1) / tiles); ++r) {
      _mm_prefetch(reinterpret_cast<const char*>(c + r * c_stride), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(c + r * c_stride + kTile), _MM_HINT_T0);
    }
    updates.advance(t, tiles);
  }
  float* const sums = updates.next_sums();
#undef SL_LEFT
#undef SL_RIGHT
#undef SL_MULTIPLY
  _tile_stored(0, sums, kRow);
  _tile_stored(1, sums + kTile, kRow);
  _tile_stored(2, sums + kTile * kBlock, kRow);
  _tile_stored(3, sums + kTile * kBlock + kTile, kRow);
  asm volatile("" ::: "memory");
}

// Rows [top, bottom) and columns [begin, end) of the product over `depth`, from the strips of A's panel. B's are packed
// into this thread's memory.
void multiply_task(const Product& p, const Vectors& b, int64_t d, int64_t depth, int64_t panel, int64_t top,
                   int64_t bottom, int64_t begin, int64_t end, const char* packed_a, char* packed_b, int a_scale,
                   int b_scale) {
  Updates updates(p.alpha, d == 0 ? p.beta : 1.0f, a_scale + b_scale, p.c.row_stride);
  const int64_t tiles = over(depth, kTileDepth), strip = tiles * kStep, strips = 2 * over(end - begin, kBlock);
  pack_strips<true>(b.from(begin, d, end - begin), depth, b_scale, strips, strip, packed_b);
  for (int64_t r = top; r < bottom; r += kBlock) {
    for (int64_t c = begin; c < end; c += kBlock) {
      if (p.symmetric && r + kBlock <= c) break;  // above the diagonal
      float* const to = p.c.data + r * p.c.row_stride + c;
      const int64_t rows = std::min<int64_t>(kBlock, bottom - r);
      multiply_block(packed_a + (r - panel) / kTile * strip, packed_b + (c - begin) / kTile * strip, strip, tiles, to,
                     p.c.row_stride, rows, updates);
      updates.push(to, rows, std::min<int64_t>(kBlock, end - c));
    }
  }
  updates.advance(0, 1);
}

}  // namespace

void multiply(const Product& p, int threads) {
  const Vectors a{p.a.data, p.a.row_stride, p.a.col_stride, p.m}, b{p.b.data, p.b.col_stride, p.b.row_stride, p.n};
  const bool same = a.data == b.data && a.stride == b.stride && a.element_stride == b.element_stride && p.m == p.n;
  const Range range_a = range_of(a, p.k, threads), range_b = same ? range_a : range_of(b, p.k, threads);
  if (!serves(range_a, range_b)) {
    avx512::multiply(p, threads);
    return;
  }
  const int a_scale = range_a.scale(), b_scale = range_b.scale();
  // Along k in parts of one size.
  const int64_t depth = kTileDepth * over(over(p.k, over(p.k, kDepth)), kTileDepth);
  const int64_t strip = depth / kTileDepth * kStep;
  const int64_t strips_a = 2 * over(std::min(p.m, kPanel), kBlock);
  const int64_t strips_b = 2 * over(std::min(p.n, kTaskColumns), kBlock);
  static thread_local Buffer buffer;  // of the caller
  char* const packed_a = buffer.at_least(static_cast<size_t>((strips_a + threads * strips_b) * strip));
  char* const packed_b = packed_a + strips_a * strip;
  for (int64_t i = 0; i < p.m; i += kPanel) {
    const int64_t below = std::min(p.m, i + kPanel), strips = 2 * over(below - i, kBlock);
    const int64_t width = p.symmetric ? below : p.n, column_tasks = over(width, kTaskColumns);
    // As many parts of the rows as give all threads something to do.
    const int64_t parts = threads == 1 ? 1 : over(4 * threads, column_tasks);
    const int64_t task_rows = over(over(below - i, parts), kBlock) * kBlock;
    const int64_t tasks = over(below - i, task_rows) * column_tasks;
    for (int64_t d = 0; d < p.k; d += depth) {
      const int64_t deep = std::min(depth, p.k - d), used = over(deep, kTileDepth) * kStep;
#pragma omp parallel num_threads(threads) if (threads > 1)
      {
        _tile_loadconfig(&kWholeTiles);
#pragma omp for schedule(dynamic, 1)
        for (int64_t s = 0; s < strips; s += kTogether)
          pack_strips<false>(a.from(std::min(i + s * kTile, p.m), d, kTogether * kTile), deep, a_scale,
                             std::min(kTogether, strips - s), used, packed_a + s * used);
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < tasks; ++t) {
          const int64_t begin = t % column_tasks * kTaskColumns, end = std::min(width, begin + kTaskColumns);
          const int64_t top = i + t / column_tasks * task_rows, bottom = std::min(below, top + task_rows);
          if (p.symmetric && bottom <= begin) continue;
          multiply_task(p, b, d, deep, i, top, bottom, begin, end, packed_a,
                        packed_b + this_thread() * strips_b * strip, a_scale, b_scale);
        }
        _tile_release();
      }
    }
  }
}

}  // namespace amx
}  // namespace stepladder::matrix_product
