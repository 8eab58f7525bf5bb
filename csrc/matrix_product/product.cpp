// Chooses among the units that were compiled in, and does what they have in common.
#include "matrix_product/product.h"

#include <algorithm>
#include <utility>

#include "common/amx.h"
#include "common/error.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace stepladder::matrix_product {

namespace {

constexpr int64_t kMirror = 32;

#if defined(SL_MATRIX_PRODUCT)
bool has_avx512() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
#endif

// Above the diagonal what is below it, for rows [begin, end) of the upper triangle.
void mirror(const Product& p, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < p.n; j += kMirror)
    for (int64_t i = begin; i < end; ++i)
      for (int64_t k = std::max(j, i + 1); k < std::min(p.n, j + kMirror); ++k)
        p.c.data[i * p.c.row_stride + k] = p.c.data[k * p.c.row_stride + i];
}

}  // namespace

std::vector<std::string> units() {
  std::vector<std::string> names;
#if defined(SL_MATRIX_PRODUCT)
  if (!has_avx512()) return names;
#if defined(SL_MATRIX_UNITS)
  if (has_amx()) names.emplace_back("amx");
#endif
  names.emplace_back("avx512");
#endif
  return names;
}

int this_thread() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

void multiply(const Product& product, const std::string& unit, int threads) {
  static const std::vector<std::string> names = units();
  SL_CHECK(std::find(names.begin(), names.end(), unit) != names.end(), "products of matrices by '", unit,
           "' cannot run here");
  Product p = product;
  if (p.m == 0 || p.n == 0) return;
  static const float zero = 0.0f;
  if (p.k == 0) {  // the same as a depth of 1 of zeros
    p.k = 1;
    p.a = p.b = {&zero, 0, 0};
  }
  if (p.c.col_stride != 1) {  // its transpose has contiguous rows
    std::swap(p.m, p.n);
    std::swap(p.a, p.b);
    std::swap(p.a.row_stride, p.a.col_stride);
    std::swap(p.b.row_stride, p.b.col_stride);
    std::swap(p.c.row_stride, p.c.col_stride);
  }
#if defined(SL_MATRIX_PRODUCT)
#if defined(SL_MATRIX_UNITS)
  if (unit == "amx") amx::multiply(p, threads);
#endif
  if (unit == "avx512") avx512::multiply(p, threads);
#endif
  if (!p.symmetric) return;
  const int64_t strips = (p.n + kMirror - 1) / kMirror;
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (threads > 1 && strips > 4)
  for (int64_t t = 0; t < strips; ++t) mirror(p, t * kMirror, std::min(p.n, (t + 1) * kMirror));
}

}  // namespace stepladder::matrix_product
