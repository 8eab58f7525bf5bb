// Inverse roots of larger matrices, an operation on all of them at a time: one persistent launch, whose blocks take
// tiles in turn and look up the matrix that each belongs to, and what is to be done with it. The block that ends a
// matrix's operation decides on the next, so that the host enqueues as many launches as the longest course may have,
// and waits for none; a matrix that has come to its end is passed over.
#include "matrix_root/gpu_course.h"
#include "matrix_root/gpu_tiles.h"

namespace stepladder::matrix_root {

namespace {

constexpr int kThreads = 256;           // of the other kernels
constexpr int kLoadedSide = kWideSide;  // tiles of the wide products serve for reading too

SL_DEVICE int64_t end_of(const RootLaunch& launch, int64_t matrix) {
  return matrix + 1 < launch.count ? launch.first[matrix + 1] : launch.work;
}

template <class T>
SL_DEVICE T* buffer_of(const RootLaunch& launch, const RootRecord& matrix, int buffer) {
  return reinterpret_cast<T*>(launch.workspace + matrix.buffers) + buffer * matrix.n * matrix.stride();
}

// Whether a launch in this arithmetic has anything to do with a matrix.
template <class T>
SL_DEVICE bool takes_part(Phase phase) {
  return sizeof(T) == sizeof(double) ? phase == Phase::wide : phase == Phase::fast || phase == Phase::top;
}

struct Flag {
  int32_t set;
};

// Whether any matrix has something to do; asked by all threads of a block.
template <class T>
SL_DEVICE bool any_left(const RootLaunch& launch) {
  SL_SHARED(Flag, flag);
  if (threadIdx.x == 0) flag.set = 0;
  __syncthreads();
  int found = 0;
  for (int64_t i = threadIdx.x; i < launch.count; i += blockDim.x)
    found |= static_cast<int>(takes_part<T>(launch.states[i].phase));
  if (__any_sync(0xffffffffu, found) && threadIdx.x % 32 == 0) flag.set = 1;
  __syncthreads();
  return flag.set != 0;
}

SL_KERNEL(kThreads)
begin_roots(SL_ARGUMENTS(RootLaunch) launch) {
  SL_SHARED(WarpSums, scratch);
  for (int64_t i = blockIdx.x; i < launch.count; i += gridDim.x) {
    const float largest = largest_magnitude(launch.matrices[i], scratch.of);
    if (threadIdx.x == 0) begin_course(launch.options, launch.matrices[i].n, largest, launch.states[i]);
  }
}

template <class T>
struct LoadedTile {
  T of[kLoadedSide][kLoadedSide + 1];
};

// D = A / unit + delta I from A's lower half.
template <class T>
SL_DEVICE void load_all(const RootLaunch& launch) {
  SL_SHARED(LoadedTile<T>, staged);
  for (int64_t unit = blockIdx.x; unit < launch.work; unit += gridDim.x) {
    const int64_t i = find_matrix(launch, unit);
    const RootState& state = launch.states[i];
    if (!takes_part<T>(state.phase)) continue;
    const RootRecord& matrix = launch.matrices[i];
    const TilePlace tile(unit - launch.first[i], kLoadedSide);
    const bool top = state.phase == Phase::top;
    const double factor = top ? state.top_unit : state.unit, delta = top ? 0.0 : state.delta;
    const bool down = matrix.column_stride > matrix.row_stride;
    __syncthreads();
    for (int k = threadIdx.x; k < kLoadedSide * kLoadedSide; k += kThreads) {
      const int major = k / kLoadedSide, minor = k % kLoadedSide;
      const int r = down ? minor : major, c = down ? major : minor;
      const int64_t row = tile.row + r, column = tile.column + c;
      double value = 0.0;
      if (row < matrix.n && column <= row) {
        value = static_cast<double>(matrix.in[row * matrix.row_stride + column * matrix.column_stride]) / factor;
        if (row == column) value += delta;
      }
      if (tile.row != tile.column || r >= c) staged.of[r][c] = static_cast<T>(value);
      if (tile.row == tile.column && r > c) staged.of[c][r] = static_cast<T>(value);
    }
    __syncthreads();
    const int64_t stride = matrix.stride();
    T* const to = buffer_of<T>(launch, matrix, 0);
    for (int k = threadIdx.x; k < kLoadedSide * kLoadedSide; k += kThreads) {
      const int r = k / kLoadedSide, c = k % kLoadedSide;
      if (tile.row + r < matrix.n && tile.column + c < stride)
        to[(tile.row + r) * stride + tile.column + c] = staged.of[r][c];
      if (tile.row != tile.column && tile.column + r < matrix.n && tile.row + c < stride)
        to[(tile.column + r) * stride + tile.row + c] = staged.of[c][r];
    }
  }
}

SL_KERNEL(kThreads)
load_roots_f32(SL_ARGUMENTS(RootLaunch) launch) { load_all<float>(launch); }
SL_KERNEL(kThreads)
load_roots_f64(SL_ARGUMENTS(RootLaunch) launch) { load_all<double>(launch); }

// out = matrix v, a warp for each row.
SL_DEVICE void multiply_vector(const float* matrix, int64_t n, int64_t stride, const float* v, float* out) {
  const int lane = threadIdx.x % 32;
  for (int64_t r = threadIdx.x / 32; r < n; r += kThreads / 32) {
    float sum = 0.0f;
    for (int64_t c = lane; c < n; c += 32) sum += matrix[r * stride + c] * v[c];
    SL_UNROLL
    for (int half = 16; half > 0; half /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, half);
    if (lane == 0) out[r] = sum;
  }
  __syncthreads();
}

SL_DEVICE double inner_product(const float* x, const float* y, int64_t n, double* scratch) {
  double sum = 0.0;
  for (int64_t k = threadIdx.x; k < n; k += kThreads) sum += static_cast<double>(x[k]) * static_cast<double>(y[k]);
  return block_sum(sum, scratch);
}

// The power method on what was squared, a block for each matrix; then the iteration can begin.
SL_KERNEL(kThreads)
find_top(SL_ARGUMENTS(RootLaunch) launch) {
  SL_SHARED(WarpSums, scratch);
  for (int64_t i = blockIdx.x; i < launch.count; i += gridDim.x) {
    RootState& state = launch.states[i];
    if (state.phase != Phase::top_squared) continue;
    const RootRecord& matrix = launch.matrices[i];
    const int64_t n = matrix.n, stride = matrix.stride();
    const float* const squared = buffer_of<float>(launch, matrix, state.operation.out);
    float* const v = buffer_of<float>(launch, matrix, kNumSquares);
    float* const w = buffer_of<float>(launch, matrix, kNumSquares + 1);
    for (int64_t k = threadIdx.x; k < n; k += kThreads) v[k] = probe_at(k);
    __syncthreads();
    for (int k = 0; k < launch.options.multiplications; ++k) {
      multiply_vector(squared, n, stride, v, w);
      const double norm = sqrt(inner_product(w, w, n, scratch.of));
      for (int64_t j = threadIdx.x; j < n; j += kThreads) v[j] = static_cast<float>(static_cast<double>(w[j]) / norm);
      __syncthreads();
    }
    multiply_vector(buffer_of<float>(launch, matrix, state.m), n, stride, v, w);
    const double top = inner_product(v, w, n, scratch.of) / inner_product(v, v, n, scratch.of);
    if (threadIdx.x == 0) begin_first_attempt(launch.options, n, top, state);
    __syncthreads();
  }
}

// What a block works on: in shared memory, as registers are scarce.
struct Job {
  int64_t unit;
  int32_t matrix;
  int32_t row, column;  // of the tile's first element
};

// The next tile of a matrix that takes part, for all threads of a block; false where there is none.
template <class T>
SL_DEVICE bool next_job(const RootLaunch& launch, Job& job) {
  __syncthreads();
  if (threadIdx.x == 0) {
    while ((job.unit += gridDim.x) < launch.work) {
      job.matrix = static_cast<int32_t>(find_matrix(launch, job.unit));
      if (takes_part<T>(launch.states[job.matrix].phase)) break;
    }
    if (job.unit < launch.work) {
      const TilePlace tile(job.unit - launch.first[job.matrix], Shape<T>::kSide);
      job.row = tile.row;
      job.column = tile.column;
    }
  }
  __syncthreads();
  return job.unit < launch.work;
}

// A finished tile goes to its place in a buffer, times `scale` plus gamma I, and across the diagonal.
template <class T>
SL_DEVICE void store_tile(const T* staged, const Job& job, T* to, int n, int stride, T scale, T gamma) {
  constexpr int kSize = Vector<T>::kSize, kBetween = kStagedStride<T>;
  const auto store = [&](int row, int column, const T* from, int step) {
    if (row >= n || column >= stride) return;
    Vector<T> v;
    SL_UNROLL
    for (int k = 0; k < kSize; ++k) {
      const T value = scale * from[k * step] + (row == column + k ? gamma : T(0));
      v.of[k] = column + k < n ? value : T(0);
    }
    v.store(to + int64_t{row} * stride + column);
  };
  for_vectors<T>([&](int r, int c) { store(job.row + r, job.column + c, staged + r * kBetween + c, 1); });
  if (job.row == job.column) return;
  // Eight rows of four vectors by a warp, so that few meet in a bank.
  constexpr int kGroups = Shape<T>::kSide / kSize / 4;
  SL_ROLLED
  for (int i = threadIdx.x; i < Shape<T>::kSide * Shape<T>::kSide / kSize; i += Shape<T>::kThreads) {
    const int r = i / 32 / kGroups * 8 + i % 8, c = (i / 32 % kGroups * 4 + i % 32 / 8) * kSize;
    store(job.column + r, job.row + c, staged + c * kBetween + r, kBetween);
  }
}

// Whether any of a warp's part is on or below the diagonal of the matrix.
template <class T>
SL_DEVICE bool is_active(const Job& job, const WarpPlace<T>& warp, int n) {
  const int row = job.row + warp.row, column = job.column + warp.column;
  return row < n && column < n && column < row + Shape<T>::kRows;
}

// Each matrix's next operation. Its factors are polynomials of one symmetric matrix, so that the result is symmetric
// too: what is on and below the diagonal is computed, and stored in both its places.
template <class T>
SL_DEVICE void run_operations(const RootLaunch& launch) {
  SL_SHARED(WarpSums, scratch);
  SL_SHARED(Flag, ended);
  SL_SHARED(Job, job);
  if (!any_left<T>(launch)) return;
  T* const memory = reinterpret_cast<T*>(gpu::dynamic_shared());
  if (threadIdx.x == 0) job.unit = static_cast<int64_t>(blockIdx.x) - gridDim.x;
  while (next_job<T>(launch, job)) {
    Part<T, Shape<T>::kRows, Shape<T>::kColumns> part;
    clear(part);
    {
      const WarpPlace<T> warp;
      const RootRecord& matrix = launch.matrices[job.matrix];
      const Operation& operation = launch.states[job.matrix].operation;
      const int n = static_cast<int>(matrix.n), stride = static_cast<int>(matrix.stride());
      if (operation.left >= 0)
        multiply_tile<T>(Copies<T>(buffer_of<T>(launch, matrix, operation.left) + int64_t{job.row} * stride,
                                   buffer_of<T>(launch, matrix, operation.right) + int64_t{job.column} * stride,
                                   n - job.row, n - job.column, stride),
                         stride, memory, part, is_active<T>(job, warp, n));
    }
    // Read anew.
    RootState& state = launch.states[job.matrix];
    const RootRecord& matrix = launch.matrices[job.matrix];
    const Operation& operation = state.operation;
    const int n = static_cast<int>(matrix.n), stride = static_cast<int>(matrix.stride());
    const bool product = operation.left >= 0, diagonal = job.row == job.column;
    const WarpPlace<T> warp;
    if (product && is_active<T>(job, warp, n)) {
      T* const to = memory + warp.row * kStagedStride<T> + warp.column;
      part.for_pairs([&](int r, int c, T& low, T& high) {
        to[r * kStagedStride<T> + c] = low;
        to[r * kStagedStride<T> + c + 1] = high;
      });
    }
    __syncthreads();

    // Of a tile on the diagonal, the lower half makes both.
    double sum = 0.0;
    const T alpha = static_cast<T>(operation.alpha), beta = static_cast<T>(operation.beta);
    const T gamma = static_cast<T>(operation.gamma), shift = static_cast<T>(operation.shift);
    const T* const right = buffer_of<T>(launch, matrix, operation.right);
    const T* const added = operation.added >= 0 ? buffer_of<T>(launch, matrix, operation.added) : nullptr;
    for_vectors<T>([&](int r, int c) {
      const int row = job.row + r, column = job.column + c;
      if (row >= n || column > row) return;
      const int64_t at = int64_t{row} * stride + column;
      T* const staged = memory + r * kStagedStride<T> + c;
      Vector<T> values = {}, others = {};
      if (!product) values = Vector<T>::load(right + at);
      if (added != nullptr) others = Vector<T>::load(added + at);
      SL_UNROLL
      for (int k = 0; k < Vector<T>::kSize; ++k) {
        if (column + k > row) break;
        T value = alpha * (product ? staged[k] : values.of[k]);
        if (added != nullptr) value += beta * others.of[k];
        if (column + k == row) value += gamma;
        staged[k] = value;
        if (diagonal) memory[(c + k) * kStagedStride<T> + r] = value;
        const double apart = static_cast<double>(column + k == row ? value - shift : value);
        sum += (column + k == row ? 1.0 : 2.0) * apart * apart;
      }
    });
    __syncthreads();
    store_tile<T>(memory, job, buffer_of<T>(launch, matrix, operation.out), n, stride, T(1), T(0));
    if (operation.also >= 0)
      store_tile<T>(memory, job, buffer_of<T>(launch, matrix, operation.also), n, stride,
                    static_cast<T>(operation.also_scale), static_cast<T>(operation.also_gamma));

    // The last tile of the matrix folds the sums, and decides.
    sum = block_sum(sum, scratch.of);
    if (threadIdx.x == 0) {
      launch.sums[job.unit] = sum;
      __threadfence();
      const auto tiles = static_cast<int32_t>(end_of(launch, job.matrix) - launch.first[job.matrix]);
      ended.set = static_cast<int32_t>(atomicAdd(&state.ticket, 1) == tiles - 1);
      __threadfence();
    }
    __syncthreads();
    if (ended.set == 0) continue;
    double total = 0.0;
    for (int64_t k = launch.first[job.matrix] + threadIdx.x; k < end_of(launch, job.matrix); k += Shape<T>::kThreads)
      total += const_cast<const volatile double*>(launch.sums)[k];
    total = block_sum(total, scratch.of);
    if (threadIdx.x != 0) continue;
    state.ticket = 0;
    advance(launch.options, state, total);
  }
}

SL_KERNEL_OF_TWO(Shape<float>::kThreads)
root_products_f32(SL_ARGUMENTS(RootLaunch) launch) { run_operations<float>(launch); }
SL_KERNEL_OF_TWO(Shape<double>::kThreads)
root_products_f64(SL_ARGUMENTS(RootLaunch) launch) { run_operations<double>(launch); }

// The results of an attempt, a warp for each row; after the last, NaN for matrices that have none.
template <class T>
SL_DEVICE void write_all(const RootLaunch& launch) {
  constexpr bool kWide = sizeof(T) == sizeof(double);
  static_assert(kWrittenRows == kThreads / 32, "a warp for each row");
  for (int64_t unit = blockIdx.x; unit < launch.work; unit += gridDim.x) {
    const int64_t i = find_matrix(launch, unit);
    const RootState& state = launch.states[i];
    const bool nothing = kWide && state.phase == Phase::nothing;
    if (!nothing && state.phase != (kWide ? Phase::wide_done : Phase::fast_done)) continue;
    const RootRecord& matrix = launch.matrices[i];
    if (unit == launch.first[i] && threadIdx.x == 0) {
      *matrix.iterations = state.steps;
      *matrix.status = static_cast<int8_t>(state.status);
    }
    const int64_t row = (unit - launch.first[i]) * kWrittenRows + threadIdx.x / 32;
    if (row >= matrix.n) continue;
    const double factor = result_factor(launch.options, state);
    const T* const x = nothing ? nullptr : buffer_of<T>(launch, matrix, state.nearest) + row * matrix.stride();
    for (int64_t c = threadIdx.x % 32; c < matrix.n; c += 32)
      matrix.out[row * matrix.n + c] = nothing ? NAN : static_cast<float>(static_cast<double>(x[c]) * factor);
  }
}

SL_KERNEL(kThreads)
write_roots_f32(SL_ARGUMENTS(RootLaunch) launch) { write_all<float>(launch); }
SL_KERNEL(kThreads)
write_roots_f64(SL_ARGUMENTS(RootLaunch) launch) { write_all<double>(launch); }

}  // namespace

const GroupedKernels& grouped_kernels() {
  static const GroupedKernels kernels = {
      gpu::kernel("begin_roots", kThreads, begin_roots),
      gpu::kernel("find_top", kThreads, find_top),
      gpu::kernel("load_roots_f32", kThreads, load_roots_f32),
      gpu::kernel("load_roots_f64", kThreads, load_roots_f64),
      gpu::kernel("root_products_f32", Shape<float>::kThreads, root_products_f32, kProductBytes<float>),
      gpu::kernel("root_products_f64", Shape<double>::kThreads, root_products_f64, kProductBytes<double>),
      gpu::kernel("write_roots_f32", kThreads, write_roots_f32),
      gpu::kernel("write_roots_f64", kThreads, write_roots_f64),
  };
  return kernels;
}

}  // namespace stepladder::matrix_root
