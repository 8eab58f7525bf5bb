// The Python module stepladder._C. Knows Python, not torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <dlfcn.h>

#include "common/cuda_devices.h"
#include "common/error.h"
#include "common/math.h"
#include "multi_tensor/plan.h"
#include "step_plan.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace py = pybind11;
using namespace stepladder;

namespace {

py::dict rules() {
  py::dict all;
  for (int r = 0; r < kNumRules; ++r) {
    const RuleInfo& info = rule_info(static_cast<Rule>(r));
    py::dict entry;
    entry["hyper"] = py::str(info.hyper).attr("split")();
    entry["states"] = py::str(info.states).attr("split")();
    entry["norms"] = info.norms;
    all[info.name] = entry;
  }
  return all;
}

// File of the OpenMP runtime that the kernels run on, or None where they were built without OpenMP.
py::object openmp_runtime() {
#if defined(_OPENMP)
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&omp_get_max_threads), &info) != 0 && info.dli_fname != nullptr)
    return py::str(info.dli_fname);
#endif
  return py::none();
}

// (devices, reason why there is none) as the CUDA runtime that was compiled in sees them.
py::tuple cuda() {
  py::list devices;
  std::string reason;
#if defined(SL_HAS_CUDA)
  for (const CudaDevice& d : cuda_devices(&reason)) {
    py::dict entry;
    entry["name"] = d.name;
    entry["capability"] = py::make_tuple(d.major, d.minor);
    entry["multiprocessors"] = d.multiprocessors;
    entry["memory"] = d.memory;
    devices.append(entry);
  }
#else
  reason = "built without nvcc";
#endif
  return py::make_tuple(devices, reason);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of stepladder.";
  py::register_exception<Error>(m, "Error", PyExc_RuntimeError);

  m.def("rules", &rules, "Every update rule: its hyper-parameters, states, and whether it takes norms.");
  m.def("power", [](double base, int64_t exponent) { return power(base, exponent); });
  m.def("openmp_runtime", &openmp_runtime);
  m.def("isas", &supported_isas, "Vector widths that were compiled in and run here, widest first.");
  m.def("cuda", &cuda, "The CUDA devices, and the reason where there is none.");
  m.attr("compiler") = SL_COMPILER;
  m.attr("cuda_version") = SL_CUDA_VERSION;

  py::class_<StepPlan>(m, "StepPlan")
      .def(py::init<py::object, py::object, py::object>(), py::arg("exchange"), py::arg("describe"),
           py::arg("shares_memory"))
      .def("reset", &StepPlan::reset)
      .def("refresh", &StepPlan::refresh)
      .def("bind", &StepPlan::bind, py::arg("index"), py::arg("grad"), py::arg("state"), py::arg("step"),
           py::arg("timed"), py::arg("fresh"), py::arg("negate"), py::arg("seed"))
      .def("bind_gradients", &StepPlan::bind_gradients)
      .def("skip", &StepPlan::skip)
      .def("active", &StepPlan::active)
      .def("norm", &StepPlan::norm)
      .def("partials", &StepPlan::partials)
      .def("scale_gradients", &StepPlan::scale_gradients)
      .def("run", &StepPlan::run)
      .def("release", &StepPlan::release)
      .def_property("isa", &StepPlan::isa, &StepPlan::set_isa)
      .def_property_readonly("trusts_states", &StepPlan::trusts_states)
      .def_property_readonly("has_exchange", &StepPlan::has_exchange);
}
