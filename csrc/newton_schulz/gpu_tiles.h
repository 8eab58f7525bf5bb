// Products of bf16 tiles in shared memory on the tensor cores: a warp's part, summed in fp32 registers.
#pragma once

#include "common/gpu.h"
#include "common/gpu_block.h"
#include "newton_schulz/gpu_matrix.h"

namespace stepladder::newton_schulz {

// kRows x kColumns of a product, spread over a warp.
template <int kTileRows, int kTileColumns>
struct Tile {
  static constexpr int kRows = kTileRows, kColumns = kTileColumns;
  static_assert(kRows % 16 == 0 && kColumns % 16 == 0, "tiles are made of 16x16 elements");
  static constexpr int kRowParts = kRows / 16, kColumnParts = kColumns / 8;
  float values[kRowParts][kColumnParts][4];

  SL_DEVICE void clear() {
    SL_UNROLL
    for (int i = 0; i < kRowParts; ++i) {
      SL_UNROLL
      for (int j = 0; j < kColumnParts; ++j) {
        SL_UNROLL
        for (int k = 0; k < 4; ++k) values[i][j][k] = 0.0f;
      }
    }
  }

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

  // Adds left x right over `depth`, a multiple of 16. `left` holds the tile's rows. `right` holds rows of the inner
  // dimension, or with kRightTransposed the tile's columns as rows.
  template <bool kRightTransposed>
  SL_DEVICE void add_product(const bf16* left, int left_stride, const bf16* right, int right_stride, int depth) {
    const int lane = threadIdx.x % 32;
    const bf16* const a_at = left + (lane % 16) * left_stride + lane / 16 * 8;
    const bf16* const b_at = kRightTransposed ? right + (lane % 8 + lane / 16 * 8) * right_stride + lane / 8 % 2 * 8
                                              : right + (lane % 16) * right_stride + lane / 16 * 8;
    SL_ROLLED
    for (int k = 0; k < depth; k += 16) {
      uint32_t a[kRowParts][4], b[kColumnParts / 2][4];
      SL_UNROLL
      for (int i = 0; i < kRowParts; ++i) gpu::load_matrices<4, false>(a_at + i * 16 * left_stride + k, a[i]);
      SL_UNROLL
      for (int j = 0; j < kColumnParts / 2; ++j) {
        if (kRightTransposed) {
          gpu::load_matrices<4, false>(b_at + j * 16 * right_stride + k, b[j]);
        } else {
          gpu::load_matrices<4, true>(b_at + k * right_stride + j * 16, b[j]);
        }
      }
      SL_UNROLL
      for (int i = 0; i < kRowParts; ++i) {
        SL_UNROLL
        for (int j = 0; j < kColumnParts; ++j) gpu::multiply_bf16(values[i][j], a[i], &b[j / 2][j % 2 * 2]);
      }
    }
  }
};

struct alignas(4) Pair {
  uint32_t word;
  SL_DEVICE float low() const { return to_float(bf16{static_cast<uint16_t>(word & 0xffffu)}); }
  SL_DEVICE float high() const { return to_float(bf16{static_cast<uint16_t>(word >> 16)}); }
};

// Two elements at an even index.
SL_DEVICE Pair load_pair(const bf16* from) { return {*reinterpret_cast<const uint32_t*>(from)}; }
SL_DEVICE void store_pair(bf16* to, float low, float high) {
  *reinterpret_cast<uint32_t*>(to) = gpu::pack_bf16(low, high);
}

// Up to whole parts of 16.
SL_DEVICE int whole_parts(int64_t size) { return static_cast<int>((size + 15) / 16 * 16); }

template <class T>
SL_DEVICE float read(const Elements& elements, int64_t offset) {
  return load_as<float>(static_cast<const T*>(elements.data)[offset]);
}

SL_DEVICE float read(const Elements& elements, int64_t offset) {
  switch (elements.type()) {
    case DType::f32: return read<float>(elements, offset);
    case DType::bf16: return read<bf16>(elements, offset);
    case DType::f16: return read<f16>(elements, offset);
    case DType::f64: break;  // refused by the host
  }
  return 0.0f;
}

SL_DEVICE void write(const Elements& elements, int64_t offset, float value) {
  switch (elements.type()) {
    case DType::f32: return store_as(static_cast<float*>(elements.data) + offset, value);
    case DType::bf16: return store_as(static_cast<bf16*>(elements.data) + offset, value);
    case DType::f16: return store_as(static_cast<f16*>(elements.data) + offset, value);
    case DType::f64: return;
  }
}

// As torch has it: from the nearer end, in one rounding.
SL_DEVICE float lerp(float start, float end, float weight) {
  const float way = end - start;
  return weight < 0.5f ? fmaf(weight, way, start) : fmaf(weight - 1.0f, way, end);
}

// What Muon makes of a gradient's element. `advance`: the momentum is moved first; what follows sees it as stored.
SL_DEVICE float update_of(const MatrixRecord& matrix, int row, int column, float grad, bool advance) {
  const int64_t at = matrix.momentum.offset(row, column);
  const float g = matrix.grad_scale * grad;
  float u = read(matrix.momentum, at);
  if (advance) {
    write(matrix.momentum, at, matrix.averages != 0 ? lerp(u, g, matrix.grad_weight) : matrix.weight * u + g);
    u = read(matrix.momentum, at);
  }
  if (matrix.nesterov == 0) return u;
  return matrix.averages != 0 ? lerp(g, u, matrix.weight) : g + matrix.weight * u;
}

// `visit(row, column, value, inside)` for each place of kRows x kColumns from (row, column) on, in all threads of a
// block; the value is 0 beyond the matrix. Neighbouring threads take neighbours in memory.
template <int kRows, int kColumns, class T, class Visit>
SL_DEVICE void read_input_as(const MatrixRecord& matrix, int row, int column, bool advance, Visit visit) {
  const bool down = matrix.in.column_stride > matrix.in.row_stride;
  for (int i = threadIdx.x; i < kRows * kColumns; i += blockDim.x) {
    const int r = down ? i % kRows : i / kColumns, c = down ? i / kRows : i % kColumns;
    const bool inside = row + r < matrix.rows && column + c < matrix.columns;
    float value = inside ? read<T>(matrix.in, matrix.in.offset(row + r, column + c)) : 0.0f;
    if (inside && matrix.momentum.data != nullptr) value = update_of(matrix, row + r, column + c, value, advance);
    visit(r, c, value, inside);
  }
}

template <int kRows, int kColumns, class Visit>
SL_DEVICE void read_input(const MatrixRecord& matrix, int row, int column, bool advance, Visit visit) {
  switch (matrix.in.type()) {
    case DType::f32: return read_input_as<kRows, kColumns, float>(matrix, row, column, advance, visit);
    case DType::bf16: return read_input_as<kRows, kColumns, bf16>(matrix, row, column, advance, visit);
    case DType::f16: return read_input_as<kRows, kColumns, f16>(matrix, row, column, advance, visit);
    case DType::f64: return;
  }
}

// Squares are summed in double: those of any float fit there.
template <int kRows, int kColumns>
SL_DEVICE double sum_of_squares(const MatrixRecord& matrix, int row, int column) {
  double sum = 0.0;
  read_input<kRows, kColumns>(matrix, row, column, true, [&](int, int, float value, bool) {
    sum += static_cast<double>(value) * static_cast<double>(value);
  });
  return sum;
}

// `put(row, column, value)` for each place, scaled; only within the matrix, so that what is not finite stays out of the
// zeros around it.
template <int kRows, int kColumns, class Put>
SL_DEVICE void gather(const MatrixRecord& matrix, int row, int column, double factor, Put put) {
  read_input<kRows, kColumns>(matrix, row, column, false, [&](int r, int c, float value, bool inside) {
    put(r, c, inside ? static_cast<float>(static_cast<double>(value) * factor) : 0.0f);
  });
}

// What becomes of a parameter w and an orthogonal factor o: decay w - step o.
struct Move {
  float decay, step;

  // As the host makes them of a number.
  SL_DEVICE static Move of(const MatrixRecord& matrix) {
    const Rate& rate = matrix.rate;
    if (rate.address == nullptr) return {matrix.decay, matrix.step};
    const double lr = rate.is_double ? *static_cast<const double*>(rate.address)
                                     : static_cast<double>(*static_cast<const float*>(rate.address));
    return {static_cast<float>(1.0 - lr * rate.weight_decay), static_cast<float>(lr * rate.scale)};
  }
};

template <class T>
SL_DEVICE void write_element(const MatrixRecord& matrix, const Move& move, int row, int column, float value) {
  if (row >= matrix.rows || column >= matrix.columns) return;
  T* const to = static_cast<T*>(matrix.out.data) + matrix.out.offset(row, column);
  if (matrix.momentum.data != nullptr) {
    // A learning rate of 0 leaves what is there, bit for bit, whatever the factor is.
    if (move.step == 0.0f) return;
    value = move.decay * load_as<float>(*to) - move.step * value;
  }
  store_as(to, value);
}

// A warp's tile, whose corner is at (row, column), to memory.
template <class T, class Part>
SL_DEVICE void write_output_as(const MatrixRecord& matrix, int row, int column, Part& tile) {
  const Move move = Move::of(matrix);
  tile.for_pairs([&](int r, int c, float& low, float& high) {
    write_element<T>(matrix, move, row + r, column + c, low);
    write_element<T>(matrix, move, row + r, column + c + 1, high);
  });
}

template <class Part>
SL_DEVICE void write_output(const MatrixRecord& matrix, int row, int column, Part& tile) {
  switch (matrix.out.type()) {
    case DType::f32: return write_output_as<float>(matrix, row, column, tile);
    case DType::bf16: return write_output_as<bf16>(matrix, row, column, tile);
    case DType::f16: return write_output_as<f16>(matrix, row, column, tile);
    case DType::f64: return;
  }
}

// 1/sqrt of the sum of a row's magnitudes in A: what the row of X is multiplied by. A row of zeros stays one.
SL_DEVICE float row_factor(float sum) { return sum != 0.0f ? 1.0f / sqrtf(sum) : 1.0f; }

}  // namespace stepladder::newton_schulz
