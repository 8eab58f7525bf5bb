// Products on a GPU: out = left right, of many matrices of any shapes at a time, all fp32 or all fp64.
#pragma once

#include <vector>

#include "common/gpu_runtime.h"
#include "matrix_root/gpu_launcher.h"

namespace stepladder::matrix_root {

// Where the elements of a batch of matrices are. Strides in elements.
struct Place {
  char* data;
  int64_t batch_stride, row_stride, column_stride;
};

// A row of the table; uploaded as words. A batch of products of [m, k] and [k, n].
struct ProductRecord {
  Place left, right, out;
  int64_t batch, m, n, k;
};

// Units of work of record i, tiles of its products, begin with first[i].
struct ProductLaunch {
  const ProductRecord* matrices = nullptr;
  const int64_t* first = nullptr;
  int64_t count = 0, work = 0;
};

struct ProductKernels {
  gpu::Kernel fast, wide;  // fp32, fp64
};
const ProductKernels& product_kernels();

class GpuProducts {
 public:
  explicit GpuProducts(int device) : launcher_(device) {}

  // In one launch; waits for nothing. No `out` may overlap an operand or another `out`. A capture keeps the addresses
  // that it was given.
  void run(std::vector<ProductRecord> products, bool wide, gpu::Stream stream);

 private:
  Launcher launcher_;
  WorkTable<ProductRecord> table_;
};

}  // namespace stepladder::matrix_root
