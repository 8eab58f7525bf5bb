// The part of dlpack.h that is used here: its structures are one binary interface for all who exchange tensors.
#pragma once

#include <cstdint>

namespace stepladder::dlpack {

constexpr int kCpu = 1;
constexpr int kFloat = 2, kBfloat = 4, kComplex = 5;

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

// What a capsule named "dltensor" holds; whoever takes it renames the capsule, and calls the deleter once.
struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

// Of version 1.3.
struct ExchangeTable {
  struct {
    uint32_t major, minor;
    void* previous;
  } header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*dltensor_from_py_object)(void*, void*);
  void* current_work_stream;
};

}  // namespace stepladder::dlpack
