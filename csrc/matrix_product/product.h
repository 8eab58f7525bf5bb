// Products of fp32 matrices on a CPU.
#pragma once

#include <cstdint>

namespace stepladder::matrix_product {

// A matrix by the address of its first element and the strides of its rows and columns, in elements.
template <typename T>
struct View {
  T* data = nullptr;
  int64_t row_stride = 0, col_stride = 0;
};

// C <- alpha AB + beta C, where A is m x k and B k x n. With beta = 0 what C held is not looked at.
struct Product {
  int64_t m = 0, n = 0, k = 0;
  View<const float> a, b;
  View<float> c;
  float alpha = 1.0f, beta = 0.0f;
  // AB and C are symmetric: what is on and below the diagonal is computed, and copied to what is above it.
  bool symmetric = false;
};

// Whether this processor and build can.
bool available();

// The result does not depend on the number of threads.
void multiply(const Product& product, int threads);

}  // namespace stepladder::matrix_product
