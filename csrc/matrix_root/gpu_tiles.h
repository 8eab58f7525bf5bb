// Tiles of products whose operands are read by rows from device memory, through shared memory.
#pragma once

#include "matrix_root/gpu_products.h"

namespace stepladder::matrix_root {

constexpr int kDepth = 16, kStages = 4;  // columns of the operands in shared memory at once, and how often
// Rows are apart by odd multiples of 16 bytes in fp32, of 32 in fp64: reads of a warp meet in no bank.
constexpr int kStride = kDepth + 4;

template <class T>
struct Shape;
template <>
struct Shape<float> {
  static constexpr int kSide = kFastSide, kThreads = 256, kRows = 64, kColumns = 32;
};
template <>
struct Shape<double> {
  static constexpr int kSide = kWideSide, kThreads = 128, kRows = 32, kColumns = 32;
};

template <class T>
constexpr int kOperand = Shape<T>::kSide * kStride;
template <class T>
constexpr int kProductBytes = kStages * 2 * kOperand<T> * static_cast<int>(sizeof(T));
template <class T>
constexpr int kStagedStride = Shape<T>::kSide + 4;
static_assert(Shape<float>::kSide * kStagedStride<float> <= kStages * 2 * kOperand<float>, "a tile fits");
static_assert(Shape<double>::kSide * kStagedStride<double> <= kStages * 2 * kOperand<double>, "a tile fits");

// The matrix that a unit of work belongs to.
template <class Launch>
SL_DEVICE int64_t find_matrix(const Launch& launch, int64_t unit) {
  int64_t low = 0, high = launch.count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (launch.first[middle] <= unit) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Tiles on and below the diagonal, by rows: row r of them begins with tile r (r + 1) / 2.
struct TilePlace {
  int row, column;  // of the first element
  SL_DEVICE TilePlace(int64_t tile, int side) {
    int64_t tile_row = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(tile) + 1.0) - 1.0) / 2.0);
    while (tile_row * (tile_row + 1) / 2 > tile) --tile_row;
    while ((tile_row + 1) * (tile_row + 2) / 2 <= tile) ++tile_row;
    row = static_cast<int>(tile_row) * side;
    column = static_cast<int>(tile - tile_row * (tile_row + 1) / 2) * side;
  }
};

// This warp's part of a tile.
template <class T>
struct WarpPlace {
  static constexpr int kInRow = Shape<T>::kSide / Shape<T>::kColumns;
  int row, column;
  SL_DEVICE WarpPlace()
      : row(gpu::thread_anew() / 32 / kInRow * Shape<T>::kRows),
        column(gpu::thread_anew() / 32 % kInRow * Shape<T>::kColumns) {}
};

// This thread's vectors of both operands' parts of kSide x kDepth, on their way to shared memory: zeros beyond the
// matrix.
template <class T>
class Copies {
 public:
  // From the first elements of both on, of which so many rows are there.
  SL_DEVICE Copies(const T* left, const T* right, int left_rows, int right_rows, int stride)
      : left_(left + int64_t{own_row()} * stride + own_column()),
        to_right_(static_cast<int>((right - left) / kVector)),
        between_(static_cast<uint32_t>(kBetween * stride / kVector)) {
    SL_UNROLL
    for (int k = 0; k < kCount; ++k) {
      const int r = k * kBetween + own_row();
      inside_ |= static_cast<uint32_t>(r < left_rows) << k | static_cast<uint32_t>(r < right_rows) << (16 + k);
    }
  }

  // The next columns, of which there are `columns` left.
  SL_DEVICE void start(T* to, int columns) {
    to += own_row() * kStride + own_column();
    const uint32_t inside = columns > own_column() ? inside_ : 0;
    SL_UNROLL
    for (int k = 0; k < kCount; ++k) {
      const bool left = inside >> k & 1, right = inside >> (16 + k) & 1;
      const T* const from = left_ + (left ? k * between_ : 0) * int64_t{kVector};
      gpu::copy_async(to + k * kBetween * kStride, from, left);
      const T* const other = left_ + (right ? to_right_ + static_cast<int>(k * between_) : 0) * int64_t{kVector};
      gpu::copy_async(to + kOperand<T> + k * kBetween * kStride, other, right);
    }
    left_ += kDepth;
  }

  // Adds this warp's part of the product of what has been copied to `at`.
  template <class P>
  SL_DEVICE static void multiply(const T* at, P& part) {
    const WarpPlace<T> warp;
    part.add_product(at + warp.row * kStride, kStride, at + kOperand<T> + warp.column * kStride, kStride, kDepth);
  }

 private:
  static constexpr int kVector = 16 / static_cast<int>(sizeof(T)), kInRow = kDepth / kVector;
  static constexpr int kBetween = Shape<T>::kThreads / kInRow, kCount = Shape<T>::kSide / kBetween;
  static_assert(kCount <= 16, "a bit for each");
  SL_DEVICE static int own_row() { return gpu::thread_anew() / kInRow; }
  SL_DEVICE static int own_column() { return gpu::thread_anew() % kInRow * kVector; }

  const T* left_;
  const int to_right_;      // vectors
  const uint32_t between_;  // vectors
  uint32_t inside_ = 0;
};

// Where the part of the inner dimension is kept after which `left` columns are left, itself counted.
template <class T>
SL_DEVICE T* stage_of(T* memory, int left) {
  return memory + (left + kDepth - 1) / kDepth % kStages * (2 * kOperand<T>);
}

// Rows of left times rows of right over all columns, as they are copied. Afterwards nobody reads the shared memory any
// more.
template <class T, class C, class P>
SL_DEVICE void multiply_tile(C copies, int depth, T* memory, P& part, bool active) {
  constexpr int kAhead = (kStages - 1) * kDepth;
  // Counted from above 0, as the copies go beyond the last column.
  depth += kStages * kDepth;
  SL_UNROLL
  for (int k = 0; k < kAhead; k += kDepth) {
    copies.start(stage_of(memory, depth - k), depth - k - kStages * kDepth);
    gpu::commit_copies();
  }
  SL_ROLLED
  for (; depth > kStages * kDepth; depth -= kDepth) {
    gpu::wait_for_copies<kStages - 2>();
    __syncthreads();
    copies.start(stage_of(memory, depth - kAhead), depth - kAhead - kStages * kDepth);
    gpu::commit_copies();
    const T* const at = stage_of(memory, depth);
    if (active) copies.multiply(at, part);
  }
  gpu::wait_for_copies<0>();
  __syncthreads();
}

template <class T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / static_cast<int>(sizeof(T));
  T of[kSize];
  SL_DEVICE static Vector load(const T* from) { return bit_cast<Vector>(gpu::load16(from)); }
  SL_DEVICE void store(T* to) const { gpu::store16(to, bit_cast<gpu::Bytes16>(*this)); }
};

// `visit(row, column)` for this thread's vectors of a tile.
template <class T, class Visit>
SL_DEVICE void for_vectors(Visit visit) {
  constexpr int kSize = Vector<T>::kSize, kInRow = Shape<T>::kSide / kSize;
  SL_ROLLED
  for (int i = threadIdx.x; i < Shape<T>::kSide * kInRow; i += Shape<T>::kThreads)
    visit(i / kInRow, i % kInRow * kSize);
}

}  // namespace stepladder::matrix_root
