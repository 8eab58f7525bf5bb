// out = left right for matrices of different shapes in one persistent launch, whose blocks take tiles in turn. Operands
// are read where they lie, in any strides: by 16 bytes along whichever of their sides is contiguous, and kept in shared
// memory in that order; else, and where an address or a size is no multiple of 16 bytes, element by element.
#include "matrix_root/gpu_multiply.h"

#include "matrix_root/gpu_tiles.h"

namespace stepladder::matrix_root {

namespace {

// Rows of an operand that a tile is made of; the right one's are columns of its matrix.
struct Band {
  const char* from;  // of its first row's first element
  int64_t row_stride, step;
  int32_t rows;      // that are there
  bool down, whole;  // neighbours are of different rows; they can be read by 16 bytes
};

// What a block works on: in shared memory, as registers are scarce.
struct Tile {
  int64_t unit;
  int32_t matrix, batch, row, column, depth;
  Band left, right;
};

// Elements that lie down: from one of the sum to the next. Reads of a warp meet in no bank.
template <class T>
constexpr int kDownStride = Shape<T>::kSide + (sizeof(T) == sizeof(double) ? 4 : 8);
static_assert(kDepth * kDownStride<float> <= kOperand<float> && kDepth * kDownStride<double> <= kOperand<double>,
              "a part of an operand fits either way");

template <class T>
SL_DEVICE Band band_of(const char* data, int64_t row_stride, int64_t step, int64_t first, int64_t rows, int64_t depth) {
  constexpr int64_t kVector = 16 / static_cast<int64_t>(sizeof(T));
  Band band;
  band.from = data + first * row_stride * static_cast<int64_t>(sizeof(T));
  band.row_stride = row_stride;
  band.step = step;
  band.rows = static_cast<int32_t>(rows - first);
  band.down = row_stride < step;
  const int64_t contiguous = band.down ? row_stride : step, apart = band.down ? step : row_stride;
  band.whole = contiguous == 1 && apart % kVector == 0 && (band.down ? rows : depth) % kVector == 0 &&
               reinterpret_cast<uintptr_t>(band.from) % 16 == 0;
  return band;
}

template <class T>
SL_DEVICE bool next_tile(const ProductLaunch& launch, Tile& tile) {
  constexpr int kSide = Shape<T>::kSide;
  __syncthreads();
  if (threadIdx.x == 0 && (tile.unit += gridDim.x) < launch.work) {
    tile.matrix = static_cast<int32_t>(find_matrix(launch, tile.unit));
    const ProductRecord& r = launch.matrices[tile.matrix];
    const int64_t across = (r.n + kSide - 1) / kSide, tiles = across * ((r.m + kSide - 1) / kSide);
    const int64_t own = tile.unit - launch.first[tile.matrix], place = own % tiles;
    tile.batch = static_cast<int32_t>(own / tiles);
    tile.row = static_cast<int32_t>(place / across) * kSide;
    tile.column = static_cast<int32_t>(place % across) * kSide;
    tile.depth = static_cast<int32_t>(r.k);
    constexpr int64_t kItem = sizeof(T);
    tile.left = band_of<T>(r.left.data + tile.batch * r.left.batch_stride * kItem, r.left.row_stride,
                           r.left.column_stride, tile.row, r.m, r.k);
    tile.right = band_of<T>(r.right.data + tile.batch * r.right.batch_stride * kItem, r.right.column_stride,
                            r.right.row_stride, tile.column, r.n, r.k);
  }
  __syncthreads();
  return tile.unit < launch.work;
}

// Both bands' parts of kSide x kDepth, on their way to shared memory: zeros beyond the matrix.
template <class T, bool kLeftDown, bool kRightDown>
struct Bands {
  const Tile& tile;

  // The next columns, of which there are `columns` left.
  SL_DEVICE void start(T* to, int columns) {
    if (columns <= 0) return;
    fetch<kLeftDown>(tile.left, to, columns);
    fetch<kRightDown>(tile.right, to + kOperand<T>, columns);
  }

  template <class P>
  SL_DEVICE static void multiply(const T* at, P& part) {
    constexpr int kLeft = kLeftDown ? kDownStride<T> : kStride, kRight = kRightDown ? kDownStride<T> : kStride;
    const WarpPlace<T> warp;
    const T* const left = at + warp.row * (kLeftDown ? 1 : kStride);
    const T* const right = at + kOperand<T> + warp.column * (kRightDown ? 1 : kStride);
    // Unrolled, which spares the registers of the loop.
    SL_UNROLL
    for (int k = 0; k < kDepth; k += P::kStep)
      part.template add_product<false, kLeftDown, kRightDown>(left + k * (kLeftDown ? kLeft : 1), kLeft,
                                                              right + k * (kRightDown ? kRight : 1), kRight, P::kStep);
  }

 private:
  template <bool kDown>
  SL_DEVICE void fetch(const Band& band, T* to, int columns) const {
    constexpr int kSide = Shape<T>::kSide, kThreads = Shape<T>::kThreads;
    constexpr int kVector = 16 / static_cast<int>(sizeof(T));
    // Neighbours in memory, and how often they come after another.
    constexpr int kLength = kDown ? kSide : kDepth, kApart = kDown ? kDownStride<T> : kStride;
    const T* const from = reinterpret_cast<const T*>(band.from) + (tile.depth - columns) * band.step;
    if (band.whole) {
      const int64_t apart = kDown ? band.step : band.row_stride;
      SL_UNROLL
      for (int i = gpu::thread_anew(); i < kSide * kDepth / kVector; i += kThreads) {
        const int outer = i / (kLength / kVector), inner = i % (kLength / kVector) * kVector;
        const bool inside = kDown ? outer < columns && inner < band.rows : outer < band.rows && inner < columns;
        gpu::copy_async(to + outer * kApart + inner, inside ? from + outer * apart + inner : from, inside);
      }
      return;
    }
    SL_ROLLED
    for (int i = gpu::thread_anew(); i < kSide * kDepth; i += kThreads) {
      const int outer = i / kLength, inner = i % kLength;
      const int row = kDown ? inner : outer, column = kDown ? outer : inner;
      const bool inside = row < band.rows && column < columns;
      to[outer * kApart + inner] = inside ? from[row * band.row_stride + column * band.step] : T(0);
    }
  }
};

// Whether any of a warp's part is in the matrix.
template <class T>
SL_DEVICE bool is_active(const Tile& tile) {
  const WarpPlace<T> warp;
  return warp.row < tile.left.rows && warp.column < tile.right.rows;
}

template <class T>
SL_DEVICE void multiply_all(const ProductLaunch& launch) {
  constexpr int kSide = Shape<T>::kSide, kBetween = kStagedStride<T>;
  SL_SHARED(Tile, tile);
  T* const memory = reinterpret_cast<T*>(gpu::dynamic_shared());
  if (threadIdx.x == 0) tile.unit = static_cast<int64_t>(blockIdx.x) - gridDim.x;
  while (next_tile<T>(launch, tile)) {
    Part<T, Shape<T>::kRows, Shape<T>::kColumns> part;
    clear(part);
    const bool active = is_active<T>(tile);
    if (tile.left.down) {
      if (tile.right.down) {
        multiply_tile<T>(Bands<T, true, true>{tile}, tile.depth, memory, part, active);
      } else {
        multiply_tile<T>(Bands<T, true, false>{tile}, tile.depth, memory, part, active);
      }
    } else if (tile.right.down) {
      multiply_tile<T>(Bands<T, false, true>{tile}, tile.depth, memory, part, active);
    } else {
      multiply_tile<T>(Bands<T, false, false>{tile}, tile.depth, memory, part, active);
    }
    const WarpPlace<T> warp;
    part.for_pairs([&](int r, int c, T& low, T& high) {
      T* const to = memory + (warp.row + r) * kBetween + warp.column + c;
      to[0] = low;
      to[1] = high;
    });
    __syncthreads();
    const Place& out = launch.matrices[tile.matrix].out;
    T* const to = reinterpret_cast<T*>(out.data) + tile.batch * out.batch_stride + tile.row * out.row_stride +
                  tile.column * out.column_stride;
    const bool down = out.row_stride < out.column_stride;
    SL_ROLLED
    for (int i = threadIdx.x; i < kSide * kSide; i += Shape<T>::kThreads) {
      const int r = down ? i % kSide : i / kSide, c = down ? i / kSide : i % kSide;
      if (r < tile.left.rows && c < tile.right.rows)
        to[r * out.row_stride + c * out.column_stride] = memory[r * kBetween + c];
    }
  }
}

SL_KERNEL_OF_TWO(Shape<float>::kThreads)
multiply_f32(SL_ARGUMENTS(ProductLaunch) launch) { multiply_all<float>(launch); }
SL_KERNEL_OF_TWO(Shape<double>::kThreads)
multiply_f64(SL_ARGUMENTS(ProductLaunch) launch) { multiply_all<double>(launch); }

}  // namespace

const ProductKernels& product_kernels() {
  static const ProductKernels kernels = {
      gpu::kernel("multiply_f32", Shape<float>::kThreads, multiply_f32, kProductBytes<float>),
      gpu::kernel("multiply_f64", Shape<double>::kThreads, multiply_f64, kProductBytes<double>),
  };
  return kernels;
}

}  // namespace stepladder::matrix_root
