// Iterations of larger matrices, an operation on all of them at a time: one persistent launch, whose blocks take units
// of work in turn and look up the matrix that each belongs to.
#include "newton_schulz/gpu_tiles.h"

namespace stepladder::newton_schulz {

namespace {

constexpr int kThreads = 256;
constexpr int kWarpRows = 64, kWarpColumns = 32;  // of a product's tile, by one warp
constexpr int kDepth = 32, kStages = 4;           // columns of the left operand in shared memory at once, and how often
// Rows in shared memory are apart by odd multiples of 16 bytes, so that 8 of them are read at once.
constexpr int kNarrowStride = kDepth + 8, kWideStride = kTileSide + 8;
constexpr int kNarrow = kTileSide * kNarrowStride, kWide = kDepth * kWideStride;
static_assert(kTileSide * kTileSide / (kWarpRows * kWarpColumns) * 32 == kThreads, "a warp for each part of a tile");
static_assert(kTileSide * kWideStride <= 2 * kStages * kNarrow, "a whole tile fits where its operands were");

using Part = Tile<kWarpRows, kWarpColumns>;

SL_DEVICE int64_t find_matrix(const GroupedLaunch& launch, int64_t unit) {
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

SL_DEVICE bf16* buffer_of(const GroupedLaunch& launch, const MatrixRecord& matrix, int buffer) {
  return reinterpret_cast<bf16*>(launch.workspace + matrix.buffers[buffer]);
}

// The diagonal of a square buffer.
SL_DEVICE float* diagonal_of(const GroupedLaunch& launch, const MatrixRecord& matrix, int buffer) {
  return reinterpret_cast<float*>(buffer_of(launch, matrix, buffer) + matrix.square_elements());
}

// A chunk's row and column.
struct Chunk {
  int row, column;
  SL_DEVICE Chunk(const MatrixRecord& matrix, int64_t index) {
    const int64_t in_row = (matrix.columns + kChunkColumns - 1) / kChunkColumns;
    row = static_cast<int>(index / in_row * kChunkRows);
    column = static_cast<int>(index % in_row * kChunkColumns);
  }
};

SL_KERNEL(kThreads)
measure_matrices(SL_ARGUMENTS(GroupedLaunch) launch) {
  SL_SHARED(WarpSums, scratch);
  for (int64_t unit = blockIdx.x; unit < launch.work; unit += gridDim.x) {
    const int64_t i = find_matrix(launch, unit);
    const MatrixRecord& matrix = launch.matrices[i];
    const Chunk chunk(matrix, unit - launch.first[i]);
    const double sum =
        block_sum(sum_of_squares<kChunkRows, kChunkColumns>(matrix, chunk.row, chunk.column), scratch.of);
    if (threadIdx.x == 0) launch.sums[unit] = sum;
  }
}

SL_KERNEL(kThreads)
pack_matrices(SL_ARGUMENTS(GroupedLaunch) launch) {
  constexpr int kSide = kChunkRows, kStride = kSide + 8;
  SL_SHARED(WarpSums, scratch);
  bf16* const square = reinterpret_cast<bf16*>(gpu::dynamic_shared());
  for (int64_t unit = blockIdx.x; unit < launch.work; unit += gridDim.x) {
    const int64_t i = find_matrix(launch, unit);
    const MatrixRecord& matrix = launch.matrices[i];
    const int64_t end = i + 1 < launch.count ? launch.first[i + 1] : launch.work;
    double sum = 0.0;
    for (int64_t part = launch.first[i] + threadIdx.x; part < end; part += kThreads) sum += launch.sums[part];
    const double factor = launch.scaling.factor(block_sum(sum, scratch.of));
    const Chunk chunk(matrix, unit - launch.first[i]);
    const int64_t stride = matrix.iterate_stride();
    bf16* const x = buffer_of(launch, matrix, launch.out);
    for (int column = chunk.column; column < chunk.column + kChunkColumns && column < stride; column += kSide) {
      gather<kSide, kSide>(matrix, chunk.row, column, factor,
                           [&](int r, int c, float value) { square[r * kStride + c] = to_bf16(value); });
      __syncthreads();
      for (int v = threadIdx.x; v < kSide * kSide / 8; v += kThreads) {
        const int r = v / (kSide / 8), c = v % (kSide / 8) * 8;
        if (chunk.row + r < matrix.rows && column + c < stride)
          gpu::store16(x + (chunk.row + r) * stride + column + c,
                       *reinterpret_cast<const gpu::Bytes16*>(square + r * kStride + c));
      }
      __syncthreads();
    }
  }
}

// Rows of X in place, by the roots of the sums of the magnitudes of A's: a warp for each.
SL_KERNEL(kThreads)
divide_rows(SL_ARGUMENTS(GroupedLaunch) launch) {
  static_assert(kRescaledRows == kThreads / 32, "a warp for each row");
  const int lane = threadIdx.x % 32;
  for (int64_t unit = blockIdx.x; unit < launch.work; unit += gridDim.x) {
    const int64_t i = find_matrix(launch, unit);
    const MatrixRecord& matrix = launch.matrices[i];
    const int64_t row = (unit - launch.first[i]) * kRescaledRows + threadIdx.x / 32;
    if (row >= matrix.rows) continue;
    const bf16* const a = buffer_of(launch, matrix, launch.left) + row * matrix.square_stride();
    float sum = lane == 0 ? fabsf(diagonal_of(launch, matrix, launch.left)[row]) : 0.0f;
    for (int64_t k = lane; k < matrix.rows; k += 32) sum += fabsf(to_float(a[k]));
    SL_UNROLL
    for (int half = 16; half > 0; half /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, half);
    const float factor = row_factor(sum);
    bf16* const x = buffer_of(launch, matrix, launch.out) + row * matrix.iterate_stride();
    for (int64_t k = 2 * lane; k < matrix.iterate_stride(); k += 64) {
      const Pair old = load_pair(x + k);
      store_pair(x + k, old.low() * factor, old.high() * factor);
    }
  }
}

// This warp's part of a tile.
struct WarpPlace {
  int row, column;
  SL_DEVICE WarpPlace()
      : row(threadIdx.x / 32 / (kTileSide / kWarpColumns) * kWarpRows),
        column(threadIdx.x / 32 % (kTileSide / kWarpColumns) * kWarpColumns) {}
};

// A tile of a buffer, from its first element on, cut off where the buffer ends.
struct BufferTile {
  bf16* data;
  int stride, rows, columns;

  SL_DEVICE BufferTile(bf16* buffer, int64_t row, int64_t column, int64_t all_rows, int64_t row_stride)
      : data(buffer + row * row_stride + column),
        stride(static_cast<int>(row_stride)),
        rows(static_cast<int>(min(int64_t{kTileSide}, all_rows - row))),
        columns(static_cast<int>(min(int64_t{kTileSide}, row_stride - column))) {}
};

// kRows x kColumns of a buffer on their way to shared memory, zeros beyond `rows` and `columns`.
template <int kRows, int kColumns, int kStride>
SL_DEVICE void copy_part(bf16* to, const bf16* from, int stride, int rows, int columns) {
  SL_UNROLL
  for (int n = 0; n < kRows * kColumns / 8 / kThreads; ++n) {
    const int i = n * kThreads + threadIdx.x, r = i / (kColumns / 8), c = i % (kColumns / 8) * 8;
    const bool inside = r < rows && c < columns;
    gpu::copy_async(to + r * kStride + c, inside ? from + int64_t{r} * stride + c : from, inside);
  }
}

// One tile of a product over `depth`: left's rows, from its first column on, times right's columns, from its first row
// on, or with kRightTransposed its rows.
template <bool kRightTransposed>
struct TileProduct {
  static constexpr int kRight = kRightTransposed ? kNarrow : kWide;

  BufferTile left, right;
  int depth;
  bf16* memory;

  SL_DEVICE void start(int stage, int k) const {
    bf16* const to = memory + stage * (kNarrow + kRight);
    copy_part<kTileSide, kDepth, kNarrowStride>(to, left.data + k, left.stride, left.rows, depth - k);
    if (kRightTransposed) {
      copy_part<kTileSide, kDepth, kNarrowStride>(to + kNarrow, right.data + k, right.stride, right.rows, depth - k);
    } else {
      copy_part<kDepth, kTileSide, kWideStride>(to + kNarrow, right.data + int64_t{k} * right.stride, right.stride,
                                                depth - k, right.columns);
    }
  }

  // Afterwards nobody reads the shared memory any more.
  SL_DEVICE void run(Part& sum, const WarpPlace& warp) const {
    SL_UNROLL
    for (int p = 0; p < kStages - 1; ++p) {
      if (p * kDepth < depth) start(p, p * kDepth);
      gpu::commit_copies();
    }
    int stage = 0;
    SL_ROLLED
    for (int k = 0; k < depth; k += kDepth) {
      gpu::wait_for_copies<kStages - 2>();
      __syncthreads();
      const int ahead = k + (kStages - 1) * kDepth;
      if (ahead < depth) start((stage + kStages - 1) % kStages, ahead);
      gpu::commit_copies();
      const bf16* const a = memory + stage * (kNarrow + kRight) + warp.row * kNarrowStride;
      const bf16* const b = memory + stage * (kNarrow + kRight) + kNarrow;
      if (kRightTransposed) {
        sum.template add_product<true>(a, kNarrowStride, b + warp.column * kNarrowStride, kNarrowStride, kDepth);
      } else {
        sum.template add_product<false>(a, kNarrowStride, b + warp.column, kWideStride, kDepth);
      }
      stage = (stage + 1) % kStages;
    }
    gpu::wait_for_copies<0>();
    __syncthreads();
  }
};

// Where a tile's elements go: to their own places, to those across the diagonal, or, of a tile on the diagonal, from
// its lower half to both.
enum class Places { own, mirrored, both };

// Adds `added`, each element times scale * factors[row * by_row + column * by_column], or times scale where there are
// no factors.
SL_DEVICE void add_tile(Part& part, const WarpPlace& warp, const BufferTile& added, const float* factors, int by_row,
                        int by_column, float scale) {
  const bf16* const data = added.data + int64_t{warp.row} * added.stride + warp.column;
  const int rows = added.rows - warp.row, columns = added.columns - warp.column;
  if (factors != nullptr) factors += warp.row * by_row + warp.column * by_column;
  part.for_pairs([&](int r, int c, float& low, float& high) {
    if (r >= rows || c >= columns) return;
    const Pair pair = load_pair(data + int64_t{r} * added.stride + c);
    const float* const at = factors != nullptr ? factors + r * by_row + c * by_column : nullptr;
    low += (at != nullptr ? scale * at[0] : scale) * pair.low();
    high += (at != nullptr ? scale * at[by_column] : scale) * pair.high();
  });
}

// A tile as bf16 in shared memory, then in rows of 16 bytes to a buffer.
SL_DEVICE void store_tile(bf16* staged, Part& part, const WarpPlace& warp, const BufferTile& to, Places places) {
  part.for_pairs([&](int r, int c, float& low, float& high) {
    r += warp.row;
    c += warp.column;
    if (places == Places::own) return store_pair(staged + r * kWideStride + c, low, high);
    const uint32_t pair = gpu::pack_bf16(low, high);
    const bf16 values[2] = {{static_cast<uint16_t>(pair & 0xffffu)}, {static_cast<uint16_t>(pair >> 16)}};
    SL_UNROLL
    for (int k = 0; k < 2; ++k) {
      if (places == Places::mirrored || r >= c + k) staged[(c + k) * kWideStride + r] = values[k];
      if (places == Places::both && r > c + k) staged[r * kWideStride + c + k] = values[k];
    }
  });
  __syncthreads();
  for (int i = threadIdx.x; i < kTileSide * kTileSide / 8; i += kThreads) {
    const int r = i / (kTileSide / 8), c = i % (kTileSide / 8) * 8;
    if (r < to.rows && c < to.columns)
      gpu::store16(to.data + int64_t{r} * to.stride + c,
                   *reinterpret_cast<const gpu::Bytes16*>(staged + r * kWideStride + c));
  }
  __syncthreads();
}

// Products known to be symmetric: XX^T, or of two symmetric matrices that commute. Only what is on and below the
// diagonal is taken, and stored in both its places: rounding would otherwise leave the two halves different, and a
// matrix and its transpose, which are taken for each other here, would drift apart.
SL_KERNEL_OF_TWO(kThreads)
symmetric_products(SL_ARGUMENTS(GroupedLaunch) launch) {
  bf16* const memory = reinterpret_cast<bf16*>(gpu::dynamic_shared());
  const WarpPlace warp;
  for (int64_t unit = blockIdx.x; unit < launch.work; unit += gridDim.x) {
    const int64_t i = find_matrix(launch, unit);
    const MatrixRecord& matrix = launch.matrices[i];
    const int64_t tile = unit - launch.first[i];
    // Row r of tiles begins with tile r (r + 1) / 2.
    int64_t tile_row = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(tile) + 1.0) - 1.0) / 2.0);
    while (tile_row * (tile_row + 1) / 2 > tile) --tile_row;
    while ((tile_row + 1) * (tile_row + 2) / 2 <= tile) ++tile_row;
    const int row = static_cast<int>(tile_row) * kTileSide;
    const int column = static_cast<int>(tile - tile_row * (tile_row + 1) / 2) * kTileSide;
    const int64_t stride = matrix.square_stride();

    Part part;
    part.clear();
    const int64_t depth = matrix.stride(launch.left);  // both operands are iterates, or both square
    const TileProduct<true> product = {{buffer_of(launch, matrix, launch.left), row, 0, matrix.rows, depth},
                                       {buffer_of(launch, matrix, launch.right), column, 0, matrix.rows, depth},
                                       launch.alpha == 0.0f ? 0 : static_cast<int>(depth),
                                       memory};
    product.run(part, warp);
    part.for_pairs([&](int, int, float& low, float& high) {
      low *= launch.alpha;
      high *= launch.alpha;
    });
    const auto tile_of = [&](int buffer) {
      return BufferTile(buffer_of(launch, matrix, buffer), row, column, matrix.rows, stride);
    };
    // Of square operands, so far what is off the diagonals was multiplied.
    const bool square = launch.left >= kNumIterates;
    SL_ROLLED
    for (int term = square ? 0 : 2; term < (launch.added >= 0 ? 3 : 2); ++term) {
      if (term == 2) {
        add_tile(part, warp, tile_of(launch.added), nullptr, 0, 0, launch.beta);
      } else {
        const bool by_row = term == 0;
        const float* const diagonal = diagonal_of(launch, matrix, by_row ? launch.left : launch.right);
        add_tile(part, warp, tile_of(by_row ? launch.right : launch.left), diagonal + (by_row ? row : column), by_row,
                 !by_row, launch.alpha);
      }
    }
    if (row == column) {
      const float* const left = square ? diagonal_of(launch, matrix, launch.left) + row : nullptr;
      const float* const right = square ? diagonal_of(launch, matrix, launch.right) + row : nullptr;
      const float* const added = launch.added >= 0 ? diagonal_of(launch, matrix, launch.added) + row : nullptr;
      float* const out = diagonal_of(launch, matrix, launch.out) + row;
      float* const also = launch.also >= 0 ? diagonal_of(launch, matrix, launch.also) + row : nullptr;
      const int size = tile_of(launch.out).columns;
      const auto take = [&](int i, float& value) {
        if (i >= size) return;
        if (square) value += launch.alpha * left[i] * right[i];
        if (added != nullptr) value += launch.beta * added[i];
        out[i] = value;
        if (also != nullptr) also[i] = value + launch.diagonal;
        value = 0.0f;
      };
      part.for_pairs([&](int r, int c, float& low, float& high) {
        if (warp.row + r == warp.column + c) take(warp.row + r, low);
        if (warp.row + r == warp.column + c + 1) take(warp.row + r, high);
      });
    }
    SL_ROLLED
    for (int output = 0; output < (launch.also >= 0 ? 2 : 1); ++output) {
      const int buffer = output == 0 ? launch.out : launch.also;
      store_tile(memory, part, warp, tile_of(buffer), row == column ? Places::both : Places::own);
      if (row != column)
        store_tile(memory, part, warp, {buffer_of(launch, matrix, buffer), column, row, matrix.rows, stride},
                   Places::mirrored);
    }
  }
}

// X <- alpha left X + beta X.
SL_KERNEL_OF_TWO(kThreads)
multiply_iterates(SL_ARGUMENTS(GroupedLaunch) launch) {
  bf16* const memory = reinterpret_cast<bf16*>(gpu::dynamic_shared());
  const WarpPlace warp;
  for (int64_t unit = blockIdx.x; unit < launch.work; unit += gridDim.x) {
    const int64_t i = find_matrix(launch, unit);
    const MatrixRecord& matrix = launch.matrices[i];
    const int64_t tile_rows = (matrix.rows + kTileSide - 1) / kTileSide, tile = unit - launch.first[i];
    // Down the columns: blocks at work at a time share their part of X.
    const int64_t row = tile % tile_rows * kTileSide, column = tile / tile_rows * kTileSide;
    const int64_t stride = matrix.iterate_stride();

    Part part;
    part.clear();
    const TileProduct<false> product = {
        {buffer_of(launch, matrix, launch.left), row, 0, matrix.rows, matrix.square_stride()},
        {buffer_of(launch, matrix, launch.right), 0, column, matrix.rows, stride},
        static_cast<int>(matrix.rows),
        memory};
    product.run(part, warp);
    part.for_pairs([&](int, int, float& low, float& high) {
      low *= launch.alpha;
      high *= launch.alpha;
    });
    const BufferTile x(buffer_of(launch, matrix, launch.right), row, column, matrix.rows, stride);
    add_tile(part, warp, x, diagonal_of(launch, matrix, launch.left) + row, 1, 0, launch.alpha);
    if (launch.beta != 0.0f) add_tile(part, warp, x, nullptr, 0, 0, launch.beta);
    if (launch.last) {
      write_output(matrix, static_cast<int>(row) + warp.row, static_cast<int>(column) + warp.column, part);
    } else {
      store_tile(memory, part, warp, {buffer_of(launch, matrix, launch.out), row, column, matrix.rows, stride},
                 Places::own);
    }
  }
}

}  // namespace

const GroupedKernels& grouped_kernels() {
  static const GroupedKernels kernels = {
      gpu::kernel("measure_matrices", kThreads, measure_matrices),
      gpu::kernel("pack_matrices", kThreads, pack_matrices, kChunkRows * (kChunkRows + 8) * sizeof(bf16)),
      gpu::kernel("divide_rows", kThreads, divide_rows),
      gpu::kernel("symmetric_products", kThreads, symmetric_products, kStages * 2 * kNarrow * sizeof(bf16)),
      gpu::kernel("multiply_iterates", kThreads, multiply_iterates, kStages * (kNarrow + kWide) * sizeof(bf16)),
  };
  return kernels;
}

}  // namespace stepladder::newton_schulz
