#include "matrix_root/gpu_grams.h"

#include <cmath>

#include "common/error.h"

namespace stepladder::matrix_root {

namespace {

constexpr int64_t kMaxSide = INT32_MAX - 1024;

void check(const GramRecord& r) {
  SL_CHECK(r.m >= 0 && r.n >= 0 && r.m <= kMaxSide && r.n <= kMaxSide, "a matrix G has ", r.m, " rows and ", r.n,
           " columns, expected 0 to ", kMaxSide, " of each");
  const auto dtype = static_cast<DType>(r.dtype);
  SL_CHECK(dtype != DType::f64, "a matrix G has the dtype float64, expected float32, bfloat16 or float16");
  if (r.m == 0) return;
  check_address(r.square, sizeof(float), "L");
  if (r.n > 0) check_address(r.factor, static_cast<size_t>(item_size(dtype)), "G");
}

}  // namespace

void GpuGrams::run(const std::vector<GramRecord>& matrices, double beta, double weight, gpu::Stream stream) {
  SL_CHECK(std::isfinite(beta) && std::isfinite(weight), "beta=", beta, " and weight=", weight,
           ", expected finite numbers");
  for (const GramRecord& matrix : matrices) check(matrix);
  const gpu::Guard guard(launcher_.device());
  table_.clear();
  for (const GramRecord& matrix : matrices)
    if (matrix.m != 0) table_.add(matrix, triangle(matrix.m, kGramSide));
  if (table_.empty()) return;
  GramLaunch launch;
  table_.upload(launcher_, launch, stream);
  launch.beta = static_cast<float>(beta);
  launch.weight = static_cast<float>(weight);
  launcher_.launch(gram_kernel(), &launch, launch.work, stream);
  launcher_.end(stream);
}

}  // namespace stepladder::matrix_root
