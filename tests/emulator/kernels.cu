// Kernels right and wrong, for the test of the emulator itself: `kernels NAME` runs one and prints its result,
// or what was wrong with it.
#include "common/gpu.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "common/error.h"
#include "emulator/run.h"

using namespace stepladder;

namespace {

constexpr int kThreads = 96;

struct Values {
  int of[kThreads];
  int& operator[](unsigned i) { return of[i]; }
};

struct Arguments {
  int* out;
};

// Adds what all threads of a block put down.
SL_KERNEL(kThreads)
reduction(SL_ARGUMENTS(Arguments) a) {
  SL_SHARED(Values, values);
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  for (unsigned n = kThreads; n > 1; n = (n + 1) / 2) {
    const unsigned half = (n + 1) / 2;
    if (threadIdx.x < n - half) values[threadIdx.x] += values[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) atomicAdd(a.out, values[0]);
}

SL_KERNEL(kThreads)
missing_barrier(SL_ARGUMENTS(Arguments) a) {
  SL_SHARED(Values, values);
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  atomicAdd(a.out, values[(threadIdx.x + 1) % kThreads]);
}

// The barrier that keeps fast threads from overwriting what slow ones still read.
SL_KERNEL(kThreads)
missing_second_barrier(SL_ARGUMENTS(Arguments) a) {
  SL_SHARED(Values, values);
  for (int round = 0; round < 2; ++round) {
    values[threadIdx.x] = round;
    __syncthreads();
    atomicAdd(a.out, values[(threadIdx.x + 1) % kThreads]);
  }
}

// A barrier of one warp does not order another's.
SL_KERNEL(kThreads)
barrier_of_a_warp(SL_ARGUMENTS(Arguments) a) {
  SL_SHARED(Values, values);
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncwarp();
  atomicAdd(a.out, values[(threadIdx.x + 32) % kThreads]);
}

SL_KERNEL(kThreads)
within_a_warp(SL_ARGUMENTS(Arguments) a) {
  SL_SHARED(Values, values);
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncwarp();
  atomicAdd(a.out, values[threadIdx.x ^ 1]);
}

SL_KERNEL(kThreads)
out_of_bounds(SL_ARGUMENTS(Arguments) a) {
  SL_SHARED(Values, values);
  values[threadIdx.x + 1] = 1;
  __syncthreads();
  atomicAdd(a.out, values[threadIdx.x]);
}

SL_KERNEL(kThreads)
beyond_global_memory(SL_ARGUMENTS(Arguments) a) { a.out[threadIdx.x] = 1; }

SL_KERNEL(kThreads)
misaligned(SL_ARGUMENTS(Arguments) a) { gpu::load16(reinterpret_cast<const char*>(a.out) + 4); }

// Half of the threads wait where the other half never comes.
SL_KERNEL(kThreads)
divergent_barrier(SL_ARGUMENTS(Arguments) a) {
  if (threadIdx.x < 48) __syncthreads();
  __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x), 0);
  atomicAdd(a.out, 1);
}

SL_KERNEL(kThreads)
lane_that_has_ended(SL_ARGUMENTS(Arguments) a) {
  if (threadIdx.x == 5) return;
  atomicAdd(a.out, __shfl_xor_sync(0xffffffffu, 1, 4));
}

SL_KERNEL(kThreads)
lane_outside_of_mask(SL_ARGUMENTS(Arguments) a) { atomicAdd(a.out, __shfl_sync(0x0000ffffu, 1, 0)); }

// Halves of a warp exchange apart; votes count.
SL_KERNEL(kThreads)
collectives(SL_ARGUMENTS(Arguments) a) {
  const unsigned lane = threadIdx.x % 32, mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  int sum = static_cast<int>(lane);
  for (int half = 8; half > 0; half /= 2) sum += __shfl_xor_sync(mask, sum, half);
  const int expected = lane < 16 ? 120 : 376;
  const bool right = sum == expected && __shfl_down_sync(0xffffffffu, lane, 1u) == (lane == 31 ? 31 : lane + 1) &&
                     __ballot_sync(0xffffffffu, lane % 3 == 0) == 0x49249249u && __any_sync(0xffffffffu, lane == 7) &&
                     !__all_sync(0xffffffffu, lane == 7);
  atomicAdd(a.out, right ? 1 : 0);
}

// Matrices with small integers, whose products are exact.
template <class T>
struct alignas(16) Matrices {
  T a[16][24], b[16][24];  // rows of 48 bytes
};

SL_DEVICE float a_of(unsigned row, unsigned column) {
  return static_cast<float>(row) - 3.0f * static_cast<float>(column % 5);
}
SL_DEVICE float b_of(unsigned row, unsigned column) {
  return static_cast<float>(row % 7) + 2.0f * static_cast<float>(column);
}

template <class T>
SL_DEVICE void fill(Matrices<T>& m) {
  for (unsigned i = threadIdx.x; i < 256; i += kThreads) {
    store_as(&m.a[i / 16][i % 16], a_of(i / 16, i % 16));
    store_as(&m.b[i / 16][i % 16], b_of(i / 16, i % 16));
  }
  __syncthreads();
}

SL_DEVICE float half_of(uint32_t word, int which) { return to_float(bf16{static_cast<uint16_t>(word >> 16 * which)}); }

// Each lane's words, of matrices and of their transposes.
SL_KERNEL(kThreads)
matrix_loads(SL_ARGUMENTS(Arguments) a) {
  SL_SHARED(Matrices<bf16>, m);
  fill(m);
  const unsigned lane = threadIdx.x % 32, g = lane / 4, t = lane % 4 * 2;
  uint32_t four[4], across[4], two[2], one[1];
  // Quarters of a: upper left, lower left, upper right, lower right.
  const bf16* const row = &m.a[lane % 16][lane / 16 * 8];
  gpu::load_matrices<4, false>(row, four);
  gpu::load_matrices<4, true>(row, across);
  gpu::load_matrices<2, false>(lane < 16 ? row : nullptr, two);
  gpu::load_matrices<1, true>(lane < 8 ? row : nullptr, one);
  bool right = true;
  for (unsigned q = 0; q < 4; ++q) {
    const unsigned r = q % 2 * 8, c = q / 2 * 8;
    for (unsigned k = 0; k < 2; ++k) {
      right = right && half_of(four[q], k) == a_of(r + g, c + t + k) && half_of(across[q], k) == a_of(r + t + k, c + g);
      if (q < 2) right = right && half_of(two[q], k) == a_of(r + g, c + t + k);
      if (q < 1) right = right && half_of(one[q], k) == a_of(r + t + k, c + g);
    }
  }
  atomicAdd(a.out, right ? 1 : 0);
}

template <class T, class Multiply>
SL_DEVICE bool multiplies(Matrices<T>& m, Multiply multiply) {
  fill(m);
  const unsigned lane = threadIdx.x % 32, g = lane / 4, t = lane % 4 * 2;
  uint32_t left[4], right[2];
  gpu::load_matrices<4, false>(&m.a[lane % 16][lane / 16 * 8], left);
  gpu::load_matrices<2, true>(&m.b[lane % 16][0], right);
  float sum[4] = {1.0f, 2.0f, 3.0f, 4.0f};
  multiply(sum, left, right);
  bool correct = true;
  for (unsigned k = 0; k < 4; ++k) {
    float expected = static_cast<float>(k + 1);
    for (unsigned i = 0; i < 16; ++i) expected += a_of(g + k / 2 * 8, i) * b_of(i, t + k % 2);
    correct = correct && sum[k] == expected;
  }
  return correct;
}

SL_KERNEL(kThreads)
matrix_products(SL_ARGUMENTS(Arguments) a) {
  SL_SHARED(Matrices<bf16>, wide);
  SL_SHARED(Matrices<f16>, narrow);
  const bool first =
      multiplies(wide, [](float* s, const uint32_t* l, const uint32_t* r) { gpu::multiply_bf16(s, l, r); });
  const bool second =
      multiplies(narrow, [](float* s, const uint32_t* l, const uint32_t* r) { gpu::multiply_f16(s, l, r); });
  atomicAdd(a.out, first && second ? 1 : 0);
}

// Small integers are tf32 as they are. Of 2^16 and more it keeps multiples of 64: 99968, then 100032, with 100000
// halfway.
SL_KERNEL(kThreads)
other_products(SL_ARGUMENTS(Arguments) a) {
  const unsigned lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  uint32_t left[4], right[2];
  for (unsigned k = 0; k < 4; ++k) left[k] = gpu::round_to_tf32(a_of(g + k % 2 * 8, t + k / 2 * 4));
  for (unsigned k = 0; k < 2; ++k) right[k] = gpu::round_to_tf32(b_of(t + k * 4, g));
  float sum[4] = {1.0f, 2.0f, 3.0f, 4.0f};
  gpu::multiply_tf32(sum, left, right);
  double wide[2] = {1e-9, 2e-9};
  gpu::multiply_f64(wide, a_of(g, t), b_of(t, g));
  bool correct = true;
  for (unsigned k = 0; k < 4; ++k) {
    const unsigned row = g + k / 2 * 8, column = 2 * t + k % 2;
    float expected = static_cast<float>(k + 1);
    for (unsigned i = 0; i < 8; ++i) expected += a_of(row, i) * b_of(i, column);
    double exact = k == 0 ? 1e-9 : 2e-9;
    for (unsigned i = 0; i < 4; ++i) exact += static_cast<double>(a_of(row, i) * b_of(i, column));
    correct = correct && sum[k] == expected && (k > 1 || wide[k] == exact);
  }
  const auto rounded = [](float value) { return bit_cast<float>(gpu::round_to_tf32(value)); };
  correct = correct && rounded(99999.0f) == 99968.0f && rounded(100000.0f) == 100032.0f &&
            rounded(-100000.0f) == -100032.0f && rounded(INFINITY) == INFINITY && rounded(NAN) != rounded(NAN);
  atomicAdd(a.out, correct ? 1 : 0);
}

struct alignas(16) Line {
  int of[4];
};

alignas(16) Line source[2 * kThreads + 1];

SL_DEVICE void fill_source() {
  for (int i = 0; i < 2 * kThreads; ++i) source[i] = {{4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3}};
}

// Two groups in flight, in dynamic shared memory; every third line is zeros.
SL_DEVICE Line* begin_copies() {
  fill_source();
  Line* const lines = reinterpret_cast<Line*>(gpu::dynamic_shared());
  for (unsigned n = 0; n < 2; ++n) {
    const unsigned i = n * kThreads + threadIdx.x;
    gpu::copy_async(&lines[i], &source[i], i % 3 != 0);
    gpu::commit_copies();
  }
  return lines;
}

SL_DEVICE int is_copied(const Line* lines, unsigned i) {
  int right = 1;
  for (int k = 0; k < 4; ++k) right = right && lines[i].of[k] == (i % 3 != 0 ? static_cast<int>(4 * i) + k : 0);
  return right;
}

SL_KERNEL(kThreads)
copies(SL_ARGUMENTS(Arguments) a) {
  const Line* const lines = begin_copies();
  gpu::wait_for_copies<1>();
  __syncthreads();
  atomicAdd(a.out, is_copied(lines, (threadIdx.x + 1) % kThreads));
  gpu::wait_for_copies<0>();
  atomicAdd(a.out, is_copied(lines, kThreads + threadIdx.x));  // its own needs no barrier
}

// The second group is still in flight.
SL_KERNEL(kThreads)
missing_wait(SL_ARGUMENTS(Arguments) a) {
  const Line* const lines = begin_copies();
  gpu::wait_for_copies<1>();
  __syncthreads();
  atomicAdd(a.out, is_copied(lines, kThreads + threadIdx.x));
}

SL_KERNEL(kThreads)
missing_barrier_after_wait(SL_ARGUMENTS(Arguments) a) {
  const Line* const lines = begin_copies();
  gpu::wait_for_copies<0>();
  atomicAdd(a.out, is_copied(lines, (threadIdx.x + 1) % kThreads));
}

// A copy into what another thread may still read.
SL_KERNEL(kThreads)
missing_barrier_before_copy(SL_ARGUMENTS(Arguments) a) {
  Line* const lines = begin_copies();
  gpu::wait_for_copies<0>();
  __syncthreads();
  atomicAdd(a.out, is_copied(lines, (threadIdx.x + 1) % kThreads));
  gpu::copy_async(&lines[threadIdx.x], &source[threadIdx.x], true);
  gpu::commit_copies();
}

SL_KERNEL(kThreads)
missing_barrier_before_matrix_load(SL_ARGUMENTS(Arguments) a) {
  SL_SHARED(Matrices<bf16>, m);
  for (unsigned i = threadIdx.x; i < 256; i += kThreads) store_as(&m.a[i / 16][i % 16], 1.0f);
  uint32_t words[1];
  gpu::load_matrices<1, false>(&m.a[threadIdx.x % 8][0], words);
  atomicAdd(a.out, static_cast<int>(words[0]));
}

SL_KERNEL(kThreads)
misaligned_matrix_load(SL_ARGUMENTS(Arguments) a) {
  SL_SHARED(Matrices<bf16>, m);
  fill(m);
  uint32_t words[1];
  gpu::load_matrices<1, false>(&m.a[threadIdx.x % 8][1], words);
  atomicAdd(a.out, static_cast<int>(words[0]));
}

SL_KERNEL(kThreads)
matrix_load_beyond_shared_memory(SL_ARGUMENTS(Arguments) a) {
  SL_SHARED(Matrices<bf16>, m);
  fill(m);
  uint32_t words[1];
  gpu::load_matrices<1, false>(&m.b[9 + threadIdx.x % 8][0], words);
  atomicAdd(a.out, static_cast<int>(words[0]));
}

SL_KERNEL(kThreads)
misaligned_copy(SL_ARGUMENTS(Arguments) a) {
  fill_source();
  gpu::copy_async(gpu::dynamic_shared(), &source[0].of[1], true);
  atomicAdd(a.out, 1);
}

SL_KERNEL(kThreads)
copy_beyond_shared_memory(SL_ARGUMENTS(Arguments) a) {
  fill_source();
  gpu::copy_async(gpu::dynamic_shared() + 2 * kThreads * sizeof(Line), source, true);
  atomicAdd(a.out, 1);
}

SL_KERNEL(kThreads)
divergent_product(SL_ARGUMENTS(Arguments) a) {
  float sum[4] = {};
  const uint32_t zeros[4] = {};
  if (threadIdx.x % 32 != 7) gpu::multiply_bf16(sum, zeros, zeros);
  __syncthreads();
  atomicAdd(a.out, 1);
}

// Each lane's words, of a matrix and of its transpose.
SL_KERNEL(kThreads)
matrix_transposes(SL_ARGUMENTS(Arguments) a) {
  SL_SHARED(Matrices<bf16>, m);
  fill(m);
  uint32_t words[1], across[1];
  gpu::load_matrices<1, false>(&m.a[threadIdx.x % 8][0], words);
  gpu::load_matrices<1, true>(&m.a[threadIdx.x % 8][0], across);
  atomicAdd(a.out, gpu::transpose_matrix(words[0]) == across[0] ? 1 : 0);
}

// Each block of a cluster puts its numbers down in the other's memory, which adds them up; twice.
SL_KERNEL(kThreads)
exchange(SL_ARGUMENTS(Arguments) a) {
  SL_SHARED(Values, values);
  const unsigned rank = gpu::cluster_rank();
  gpu::cluster_barrier();
  for (int round = 0; round < 2; ++round) {
    gpu::shared_of(1 - rank, &values)->of[threadIdx.x] = static_cast<int>(1000 * rank + threadIdx.x);
    gpu::cluster_barrier();
    atomicAdd(a.out, values[(threadIdx.x + 1) % kThreads]);
    gpu::cluster_barrier();
  }
  if (rank != blockIdx.x) atomicAdd(a.out, 1);
}

SL_KERNEL(kThreads)
missing_first_cluster_barrier(SL_ARGUMENTS(Arguments) a) {
  SL_SHARED(Values, values);
  gpu::shared_of(1 - gpu::cluster_rank(), &values)->of[threadIdx.x] = 1;
  gpu::cluster_barrier();
  atomicAdd(a.out, values[threadIdx.x]);
}

SL_KERNEL(kThreads)
missing_cluster_barrier_before_read(SL_ARGUMENTS(Arguments) a) {
  SL_SHARED(Values, values);
  gpu::cluster_barrier();
  gpu::shared_of(1 - gpu::cluster_rank(), &values)->of[threadIdx.x] = 1;
  __syncthreads();  // of this block alone
  atomicAdd(a.out, values[threadIdx.x]);
  gpu::cluster_barrier();
}

SL_KERNEL(kThreads)
missing_cluster_barrier_before_write(SL_ARGUMENTS(Arguments) a) {
  SL_SHARED(Values, values);
  values[threadIdx.x] = 1;
  gpu::cluster_barrier();
  atomicAdd(a.out, values[threadIdx.x]);
  __syncthreads();
  gpu::shared_of(1 - gpu::cluster_rank(), &values)->of[threadIdx.x] = 2;
  gpu::cluster_barrier();
}

// One block may go while the other writes to it, whichever the emulator lets end first.
template <unsigned kWriter>
SL_KERNEL(kThreads)
missing_last_cluster_barrier(SL_ARGUMENTS(Arguments) a) {
  SL_SHARED(Values, values);
  Values* const other = gpu::shared_of(1 - gpu::cluster_rank(), &values);
  gpu::cluster_barrier();
  if (gpu::cluster_rank() == kWriter) other->of[threadIdx.x] = 1;
  atomicAdd(a.out, 1);
}

SL_KERNEL(kThreads)
block_that_has_ended(SL_ARGUMENTS(Arguments) a) {
  SL_SHARED(Values, values);
  gpu::cluster_barrier();
  if (gpu::cluster_rank() == 0) gpu::shared_of(1, &values)->of[threadIdx.x] = 1;
  atomicAdd(a.out, 1);
}

SL_KERNEL(kThreads)
block_of_no_rank(SL_ARGUMENTS(Arguments) a) {
  SL_SHARED(Values, values);
  gpu::cluster_barrier();
  gpu::shared_of(2, &values)->of[threadIdx.x] = 1;
  atomicAdd(a.out, 1);
}

SL_KERNEL(kThreads)
private_of_another_block(SL_ARGUMENTS(Arguments) a) {
  int own = 0;
  gpu::cluster_barrier();
  atomicAdd(a.out, *gpu::shared_of(1 - gpu::cluster_rank(), &own));
}

// One block waits for the cluster, the other for its own threads, of which one waits for the cluster.
SL_KERNEL(kThreads)
divergent_cluster_barrier(SL_ARGUMENTS(Arguments) a) {
  if (gpu::cluster_rank() == 0 || threadIdx.x == 0) {
    gpu::cluster_barrier();
  } else {
    __syncthreads();
  }
  atomicAdd(a.out, 1);
}

gpu::Kernel of_cluster(int blocks, gpu::Kernel kernel) {
  kernel.cluster = blocks;
  return kernel;
}

gpu::Kernel with_lines(gpu::Kernel kernel) {
  kernel.shared_bytes = 2 * kThreads * sizeof(Line);
  return kernel;
}

const gpu::Kernel kKernels[] = {
    gpu::kernel("reduction", kThreads, reduction),
    gpu::kernel("missing_barrier", kThreads, missing_barrier),
    gpu::kernel("missing_second_barrier", kThreads, missing_second_barrier),
    gpu::kernel("barrier_of_a_warp", kThreads, barrier_of_a_warp),
    gpu::kernel("within_a_warp", kThreads, within_a_warp),
    gpu::kernel("out_of_bounds", kThreads, out_of_bounds),
    gpu::kernel("beyond_global_memory", kThreads, beyond_global_memory),
    gpu::kernel("misaligned", kThreads, misaligned),
    gpu::kernel("divergent_barrier", kThreads, divergent_barrier),
    gpu::kernel("lane_that_has_ended", kThreads, lane_that_has_ended),
    gpu::kernel("lane_outside_of_mask", kThreads, lane_outside_of_mask),
    gpu::kernel("collectives", kThreads, collectives),
    gpu::kernel("matrix_loads", kThreads, matrix_loads),
    gpu::kernel("matrix_products", kThreads, matrix_products),
    gpu::kernel("other_products", kThreads, other_products),
    with_lines(gpu::kernel("copies", kThreads, copies)),
    with_lines(gpu::kernel("missing_wait", kThreads, missing_wait)),
    with_lines(gpu::kernel("missing_barrier_after_wait", kThreads, missing_barrier_after_wait)),
    with_lines(gpu::kernel("missing_barrier_before_copy", kThreads, missing_barrier_before_copy)),
    gpu::kernel("missing_barrier_before_matrix_load", kThreads, missing_barrier_before_matrix_load),
    gpu::kernel("misaligned_matrix_load", kThreads, misaligned_matrix_load),
    gpu::kernel("matrix_load_beyond_shared_memory", kThreads, matrix_load_beyond_shared_memory),
    with_lines(gpu::kernel("misaligned_copy", kThreads, misaligned_copy)),
    with_lines(gpu::kernel("copy_beyond_shared_memory", kThreads, copy_beyond_shared_memory)),
    gpu::kernel("no_dynamic_shared_memory", kThreads, misaligned_copy),
    gpu::kernel("divergent_product", kThreads, divergent_product),
    gpu::kernel("matrix_transposes", kThreads, matrix_transposes),
    of_cluster(2, gpu::kernel("exchange", kThreads, exchange)),
    of_cluster(2, gpu::kernel("missing_first_cluster_barrier", kThreads, missing_first_cluster_barrier)),
    of_cluster(2, gpu::kernel("missing_cluster_barrier_before_read", kThreads, missing_cluster_barrier_before_read)),
    of_cluster(2, gpu::kernel("missing_cluster_barrier_before_write", kThreads, missing_cluster_barrier_before_write)),
    of_cluster(2, gpu::kernel("first_misses_last_cluster_barrier", kThreads, missing_last_cluster_barrier<0>)),
    of_cluster(2, gpu::kernel("second_misses_last_cluster_barrier", kThreads, missing_last_cluster_barrier<1>)),
    of_cluster(2, gpu::kernel("block_that_has_ended", kThreads, block_that_has_ended)),
    of_cluster(2, gpu::kernel("block_of_no_rank", kThreads, block_of_no_rank)),
    of_cluster(2, gpu::kernel("private_of_another_block", kThreads, private_of_another_block)),
    of_cluster(2, gpu::kernel("divergent_cluster_barrier", kThreads, divergent_cluster_barrier)),
    of_cluster(3, gpu::kernel("part_of_a_cluster", kThreads, exchange)),
};

}  // namespace

int main(int, char** names) {
  for (const gpu::Kernel& kernel : kKernels) {
    if (strcmp(kernel.name, names[1]) != 0) continue;
    std::vector<int> out(8);
    const Arguments arguments{out.data()};
    try {
      emulator::run(kernel.call, kernel.function, &arguments, 2, kernel.threads, kernel.shared_bytes,
                    static_cast<unsigned>(kernel.cluster));
      printf("result %d\n", out[0]);
    } catch (const Error& error) {
      printf("error: %s\n", error.what());
    }
    return 0;
  }
  return 1;
}
