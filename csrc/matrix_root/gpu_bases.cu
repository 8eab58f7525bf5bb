// Orthonormal bases by shifted Cholesky-QR in three passes, all matrices together: X^T X, its factor L a column of
// blocks after the other, then X L^-T, a block of rows at a time. What fails is done over by Householder reflections,
// one block for a matrix, which is slow and rare.
#include "matrix_root/gpu_bases.h"

#include "matrix_root/gpu_tiles.h"

namespace stepladder::matrix_root {

namespace {

using S = Shape<double>;
using P = Part<double, S::kRows, S::kColumns>;
constexpr int kThreads = S::kThreads, kReflecting = 512;
// Of a tile in shared memory, and of columns that are read across.
constexpr int kBetween = kBlockSide + 4, kTile = kBlockSide * kBetween;
constexpr int kPanel = kDepth * kBetween;  // rows of X, 64 columns of each
constexpr int64_t kTileBytes = 2 * kTile * sizeof(double);
static_assert(S::kSide == kBlockSide, "blocks are tiles");
static_assert(kTileBytes <= kProductBytes<double>, "two tiles fit where a product's operands were");

SL_DEVICE double* x_of(const BasisLaunch& launch, const BasisRecord& matrix) {
  return reinterpret_cast<double*>(launch.workspace + matrix.buffers);
}
SL_DEVICE double* factor_of(const BasisLaunch& launch, const BasisRecord& matrix) {
  return x_of(launch, matrix) + matrix.factor();
}
SL_DEVICE double* inverse_of(const BasisLaunch& launch, const BasisRecord& matrix, int block) {
  return x_of(launch, matrix) + matrix.inverses() + block * kInverse;
}

SL_DEVICE float element(const BasisRecord& matrix, int64_t row, int64_t column) {
  return matrix.in[row * matrix.row_stride + column * matrix.column_stride];
}

SL_KERNEL(kThreads)
begin_bases(SL_ARGUMENTS(BasisLaunch) launch) {
  SL_SHARED(WarpSums, scratch);
  for (int64_t i = blockIdx.x; i < launch.count; i += gridDim.x) {
    const BasisRecord& matrix = launch.matrices[i];
    const float largest =
        largest_magnitude(matrix.in, matrix.m, matrix.n, matrix.row_stride, matrix.column_stride, scratch.of);
    if (threadIdx.x != 0) continue;
    const bool finite = largest - largest == 0.0f;
    launch.states[i] = {largest, 0.0, finite, !finite || launch.householder};
    *matrix.finite = finite;
  }
}

// X over its largest magnitude, 64 rows at a time.
SL_KERNEL(kThreads)
load_bases(SL_ARGUMENTS(BasisLaunch) launch) {
  for (int64_t unit = blockIdx.x; unit < launch.work; unit += gridDim.x) {
    const int64_t i = find_matrix(launch, unit);
    const BasisRecord& matrix = launch.matrices[i];
    const BasisState& state = launch.states[i];
    if (state.failed != 0) continue;
    const double divisor = state.largest > 0.0 ? state.largest : 1.0;
    const int64_t begin = (unit - launch.first[i]) * kBlockSide, end = min(begin + kBlockSide, matrix.m);
    for (int64_t r = begin + threadIdx.x / 32; r < end; r += kThreads / 32) {
      double* const row = x_of(launch, matrix) + r * matrix.stride();
      for (int64_t c = threadIdx.x % 32; c < matrix.stride(); c += 32)
        row[c] = c < matrix.n ? static_cast<double>(element(matrix, r, c)) / divisor : 0.0;
    }
  }
}

// The lower half of X^T X, and of each tile the sum of the squares of what it has more than I.
SL_KERNEL_OF_TWO(kThreads)
gram_products(SL_ARGUMENTS(BasisLaunch) launch) {
  SL_SHARED(WarpSums, scratch);
  double* const memory = reinterpret_cast<double*>(gpu::dynamic_shared());
  for (int64_t unit = blockIdx.x; unit < launch.work; unit += gridDim.x) {
    const int64_t i = find_matrix(launch, unit);
    if (launch.states[i].failed != 0) continue;
    const BasisRecord& matrix = launch.matrices[i];
    const TilePlace tile(unit - launch.first[i], kBlockSide);
    const WarpPlace<double> warp;
    const int n = static_cast<int>(matrix.n), stride = static_cast<int>(matrix.stride());
    const int row = tile.row + warp.row, column = tile.column + warp.column;
    const bool active = row < n && column < n && column < row + S::kRows;
    const double* const x = x_of(launch, matrix);
    // Rows k and on of the tile's columns, twice.
    const auto start = [&](int64_t k) {
      double* const to = memory + k / kDepth % kStages * (2 * kPanel);
      for (int v = threadIdx.x; v < kDepth * kBlockSide / 2; v += kThreads) {
        const int r = v / (kBlockSide / 2), c = v % (kBlockSide / 2) * 2;
        const bool there = k + r < matrix.m;
        const bool left = there && tile.row + c < stride, right = there && tile.column + c < stride;
        const double* const from = x + (k + r) * stride;
        gpu::copy_async(to + r * kBetween + c, left ? from + tile.row + c : x, left);
        gpu::copy_async(to + kPanel + r * kBetween + c, right ? from + tile.column + c : x, right);
      }
      gpu::commit_copies();
    };
    P part;
    clear(part);
    for (int64_t k = 0; k < (kStages - 1) * kDepth; k += kDepth) start(k);
    SL_ROLLED
    for (int64_t k = 0; k < matrix.m; k += kDepth) {
      gpu::wait_for_copies<kStages - 2>();
      __syncthreads();
      start(k + (kStages - 1) * kDepth);
      const double* const at = memory + k / kDepth % kStages * (2 * kPanel);
      if (active)
        part.template add_product<false, true, true>(at + warp.row, kBetween, at + kPanel + warp.column, kBetween,
                                                     kDepth);
    }
    gpu::wait_for_copies<0>();
    __syncthreads();
    double sum = 0.0;
    if (active) {
      double* const gram = factor_of(launch, matrix);
      part.for_pairs([&](int r, int c, double& low, double& high) {
        const double values[2] = {low, high};
        SL_UNROLL
        for (int k = 0; k < 2; ++k) {
          const int at_row = row + r, at_column = column + c + k;
          if (at_row >= n || at_column > at_row) continue;
          gram[int64_t{at_row} * stride + at_column] = values[k];
          const double more = at_row == at_column ? values[k] - 1.0 : values[k];
          sum += (at_row == at_column ? 1.0 : 2.0) * more * more;
        }
      });
    }
    sum = block_sum(sum, scratch.of);
    if (threadIdx.x == 0) launch.sums[unit] = sum;
  }
}

// Of rows `rows`, block j <- (block j - the blocks before it times those of L's row j), staged in shared memory; zeros
// beyond the matrix. L's row j begins at `pivot`.
SL_DEVICE void reduce_block(double* memory, const double* rows, int num_rows, const double* pivot, int num_pivots,
                            int column, int stride) {
  P part;
  clear(part);
  if (column > 0)
    multiply_tile<double>(Copies<double>(rows, pivot, num_rows, num_pivots, stride), column, memory, part, true);
  const WarpPlace<double> warp;
  part.for_pairs([&](int r, int c, double& low, double& high) {
    r += warp.row;
    c += warp.column;
    const double* const from = rows + int64_t{r} * stride + column + c;
    memory[r * kBetween + c] = r < num_rows && c < num_pivots ? from[0] - low : 0.0;
    memory[r * kBetween + c + 1] = r < num_rows && c + 1 < num_pivots ? from[1] - high : 0.0;
  });
  __syncthreads();
}

// Rows times L^-T, in their block `launch.block`: reduced, then times the inverse of the diagonal block.
SL_DEVICE void eliminate(const BasisLaunch& launch, const BasisRecord& matrix, int block, double* rows, int num_rows,
                         double* memory) {
  const int n = static_cast<int>(matrix.n), stride = static_cast<int>(matrix.stride());
  const int column = block * kBlockSide, size = min(kBlockSide, n - column);
  reduce_block(memory, rows, num_rows, factor_of(launch, matrix) + int64_t{column} * stride, size, column, stride);
  double* const inverse = memory + kTile;
  const double* const from = inverse_of(launch, matrix, block);
  for (int k = threadIdx.x; k < kInverse; k += kThreads) inverse[k / kBlockSide * kBetween + k % kBlockSide] = from[k];
  __syncthreads();
  P part;
  clear(part);
  const WarpPlace<double> warp;
  part.add_product(memory + warp.row * kBetween, kBetween, inverse + warp.column * kBetween, kBetween, kBlockSide);
  part.for_pairs([&](int r, int c, double& low, double& high) {
    r += warp.row;
    c += warp.column;
    double* const to = rows + int64_t{r} * stride + column + c;
    if (r < num_rows && column + c < stride) to[0] = low;
    if (r < num_rows && column + c + 1 < stride) to[1] = high;
  });
  __syncthreads();
}

// The block of L on the diagonal, and its inverse; one thread block for each matrix.
SL_KERNEL_OF_TWO(kThreads)
factor_blocks(SL_ARGUMENTS(BasisLaunch) launch) {
  SL_SHARED(WarpSums, scratch);
  double* const memory = reinterpret_cast<double*>(gpu::dynamic_shared());
  double* const inverse = memory + kTile;
  for (int64_t i = blockIdx.x; i < launch.count; i += gridDim.x) {
    const BasisRecord& matrix = launch.matrices[i];
    BasisState& state = launch.states[i];
    const int n = static_cast<int>(matrix.n), stride = static_cast<int>(matrix.stride());
    const int column = launch.block * kBlockSide, size = min(kBlockSide, n - column);
    if (size <= 0 || state.failed != 0) continue;
    double* const rows = factor_of(launch, matrix) + int64_t{column} * stride;
    double shift = state.shift;
    if (launch.block == 0) {
      double trace = 0.0;
      for (int k = threadIdx.x; k < n; k += kThreads) trace += rows[int64_t{k} * stride + k];
      shift = launch.shift * block_sum(trace, scratch.of);
    }
    reduce_block(memory, rows, size, rows, size, column, stride);
    bool failed = false;
    for (int c = 0; c < size && !failed; ++c) {
      const double pivot = memory[c * kBetween + c] + shift;
      failed = !(pivot > 0.0) || pivot - pivot != 0.0;
      const double root = sqrt(pivot);
      __syncthreads();
      for (int r = c + threadIdx.x; r < size; r += kThreads)
        memory[r * kBetween + c] = r == c ? root : memory[r * kBetween + c] / root;
      __syncthreads();
      // What is right of the column and on or below the diagonal.
      const int left = size - c - 1;
      for (int k = threadIdx.x; k < left * left; k += kThreads) {
        const int r = c + 1 + k / left, q = c + 1 + k % left;
        if (q <= r) memory[r * kBetween + q] -= memory[r * kBetween + c] * memory[q * kBetween + c];
      }
      __syncthreads();
    }
    // A column of the inverse for each thread.
    const int q = threadIdx.x;
    if (q < kBlockSide && !failed) {
      for (int r = 0; r < kBlockSide; ++r) {
        double value = r == q ? 1.0 : 0.0;
        for (int k = q; k < r && r < size; ++k) value -= memory[r * kBetween + k] * inverse[k * kBetween + q];
        inverse[r * kBetween + q] = r >= q && r < size ? value / memory[r * kBetween + r] : 0.0;
      }
    }
    __syncthreads();
    double* const to = inverse_of(launch, matrix, launch.block);
    for (int k = threadIdx.x; k < kInverse && !failed; k += kThreads) {
      const int r = k / kBlockSide, c = k % kBlockSide;
      to[k] = inverse[r * kBetween + c];
      if (c <= r && r < size) rows[int64_t{r} * stride + column + c] = memory[r * kBetween + c];
    }
    if (threadIdx.x == 0) {
      state.failed = static_cast<int32_t>(failed);
      state.shift = shift;
    }
    __syncthreads();
  }
}

// What is below the diagonal block in its column of L.
SL_KERNEL_OF_TWO(kThreads)
eliminate_blocks(SL_ARGUMENTS(BasisLaunch) launch) {
  double* const memory = reinterpret_cast<double*>(gpu::dynamic_shared());
  for (int64_t unit = blockIdx.x; unit < launch.work; unit += gridDim.x) {
    const int64_t i = find_matrix(launch, unit);
    const int block = static_cast<int>(unit - launch.first[i]);
    if (block <= launch.block || launch.states[i].failed != 0) continue;
    const BasisRecord& matrix = launch.matrices[i];
    const int row = block * kBlockSide;
    eliminate(launch, matrix, launch.block, factor_of(launch, matrix) + row * matrix.stride(),
              min(kBlockSide, static_cast<int>(matrix.n) - row), memory);
  }
}

// X <- X L^-T, where rows do not meet.
SL_KERNEL_OF_TWO(kThreads)
solve_rows(SL_ARGUMENTS(BasisLaunch) launch) {
  double* const memory = reinterpret_cast<double*>(gpu::dynamic_shared());
  for (int64_t unit = blockIdx.x; unit < launch.work; unit += gridDim.x) {
    const int64_t i = find_matrix(launch, unit);
    if (launch.states[i].failed != 0) continue;
    const BasisRecord& matrix = launch.matrices[i];
    const int64_t row = (unit - launch.first[i]) * kBlockSide;
    for (int block = 0; block * kBlockSide < matrix.n; ++block)
      eliminate(launch, matrix, block, x_of(launch, matrix) + row * matrix.stride(),
                static_cast<int>(min(int64_t{kBlockSide}, matrix.m - row)), memory);
  }
}

// Whether ||Q^T Q - I||F is within the limit.
SL_KERNEL(kThreads)
judge_bases(SL_ARGUMENTS(BasisLaunch) launch) {
  SL_SHARED(WarpSums, scratch);
  for (int64_t i = blockIdx.x; i < launch.count; i += gridDim.x) {
    BasisState& state = launch.states[i];
    const int64_t end = i + 1 < launch.count ? launch.first[i + 1] : launch.work;
    const bool skipped = state.failed != 0;
    double sum = 0.0;
    for (int64_t k = launch.first[i] + threadIdx.x; k < end && !skipped; k += kThreads) sum += launch.sums[k];
    sum = block_sum(sum, scratch.of);
    if (threadIdx.x != 0) continue;
    if (!skipped) state.failed = static_cast<int32_t>(!(sqrt(sum) <= launch.limit));
    *launch.matrices[i].fallback = state.failed != 0 && state.finite != 0 && !launch.householder;
  }
}

// x <- (I - tau v v^T) x, by one warp; the first element of v is 1, whatever stands there.
SL_DEVICE void reflect(double* x, const double* v, double tau, int64_t size) {
  const int lane = threadIdx.x % 32;
  double sum = 0.0;
  for (int64_t k = lane; k < size; k += 32) sum += (k == 0 ? 1.0 : v[k]) * x[k];
  SL_UNROLL
  for (int half = 16; half > 0; half /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, half);
  for (int64_t k = lane; k < size; k += 32) x[k] -= tau * sum * (k == 0 ? 1.0 : v[k]);
}

// Householder's method for what has failed, as LAPACK's geqr2 and org2r have it: column c of X stands at x + c m, below
// its diagonal becomes a reflection's v, whose factor is kept where L was, and then a column of Q.
SL_KERNEL(kReflecting)
reflect_bases(SL_ARGUMENTS(BasisLaunch) launch) {
  SL_SHARED(WarpSums, scratch);
  const int warp = threadIdx.x / 32, warps = kReflecting / 32;
  for (int64_t i = blockIdx.x; i < launch.count; i += gridDim.x) {
    const BasisState& state = launch.states[i];
    if (state.failed == 0 || state.finite == 0) continue;
    const BasisRecord& matrix = launch.matrices[i];
    const int64_t m = matrix.m, n = matrix.n;
    const double divisor = state.largest > 0.0 ? state.largest : 1.0;
    double* const x = x_of(launch, matrix);
    double* const taus = factor_of(launch, matrix);
    for (int64_t k = threadIdx.x; k < m * n; k += kReflecting)
      x[k % n * m + k / n] = static_cast<double>(element(matrix, k / n, k % n)) / divisor;
    __syncthreads();
    for (int64_t c = 0; c < n; ++c) {
      double* const v = x + c * m + c;
      double below = 0.0;
      for (int64_t k = 1 + threadIdx.x; k < m - c; k += kReflecting) below += v[k] * v[k];
      below = block_sum(below, scratch.of);
      const double first = v[0];
      // A column that is zero below its first element needs no reflection.
      const double norm = sqrt(first * first + below), beta = first >= 0.0 ? -norm : norm;
      const double tau = below > 0.0 ? (beta - first) / beta : 0.0;
      for (int64_t k = 1 + threadIdx.x; k < m - c && below > 0.0; k += kReflecting) v[k] /= first - beta;
      if (threadIdx.x == 0) taus[c] = tau;
      __syncthreads();
      for (int64_t other = c + 1 + warp; other < n && tau != 0.0; other += warps)
        reflect(x + other * m + c, v, tau, m - c);
      __syncthreads();
    }
    for (int64_t c = n - 1; c >= 0; --c) {
      double* const v = x + c * m + c;
      const double tau = taus[c];
      for (int64_t other = c + 1 + warp; other < n; other += warps) reflect(x + other * m + c, v, tau, m - c);
      __syncthreads();
      for (int64_t k = threadIdx.x; k < m; k += kReflecting) {
        double& value = x[c * m + k];
        value = k < c ? 0.0 : k == c ? 1.0 - tau : -tau * value;
      }
      __syncthreads();
    }
  }
}

SL_KERNEL(kThreads)
write_bases(SL_ARGUMENTS(BasisLaunch) launch) {
  for (int64_t unit = blockIdx.x; unit < launch.work; unit += gridDim.x) {
    const int64_t i = find_matrix(launch, unit);
    const BasisRecord& matrix = launch.matrices[i];
    const BasisState& state = launch.states[i];
    const bool by_columns = state.failed != 0;
    const int64_t row_step = by_columns ? 1 : matrix.stride(), column_step = by_columns ? matrix.m : 1;
    const double* const x = x_of(launch, matrix);
    const int64_t begin = (unit - launch.first[i]) * kBlockSide, end = min(begin + kBlockSide, matrix.m);
    for (int64_t r = begin + threadIdx.x / 32; r < end; r += kThreads / 32) {
      for (int64_t c = threadIdx.x % 32; c < matrix.n; c += 32)
        matrix.out[r * matrix.n + c] = state.finite != 0 ? static_cast<float>(x[r * row_step + c * column_step]) : NAN;
    }
  }
}

}  // namespace

const BasisKernels& basis_kernels() {
  static const BasisKernels kernels = {
      gpu::kernel("begin_bases", kThreads, begin_bases),
      gpu::kernel("load_bases", kThreads, load_bases),
      gpu::kernel("gram_products", kThreads, gram_products, kProductBytes<double>),
      gpu::kernel("factor_blocks", kThreads, factor_blocks, kProductBytes<double>),
      gpu::kernel("eliminate_blocks", kThreads, eliminate_blocks, kProductBytes<double>),
      gpu::kernel("solve_rows", kThreads, solve_rows, kProductBytes<double>),
      gpu::kernel("judge_bases", kThreads, judge_bases),
      gpu::kernel("reflect_bases", kReflecting, reflect_bases),
      gpu::kernel("write_bases", kThreads, write_bases),
  };
  return kernels;
}

}  // namespace stepladder::matrix_root
