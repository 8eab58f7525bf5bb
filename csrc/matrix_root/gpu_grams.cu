// L <- beta L + weight G G^T, tiles on and below the diagonal, which are written to both their places. G is converted
// as it is read, whatever its dtype and strides; bf16 and fp16 are tf32 as they are, so that one product suffices for
// them.
#include "matrix_root/gpu_grams.h"

#include <type_traits>

#include "matrix_root/gpu_tiles.h"

namespace stepladder::matrix_root {

namespace {

constexpr int kThreads = 128, kSide = kGramSide;
constexpr int kOperandSize = kSide * kStride;  // kDepth columns of as many rows
constexpr int kHeld = kSide * kDepth / kThreads;
constexpr int kBetween = kSide + 1;  // of a tile in shared memory, read across too

struct Memory {
  alignas(16) float of[4 * kOperandSize];  // two operands, twice
};
static_assert(kSide * kBetween <= 4 * kOperandSize, "a tile fits where the operands were");

// Part of G on its way: kDepth columns of kSide rows, neighbouring threads at neighbours in memory.
template <class T>
class Held {
 public:
  SL_DEVICE void fetch(const GramRecord& matrix, int row, int64_t column) {
    const bool down = is_down(matrix);
    SL_UNROLL
    for (int k = 0; k < kHeld; ++k) {
      const int64_t r = row + row_of(k, down), c = column + column_of(k, down);
      const bool inside = r < matrix.m && c < matrix.n;
      const T* const from = static_cast<const T*>(matrix.factor);
      values_[k] = inside ? load_as<float>(from[r * matrix.factor_row_stride + c * matrix.factor_column_stride]) : 0.0f;
    }
  }
  SL_DEVICE void put(const GramRecord& matrix, float* to) const {
    const bool down = is_down(matrix);
    SL_UNROLL
    for (int k = 0; k < kHeld; ++k) to[row_of(k, down) * kStride + column_of(k, down)] = values_[k];
  }

 private:
  SL_DEVICE static bool is_down(const GramRecord& matrix) {
    return matrix.factor_column_stride > matrix.factor_row_stride;
  }
  SL_DEVICE static int row_of(int k, bool down) {
    const int i = k * kThreads + static_cast<int>(threadIdx.x);
    return down ? i % kSide : i / kDepth;
  }
  SL_DEVICE static int column_of(int k, bool down) {
    const int i = k * kThreads + static_cast<int>(threadIdx.x);
    return down ? i / kSide : i % kDepth;
  }

  float values_[kHeld];
};

template <class T>
SL_DEVICE void update_tile(const GramLaunch& launch, const GramRecord& matrix, const TilePlace& tile, float* memory) {
  constexpr bool kExact = !std::is_same<T, float>::value;
  const bool diagonal = tile.row == tile.column;
  const int warp_row = static_cast<int>(threadIdx.x) / 64 * 32,
            warp_column = static_cast<int>(threadIdx.x) / 32 % 2 * 32;
  // Else all of the part is above the diagonal.
  const bool active = !diagonal || warp_column <= warp_row;
  Part<float, 32, 32> part;
  clear(part);
  Held<T> rows, columns;
  const auto fetch = [&](int64_t k) {
    rows.fetch(matrix, tile.row, k);
    if (!diagonal) columns.fetch(matrix, tile.column, k);
  };
  const auto put = [&](float* to) {
    rows.put(matrix, to);
    if (!diagonal) columns.put(matrix, to + kOperandSize);
  };
  fetch(0);
  put(memory);
  __syncthreads();
  int stage = 0;
  SL_ROLLED
  for (int64_t k = 0; k < matrix.n; k += kDepth) {
    const bool more = k + kDepth < matrix.n;
    if (more) fetch(k + kDepth);
    const float* const at = memory + stage * 2 * kOperandSize;
    const float* const right = diagonal ? at : at + kOperandSize;
    if (active)
      part.template add_product<kExact>(at + warp_row * kStride, kStride, right + warp_column * kStride, kStride,
                                        kDepth);
    stage = 1 - stage;
    if (more) put(memory + stage * 2 * kOperandSize);
    __syncthreads();
  }
  if (active) {
    part.for_pairs([&](int r, int c, float& low, float& high) {
      float* const to = memory + (warp_row + r) * kBetween + warp_column + c;
      to[0] = low;
      to[1] = high;
    });
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kSide * kSide; i += kThreads) {
    const int r = i / kSide, c = i % kSide;
    const int64_t row = tile.row + r, column = tile.column + c;
    if (row >= matrix.m || column > row) continue;
    float& place = matrix.square[row * matrix.square_row_stride + column * matrix.square_column_stride];
    place = memory[r * kBetween + c] = launch.beta * place + launch.weight * memory[r * kBetween + c];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kSide * kSide; i += kThreads) {
    const int r = i % kSide, c = i / kSide;
    const int64_t row = tile.row + r, column = tile.column + c;
    if (row >= matrix.m || column >= row) continue;
    matrix.square[column * matrix.square_row_stride + row * matrix.square_column_stride] = memory[r * kBetween + c];
  }
  __syncthreads();
}

SL_KERNEL_OF_TWO(kThreads)
average_grams(SL_ARGUMENTS(GramLaunch) launch) {
  SL_SHARED(Memory, memory);
  for (int64_t unit = blockIdx.x; unit < launch.work; unit += gridDim.x) {
    const int64_t i = find_matrix(launch, unit);
    const GramRecord& matrix = launch.matrices[i];
    const TilePlace tile(unit - launch.first[i], kSide);
    switch (static_cast<DType>(matrix.dtype)) {
      case DType::f32: update_tile<float>(launch, matrix, tile, memory.of); break;
      case DType::bf16: update_tile<bf16>(launch, matrix, tile, memory.of); break;
      case DType::f16: update_tile<f16>(launch, matrix, tile, memory.of); break;
      case DType::f64: break;  // refused by the host
    }
  }
}

}  // namespace

const gpu::Kernel& gram_kernel() {
  static const gpu::Kernel kernel = gpu::kernel("average_grams", kThreads, average_grams);
  return kernel;
}

}  // namespace stepladder::matrix_root
