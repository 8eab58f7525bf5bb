#include "dlpack.h"
#include "step_plan.h"

namespace stepladder {

TensorReader::TensorReader(py::object exchange, py::object describe)
    : capsule_(std::move(exchange)), describe_(std::move(describe)) {
  if (capsule_.is_none()) return;
  const auto* table =
      static_cast<const dlpack::ExchangeTable*>(PyCapsule_GetPointer(capsule_.ptr(), "dlpack_exchange_api"));
  if (table == nullptr) throw py::error_already_set();
  if (table->header.major == 1) from_py_object_ = table->dltensor_from_py_object;
}

bool TensorReader::read(PyObject* tensor, TensorView* view) {
  if (from_py_object_ == nullptr) return read_described(tensor, view);
  dlpack::Tensor t;
  if (from_py_object_(tensor, &t) != 0) {
    PyErr_Clear();
    return false;
  }
  view->data = static_cast<char*>(t.data) + t.byte_offset;
  view->device = {t.device.type, t.device.id};
  view->ndim = t.ndim;
  view->sizes = t.shape;
  view->strides = t.strides;
  view->complex = t.dtype.code == dlpack::kComplex;
  const int bits = view->complex ? t.dtype.bits / 2 : t.dtype.bits;
  if (t.dtype.code == dlpack::kBfloat && bits == 16) {
    view->dtype = DType::bf16;
  } else if ((t.dtype.code == dlpack::kFloat || view->complex) && (bits == 64 || bits == 32 || bits == 16)) {
    view->dtype = bits == 64 ? DType::f64 : bits == 32 ? DType::f32 : DType::f16;
  } else {
    return false;
  }
  return true;
}

bool TensorReader::read_described(PyObject* tensor, TensorView* view) {
  const py::object result = describe_(py::handle(tensor));
  if (result.is_none()) return false;
  const auto fields = result.cast<py::tuple>();
  view->data = reinterpret_cast<void*>(fields[0].cast<uintptr_t>());
  sizes_ = fields[1].cast<std::vector<int64_t>>();
  strides_ = fields[2].cast<std::vector<int64_t>>();
  const auto dtype = fields[3].cast<std::string>();
  view->device = {fields[4].cast<int>(), fields[5].cast<int>()};
  view->ndim = static_cast<int>(sizes_.size());
  view->sizes = sizes_.data();
  view->strides = strides_.data();
  view->complex = dtype.rfind("complex", 0) == 0;
  if (dtype == "bfloat16") {
    view->dtype = DType::bf16;
  } else if (dtype == "float64" || dtype == "complex128") {
    view->dtype = DType::f64;
  } else if (dtype == "float32" || dtype == "complex64") {
    view->dtype = DType::f32;
  } else if (dtype == "float16" || dtype == "complex32") {
    view->dtype = DType::f16;
  } else {
    return false;
  }
  return true;
}

}  // namespace stepladder
