#include "kept_tensor.h"

#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/buffer_pool.h"
#include "common/error.h"
#include "dlpack.h"

namespace py = pybind11;

namespace stepladder {

namespace {

constexpr size_t kKeptBytes = size_t{1} << 28;
constexpr char kCapsule[] = "dltensor";

// Never destroyed: tensors outlive what is static.
BufferPool& pool() {
  static BufferPool* const all = new BufferPool(kKeptBytes);
  return *all;
}

struct Kept {
  dlpack::ManagedTensor managed = {};
  std::unique_ptr<Buffer> buffer;
  std::vector<int64_t> shape, strides;
};

// Called without the interpreter's lock too.
void release(dlpack::ManagedTensor* managed) {
  const std::unique_ptr<Kept> kept(static_cast<Kept*>(managed->context));
  pool().give_back(std::move(kept->buffer));
}

// Of a capsule that nobody took.
void release_capsule(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, kCapsule))
    release(static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, kCapsule)));
}

dlpack::DataType data_type(const std::string& name) {
  if (name == "float32") return {dlpack::kFloat, 32, 1};
  if (name == "float16") return {dlpack::kFloat, 16, 1};
  SL_CHECK(name == "bfloat16", "a tensor has the dtype '", name, "', expected float32, bfloat16 or float16");
  return {dlpack::kBfloat, 16, 1};
}

py::object kept_tensor(const std::vector<int64_t>& shape, const std::string& dtype) {
  auto kept = std::make_unique<Kept>();
  kept->shape = shape;
  kept->strides.resize(shape.size());
  dlpack::Tensor& tensor = kept->managed.tensor;
  tensor.dtype = data_type(dtype);
  const int64_t item = tensor.dtype.bits / 8, most = static_cast<int64_t>(kKeptBytes) / item;
  int64_t count = 1;
  for (size_t d = shape.size(); d-- > 0; count *= shape[d]) {
    SL_CHECK(shape[d] > 0 && shape[d] <= most / count, "dimension ", d, " of a tensor is ", shape[d],
             ", expected 1 or more, and up to ", most, " elements in all");
    kept->strides[d] = count;
  }
  kept->buffer = pool().take(static_cast<size_t>(count * item));
  tensor.data = kept->buffer->at_least(0);
  tensor.device = {dlpack::kCpu, 0};
  tensor.ndim = static_cast<int32_t>(shape.size());
  tensor.shape = kept->shape.data();
  tensor.strides = kept->strides.data();
  kept->managed.context = kept.get();
  kept->managed.deleter = release;
  PyObject* const capsule = PyCapsule_New(&kept->managed, kCapsule, release_capsule);
  if (capsule == nullptr) throw py::error_already_set();
  kept.release();
  return py::reinterpret_steal<py::object>(capsule);
}

}  // namespace

void bind_kept_tensor(py::module_& m) {
  m.attr("KEPT_TENSOR_BYTES") = kKeptBytes;
  m.def("kept_bytes", [] { return pool().kept_bytes(); }, "Of tensors that are gone.");
  m.def("kept_tensor", &kept_tensor, py::arg("shape"), py::arg("dtype"),
        "A DLPack capsule of a contiguous tensor on the CPU, whose memory is kept for later ones once it is gone.");
}

}  // namespace stepladder
