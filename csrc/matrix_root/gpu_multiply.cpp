#include "matrix_root/gpu_multiply.h"

#include <algorithm>
#include <cstring>

#include "common/error.h"
#include "matrix_root/gpu_roots.h"

namespace stepladder::matrix_root {

namespace {

constexpr int64_t kMaxSide = INT32_MAX - 1024;

void check(const ProductRecord& r, size_t item) {
  SL_CHECK(r.m >= 0 && r.n >= 0 && r.k >= 0 && r.batch >= 0 && std::max({r.m, r.n, r.k, r.batch}) <= kMaxSide,
           "a product is of ", r.batch, " times ", r.m, " x ", r.k, " and ", r.k, " x ", r.n,
           ", expected sizes from 0 to ", kMaxSide);
  if (r.m == 0 || r.n == 0 || r.batch == 0) return;
  check_address(r.out.data, item, "out");
  if (r.k == 0) return;
  check_address(r.left.data, item, "left");
  check_address(r.right.data, item, "right");
}

}  // namespace

void GpuProducts::run(std::vector<ProductRecord> products, bool wide, gpu::Stream stream) {
  for (const ProductRecord& product : products) check(product, wide ? sizeof(double) : sizeof(float));
  // The longest sums begin, so that short ones fill up the end.
  std::stable_sort(products.begin(), products.end(),
                   [](const ProductRecord& a, const ProductRecord& b) { return a.k > b.k; });
  const gpu::Guard guard(launcher_.device());
  const int64_t side = wide ? kWideSide : kFastSide;
  constexpr size_t kWords = sizeof(ProductRecord) / sizeof(uint64_t);
  ProductLaunch launch;
  words_.clear();
  std::vector<uint64_t> first;
  for (const ProductRecord& product : products) {
    if (product.m == 0 || product.n == 0 || product.batch == 0) continue;
    words_.resize(words_.size() + kWords);
    memcpy(words_.data() + words_.size() - kWords, &product, sizeof(ProductRecord));
    first.push_back(static_cast<uint64_t>(launch.work));
    launch.work += product.batch * parts(product.m, side) * parts(product.n, side);
    ++launch.count;
  }
  if (launch.count == 0) return;
  const size_t records = words_.size();
  words_.insert(words_.end(), first.begin(), first.end());
  const uint64_t* const words = launcher_.upload(words_, stream);
  launch.matrices = reinterpret_cast<const ProductRecord*>(words);
  launch.first = reinterpret_cast<const int64_t*>(words + records);
  launcher_.launch(wide ? product_kernels().wide : product_kernels().fast, &launch, launch.work, stream);
  launcher_.end(stream);
}

}  // namespace stepladder::matrix_root
