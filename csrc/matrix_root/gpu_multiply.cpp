#include "matrix_root/gpu_multiply.h"

#include <algorithm>

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
  table_.clear();
  for (const ProductRecord& product : products) {
    if (product.m == 0 || product.n == 0 || product.batch == 0) continue;
    table_.add(product, product.batch * parts(product.m, side) * parts(product.n, side));
  }
  if (table_.empty()) return;
  ProductLaunch launch;
  table_.upload(launcher_, launch, stream);
  launcher_.launch(wide ? product_kernels().wide : product_kernels().fast, &launch, launch.work, stream);
  launcher_.end(stream);
}

}  // namespace stepladder::matrix_root
