// Products on the tensor cores, in fp32 and in fp64: a warp's part of a tile.
//
// Both operands are read by rows, the right one's being columns of its matrix. They lie in shared memory row after row,
// or down: what they are summed over after another, elements of all rows side by side. fp32 is split into two numbers
// of tf32, and the product of the two small ones left out; each part of the inner dimension is added to the sum by an
// addition that rounds to nearest, as the tensor cores' own cut off. Paper: Ootomo & Yokota 2022, arXiv:2203.03341.
#pragma once

#include "common/gpu.h"
#include "common/gpu_block.h"
#include "matrix_root/gpu_roots.h"

namespace stepladder::matrix_root {

// kRows x kColumns of a product, spread over a warp.
template <class T, int kRows, int kColumns>
struct Part;

template <int kRows, int kColumns>
struct Part<float, kRows, kColumns> {
  static_assert(kRows % 16 == 0 && kColumns % 16 == 0, "parts are made of 16x16 elements");
  static constexpr int kStep = 8;  // of the inner dimension
  static constexpr int kRowParts = kRows / 16, kColumnParts = kColumns / 8;
  float values[kRowParts][kColumnParts][4];

  // `visit(row, column, left, right)` for each pair of neighbours in a row that this thread holds.
  template <class Visit>
  SL_DEVICE void for_pairs(Visit visit) {
    const int lane = threadIdx.x % 32;
    SL_UNROLL
    for (int i = 0; i < kRowParts; ++i) {
      SL_UNROLL
      for (int j = 0; j < kColumnParts; ++j) {
        SL_UNROLL
        for (int half = 0; half < 2; ++half)
          visit(i * 16 + half * 8 + lane / 4, j * 8 + lane % 4 * 2, values[i][j][2 * half], values[i][j][2 * half + 1]);
      }
    }
  }

  // What load_matrices gives, of elements that lie down: the second of each two `near` the first, the next two `far`.
  SL_DEVICE static void load_down(const float* at, int near, int far, uint32_t* words) {
    SL_UNROLL
    for (int k = 0; k < 4; ++k) words[k] = bit_cast<uint32_t>(at[k % 2 * near + k / 2 * far]);
  }

  SL_DEVICE static void split(const uint32_t* words, int count, uint32_t* large, uint32_t* small) {
    SL_UNROLL
    for (int k = 0; k < count; ++k) {
      const float value = bit_cast<float>(words[k]);
      large[k] = gpu::round_to_tf32(value);
      small[k] = gpu::round_to_tf32(value - bit_cast<float>(large[k]));
    }
  }

  // Adds left right^T over `depth`, a multiple of 8; rows are aligned to 16 bytes. kExact: all elements are tf32 as
  // they are. kLeftDown, kRightDown: that operand lies down, and its stride is from one element of the sum to the next.
  template <bool kExact = false, bool kLeftDown = false, bool kRightDown = false>
  SL_DEVICE void add_product(const float* left, int left_stride, const float* right, int right_stride, int depth) {
    const int lane = threadIdx.x % 32;
    const float* const a_at =
        kLeftDown ? left + lane % 4 * left_stride + lane / 4 : left + (lane % 16) * left_stride + lane / 16 * 4;
    const float* const b_at = kRightDown ? right + lane % 4 * right_stride + lane / 4
                                         : right + (lane % 8 + lane / 16 * 8) * right_stride + lane / 8 % 2 * 4;
    SL_ROLLED
    for (int k = 0; k < depth; k += kStep) {
      uint32_t words[4], large_b[kColumnParts / 2][4], small_b[kColumnParts / 2][4];
      SL_UNROLL
      for (int j = 0; j < kColumnParts / 2; ++j) {
        if (kRightDown) {
          load_down(b_at + k * right_stride + j * 16, 4 * right_stride, 8, words);
        } else {
          gpu::load_matrices<4, false>(b_at + j * 16 * right_stride + k, words);
        }
        split(words, 4, large_b[j], small_b[j]);
      }
      SL_UNROLL
      for (int i = 0; i < kRowParts; ++i) {
        uint32_t large_a[4], small_a[4];
        if (kLeftDown) {
          load_down(a_at + k * left_stride + i * 16, 8, 4 * left_stride, words);
        } else {
          gpu::load_matrices<4, false>(a_at + i * 16 * left_stride + k, words);
        }
        split(words, 4, large_a, small_a);
        // Two columns at a time, as registers are scarce.
        SL_UNROLL
        for (int j = 0; j < kColumnParts; j += 2) {
          float sums[2][4] = {};
          SL_UNROLL
          for (int h = 0; h < (kExact ? 0 : 2); ++h) gpu::multiply_tf32(sums[h], small_a, &large_b[j / 2][2 * h]);
          SL_UNROLL
          for (int h = 0; h < (kExact ? 0 : 2); ++h) gpu::multiply_tf32(sums[h], large_a, &small_b[j / 2][2 * h]);
          SL_UNROLL
          for (int h = 0; h < 2; ++h) gpu::multiply_tf32(sums[h], large_a, &large_b[j / 2][2 * h]);
          SL_UNROLL
          for (int n = 0; n < 8; ++n) values[i][j + n / 4][n % 4] += sums[n / 4][n % 4];
        }
      }
    }
  }
};

template <int kRows, int kColumns>
struct Part<double, kRows, kColumns> {
  static_assert(kRows % 8 == 0 && kColumns % 8 == 0, "parts are made of 8x8 elements");
  static constexpr int kStep = 4;
  static constexpr int kRowParts = kRows / 8, kColumnParts = kColumns / 8;
  double values[kRowParts][kColumnParts][2];

  template <class Visit>
  SL_DEVICE void for_pairs(Visit visit) {
    const int lane = threadIdx.x % 32;
    SL_UNROLL
    for (int i = 0; i < kRowParts; ++i) {
      SL_UNROLL
      for (int j = 0; j < kColumnParts; ++j)
        visit(i * 8 + lane / 4, j * 8 + lane % 4 * 2, values[i][j][0], values[i][j][1]);
    }
  }

  // Adds left right^T over `depth`, a multiple of 4. kLeftDown, kRightDown: that operand lies down.
  template <bool kExact = false, bool kLeftDown = false, bool kRightDown = false>
  SL_DEVICE void add_product(const double* left, int left_stride, const double* right, int right_stride, int depth) {
    const int left_row = kLeftDown ? 1 : left_stride, left_step = kLeftDown ? left_stride : 1;
    const int right_row = kRightDown ? 1 : right_stride, right_step = kRightDown ? right_stride : 1;
    const int lane = threadIdx.x % 32;
    const double* const a_at = left + lane / 4 * left_row + lane % 4 * left_step;
    const double* const b_at = right + lane / 4 * right_row + lane % 4 * right_step;
    SL_ROLLED
    for (int k = 0; k < depth; k += kStep) {
      double a[kRowParts], b[kColumnParts];
      SL_UNROLL
      for (int i = 0; i < kRowParts; ++i) a[i] = a_at[i * 8 * left_row + k * left_step];
      SL_UNROLL
      for (int j = 0; j < kColumnParts; ++j) b[j] = b_at[j * 8 * right_row + k * right_step];
      add_outer(a, b);
    }
  }

 private:
  SL_DEVICE void add_outer(const double* a, const double* b) {
    SL_UNROLL
    for (int i = 0; i < kRowParts; ++i) {
      SL_UNROLL
      for (int j = 0; j < kColumnParts; ++j) gpu::multiply_f64(values[i][j], a[i], b[j]);
    }
  }
};

template <class P>
SL_DEVICE void clear(P& part) {
  part.for_pairs([](int, int, auto& low, auto& high) { low = high = 0; });
}

// A vector without a pattern; the reference's `probe`.
SL_DEVICE float probe_at(int64_t k) {
  uint32_t mixed = static_cast<uint32_t>(k + 1) * 2654435769u;
  mixed = (mixed ^ mixed >> 15) * 2246822519u;
  mixed = mixed ^ mixed >> 13;
  return static_cast<float>(static_cast<int>(2u * (mixed & 0xffffu)) - 0xffff) * 0x1p-16f;
}

// The largest of all threads' values, where any NaN is.
SL_DEVICE float block_max(float value, double* scratch) {
  const auto larger = [](float x, float y) { return x > y || x != x ? x : y; };
  SL_UNROLL
  for (int half = 16; half > 0; half /= 2) value = larger(value, __shfl_xor_sync(0xffffffffu, value, half));
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float all = 0.0f;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) all = larger(all, static_cast<float>(scratch[warp]));
  return all;
}

// The largest magnitude of the elements of a matrix [m, n], NaN where one of them is; for all threads of a block.
SL_DEVICE float largest_magnitude(const float* from, int64_t m, int64_t n, int64_t row_stride, int64_t column_stride,
                                  double* scratch) {
  const bool down = column_stride > row_stride;
  const int64_t outer = down ? column_stride : row_stride, inner = down ? row_stride : column_stride;
  const int64_t count = down ? n : m, length = down ? m : n;
  const int warps = static_cast<int>(blockDim.x) / 32;
  float largest = 0.0f;
  for (int64_t r = threadIdx.x / 32; r < count; r += warps) {
    for (int64_t c = threadIdx.x % 32; c < length; c += 32) {
      const float value = fabsf(from[r * outer + c * inner]);
      largest = value > largest || value != value ? value : largest;
    }
  }
  return block_max(largest, scratch);
}

// Of a square matrix.
SL_DEVICE float largest_magnitude(const RootRecord& matrix, double* scratch) {
  return largest_magnitude(matrix.in, matrix.n, matrix.n, matrix.row_stride, matrix.column_stride, scratch);
}

}  // namespace stepladder::matrix_root
