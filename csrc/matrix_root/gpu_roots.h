// What host and kernels share of the inverse roots of many matrices on a GPU: their table, what the device knows of
// each, and each launch's arguments. The iteration is that of reference/matrix_root.py.
#pragma once

#include <cmath>

#include "common/dtype.h"
#include "common/gpu_runtime.h"

namespace stepladder::matrix_root {

constexpr int kMaxStarts = 16;

// T = aI + bM + cM^2, for a matrix of at most this condition.
struct Start {
  double condition, a, b, c;
};

// One arithmetic's limits.
struct Attempt {
  Start starts[kMaxStarts];
  int32_t num_starts, newton_steps;
};

struct Options {
  int32_t p;
  double eps, relative_eps;
  double near, growth, fast_size;  // NEAR_IDENTITY, GROWTH and FAST_SIZE of the reference
  int32_t squarings, multiplications;
  Attempt fast, wide;  // in fp32, in fp64
};

enum Status : int8_t { kConverged = 0, kStalled = 1, kFailed = 2, kNonFinite = 3 };

// A row of the table; uploaded as words.
struct RootRecord {
  const float* in;
  int64_t row_stride, column_stride;  // elements
  float* out;                         // contiguous
  int32_t* iterations;
  int8_t* status;
  int64_t n;
  int64_t buffers;  // bytes from the start of the workspace

  // Elements from row to row of a buffer: whole vectors of 16 bytes, padded with zeros.
  SL_HD int64_t stride() const { return (n + 3) / 4 * 4; }
};
static_assert(sizeof(RootRecord) % sizeof(uint64_t) == 0, "the table is made of words");

// Buffers of a matrix: four for M, T, and T's powers or what M becomes, and three for X, the X before it, and the
// nearest.
constexpr int kNumSquares = 4, kNumBuffers = kNumSquares + 3;

// What happens to a matrix next: out = alpha left right + beta added + gamma I, where without `left` there is no
// product, and `right` stands alone; then also = also_scale out + also_gamma I. -1: there is none. The squares of
// out - shift I are summed.
struct Operation {
  int32_t left, right, added, out, also;
  double alpha, beta, gamma, also_scale, also_gamma, shift;
};

// Squarings for the largest eigenvalue, and when they are done; the iteration in fp32, in fp64; then which of these two
// made the result, or that there is none.
enum class Phase : int32_t { top, top_squared, fast, wide, fast_done, wide_done, nothing };
enum class Position : int32_t { square, first, start, multiply, power2, power4, update };

// Device memory; of a matrix between the launches.
struct RootState {
  Phase phase;
  Position position;
  int32_t ticket;  // tiles that are done
  int32_t start, newton, steps, squarings;
  int32_t status;
  bool fresh;          // M stands for D still
  bool last;           // the X being made is the result
  int32_t m, t, a, b;  // who is who of the square buffers
  int32_t x, nearest;  // -1: there is none
  double unit;         // what A is divided by, a power of two
  double top_unit;     // likewise, while its largest eigenvalue is looked for
  double delta;        // damping of A / unit
  double scale;        // of D = A / unit + delta I: M = D / scale
  double best;         // least distance of M from I
  Operation operation;
};

// Every launch's arguments. Units of work of matrix i begin with first[i].
struct RootLaunch {
  const RootRecord* matrices = nullptr;
  RootState* states = nullptr;
  const int64_t* first = nullptr;
  int64_t count = 0, work = 0;
  char* workspace = nullptr;
  double* sums = nullptr;  // one for each unit
  Options options;
};

// A matrix is iterated on by one block, in fp32 and in fp64, where its side is up to one of these.
constexpr int kSides[] = {32, 64, 128};
constexpr int kNumSides = 3, kNumWideSides = 2;
constexpr int kPad = 4;  // of rows in shared memory, elements
// M, X, T; the sums of the warps.
constexpr int64_t on_chip_bytes(int side, int64_t element) {
  return 3 * side * (side + kPad) * element + 32 * static_cast<int64_t>(sizeof(double));
}

// The part of a product that one block computes, in fp32 and in fp64.
constexpr int kFastSide = 128, kWideSide = 64;
// Rows of the result that one block writes.
constexpr int kWrittenRows = 8;

const gpu::Kernel& on_chip_kernel(int side, bool wide);  // by index in kSides

struct GroupedKernels {
  gpu::Kernel begin, find_top, load_fast, load_wide, fast, wide, write_fast, write_wide;
};
const GroupedKernels& grouped_kernels();

}  // namespace stepladder::matrix_root
