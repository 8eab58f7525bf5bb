// A plan bound to Python's objects: parameters, their gradients and states are read by pointer and
// revalidated at every step. No torch header: tensors are read through torch's DLPack exchange table.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "multi_tensor/executor.h"
#include "multi_tensor/plan.h"

namespace stepladder {

namespace py = pybind11;

// DLPack's numbers for devices.
struct DeviceId {
  int type = 1, index = 0;
  bool operator==(const DeviceId& other) const { return type == other.type && index == other.index; }
};
constexpr int kCpuDevice = 1;
#if defined(SL_EMULATED)
constexpr int kGpuDevice = kCpuDevice;  // the emulator's memory is the host's
#else
constexpr int kGpuDevice = 2;
#endif

// The memory that a tensor views.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::f32;
  bool complex = false;
  DeviceId device;
  int ndim = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;  // elements
};

// Reads tensors: through the exchange table where this torch has one, else by calling `describe`.
class TensorReader {
 public:
  // exchange: torch.Tensor.__dlpack_c_exchange_api__ or None.
  // describe: tensor -> (pointer, sizes, strides, dtype name, device type, device index), the device in
  // DLPack's numbers; used where exchange is None.
  TensorReader(py::object exchange, py::object describe);

  // False, with no Python error set, where the tensor has no plain memory of a supported dtype.
  bool read(PyObject* tensor, TensorView* view);
  bool has_exchange() const { return from_py_object_ != nullptr; }

 private:
  bool read_described(PyObject* tensor, TensorView* view);

  int (*from_py_object_)(void*, void*) = nullptr;
  py::object capsule_, describe_;
  std::vector<int64_t> sizes_, strides_;  // of the tensor last described
};

class StepPlan {
 public:
  // shares_memory: list of tensors -> whether anything else holds on to the memory of one of them.
  // stream: GPU index -> handle of the stream that is current there.
  // triton: device type in DLPack's number, index -> what TableExecutor takes; None where there is no Triton.
  StepPlan(py::object exchange, py::object describe, py::object shares_memory, py::object stream, py::object triton);

  // Forgets everything, then takes over the groups: a list of (param_group, rule name, watched keys).
  void reset(const py::list& groups);

  // Compares every parameter, gradient and state with what is bound. None: groups or parameters are not
  // those of reset(). Else the indices that bind() must be called for, counting through all groups.
  //
  // Reading the states costs more than all the rest, so they are trusted while nobody can have changed them:
  // `touched` says whether anyone has asked the optimizer for its state since the last refresh(). Once nobody
  // has, and nobody outside holds a reference to a state or to its memory, none is looked at again until
  // somebody asks. `attributes` is the optimizer's __dict__.
  py::object refresh(const py::list& param_groups, const py::dict& attributes, bool touched);

  // Binds parameter `index` to a backend, "cpu", "cuda" or "triton". `state` is its state dict, `step` its step tensor
  // or None; `timed`: the rule counts time by it. `fresh`: the states were just created. `clock`: on a GPU, for a rule
  // that is not timed, a float32 tensor on the device that counts in place of `fresh`. `seed`: for stochastic rounding,
  // or None; `first`: the parameter's first element is this one of a whole, of which it is a shard.
  //
  // A distributed tensor (torch's DTensor) stands for the memory that this rank has of it.
  void bind(int index, const std::string& backend, const py::object& grad, const py::object& state,
            const py::object& step, const py::object& clock, bool timed, bool fresh, bool negate,
            const py::object& seed, int64_t first);
  // Binds every parameter's gradient, without states; `backends` names one for each parameter, and one of
  // another name is left to whoever has it. Returns the indices of these.
  std::vector<int> bind_gradients(const std::vector<std::string>& backends);
  // Leaves parameter `index` to another executor.
  void skip(int index);

  // Indices that have a gradient at this step, skipped ones included. After refresh().
  std::vector<int> active() const;

  // (backend, index of the GPU) by which all work of the next step is done; None where some is done elsewhere,
  // or all on the CPU.
  py::object only_device();

  // Norm of all bound gradients times `inverse_scale`, and whether all their elements are finite; kind is 1, 2
  // or inf. Waits for the devices.
  std::pair<double, bool> norm(double kind, double inverse_scale, int threads);
  std::vector<double> partials() const;
  void scale_gradients(double factor, int threads);
  // The same without waiting, for only_device(): norm and factor go to the two doubles at `result`.
  void clip_on_device(double kind, double max_norm, uintptr_t result, uintptr_t found_inf);

  // The step. After refresh() returned no index. `announce` is called with the list of the parameters that
  // are written, by this thread while others already work.
  void run(const py::object& inverse_scale, double clip_factor, int threads, const py::object& announce);
  // The same for only_device(), with what GradScaler left there: addresses of a float each, or 0. `max_norm`: to
  // which gradients are clipped, or 0; the norm is then found in device_norm().
  void run_on_device(uintptr_t grad_scale, uintptr_t found_inf, double max_norm, const py::object& announce);
  double device_norm();
  // Lets go of this step's gradients.
  void release();

  void set_isa(const std::string& isa);
  std::string isa() const { return kernels_->isa; }
  bool has_exchange() const { return reader_.has_exchange(); }
  // Whether the next step has the chunks of the last one.
  bool scheduled() const { return !stale_schedule_; }
  // Whether the last refresh() took the states as they were.
  bool trusts_states() const { return states_trusted_; }

 private:
  // Dtype, sizes and strides of a tensor, kept in place: revalidation is bound by cache misses.
  struct Signature {
    static constexpr int kInline = 4;  // dimensions; tensors of more keep theirs in `more`
    int ndim = 0;
    DType dtype = DType::f32;
    bool complex = false;
    int64_t extents[2 * kInline] = {};
    std::vector<int64_t> more;  // sizes, then strides
    bool matches(const TensorView& view) const;
    void assign(const TensorView& view);
  };

  // Addresses to be prefetched, never read through.
  struct Footprint {
    const char* param = nullptr;
    const char* param_storage = nullptr;
    const char* grad_object = nullptr;
    const char* grad = nullptr;
  };

  struct Bound {
    py::object param, state, step, clock;
    py::object states[kMaxStates];
    py::object grad;  // held from refresh() to release()
    // Of a distributed parameter: how it and its gradient lie on the ranks. Null of others.
    py::object param_spec, grad_spec;
    PyTypeObject* grad_type = nullptr;
    const void* state_data[kMaxStates] = {};
    void* step_data = nullptr;
    Signature param_signature, grad_signature;
    Footprint footprint;
    DeviceId device;
    int group = 0;
    bool step_is_double = false;
    bool bound = false;
    bool skipped = false;
    bool timed = false;
    bool fresh = false;  // the next step is the first with these states
    // The gradient may carry a conjugate or negative bit: torch sets them on complex tensors and on their
    // imaginary parts, which are never contiguous.
    bool may_be_lazy = false;
    bool active = false;
  };

  struct Group {
    py::object dict;
    Rule rule = Rule::count;
    std::vector<py::object> hyper_keys, state_keys;
    std::vector<std::pair<py::object, py::object>> watched;  // key, value at reset()
    GroupValues values;
    std::vector<int> executors;  // to which some of its parameters were bound
  };

  // A GPU, and whose kernels work on it.
  struct Place {
    std::string backend;
    DeviceId device;
    std::unique_ptr<Executor> executor;
  };

  bool same_structure(const py::list& param_groups) const;
  void read_hyper(Group& group);
  bool is_at_hand(const Group& group, const TensorView& lr) const;
  // Reads a tensor, or a distributed one's local part; false where there is none that can be read.
  bool read(PyObject* tensor, bool distributed, TensorView* view);
  bool still_valid(int index, PyObject* mapping);
  bool states_still_valid(const Bound& bound, PyObject* mapping);
  bool memory_shared() const;
  void prefetch(size_t index) const;
  py::list written();
  void prepare();
  void count_steps();
  int executor_for(const std::string& backend, const DeviceId& device);
  Place& only_place();
  gpu::Stream stream_of(const Place& place) const;

  TensorReader reader_;
  py::object tensor_type_, parameter_type_;  // torch.Tensor, torch.nn.Parameter
  const CpuKernels* kernels_;
  py::object shares_memory_;
  py::object stream_, triton_;
  Plan plan_;
  std::vector<Place> places_;  // by the tensors' executor
  std::vector<Bound> bound_;
  std::vector<Group> groups_;  // tensors point into it
  py::object written_;
  bool stale_schedule_ = true;
  bool states_trusted_ = false;
  bool states_shared_ = false;  // found in the refresh() in progress: somebody else holds a reference to a state
  ptrdiff_t sizes_offset_ = 0;  // of the sizes in torch's record of a tensor
};

}  // namespace stepladder
