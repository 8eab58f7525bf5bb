// What host and kernels share of the iterations of many matrices on a GPU: their table, and each launch's arguments.
// Every matrix is seen as wide, rows <= columns: a tall one by its transpose, its strides exchanged.
#pragma once

#include <cmath>

#include "common/dtype.h"
#include "common/gpu_runtime.h"
#include "newton_schulz/matrix.h"

namespace stepladder::newton_schulz {

constexpr int kMaxSteps = 99;

struct Polynomial {
  float a, b, c;
};

// Elements in memory, strides in elements.
struct Elements {
  void* data = nullptr;
  int64_t row_stride = 0, column_stride = 0;
  int64_t dtype = 0;

  SL_HD DType type() const { return static_cast<DType>(dtype); }
  SL_HD int64_t offset(int row, int column) const { return row * row_stride + column * column_stride; }
};

// Buffers of a matrix: two for iterates, of its own shape, and square ones.
constexpr int kNumIterates = 2, kNumSquares = 4, kNumBuffers = kNumIterates + kNumSquares;

// A row of the table; uploaded as words.
struct MatrixRecord {
  Elements in, out, momentum;    // the last where Muon's update is what is iterated
  int64_t buffers[kNumBuffers];  // bytes from the start of the workspace
  int64_t first_sum;             // of its chunks' sums of squares
  int64_t rows, columns;
  // What Muon does around the iteration; see matrix.h.
  float weight, grad_weight, grad_scale, decay, step;
  int32_t averages, nesterov, unused;
  Rate rate;

  // Elements from row to row of a buffer: whole vectors of 16 bytes, padded with zeros.
  SL_HD int64_t iterate_stride() const { return (columns + 7) / 8 * 8; }
  SL_HD int64_t square_stride() const { return (rows + 7) / 8 * 8; }
  SL_HD int64_t stride(int buffer) const { return buffer < kNumIterates ? iterate_stride() : square_stride(); }
  // Behind the elements of a square buffer stands its diagonal in fp32, of which the elements have zeros: as X nears an
  // orthogonal matrix its squares near multiples of the identity, and rounded diagonals would be most of the error.
  SL_HD int64_t square_elements() const { return rows * square_stride(); }
};
static_assert(sizeof(MatrixRecord) % sizeof(uint64_t) == 0, "the table is made of words");

// What X is divided by at first.
struct Scaling {
  double eps = 0.0, divisor = 1.0;

  // Zero for a matrix of zeros, NaN where an element is not finite.
  SL_HD double factor(double sum_of_squares) const {
    if (sum_of_squares == 0.0) return 0.0;
    const double norm = sqrt(sum_of_squares);
    if (!(norm - norm == 0.0)) return norm - norm;
    return 1.0 / ((norm > eps ? norm : eps) * divisor);
  }
};

// Whole iterations, a block or a cluster for each matrix.
struct OnChipLaunch {
  const MatrixRecord* matrices = nullptr;
  int64_t count = 0;
  char* workspace = nullptr;
  int32_t slots = 0;  // panels that shared memory holds
  bool prescale = false;
  Scaling scaling;
  int32_t steps = 0;
  Polynomial polynomials[kMaxSteps];
};

// One operation on all matrices, cut into units of work: those of matrix i begin with first[i].
struct GroupedLaunch {
  const MatrixRecord* matrices = nullptr;
  const int64_t* first = nullptr;
  int64_t count = 0, work = 0;
  char* workspace = nullptr;
  double* sums = nullptr;
  Scaling scaling;
  // Buffers: out = alpha left right + beta added, and also = out + diagonal I. -1: there is none.
  int32_t left = 0, right = 0, added = -1, out = 0, also = -1;
  float alpha = 1.0f, beta = 0.0f, diagonal = 0.0f;
  bool last = false;  // the result goes to memory
};

// Matrices are iterated on chip whose smaller side is up to one of these; the last takes a cluster of blocks.
constexpr int kSides[] = {32, 64, 128, 256};
constexpr int kNumSides = 4;
constexpr int blocks_of(int side) { return side == kSides[kNumSides - 1] ? 2 : 1; }
// Of a matrix with few rows, rounding to bf16 would change the singular values by more than of one with many: its
// elements are kept as the sum of two bf16, in as many planes.
constexpr int planes_of(int side) { return side == kSides[0] ? 2 : 1; }
// Columns of a panel of X. In a cluster two of 64 fit beside B; where they are streamed, the next A's sums leave
// registers for 32.
constexpr int panel_width(int side, bool streamed) { return blocks_of(side) == 1 ? side : streamed ? 32 : 64; }
// Doubles in which a block sums.
constexpr int kScratch = 32;
// Shared memory of a block that has room for `slots` panels.
constexpr int64_t on_chip_bytes(int side, bool streamed, int64_t slots) {
  return int64_t{2} * planes_of(side) * side * (side + 8 + slots * (panel_width(side, streamed) + 8)) +
         kScratch * sizeof(double) + 2 * side * sizeof(float);
}
// The part of a matrix that one block measures or converts.
constexpr int kChunkRows = 64, kChunkColumns = 256;
// The part of a product that one block computes.
constexpr int kTileSide = 128;
// Rows that one block rescales.
constexpr int kRescaledRows = 8;

const gpu::Kernel& on_chip_kernel(int side, bool streamed);  // by index in kSides
const gpu::Kernel& cluster_kernel(bool streamed);            // of the last side

struct GroupedKernels {
  gpu::Kernel measure, pack, rescale, symmetric, multiply;
};
const GroupedKernels& grouped_kernels();

}  // namespace stepladder::newton_schulz
