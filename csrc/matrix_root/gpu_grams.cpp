#include "matrix_root/gpu_grams.h"

#include <cmath>
#include <cstring>

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
  words_.clear();
  GramLaunch launch;
  std::vector<uint64_t> first;
  for (const GramRecord& matrix : matrices) {
    if (matrix.m == 0) continue;
    words_.resize(words_.size() + sizeof(GramRecord) / sizeof(uint64_t));
    memcpy(words_.data() + words_.size() - sizeof(GramRecord) / sizeof(uint64_t), &matrix, sizeof(GramRecord));
    first.push_back(static_cast<uint64_t>(launch.work));
    launch.work += triangle(matrix.m, kGramSide);
    ++launch.count;
  }
  if (launch.count == 0) return;
  const size_t records = words_.size();
  words_.insert(words_.end(), first.begin(), first.end());
  const uint64_t* const words = launcher_.upload(words_, stream);
  launch.matrices = reinterpret_cast<const GramRecord*>(words);
  launch.first = reinterpret_cast<const int64_t*>(words + records);
  launch.beta = static_cast<float>(beta);
  launch.weight = static_cast<float>(weight);
  launcher_.launch(gram_kernel(), &launch, launch.work, stream);
  launcher_.end(stream);
}

}  // namespace stepladder::matrix_root
