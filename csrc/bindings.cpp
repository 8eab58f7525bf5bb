// The Python module stepladder._C. Knows Python, not torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <dlfcn.h>

#include <cstdlib>

#include "common/error.h"
#include "common/gpu_runtime.h"
#include "common/math.h"
#include "kept_tensor.h"
#include "matrix_product/bindings.h"
#include "multi_tensor/plan.h"
#include "multi_tensor/regions.h"
#include "newton_schulz/cpu_bindings.h"
#if defined(SL_HAS_CUDA)
#include "matrix_root/gpu_bindings.h"
#include "newton_schulz/gpu_bindings.h"
#endif
#include "step_plan.h"
#include "table_executor.h"
#if defined(SL_EMULATED)
#include "emulator/device.h"
#include "emulator/graph.h"
#endif

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
    entry["prepared"] = info.num_prepared;
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
  for (const gpu::Device& d : gpu::devices(&reason)) {
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

int64_t gpu_launches() {
#if defined(SL_HAS_CUDA)
  return gpu::launches();
#else
  return 0;
#endif
}

const char* dtype_name(DType dtype) {
  return dtype == DType::f64    ? "float64"
         : dtype == DType::f32  ? "float32"
         : dtype == DType::bf16 ? "bfloat16"
                                : "float16";
}

// (begin, end, threads) of each region, a thread being (begin, end, shares), and a share (pass, rule, dtypes of
// parameter, gradient and states, nanoseconds, elements, chunks).
py::list regions() {
  py::list all;
  for (const Region& region : take_regions()) {
    py::list threads;
    for (const RegionThread& thread : region.threads) {
      py::list shares;
      for (const Share& share : thread.shares) {
        const Kernel& k = share.kernel;
        const RuleInfo* info = k.rule == Rule::count ? nullptr : &rule_info(k.rule);
        const std::string pass = info != nullptr && info->norms && k.pass == std::string("update") ? "prepare" : k.pass;
        shares.append(py::make_tuple(pass, info == nullptr ? "" : info->name, dtype_name(k.param), dtype_name(k.grad),
                                     dtype_name(k.state), share.nanoseconds, share.elements, share.chunks));
      }
      threads.append(py::make_tuple(thread.begin, thread.end, shares));
    }
    all.append(py::make_tuple(region.begin, region.end, threads));
  }
  return all;
}

// What the kernels of Python need of a table and of the gradients' way in.
void bind_tables(py::module_& m) {
  m.attr("GROUP_WORDS") = kGroupWords;
  py::class_<PlanTable, std::shared_ptr<PlanTable>>(m, "Table", py::buffer_protocol(), py::module_local())
      .def_buffer([](PlanTable& t) {
        const std::vector<uint64_t>& words = t.table.words();
        return py::buffer_info(const_cast<uint64_t*>(words.data()), sizeof(int64_t),
                               py::format_descriptor<int64_t>::format(), 1, {words.size()}, {sizeof(int64_t)}, true);
      })
      .def_readonly("rule", &PlanTable::rule)
      .def_property_readonly("param", [](const PlanTable& t) { return dtype_name(t.param); })
      .def_property_readonly("state", [](const PlanTable& t) { return dtype_name(t.state); })
      .def_property_readonly("chunks", [](const PlanTable& t) { return t.table.chunks(); })
      .def_property_readonly("chunk_tiles", [](const PlanTable& t) { return t.table.chunk_tiles(); })
      .def_property_readonly("num_sums", [](const PlanTable& t) { return t.table.num_sums(); })
      .def_property_readonly("shape", [](const PlanTable& t) {
        const TableShape& s = t.table.shape();
        return py::dict(py::arg("tensors") = s.tensors, py::arg("grad") = s.grad, py::arg("param") = s.param,
                        py::arg("step") = s.step, py::arg("clock") = s.clock, py::arg("first") = s.first,
                        py::arg("numel") = s.numel, py::arg("meta") = s.meta, py::arg("layout") = s.layout,
                        py::arg("sums") = s.sums);
      });

  const auto address = [](auto member) {
    return [member](const GradientScale& scale) { return reinterpret_cast<uintptr_t>(scale.*member); };
  };
  py::class_<GradientScale>(m, "GradientScale", py::module_local())
      .def_readonly("unscale", &GradientScale::unscale)
      .def_readonly("clip", &GradientScale::clip)
      .def_readonly("inverse_scale", &GradientScale::inverse_scale)
      .def_readonly("clip_factor", &GradientScale::clip_factor)
      .def_property_readonly("grad_scale", address(&GradientScale::grad_scale))
      .def_property_readonly("clip_address", address(&GradientScale::clip_address))
      .def_property_readonly("found_inf", address(&GradientScale::found_inf));
}

}  // namespace

#if !defined(SL_MODULE)
#define SL_MODULE _C
#endif

PYBIND11_MODULE(SL_MODULE, m) {
  m.doc() = "Compiled kernels of stepladder.";
  py::register_local_exception<Error>(m, "Error", PyExc_RuntimeError);

  m.def("rules", &rules, "Every update rule: its hyper-parameters, states, and whether it takes norms.");
  m.def("power", [](double base, int64_t exponent) { return power(base, exponent); });
  m.def("openmp_runtime", &openmp_runtime);
  m.def("isas", &supported_isas, "Vector widths that were compiled in and run here, widest first.");
  m.def(
      "environment",
      [](const char* variable) -> py::object {
        const char* const value = getenv(variable);
        if (value == nullptr) return py::none();
        return py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(value));
      },
      "As os.environ.get, in a tenth of its time.");
  m.def("cuda", &cuda, "The CUDA devices, and the reason where there is none.");
  m.def("record_regions", &set_recording, "Whether parallel regions of the CPU's plans are recorded.");
  m.def("take_regions", &regions, "Those recorded since the last call.");
  m.attr("compiler") = SL_COMPILER;
  m.attr("cuda_version") = SL_CUDA_VERSION;

  m.def("launches", [] { return gpu_launches(); }, "How many GPU kernels this process has launched.");

#if defined(SL_EMULATED)
  m.def("begin_capture", &emulator::begin_capture);
  m.def("replay", &emulator::replay);
  m.def("set_capability", &emulator::set_capability);
#endif

  bind_tables(m);
  bind_kept_tensor(m);
  bind_newton_schulz_cpu(m);
  bind_matrix_product(m);
#if defined(SL_HAS_CUDA)
  bind_newton_schulz_gpu(m);
  bind_matrix_root_gpu(m);
#endif

  // Local: a second module, with the emulator in place of a GPU, may stand beside this one.
  py::class_<StepPlan>(m, "StepPlan", py::module_local())
      .def(py::init<py::object, py::object, py::object, py::object, py::object>(), py::arg("exchange"),
           py::arg("describe"), py::arg("shares_memory"), py::arg("stream"), py::arg("triton") = py::none())
      .def("reset", &StepPlan::reset)
      .def("refresh", &StepPlan::refresh)
      .def("bind", &StepPlan::bind, py::arg("index"), py::arg("backend"), py::arg("grad"), py::arg("state"),
           py::arg("step"), py::arg("clock"), py::arg("timed"), py::arg("fresh"), py::arg("negate"), py::arg("seed"),
           py::arg("first") = 0)
      .def("bind_gradients", &StepPlan::bind_gradients)
      .def("skip", &StepPlan::skip)
      .def("active", &StepPlan::active)
      .def("only_device", &StepPlan::only_device)
      .def("norm", &StepPlan::norm)
      .def("partials", &StepPlan::partials)
      .def("scale_gradients", &StepPlan::scale_gradients)
      .def("clip_on_device", &StepPlan::clip_on_device)
      .def("run", &StepPlan::run)
      .def("run_on_device", &StepPlan::run_on_device)
      .def("device_norm", &StepPlan::device_norm)
      .def("release", &StepPlan::release)
      .def_property("isa", &StepPlan::isa, &StepPlan::set_isa)
      .def_property_readonly("scheduled", &StepPlan::scheduled)
      .def_property_readonly("trusts_states", &StepPlan::trusts_states)
      .def_property_readonly("has_exchange", &StepPlan::has_exchange);
}
