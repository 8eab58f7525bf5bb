// What host and kernels share of the orthonormal bases of many matrices on a GPU. The method is that of
// reference/orthonormalize.py, in fp64.
#pragma once

#include "common/dtype.h"
#include "common/gpu_runtime.h"

namespace stepladder::matrix_root {

// A row of the table; uploaded as words.
struct BasisRecord {
  const float* in;
  int64_t row_stride, column_stride;  // elements
  float* out;                         // contiguous
  bool* fallback;
  bool* finite;
  int64_t m, n;     // rows and columns
  int64_t buffers;  // bytes from the start of the workspace

  // Elements from row to row of X and L: whole vectors of 16 bytes, padded with zeros.
  SL_HD int64_t stride() const { return (n + 3) / 4 * 4; }
  // X, or the columns of its reflections; then the Gram matrix and its factor L, then the inverses of L's diagonal
  // blocks. All are of doubles.
  SL_HD int64_t factor() const { return m * stride(); }
  SL_HD int64_t inverses() const { return factor() + n * stride(); }
};
static_assert(sizeof(BasisRecord) % sizeof(uint64_t) == 0, "the table is made of words");

// Device memory; of a matrix between the launches.
struct BasisState {
  double largest;  // magnitude of an element
  double shift;    // added to the Gram matrix's diagonal
  int32_t finite;
  int32_t failed;  // Cholesky's method has, or was not asked for
};

// Every launch's arguments. Units of work of matrix i begin with first[i].
struct BasisLaunch {
  const BasisRecord* matrices = nullptr;
  BasisState* states = nullptr;
  const int64_t* first = nullptr;
  int64_t count = 0, work = 0;
  char* workspace = nullptr;
  double* sums = nullptr;  // one for each tile of a Gram matrix
  double shift = 0.0;      // relative to the trace, in this pass
  double limit = 0.0;      // of the basis's distance from an orthonormal one
  int32_t block = 0;       // column of blocks of L
  bool householder = false;
};

// Side of a block of L, and of a tile; elements of the inverse of a diagonal block.
constexpr int kBlockSide = 64;
constexpr int64_t kInverse = kBlockSide * kBlockSide;

struct BasisKernels {
  gpu::Kernel begin, load, gram, factor, eliminate, solve, judge, reflect, write;
};
const BasisKernels& basis_kernels();

}  // namespace stepladder::matrix_root
