#include "matrix_product/bindings.h"

#include <pybind11/stl.h>

#include <tuple>

#include "common/error.h"
#include "matrix_product/product.h"

namespace py = pybind11;

namespace stepladder {

using namespace matrix_product;

// Address, strides of rows and columns.
using PyView = std::tuple<uintptr_t, int64_t, int64_t>;

template <typename T>
View<T> view_of(const PyView& view) {
  return {reinterpret_cast<T*>(std::get<0>(view)), std::get<1>(view), std::get<2>(view)};
}

void bind_matrix_product(py::module_& m) {
  m.def("product_units", &units, "Who can multiply matrices of fp32 here, fastest first.");
  m.def(
      "multiply_matrices",
      [](int64_t rows, int64_t columns, int64_t depth, const PyView& a, const PyView& b, const PyView& c, double alpha,
         double beta, bool symmetric, const std::string& unit, int threads) {
        SL_CHECK(rows >= 0 && columns >= 0 && depth >= 0, "a product has ", rows, "x", depth, "x", columns,
                 " elements, expected none below 0");
        SL_CHECK(!symmetric || rows == columns, "a symmetric product has ", rows, " rows and ", columns,
                 " columns, expected as many");
        SL_CHECK(std::get<1>(c) == 1 || std::get<2>(c) == 1, "neither rows nor columns of the result are contiguous");
        Product product;
        product.m = rows;
        product.n = columns;
        product.k = depth;
        product.a = view_of<const float>(a);
        product.b = view_of<const float>(b);
        product.c = view_of<float>(c);
        product.alpha = static_cast<float>(alpha);
        product.beta = static_cast<float>(beta);
        product.symmetric = symmetric;
        const py::gil_scoped_release nogil;
        multiply(product, unit, threads);
      },
      py::arg("rows"), py::arg("columns"), py::arg("depth"), py::arg("a"), py::arg("b"), py::arg("c"), py::arg("alpha"),
      py::arg("beta"), py::arg("symmetric"), py::arg("unit"), py::arg("threads"),
      "C <- alpha AB + beta C in fp32; matrices as (address, row stride, column stride).");
}

}  // namespace stepladder
