// A plan bound to Python's objects: parameters, their gradients and states are read by pointer and
// revalidated at every step. No torch header: tensors are read through torch's DLPack exchange table.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "multi_tensor/plan.h"

namespace stepladder {

namespace py = pybind11;

// The memory that a tensor views.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::f32;
  bool complex = false;
  bool on_cpu = true;
  int ndim = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;  // elements
};

// Reads tensors: through the exchange table where this torch has one, else by calling `describe`.
class TensorReader {
 public:
  // exchange: torch.Tensor.__dlpack_c_exchange_api__ or None.
  // describe: tensor -> (pointer, sizes, strides, dtype name, is on the CPU), used where exchange is None.
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
  StepPlan(py::object exchange, py::object describe, py::object shares_memory);

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

  // Binds parameter `index`. `state` is its state dict, `step` its step tensor or None; `timed`: the rule
  // counts time by it. `fresh`: the states were just created. `seed`: for stochastic rounding, or None.
  void bind(int index, const py::object& grad, const py::object& state, const py::object& step, bool timed, bool fresh,
            bool negate, const py::object& seed);
  // Binds every parameter's gradient, without states; returns the indices whose tensors cannot be read here.
  std::vector<int> bind_gradients();
  // Leaves parameter `index` to another executor.
  void skip(int index);

  // Indices that have a gradient at this step, skipped ones included. After refresh().
  std::vector<int> active() const;

  // Norm of all bound gradients over `inverse_scale`; kind is 1, 2 or inf.
  std::pair<double, bool> norm(double kind, double inverse_scale, int threads);
  std::vector<double> partials() const;
  void scale_gradients(double factor, int threads);

  // The step. After refresh() returned no index. `announce` is called with the list of the parameters that
  // are written, by this thread while others already work.
  void run(const py::object& inverse_scale, double clip_factor, int threads, const py::object& announce);
  // Lets go of this step's gradients.
  void release();

  void set_isa(const std::string& isa);
  std::string isa() const { return kernels_->isa; }
  bool has_exchange() const { return reader_.has_exchange(); }
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
    py::object param, state, step;
    py::object states[kMaxStates];
    py::object grad;  // held from refresh() to release()
    PyTypeObject* grad_type = nullptr;
    const void* state_data[kMaxStates] = {};
    void* step_data = nullptr;
    Signature param_signature, grad_signature;
    Footprint footprint;
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
    double hyper[kMaxHyper] = {};
  };

  bool same_structure(const py::list& param_groups) const;
  void read_hyper(Group& group);
  bool still_valid(int index, PyObject* mapping);
  bool states_still_valid(const Bound& bound, PyObject* mapping);
  bool memory_shared() const;
  void prefetch(size_t index) const;
  py::list written();
  void prepare();

  TensorReader reader_;
  const CpuKernels* kernels_;
  py::object shares_memory_;
  Plan plan_;
  std::vector<Bound> bound_;
  std::vector<Group> groups_;
  py::object written_;
  bool stale_schedule_ = true;
  bool states_trusted_ = false;
  bool states_shared_ = false;  // found in the refresh() in progress: somebody else holds a reference to a state
  ptrdiff_t sizes_offset_ = 0;  // of the sizes in torch's record of a tensor
};

}  // namespace stepladder
