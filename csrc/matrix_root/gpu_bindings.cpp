#include "matrix_root/gpu_bindings.h"

#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <tuple>

#include "common/error.h"
#include "matrix_root/gpu_basis_passes.h"
#include "matrix_root/gpu_grams.h"
#include "matrix_root/gpu_iteration.h"
#include "matrix_root/gpu_multiply.h"
#include "newton_schulz/py_matrix.h"

namespace py = pybind11;

namespace stepladder {

using namespace matrix_root;

namespace {

// Address, matrices, side, strides from matrix to matrix, row to row, column to column; addresses of the results, the
// iterations and the statuses.
using PyStack = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t>;
// Conditions and coefficients of the polynomials, and Newton's steps.
using PyAttempt = std::tuple<std::vector<std::tuple<double, double, double, double>>, int>;

Attempt attempt_of(const PyAttempt& given) {
  const auto& [starts, newton_steps] = given;
  SL_CHECK(starts.size() <= kMaxStarts, "there are ", starts.size(), " polynomials to begin with, expected 1 to ",
           kMaxStarts);
  Attempt attempt = {};
  for (const auto& [condition, a, b, c] : starts) attempt.starts[attempt.num_starts++] = {condition, a, b, c};
  attempt.newton_steps = newton_steps;
  return attempt;
}

std::vector<Stack> stacks_of(const std::vector<PyStack>& given) {
  std::vector<Stack> stacks;
  for (const auto& [in, count, n, stride, row_stride, column_stride, out, iterations, status] : given)
    stacks.push_back({reinterpret_cast<const float*>(in), count, n, stride, row_stride, column_stride,
                      reinterpret_cast<float*>(out), reinterpret_cast<int32_t*>(iterations),
                      reinterpret_cast<int8_t*>(status)});
  return stacks;
}

// Address, matrices, rows, columns, strides from matrix to matrix, row to row, column to column; addresses of the
// bases, of whether they fell back, and of whether they are finite.
using PyBasisStack =
    std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t>;

std::vector<BasisStack> basis_stacks_of(const std::vector<PyBasisStack>& given) {
  std::vector<BasisStack> stacks;
  for (const auto& [in, count, m, n, stride, row_stride, column_stride, out, fallback, finite] : given)
    stacks.push_back({reinterpret_cast<const float*>(in), count, m, n, stride, row_stride, column_stride,
                      reinterpret_cast<float*>(out), reinterpret_cast<bool*>(fallback),
                      reinterpret_cast<bool*>(finite)});
  return stacks;
}

// L and G.
using PyGrams = std::tuple<newton_schulz::PyTensor, newton_schulz::PyTensor>;

std::vector<GramRecord> grams_of(const std::vector<PyGrams>& given) {
  std::vector<GramRecord> grams;
  for (const auto& [squares, factors] : given) {
    const auto& name = std::get<1>(squares);
    const auto& shape = std::get<2>(factors);
    SL_CHECK(name == "float32", "a matrix L has the dtype '", name, "', expected float32");
    const std::vector<newton_schulz::View> left = newton_schulz::views_of(squares),
                                           right = newton_schulz::views_of(factors);
    const auto& square = std::get<2>(squares);
    const int64_t rows = shape[shape.size() - 2];
    SL_CHECK(left.size() == right.size(), "there are ", left.size(), " matrices L and ", right.size(), " matrices G");
    SL_CHECK(square.end()[-1] == rows && square.end()[-2] == rows, "a matrix L is of ", square.end()[-2], "x",
             square.end()[-1], " for a matrix G of ", rows, " rows");
    for (size_t k = 0; k < left.size(); ++k) {
      const newton_schulz::View &l = left[k], &g = right[k];
      grams.push_back({static_cast<float*>(l.data), l.row_stride, l.col_stride, g.data, g.row_stride, g.col_stride,
                       static_cast<int64_t>(g.dtype), rows, shape[shape.size() - 1]});
    }
  }
  return grams;
}

// Address, strides from matrix to matrix, row to row, column to column.
using PyPlace = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;
// Left, right, out; matrices, rows of the left, columns of the right, what is summed over.
using PyProduct = std::tuple<PyPlace, PyPlace, PyPlace, int64_t, int64_t, int64_t, int64_t>;

Place place_of(const PyPlace& given) {
  const auto& [address, batch_stride, row_stride, column_stride] = given;
  return {reinterpret_cast<char*>(address), batch_stride, row_stride, column_stride};
}

std::vector<ProductRecord> products_of(const std::vector<PyProduct>& given) {
  std::vector<ProductRecord> products;
  for (const auto& [left, right, out, batch, m, n, k] : given)
    products.push_back({place_of(left), place_of(right), place_of(out), batch, m, n, k});
  return products;
}

// Dynamic shared memory of a block, by the kernel's name.
py::dict root_kernels() {
  py::dict all;
  const BasisKernels& b = basis_kernels();
  for (const gpu::Kernel* kernel :
       {&b.begin, &b.load, &b.gram, &b.factor, &b.eliminate, &b.solve, &b.judge, &b.reflect, &b.write})
    all[kernel->name] = kernel->shared_bytes;
  for (const gpu::Kernel& kernel : {gram_kernel(), product_kernels().fast, product_kernels().wide})
    all[kernel.name] = kernel.shared_bytes;
  const GroupedKernels& k = grouped_kernels();
  for (const gpu::Kernel* kernel :
       {&k.begin, &k.find_top, &k.load_fast, &k.load_wide, &k.fast, &k.wide, &k.write_fast, &k.write_wide})
    all[kernel->name] = kernel->shared_bytes;
  for (const bool wide : {false, true}) {
    for (int side = 0; side < (wide ? kNumWideSides : kNumSides); ++side) {
      const gpu::Kernel& kernel = on_chip_kernel(side, wide);
      all[kernel.name] = kernel.shared_bytes;
    }
  }
  return all;
}

}  // namespace

void bind_matrix_root_gpu(py::module_& m) {
  py::class_<Options>(m, "RootOptions", py::module_local())
      .def(py::init([](int p, double eps, double relative_eps, double near, double growth, double fast_size,
                       int squarings, int multiplications, const PyAttempt& fast, const PyAttempt& wide) {
             return Options{p,
                            eps,
                            relative_eps,
                            near,
                            growth,
                            fast_size,
                            squarings,
                            multiplications,
                            attempt_of(fast),
                            attempt_of(wide)};
           }),
           py::kw_only(), py::arg("p"), py::arg("eps"), py::arg("relative_eps"), py::arg("near"), py::arg("growth"),
           py::arg("fast_size"), py::arg("squarings"), py::arg("multiplications"), py::arg("fast"), py::arg("wide"));
  py::class_<GpuRoots>(m, "GpuRoots", py::module_local())
      .def(py::init<int, int64_t, int64_t>(), py::arg("device"), py::arg("shared_limit") = INT64_MAX,
           py::arg("buffer_limit") = int64_t{4} << 30)
      .def(
          "run",
          [](GpuRoots& roots, const std::vector<PyStack>& stacks, const Options& options,
             const std::function<uintptr_t(int64_t)>& allocate, uintptr_t stream) {
            roots.run(
                stacks_of(stacks), options, [&](int64_t bytes) { return reinterpret_cast<char*>(allocate(bytes)); },
                reinterpret_cast<gpu::Stream>(stream));
          },
          py::arg("stacks"), py::arg("options"), py::arg("allocate"), py::arg("stream"));
  py::class_<GpuBases>(m, "GpuBases", py::module_local())
      .def(py::init<int, int64_t>(), py::arg("device"), py::arg("buffer_limit") = int64_t{4} << 30)
      .def(
          "run",
          [](GpuBases& bases, const std::vector<PyBasisStack>& stacks, bool householder, double shift, double limit,
             const std::function<uintptr_t(int64_t)>& allocate, uintptr_t stream) {
            bases.run(
                basis_stacks_of(stacks), householder, shift, limit,
                [&](int64_t bytes) { return reinterpret_cast<char*>(allocate(bytes)); },
                reinterpret_cast<gpu::Stream>(stream));
          },
          py::arg("stacks"), py::arg("householder"), py::arg("shift"), py::arg("limit"), py::arg("allocate"),
          py::arg("stream"));
  py::class_<GpuGrams>(m, "GpuGrams", py::module_local())
      .def(py::init<int>(), py::arg("device"))
      .def(
          "run",
          [](GpuGrams& grams, const std::vector<PyGrams>& matrices, double beta, double weight, uintptr_t stream) {
            grams.run(grams_of(matrices), beta, weight, reinterpret_cast<gpu::Stream>(stream));
          },
          py::arg("matrices"), py::arg("beta"), py::arg("weight"), py::arg("stream"));
  py::class_<GpuProducts>(m, "GpuProducts", py::module_local())
      .def(py::init<int>(), py::arg("device"))
      .def(
          "run",
          [](GpuProducts& products, const std::vector<PyProduct>& given, bool wide, uintptr_t stream) {
            products.run(products_of(given), wide, reinterpret_cast<gpu::Stream>(stream));
          },
          py::arg("products"), py::arg("wide"), py::arg("stream"));
  m.def("root_kernels", &root_kernels,
        "Dynamic shared memory of the blocks of inverse roots, bases, Gram matrices and products, by kernel.");
}

}  // namespace stepladder
