// A product by blocks that fit the caches: panels of B, kDepth rows of it at a time, stay in L2 and L3, blocks of A in
// L2, and a tile of C in registers. Both are packed in the order in which they are read, with zeros beyond their edges.
#include <immintrin.h>

#include <algorithm>

#include "common/avx512.h"
#include "common/buffer.h"
#include "matrix_product/product.h"

namespace stepladder::matrix_product::avx512 {

namespace {

constexpr int kRows = 14, kColumns = 32;   // of a tile: 28 registers of sums, two of B, one of A
constexpr int64_t kDepth = 256;            // a panel of B of 32 KiB, which passes through L1 once for a block of A
constexpr int64_t kBlock = 32 * kRows;     // rows of A that are packed at a time
constexpr int64_t kWidth = 96 * kColumns;  // columns of B that are packed at a time

int64_t whole(int64_t size, int64_t part) { return (size + part - 1) / part * part; }

// `count` vectors of `depth` elements in groups of kGroup: element d of all vectors of a group side by side.
template <int kGroup>
void pack(const float* from, int64_t vector_stride, int64_t element_stride, int64_t count, int64_t depth, float* to) {
  for (int64_t first = 0; first < count; first += kGroup, to += kGroup * depth) {
    const float* const group = from + first * vector_stride;
    const int64_t here = std::min<int64_t>(kGroup, count - first);
    if (here < kGroup) std::fill(to, to + kGroup * depth, 0.0f);
    if (vector_stride == 1) {
      for (int64_t d = 0; d < depth; ++d)
        for (int64_t v = 0; v < here; ++v) to[d * kGroup + v] = group[d * element_stride + v];
    } else {
      // Short runs of each vector, so that what is written stays in L1.
      for (int64_t begin = 0; begin < depth; begin += 16) {
        const int64_t end = std::min(depth, begin + 16);
        for (int64_t v = 0; v < here; ++v) {
          const float* const vector = group + v * vector_stride;
          for (int64_t d = begin; d < end; ++d) to[d * kGroup + v] = vector[d * element_stride];
        }
      }
    }
  }
}

// A tile of sums over `depth`, in the order of the depth.
inline void multiply_tile(const float* a, const float* b, int64_t depth, __m512 (&sums)[kRows][2]) {
#pragma GCC unroll 14
  for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
  for (int64_t d = 0; d < depth; ++d, a += kRows, b += kColumns) {
    const __m512 low = _mm512_load_ps(b), high = _mm512_load_ps(b + 16);
#pragma GCC unroll 14
    for (int r = 0; r < kRows; ++r) {
      const __m512 x = _mm512_set1_ps(a[r]);
      sums[r][0] = _mm512_fmadd_ps(x, low, sums[r][0]);
      sums[r][1] = _mm512_fmadd_ps(x, high, sums[r][1]);
    }
  }
}

// Rows of C are contiguous here.
struct Update {
  float alpha, beta;

  __m512 operator()(__m512 old, __m512 sum) const {
    const __m512 product = _mm512_mul_ps(_mm512_set1_ps(alpha), sum);
    if (beta == 0.0f) return product;
    return _mm512_fmadd_ps(_mm512_set1_ps(beta), old, product);
  }
};

void add_tile(const float* a, const float* b, int64_t depth, float* c, int64_t stride, int64_t rows, int64_t columns,
              Update update) {
  __m512 sums[kRows][2];
  for (int64_t r = 0; r < rows; ++r) _mm_prefetch(reinterpret_cast<const char*>(c + r * stride), _MM_HINT_T0);
  multiply_tile(a, b, depth, sums);
  if (rows == kRows && columns == kColumns) {
#pragma GCC unroll 14
    for (int r = 0; r < kRows; ++r) {
      float* const row = c + r * stride;
      const bool read = update.beta != 0.0f;
      const __m512 low = read ? _mm512_loadu_ps(row) : _mm512_setzero_ps();
      const __m512 high = read ? _mm512_loadu_ps(row + 16) : _mm512_setzero_ps();
      _mm512_storeu_ps(row, update(low, sums[r][0]));
      _mm512_storeu_ps(row + 16, update(high, sums[r][1]));
    }
    return;
  }
  const __mmask16 low = first_lanes(columns), high = first_lanes(columns - 16);
#pragma GCC unroll 14
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) continue;
    float* const row = c + r * stride;
    _mm512_mask_storeu_ps(row, low, update(_mm512_maskz_loadu_ps(low, row), sums[r][0]));
    _mm512_mask_storeu_ps(row + 16, high, update(_mm512_maskz_loadu_ps(high, row + 16), sums[r][1]));
  }
}

// Columns [begin, end) of the product, all of which one thread computes.
void multiply_columns(const Product& p, int64_t begin, int64_t end, float* packed_a, float* packed_b) {
  for (int64_t j = begin; j < end; j += kWidth) {
    const int64_t width = std::min(kWidth, end - j);
    const int64_t top = p.symmetric ? j / kRows * kRows : 0;  // what is above is above the diagonal
    for (int64_t d = 0; d < p.k; d += kDepth) {
      const int64_t deep = std::min(kDepth, p.k - d);
      const Update update{p.alpha, d == 0 ? p.beta : 1.0f};
      pack<kColumns>(p.b.data + d * p.b.row_stride + j * p.b.col_stride, p.b.col_stride, p.b.row_stride, width, deep,
                     packed_b);
      for (int64_t i = top; i < p.m; i += kBlock) {
        const int64_t height = std::min(kBlock, p.m - i);
        pack<kRows>(p.a.data + i * p.a.row_stride + d * p.a.col_stride, p.a.row_stride, p.a.col_stride, height, deep,
                    packed_a);
        for (int64_t c = 0; c < width; c += kColumns) {
          for (int64_t r = 0; r < height; r += kRows) {
            if (p.symmetric && i + r + kRows <= j + c) continue;
            add_tile(packed_a + r * deep, packed_b + c * deep, deep, p.c.data + (i + r) * p.c.row_stride + j + c,
                     p.c.row_stride, std::min<int64_t>(kRows, height - r), std::min<int64_t>(kColumns, width - c),
                     update);
          }
        }
      }
    }
  }
}

}  // namespace

void multiply(const Product& p, int threads) {
  // Where one half is computed the first columns have most rows: many parts, in turn.
  const int64_t parts = threads == 1 ? 1 : p.symmetric ? 4 * threads : threads;
  const int64_t part = std::max<int64_t>(kColumns, whole((p.n + parts - 1) / parts, kColumns));
  const int64_t count = (p.n + part - 1) / part;
  // Taken before the threads begin, out of which no exception may come. What is read by 64 bytes stands first.
  const int64_t depth = std::min(kDepth, p.k), room_b = whole(std::min(kWidth, part), kColumns) * depth;
  const int64_t room = whole(room_b + whole(std::min(kBlock, p.m), kRows) * depth, 16);
  static thread_local Buffer buffer;  // of the caller
  float* const packed =
      reinterpret_cast<float*>(buffer.at_least(static_cast<size_t>((count > 1 ? threads : 1) * room) * sizeof(float)));
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && count > 1)
  for (int64_t t = 0; t < count; ++t) {
    float* const own = packed + this_thread() * room;
    multiply_columns(p, t * part, std::min(p.n, (t + 1) * part), own + room_b, own);
  }
}

}  // namespace stepladder::matrix_product::avx512
