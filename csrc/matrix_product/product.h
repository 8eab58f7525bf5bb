// Products of fp32 matrices on a CPU.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

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

// Who can multiply here, fastest first: "amx", "avx512".
std::vector<std::string> units();

// By the unit of that name. The result does not depend on the number of threads.
void multiply(const Product& product, const std::string& unit, int threads);

// Which of the threads of a parallel region asks.
int this_thread();

// Products of at least one element and one multiplication, where rows of C are contiguous; of symmetric ones what is on
// and below the diagonal, and whatever they like of what is above it.
namespace amx {
void multiply(const Product& product, int threads);
}
namespace avx512 {
void multiply(const Product& product, int threads);
}

}  // namespace stepladder::matrix_product
