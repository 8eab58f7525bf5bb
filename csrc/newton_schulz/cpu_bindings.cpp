#include "newton_schulz/cpu_bindings.h"

#include "multi_tensor/kernels.h"
#include "newton_schulz/cpu_iteration.h"
#include "newton_schulz/normalised.h"
#include "newton_schulz/py_matrix.h"

namespace py = pybind11;

namespace stepladder {

using namespace newton_schulz;

void bind_newton_schulz_cpu(py::module_& m) {
  py::class_<Options, std::shared_ptr<Options>>(m, "NewtonSchulzOptions", py::module_local())
      .def(py::init([](const std::vector<std::tuple<double, double, double>>& steps, double eps, double divisor,
                       bool aol, bool gram) {
             auto options = std::make_shared<Options>();
             for (const auto& [a, b, c] : steps) options->steps.push_back({a, b, c});
             options->eps = eps;
             options->divisor = divisor;
             options->aol = aol;
             options->gram = gram;
             return options;
           }),
           py::arg("steps"), py::arg("eps"), py::arg("divisor"), py::arg("aol"), py::arg("gram"));
  py::class_<CpuIteration>(m, "NewtonSchulzCpu", py::module_local())
      .def(py::init<size_t>(), py::arg("kept_bytes"))
      .def(
          "run",
          [](CpuIteration& iteration, const std::vector<PyMatrices>& matrices, const std::string& unit, int threads) {
            const Engine* found = cpu_engine(unit.c_str());
            SL_CHECK(found != nullptr, "this processor or build has no matrix unit '", unit, "'");
            const std::vector<Job> jobs = jobs_of(matrices);
            for (const Job& job : jobs)
              SL_CHECK(job.muon.rate.address == nullptr, "a learning rate on the device goes with a GPU only");
            const py::gil_scoped_release nogil;
            iteration.run(jobs, *found, threads);
          },
          py::arg("matrices"), py::arg("unit"), py::arg("threads"));
  m.def(
      "normalise",
      [](const PyTensor& from, const PyTensor& to, double eps, double divisor, int threads) {
        const auto& shape = std::get<2>(from);
        const std::vector<View> sources = views_of(from), targets = views_of(to);
        SL_CHECK(shape == std::get<2>(to), "the two tensors have different shapes");
        SL_CHECK(std::get<1>(to) != "float16", "normalised matrices are of float16, expected float32 or bfloat16");
        std::vector<Normalised> matrices;
        for (size_t k = 0; k < sources.size(); ++k)
          matrices.push_back({shape[shape.size() - 2], shape[shape.size() - 1], sources[k], targets[k]});
        const py::gil_scoped_release nogil;
        cpu_kernels(nullptr)->normalise(matrices, eps, divisor, threads);
      },
      py::arg("from"), py::arg("to"), py::arg("eps"), py::arg("divisor"), py::arg("threads"),
      "Matrices divided by their norms, from one tensor to another.");
  m.def("matrix_units", &supported_engines, "Matrix units that were compiled for and run here, fastest first.");
}

}  // namespace stepladder
