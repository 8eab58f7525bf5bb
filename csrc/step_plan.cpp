#include "step_plan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

#include "common/error.h"
#include "table_executor.h"
#if defined(SL_HAS_CUDA)
#include "multi_tensor/gpu_executor.h"
#endif

namespace stepladder {

namespace {

PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

PyObject* grad_name() {
  static PyObject* name = interned("grad");
  return name;
}

std::vector<py::object> split_names(const char* names) {
  std::vector<py::object> result;
  std::istringstream stream(names);
  for (std::string name; stream >> name;) result.push_back(py::reinterpret_steal<py::object>(interned(name.c_str())));
  return result;
}

Rule rule_by_name(const std::string& name) {
  for (int r = 0; r < kNumRules; ++r)
    if (name == rule_info(static_cast<Rule>(r)).name) return static_cast<Rule>(r);
  SL_CHECK(name.empty(), "no rule is called '", name, "'");
  return Rule::count;
}

// A watched group value chooses the rule: floats count only as zero or not, as schedulers move them.
bool same_choice(PyObject* before, PyObject* now) {
  if (before == now) return true;
  if (before == nullptr || now == nullptr) return false;
  if (PyFloat_Check(before) && PyFloat_Check(now))
    return (PyFloat_AS_DOUBLE(before) != 0.0) == (PyFloat_AS_DOUBLE(now) != 0.0);
  const int equal = PyObject_RichCompareBool(before, now, Py_EQ);
  if (equal < 0) PyErr_Clear();
  return equal == 1;
}

// What torch's DTensor calls the memory that this rank has of it, and the way in which it lies on the ranks.
PyObject* local_name() {
  static PyObject* name = interned("_local_tensor");
  return name;
}

PyObject* spec_name() {
  static PyObject* name = interned("_spec");
  return name;
}

bool is_distributed(const py::handle& tensor) { return PyObject_HasAttr(tensor.ptr(), local_name()) == 1; }

// Compares by identity first, which is how FSDP has it.
bool lies_as(PyObject* tensor, const py::object& spec) {
  const auto now = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, spec_name()));
  const int equal = now ? PyObject_RichCompareBool(now.ptr(), spec.ptr(), Py_EQ) : -1;
  if (equal < 0) throw py::error_already_set();
  return equal == 1;
}

bool flag(PyObject* tensor, PyObject* method) {
  const auto result = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, method));
  if (!result) throw py::error_already_set();
  return result.ptr() == Py_True;
}

// Strides of a contiguous tensor: those whose gradients need no closer look.
bool is_contiguous(const TensorView& view) {
  int64_t expected = 1;
  for (int d = view.ndim - 1; d >= 0; --d) {
    if (view.sizes[d] == 0) return true;
    if (view.sizes[d] != 1) {
      if (view.strides[d] != expected) return false;
      expected *= view.sizes[d];
    }
  }
  return true;
}

int64_t count_elements(const TensorView& view) {
  int64_t n = view.complex ? 2 : 1;
  for (int d = 0; d < view.ndim; ++d) n *= view.sizes[d];
  return n;
}

// Fills the tensor's layout from the views of its columns, merging dimensions that are adjacent in all.
void set_layout(Tensor& tensor, const std::vector<TensorView>& views) {
  tensor.contiguous = std::all_of(views.begin(), views.end(), is_contiguous);
  tensor.uniform = tensor.contiguous;
  tensor.layout = Layout();
  if (tensor.contiguous) return;

  const TensorView& first = views[0];
  std::vector<int> kept;  // dimensions that matter
  for (int d = 0; d < first.ndim; ++d)
    if (first.sizes[d] != 1) kept.push_back(d);
  const auto stride = [&](size_t column, int d) { return views[column].strides[d] * (first.complex ? 2 : 1); };

  // Uniform: every column has the same strides, and they are those of a permuted contiguous tensor.
  bool uniform = true;
  for (size_t c = 1; c < views.size(); ++c)
    for (int d : kept) uniform = uniform && views[c].strides[d] == first.strides[d];
  std::vector<int> by_stride = kept;
  std::sort(by_stride.begin(), by_stride.end(), [&](int a, int b) { return first.strides[a] < first.strides[b]; });
  int64_t expected = 1;
  for (int d : by_stride) {
    uniform = uniform && first.strides[d] == expected;
    expected *= first.sizes[d];
  }
  tensor.uniform = uniform;

  Layout& layout = tensor.layout;
  for (int d : kept) {
    bool merge = !layout.sizes.empty();
    for (size_t c = 0; merge && c < views.size(); ++c)
      merge = layout.strides[c].back() == stride(c, d) * first.sizes[d];
    if (merge) {
      layout.sizes.back() *= first.sizes[d];
    } else {
      layout.sizes.push_back(first.sizes[d]);
      for (size_t c = 0; c < views.size(); ++c) layout.strides[c].push_back(0);
    }
    for (size_t c = 0; c < views.size(); ++c) layout.strides[c].back() = stride(c, d);
  }
  if (first.complex || layout.sizes.empty()) {
    layout.sizes.push_back(first.complex ? 2 : 1);
    for (size_t c = 0; c < views.size(); ++c) layout.strides[c].push_back(1);
  }
}

// Adds one to a step count; returns the new one.
int64_t count_step(void* data, bool is_double) {
  if (is_double) return static_cast<int64_t>(*static_cast<double*>(data) += 1.0);
  return static_cast<int64_t>(*static_cast<float*>(data) += 1.0f);
}

}  // namespace

bool StepPlan::Signature::matches(const TensorView& view) const {
  if (view.ndim != ndim || view.dtype != dtype || view.complex != complex) return false;
  const int64_t* expected = ndim <= kInline ? extents : more.data();
  for (int d = 0; d < ndim; ++d)
    if (view.sizes[d] != expected[d] || view.strides[d] != expected[ndim + d]) return false;
  return true;
}

void StepPlan::Signature::assign(const TensorView& view) {
  ndim = view.ndim;
  dtype = view.dtype;
  complex = view.complex;
  if (ndim > kInline) more.resize(2 * ndim);
  int64_t* kept = ndim <= kInline ? extents : more.data();
  std::copy(view.sizes, view.sizes + ndim, kept);
  std::copy(view.strides, view.strides + ndim, kept + ndim);
}

StepPlan::StepPlan(py::object exchange, py::object describe, py::object shares_memory, py::object stream,
                   py::object triton)
    : reader_(std::move(exchange), std::move(describe)),
      tensor_type_(py::module_::import("torch").attr("Tensor")),
      parameter_type_(py::module_::import("torch.nn").attr("Parameter")),
      kernels_(cpu_kernels(nullptr)),
      shares_memory_(std::move(shares_memory)),
      stream_(std::move(stream)),
      triton_(std::move(triton)) {}

void StepPlan::set_isa(const std::string& isa) {
  const CpuKernels* kernels = cpu_kernels(isa.c_str());
  SL_CHECK(kernels != nullptr, "this processor or build has no '", isa, "' kernels");
  kernels_ = kernels;
}

void StepPlan::reset(const py::list& groups) {
  bound_.clear();
  groups_.clear();
  plan_.tensors.clear();
  plan_.active.clear();
  for (const py::handle& item : groups) {
    const auto fields = item.cast<py::tuple>();
    Group group;
    group.dict = fields[0];
    group.rule = rule_by_name(fields[1].cast<std::string>());
    if (group.rule != Rule::count) {
      group.hyper_keys = split_names(rule_info(group.rule).hyper);
      group.state_keys = split_names(rule_info(group.rule).states);
    }
    for (const py::handle& key : fields[2].cast<py::tuple>()) {
      PyObject* value = PyDict_GetItem(group.dict.ptr(), key.ptr());
      group.watched.emplace_back(py::reinterpret_borrow<py::object>(key), py::reinterpret_borrow<py::object>(value));
    }
    for (const py::handle& param : group.dict["params"]) {
      Bound bound;
      bound.param = py::reinterpret_borrow<py::object>(param);
      bound.group = static_cast<int>(groups_.size());
      bound_.push_back(std::move(bound));
    }
    groups_.push_back(std::move(group));
  }
  plan_.tensors.resize(bound_.size());
  plan_.active.assign(bound_.size(), 0);
  written_ = py::object();
  stale_schedule_ = true;
}

bool StepPlan::same_structure(const py::list& param_groups) const {
  if (param_groups.size() != groups_.size()) return false;
  static PyObject* params_name = interned("params");
  size_t next = 0;
  for (size_t g = 0; g < groups_.size(); ++g) {
    const Group& group = groups_[g];
    PyObject* dict = PyList_GET_ITEM(param_groups.ptr(), g);
    if (dict != group.dict.ptr()) return false;
    for (const auto& [key, value] : group.watched)
      if (!same_choice(value.ptr(), PyDict_GetItem(dict, key.ptr()))) return false;
    PyObject* params = PyDict_GetItem(dict, params_name);
    if (params == nullptr || !(PyList_Check(params) || PyTuple_Check(params))) return false;
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(params); ++i, ++next) {
      if (next >= bound_.size() || bound_[next].group != static_cast<int>(g) ||
          bound_[next].param.ptr() != PySequence_Fast_GET_ITEM(params, i))
        return false;
    }
  }
  return next == bound_.size();
}

void StepPlan::read_hyper(Group& group) {
  int n = 0;
  const auto take = [&](PyObject* value) {
    const double number = PyFloat_AsDouble(value);
    if (number == -1.0 && PyErr_Occurred()) throw py::error_already_set();
    SL_CHECK(n < kMaxHyper, "too many hyper-parameters in a group");
    group.values.hyper[n++] = number;
  };
  group.values.lr_address = nullptr;
  for (const py::object& key : group.hyper_keys) {
    PyObject* value = PyDict_GetItem(group.dict.ptr(), key.ptr());
    if (value == nullptr) throw py::key_error(key.cast<std::string>());
    TensorView view;
    if (n == 0 && !PyFloat_Check(value) && reader_.read(value, &view) && is_at_hand(group, view)) {
      // A learning rate on a GPU is read there, without waiting for it.
      group.values.lr_address = view.data;
      group.values.lr_is_double = view.dtype == DType::f64;
      ++n;
      continue;
    }
    if (PyTuple_Check(value) || PyList_Check(value)) {
      for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(value); ++i) take(PySequence_Fast_GET_ITEM(value, i));
    } else {
      take(value);
    }
  }
  SL_CHECK(group.rule == Rule::count || n == rule_info(group.rule).num_hyper, "a group gives ", n,
           " hyper-parameters, its rule takes ", rule_info(group.rule).hyper);
}

// Whether every kernel that steps the group can read the learning rate where it is.
bool StepPlan::is_at_hand(const Group& group, const TensorView& lr) const {
  return !group.executors.empty() && (lr.dtype == DType::f32 || lr.dtype == DType::f64) &&
         std::all_of(group.executors.begin(), group.executors.end(),
                     [&](int e) { return e != kOnCpu && places_[e].device == lr.device; });
}

bool StepPlan::read(PyObject* tensor, bool distributed, TensorView* view) {
  if (!distributed) return reader_.read(tensor, view);
  const auto local = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, local_name()));
  if (!local) {
    PyErr_Clear();
    return false;
  }
  // One that a collective is still to fill has a type of its own.
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(local.ptr()));
  return (type == tensor_type_.ptr() || type == parameter_type_.ptr()) && reader_.read(local.ptr(), view);
}

bool StepPlan::still_valid(int index, PyObject* mapping) {
  Bound& bound = bound_[index];
  Tensor& tensor = plan_.tensors[index];
  if (!bound.bound) return false;

  const bool distributed = static_cast<bool>(bound.param_spec);
  TensorView view;
  if (!read(bound.param.ptr(), distributed, &view) || view.data != tensor.columns[kParam].data ||
      !bound.param_signature.matches(view))
    return false;
  if (Py_TYPE(bound.grad.ptr()) != bound.grad_type || !read(bound.grad.ptr(), distributed, &view) ||
      !(view.device == bound.device) || !bound.grad_signature.matches(view))
    return false;
  if (distributed && !(lies_as(bound.param.ptr(), bound.param_spec) && lies_as(bound.grad.ptr(), bound.grad_spec)))
    return false;
  static PyObject* is_neg = interned("is_neg");
  static PyObject* is_conj = interned("is_conj");
  if (bound.may_be_lazy && (flag(bound.grad.ptr(), is_neg) || flag(bound.grad.ptr(), is_conj))) return false;
  void* grad_data = view.data;

  // The sizes belong to the local tensor, the rest of whose record is near.
  bound.footprint.grad = reinterpret_cast<const char*>(view.sizes) - sizes_offset_;
  bound.footprint.grad_object = reinterpret_cast<const char*>(bound.grad.ptr());
  if (!states_trusted_ && !states_still_valid(bound, mapping)) return false;
  tensor.columns[kGrad].data = grad_data;
  return true;
}

bool StepPlan::states_still_valid(const Bound& bound, PyObject* mapping) {
  // Referred to by the optimizer's state and by the plan: anyone else may change it unseen.
  const auto shared = [](const py::object& object) { return Py_REFCNT(object.ptr()) > 2; };
  TensorView view;
  const auto valid = [&](const py::object& key, const py::object& value, const void* data, bool distributed) {
    states_shared_ = states_shared_ || shared(value);
    if (distributed) {
      const auto local = py::reinterpret_steal<py::object>(PyObject_GetAttr(value.ptr(), local_name()));
      if (!local) throw py::error_already_set();
      states_shared_ = states_shared_ || shared(local);
    }
    return PyDict_GetItem(bound.state.ptr(), key.ptr()) == value.ptr() && read(value.ptr(), distributed, &view) &&
           view.data == data;
  };
  const Group& group = groups_[bound.group];
  if (group.state_keys.empty() && bound.step_data == nullptr) return true;
  states_shared_ = states_shared_ || shared(bound.state);
  PyObject* entry = PyDict_GetItemWithError(mapping, bound.param.ptr());
  if (entry == nullptr && PyErr_Occurred()) throw py::error_already_set();
  if (entry != bound.state.ptr()) return false;
  for (size_t k = 0; k < group.state_keys.size(); ++k)
    if (!valid(group.state_keys[k], bound.states[k], bound.state_data[k], static_cast<bool>(bound.param_spec)))
      return false;
  static const py::object step_name = py::reinterpret_steal<py::object>(interned("step"));
  return bound.step_data == nullptr || valid(step_name, bound.step, bound.step_data, false);
}

// A step finds torch's records of its parameters evicted by the forward and backward passes. Asking for them
// some parameters ahead overlaps the misses.
void StepPlan::prefetch(size_t index) const {
  if (index >= bound_.size()) return;
  const Bound& bound = bound_[index];
  __builtin_prefetch(bound.param.ptr());
  __builtin_prefetch(bound.footprint.grad_object);
  __builtin_prefetch(bound.footprint.param_storage);
  __builtin_prefetch(bound.step_data, 1);
  for (int line = 0; line < 3; ++line) {
    __builtin_prefetch(bound.footprint.param + 64 * line);
    __builtin_prefetch(bound.footprint.grad + 64 * line);
  }
}

py::object StepPlan::refresh(const py::list& param_groups, const py::dict& attributes, bool touched) {
  if (!same_structure(param_groups)) return py::none();
  for (Group& group : groups_) read_hyper(group);
  PyObject* mapping = PyDict_GetItemString(attributes.ptr(), "state");
  SL_CHECK(mapping != nullptr && PyDict_Check(mapping), "the optimizer's state is no dict");
  if (touched) states_trusted_ = false;
#if defined(Py_GIL_DISABLED)
  states_shared_ = true;  // reference counts say nothing there
#else
  states_shared_ = Py_REFCNT(mapping) > 1;
#endif
  py::list stale;
  constexpr size_t kAhead = 6;
  for (size_t i = 0; i < bound_.size(); ++i) {
    prefetch(i + kAhead);
    Bound& bound = bound_[i];
    PyObject* grad = PyObject_GetAttr(bound.param.ptr(), grad_name());
    if (grad == nullptr) throw py::error_already_set();
    bound.grad = py::reinterpret_steal<py::object>(grad);
    bound.active = grad != Py_None;
    const char works = bound.active && !bound.skipped;
    if (works != plan_.active[i]) {
      plan_.active[i] = works;
      stale_schedule_ = true;
    }
    if (works && !still_valid(static_cast<int>(i), mapping)) stale.append(i);
    // States of a parameter that sits this step out are vouched for too.
    if (!works && bound.bound && !states_trusted_ && !states_still_valid(bound, mapping)) bound.bound = false;
  }
  if (!touched && !states_trusted_) states_trusted_ = stale.empty() && !states_shared_ && !memory_shared();
  return stale;
}

bool StepPlan::memory_shared() const {
  py::list tensors;
  for (const Bound& bound : bound_) {
    if (!bound.bound) continue;
    for (const py::object& state : bound.states)
      if (state) tensors.append(bound.param_spec ? state.attr(local_name()) : state);
    if (bound.step_data != nullptr) tensors.append(bound.step);
  }
  return shares_memory_(tensors).cast<bool>();
}

void StepPlan::bind(int index, const std::string& backend, const py::object& grad, const py::object& state,
                    const py::object& step, const py::object& clock, bool timed, bool fresh, bool negate,
                    const py::object& seed, int64_t first) {
  Bound& bound = bound_.at(index);
  const bool distributed = is_distributed(bound.param);
  SL_CHECK(distributed == is_distributed(grad), "of parameter ", index, " and its gradient one alone is distributed");
  Tensor& tensor = plan_.tensors[index];
  Group& group = groups_[bound.group];

  std::vector<TensorView> views;
  std::vector<std::vector<int64_t>> sizes_kept, strides_kept;  // a described view lives until the next
  const auto take = [&](const py::handle& object, const char* what) {
    TensorView view;
    SL_CHECK(read(object.ptr(), distributed, &view), what, " of parameter ", index,
             " is no plain tensor of a supported dtype");
    SL_CHECK(views.empty() || view.device == views[0].device, what, " of parameter ", index,
             " is on another device than the parameter");
    sizes_kept.emplace_back(view.sizes, view.sizes + view.ndim);
    strides_kept.emplace_back(view.strides, view.strides + view.ndim);
    views.push_back(view);
  };
  take(bound.param, "the value");
  const int64_t* param_sizes = views[0].sizes;
  take(grad, "the gradient");
  for (const py::object& key : group.state_keys)
    take(state[key], ("the state '" + key.cast<std::string>() + "'").c_str());
  for (size_t c = 0; c < views.size(); ++c) {
    views[c].sizes = sizes_kept[c].data();
    views[c].strides = strides_kept[c].data();
    SL_CHECK(sizes_kept[c] == sizes_kept[0] && views[c].complex == views[0].complex, "column ", c, " of parameter ",
             index, " has another shape than the parameter, or is complex where that is real");
  }

  const auto address = [](const py::object& object) {
    return reinterpret_cast<const char*>(object.attr("_cdata").cast<uintptr_t>());
  };
  const py::object param = distributed ? bound.param.attr(local_name()) : bound.param;
  bound.footprint.param = address(param);
  bound.footprint.param_storage = address(param.attr("untyped_storage")());
  sizes_offset_ = reinterpret_cast<const char*>(param_sizes) - bound.footprint.param;

  const int executor = executor_for(backend, views[0].device);
  bound.bound = true;
  bound.skipped = false;
  bound.active = true;
  bound.device = views[0].device;
  bound.grad = grad;
  bound.grad_type = Py_TYPE(grad.ptr());
  bound.param_spec = distributed ? bound.param.attr(spec_name()) : py::object();
  bound.grad_spec = distributed ? grad.attr(spec_name()) : py::object();
  bound.state = state;
  bound.param_signature.assign(views[0]);
  bound.grad_signature.assign(views[1]);
  bound.may_be_lazy = views[1].complex || count_elements(views[1]) == 1 || !is_contiguous(views[1]);
  bound.timed = timed;
  bound.fresh = fresh;
  for (py::object& kept : bound.states) kept = py::object();
  for (size_t k = 0; k < group.state_keys.size(); ++k) {
    bound.states[k] = state[group.state_keys[k]];
    bound.state_data[k] = views[kState + k].data;
  }
  bound.step = step;
  bound.step_data = nullptr;
  if (!step.is_none()) {
    TensorView view;
    const bool readable = reader_.read(step.ptr(), &view);
    const bool in_place = executor == kOnCpu ? view.device.type == kCpuDevice : view.device == bound.device;
    SL_CHECK(
        readable && in_place && count_elements(view) == 1 && (view.dtype == DType::f32 || view.dtype == DType::f64),
        "the step count of parameter ", index,
        executor == kOnCpu ? " is no CPU scalar of float32 or float64"
                           : " is no scalar of float32 or float64 on the parameter's device");
    bound.step_data = view.data;
    bound.step_is_double = view.dtype == DType::f64;
  }

  bound.clock = clock;

  tensor = Tensor();
  tensor.executor = executor;
  if (std::find(group.executors.begin(), group.executors.end(), executor) == group.executors.end())
    group.executors.push_back(executor);
  tensor.group = &group.values;
  tensor.step_data = bound.step_data;
  tensor.step_is_double = bound.step_is_double;
  tensor.clock = bound.step_data;
  if (executor != kOnCpu && !timed && !clock.is_none()) {
    TensorView view;
    SL_CHECK(reader_.read(clock.ptr(), &view) && view.device == bound.device && view.dtype == DType::f32,
             "the clock of parameter ", index, " is no float32 tensor on its device");
    tensor.clock = view.data;
  }
  tensor.numel = count_elements(views[0]);
  tensor.num_columns = static_cast<int>(views.size());
  tensor.rule = group.rule;
  tensor.arithmetic = views[0].dtype == DType::f64 ? DType::f64 : DType::f32;
  for (size_t c = 0; c < views.size(); ++c) tensor.columns[c] = {views[c].data, views[c].dtype};
  set_layout(tensor, views);
  tensor.negate = negate;
  tensor.index = static_cast<uint32_t>(index);
  tensor.stochastic = !seed.is_none();
  if (tensor.stochastic) {
    SL_CHECK(views[0].dtype == DType::bf16 && bound.step_data != nullptr,
             "stochastic rounding needs a bfloat16 parameter and a step count");
    tensor.seed = group.values.seed = seed.cast<uint64_t>();
    SL_CHECK(first == 0 || executor == kOnCpu, "stochastic rounding of shards is the CPU's alone");
    tensor.first = first;
  }
  plan_.active[index] = 1;
  stale_schedule_ = true;
}

int StepPlan::executor_for(const std::string& backend, const DeviceId& device) {
  if (backend == "cpu") {
    SL_CHECK(device.type == kCpuDevice, "the backend 'cpu' got a tensor on another device");
    return kOnCpu;
  }
  for (size_t e = 0; e < places_.size(); ++e)
    if (places_[e].backend == backend && places_[e].device == device) return static_cast<int>(e);
  std::unique_ptr<Executor> executor;
  if (backend == "triton") {
    SL_CHECK(!triton_.is_none(), "the plan was made without Triton");
    executor = std::make_unique<TableExecutor>(triton_(device.type, device.index));
  } else {
    SL_CHECK(backend == "cuda", "the plan has no backend '", backend, "'");
#if defined(SL_HAS_CUDA)
    SL_CHECK(device.type == kGpuDevice, "the backend 'cuda' got a tensor on another device");
    executor = std::make_unique<GpuExecutor>(device.index);
#else
    fail(__FILE__, __LINE__, "stepladder was built without nvcc");
#endif
  }
  places_.push_back({backend, device, std::move(executor)});
  return static_cast<int>(places_.size()) - 1;
}

std::vector<int> StepPlan::bind_gradients(const std::vector<std::string>& backends) {
  std::vector<int> others;
  for (size_t i = 0; i < bound_.size(); ++i) {
    const int index = static_cast<int>(i);
    if (backends.at(i) == "cpu" || backends[i] == "cuda" || backends[i] == "triton") {
      const py::object grad = bound_[i].param.attr("grad");
      bind(index, backends[i], grad, py::dict(), py::none(), py::none(), false, false, false, py::none(), 0);
    } else {
      skip(index);
      others.push_back(index);
    }
  }
  return others;
}

void StepPlan::skip(int index) {
  Bound& bound = bound_.at(index);
  bound.skipped = true;
  bound.bound = false;
  plan_.active[index] = 0;
  stale_schedule_ = true;
}

std::vector<int> StepPlan::active() const {
  std::vector<int> indices;
  for (size_t i = 0; i < bound_.size(); ++i)
    if (bound_[i].active) indices.push_back(static_cast<int>(i));
  return indices;
}

void StepPlan::prepare() {
  if (!stale_schedule_) return;
  plan_.schedule();
  written_ = py::object();
  const std::vector<int> wave_of = plan_.assign_waves();
  for (size_t e = 0; e < places_.size(); ++e) {
    std::vector<std::vector<int>> waves;
    for (size_t i = 0; i < plan_.tensors.size(); ++i) {
      if (!plan_.active[i] || plan_.tensors[i].executor != static_cast<int>(e)) continue;
      if (static_cast<int>(waves.size()) <= wave_of[i]) waves.resize(wave_of[i] + 1);
      waves[wave_of[i]].push_back(static_cast<int>(i));
    }
    places_[e].executor->schedule(plan_.tensors, waves);
  }
  stale_schedule_ = false;
}

namespace {

Norm norm_kind(double kind) {
  SL_CHECK(kind == 2.0 || kind == 1.0 || kind == std::numeric_limits<double>::infinity(), "norm kind ", kind,
           " is none of 1, 2 and inf");
  return kind == 2.0 ? Norm::l2 : kind == 1.0 ? Norm::l1 : Norm::inf;
}

}  // namespace

std::pair<double, bool> StepPlan::norm(double kind, double inverse_scale, int threads) {
  prepare();
  const Norm norm = norm_kind(kind);
  bool finite = true;
  GradientScale scale;
  scale.inverse_scale = inverse_scale;
  for (const Place& place : places_) {
    Executor& executor = *place.executor;
    if (executor.scheduled().empty()) continue;
    const gpu::Stream stream = stream_of(place);
    const py::gil_scoped_release nogil;
    bool here;
    executor.measure(plan_.tensors, norm, scale, 0.0, nullptr, nullptr, stream);
    const std::vector<double> partials = executor.partials(stream, &here);
    for (size_t k = 0; k < partials.size(); ++k) plan_.set_partial(executor.scheduled()[k], partials[k]);
    finite = finite && here;
  }
  const py::gil_scoped_release nogil;
  bool here;
  plan_.measure(norm, inverse_scale, *kernels_, threads, &here);
  return {plan_.total_norm(norm), finite && here};
}

std::vector<double> StepPlan::partials() const {
  std::vector<double> result(bound_.size(), 0.0);
  for (size_t i = 0; i < bound_.size(); ++i)
    if (plan_.active[i]) result[i] = plan_.partial(static_cast<int>(i));
  return result;
}

void StepPlan::scale_gradients(double factor, int threads) {
  prepare();
  for (const Place& place : places_)
    if (!place.executor->scheduled().empty())
      place.executor->scale_gradients(plan_.tensors, nullptr, factor, stream_of(place));
  const py::gil_scoped_release nogil;
  plan_.scale(factor, *kernels_, threads);
}

// On the CPU, one after another: a parameter that is listed twice steps twice.
void StepPlan::count_steps() {
  // Neighbours of one group mostly share their step count and so their scalars.
  int previous = -1;
  int64_t previous_time = 0;
  for (size_t i = 0; i < bound_.size(); ++i) {
    if (!plan_.active[i] || plan_.tensors[i].executor != kOnCpu) continue;
    Bound& bound = bound_[i];
    const int64_t count = bound.step_data == nullptr ? 0 : count_step(bound.step_data, bound.step_is_double);
    const int64_t time = bound.timed ? count : bound.fresh ? 1 : 2;
    const bool same = previous >= 0 && bound_[previous].group == bound.group && previous_time == time &&
                      plan_.tensors[previous].arithmetic == plan_.tensors[i].arithmetic;
    plan_.set_scalars(static_cast<int>(i), groups_[bound.group].values.hyper, time, same ? previous : -1);
    plan_.tensors[i].step = static_cast<uint32_t>(count);
    bound.fresh = false;
    previous = static_cast<int>(i);
    previous_time = time;
  }
}

void StepPlan::run(const py::object& inverse_scale, double clip_factor, int threads, const py::object& announce) {
  prepare();
  GradientScale scale;
  scale.unscale = !inverse_scale.is_none();
  if (scale.unscale) scale.inverse_scale = inverse_scale.cast<double>();
  scale.clip = clip_factor != 1.0;
  scale.clip_factor = clip_factor;
  for (const Place& place : places_)
    if (!place.executor->scheduled().empty()) place.executor->run(plan_.tensors, scale, stream_of(place));
  count_steps();
  const py::list params = written();
  PyThreadState* thread = nullptr;
  plan_.run(scale, *kernels_, threads, [&] {
    PyObject_CallOneArg(announce.ptr(), params.ptr());
    thread = PyEval_SaveThread();
  });
  PyEval_RestoreThread(thread);
  if (PyErr_Occurred()) throw py::error_already_set();
}

gpu::Stream StepPlan::stream_of(const Place& place) const {
  if (place.backend != "cuda") return nullptr;  // Triton asks for it itself
  return reinterpret_cast<gpu::Stream>(stream_(place.device.index).cast<uintptr_t>());
}

StepPlan::Place& StepPlan::only_place() {
  Place* found = nullptr;
  for (Place& place : places_)
    if (!place.executor->scheduled().empty()) found = &place;
  SL_CHECK(found != nullptr, "nothing is bound to a GPU");
  return *found;
}

py::object StepPlan::only_device() {
  if (places_.empty()) return py::none();
  prepare();
  const Place* found = nullptr;
  int places = 0;
  for (const Place& place : places_) {
    if (place.executor->scheduled().empty()) continue;
    found = &place;
    ++places;
  }
  if (places != 1) return py::none();
  for (size_t i = 0; i < bound_.size(); ++i)
    if (bound_[i].active && (bound_[i].skipped || plan_.tensors[i].executor == kOnCpu)) return py::none();
  return py::make_tuple(found->backend, found->device.index);
}

void StepPlan::run_on_device(uintptr_t grad_scale, uintptr_t found_inf, double max_norm, const py::object& announce) {
  prepare();
  const Place& place = only_place();
  Executor& executor = *place.executor;
  const gpu::Stream stream = stream_of(place);
  GradientScale scale;
  scale.unscale = grad_scale != 0;
  scale.grad_scale = reinterpret_cast<const float*>(grad_scale);
  scale.found_inf = reinterpret_cast<const float*>(found_inf);
  if (max_norm > 0.0) {
    executor.measure(plan_.tensors, Norm::l2, scale, max_norm, nullptr, nullptr, stream);
    scale.clip = true;
    scale.clip_address = executor.clip_factor();
  }
  executor.run(plan_.tensors, scale, stream);
  announce(written());
}

double StepPlan::device_norm() {
  Place& place = only_place();
  return place.executor->norm(stream_of(place));
}

void StepPlan::clip_on_device(double kind, double max_norm, uintptr_t result, uintptr_t found_inf) {
  prepare();
  const Place& place = only_place();
  Executor& executor = *place.executor;
  const gpu::Stream stream = stream_of(place);
  auto* const norm = reinterpret_cast<double*>(result);
  executor.measure(plan_.tensors, norm_kind(kind), GradientScale(), max_norm, norm, reinterpret_cast<float*>(found_inf),
                   stream);
  executor.scale_gradients(plan_.tensors, norm + 1, 1.0, stream);
}

py::list StepPlan::written() {
  if (!written_) {
    py::list list;
    for (size_t i = 0; i < bound_.size(); ++i)
      if (plan_.active[i]) list.append(bound_[i].param);
    written_ = list;
  }
  return written_.cast<py::list>();
}

void StepPlan::release() {
  for (Bound& bound : bound_) bound.grad = py::object();
}

}  // namespace stepladder
