#include "newton_schulz/gpu_bindings.h"

#include <pybind11/functional.h>

#include "newton_schulz/gpu_iteration.h"
#include "newton_schulz/py_matrix.h"

namespace py = pybind11;

namespace stepladder {

using namespace newton_schulz;

namespace {

// Dynamic shared memory of a block, by the kernel's name; on chip with the fewest panels.
py::dict matrix_kernels() {
  py::dict all;
  const GroupedKernels& k = grouped_kernels();
  for (const gpu::Kernel* kernel : {&k.measure, &k.pack, &k.rescale, &k.symmetric, &k.multiply})
    all[kernel->name] = kernel->shared_bytes;
  for (int side = 0; side < kNumSides; ++side)
    for (const bool streamed : {false, true})
      all[on_chip_kernel(side, streamed).name] = on_chip_bytes(kSides[side], streamed, 1);
  return all;
}

}  // namespace

void bind_newton_schulz_gpu(py::module_& m) {
  py::class_<GpuIteration>(m, "NewtonSchulzGpu", py::module_local())
      .def(py::init<int, int64_t, bool>(), py::arg("device"), py::arg("shared_limit") = INT64_MAX,
           py::arg("clusters") = false)
      .def(
          "run",
          [](GpuIteration& iteration, const std::vector<PyMatrices>& matrices,
             const std::function<uintptr_t(int64_t)>& allocate, uintptr_t stream) {
            iteration.run(
                jobs_of(matrices), [&](int64_t bytes) { return reinterpret_cast<char*>(allocate(bytes)); },
                reinterpret_cast<gpu::Stream>(stream));
          },
          py::arg("matrices"), py::arg("allocate"), py::arg("stream"));
  m.def("matrix_kernels", &matrix_kernels, "Dynamic shared memory of the Newton-Schulz kernels' blocks, by name.");
}

}  // namespace stepladder
