// How GPU kernels find their tensors in the table and read and write elements. A thread holds kVector
// consecutive logical elements: by 16-byte accesses where every column is flat and aligned and the vector is
// whole, else one by one.
#pragma once

#include "common/gpu.h"
#include "common/philox.h"
#include "multi_tensor/gpu_kernels.h"

namespace stepladder {

struct Words {
  const uint64_t* words;
  SL_DEVICE explicit Words(const Launch& launch) : words(launch.table != nullptr ? launch.table : launch.words) {}
  SL_DEVICE uint64_t operator[](int64_t i) const { return words[i]; }
  template <class T>
  SL_DEVICE T* address(int64_t i) const {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(words[i]));
  }
};

// The last tensor whose first chunk is not beyond `chunk`; empty tensors, which have none, are passed over.
SL_DEVICE int find_tensor(const TableShape& shape, const Words& words, int64_t chunk) {
  int low = 0, high = shape.tensors;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (static_cast<int64_t>(words[shape.first + middle]) <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

template <int kStates>
struct Record {
  void* columns[2 + kStates];
  int64_t numel;
  int64_t first_chunk;
  Meta meta;
  int32_t layout;  // index of its first word, or 0
  bool vectors;    // 16-byte accesses are possible

  SL_DEVICE Record(const TableShape& shape, const Words& words, int tensor) {
    uint64_t bits = 0;
    SL_UNROLL
    for (int c = 0; c < 2 + kStates; ++c) {
      columns[c] = words.template address<void>(shape.column(c) + tensor);
      bits |= words[shape.column(c) + tensor];
    }
    numel = static_cast<int64_t>(words[shape.numel + tensor]);
    first_chunk = static_cast<int64_t>(words[shape.first + tensor]);
    meta.word = words[shape.meta + tensor];
    layout = shape.layout != 0 ? static_cast<int32_t>(words[shape.layout + tensor]) : 0;
    vectors = layout == 0 && (bits & 15) == 0;
  }

  // Of logical element i, in elements from the column's address.
  SL_DEVICE int64_t offset(const Words& words, int column, int64_t i) const {
    if (layout == 0) return i;
    const int dims = static_cast<int>(words[layout]);
    int64_t result = 0;
    SL_ROLLED
    for (int d = dims - 1; d >= 0; --d) {
      const int64_t size = static_cast<int64_t>(words[layout + 1 + d]);
      result += i % size * static_cast<int64_t>(words[layout + 1 + dims * (1 + column) + d]);
      i /= size;
    }
    return result;
  }
};

template <class T>
SL_DEVICE T load_element(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f64: return load_as<T>(static_cast<const double*>(data)[i]);
    case DType::f32: return load_as<T>(static_cast<const float*>(data)[i]);
    case DType::bf16: return load_as<T>(static_cast<const bf16*>(data)[i]);
    case DType::f16: return load_as<T>(static_cast<const f16*>(data)[i]);
  }
  return T(0);
}

template <class T>
SL_DEVICE void store_element(void* data, DType dtype, int64_t i, T value) {
  switch (dtype) {
    case DType::f64: return store_as(static_cast<double*>(data) + i, value);
    case DType::f32: return store_as(static_cast<float*>(data) + i, value);
    case DType::bf16: return store_as(static_cast<bf16*>(data) + i, value);
    case DType::f16: return store_as(static_cast<f16*>(data) + i, value);
  }
}

// kVector elements as they are stored.
template <class S>
struct Vector {
  static constexpr int kPer16 = 16 / sizeof(S);
  static constexpr int kAccesses = kVector / kPer16;
  struct alignas(16) Part {
    S values[kPer16];
  };
  Part parts[kAccesses];

  SL_DEVICE void load(const void* data, int64_t at) {
    SL_UNROLL
    for (int k = 0; k < kAccesses; ++k)
      parts[k] = bit_cast<Part>(gpu::load16(static_cast<const S*>(data) + at + k * kPer16));
  }
  SL_DEVICE void store(void* data, int64_t at) const {
    SL_UNROLL
    for (int k = 0; k < kAccesses; ++k)
      gpu::store16(static_cast<S*>(data) + at + k * kPer16, bit_cast<gpu::Bytes16>(parts[k]));
  }
  template <class T>
  SL_DEVICE void widen(T* values) const {
    SL_UNROLL
    for (int k = 0; k < kVector; ++k) values[k] = load_as<T>(parts[k / kPer16].values[k % kPer16]);
  }
  template <class T>
  SL_DEVICE void narrow(const T* values) {
    SL_UNROLL
    for (int k = 0; k < kVector; ++k) store_as(&parts[k / kPer16].values[k % kPer16], values[k]);
  }
};

template <class S, class T>
SL_DEVICE void load_vector(const void* data, int64_t at, T* values) {
  Vector<S> vector;
  vector.load(data, at);
  vector.widen(values);
}

template <class S, class T>
SL_DEVICE void store_vector(void* data, int64_t at, const T* values) {
  Vector<S> vector;
  vector.narrow(values);
  vector.store(data, at);
}

template <class T>
SL_DEVICE void load_vector(const void* data, DType dtype, int64_t at, T* values) {
  switch (dtype) {
    case DType::f64: return load_vector<double>(data, at, values);
    case DType::f32: return load_vector<float>(data, at, values);
    case DType::bf16: return load_vector<bf16>(data, at, values);
    case DType::f16: return load_vector<f16>(data, at, values);
  }
}

template <class T>
SL_DEVICE void store_vector(void* data, DType dtype, int64_t at, const T* values) {
  switch (dtype) {
    case DType::f64: return store_vector<double>(data, at, values);
    case DType::f32: return store_vector<float>(data, at, values);
    case DType::bf16: return store_vector<bf16>(data, at, values);
    case DType::f16: return store_vector<f16>(data, at, values);
  }
}

// How a launch changes gradients as they are read; the same operations in the same order as on the CPU.
template <class T>
struct GradientReader {
  bool unscale, write_back, clip;
  T inverse, factor;

  SL_DEVICE explicit GradientReader(const Launch& launch)
      : unscale(launch.unscale),
        write_back(launch.unscale && launch.write_back),
        clip(launch.clip),
        inverse(static_cast<T>(launch.grad_scale != nullptr ? 1.0 / static_cast<double>(*launch.grad_scale)
                                                            : launch.inverse_scale)),
        factor(static_cast<T>(launch.clip_address != nullptr ? *launch.clip_address : launch.clip_factor)) {}

  // What is left after unscaling.
  SL_DEVICE T seen(T g, bool negate) const {
    if (clip) g = g * factor;
    return negate ? -g : g;
  }
};

template <class R, class T>
struct SharedScalars {
  typename R::template Scalars<T> scalars;
};

// The scalars of the current tensor's group and time, made once for the block whenever either changes. All
// threads of a block call it together.
template <class R, class T>
struct ScalarsOfBlock {
  SharedScalars<R, T>& shared;
  int group = -1;
  int64_t time = -1;

  SL_DEVICE explicit ScalarsOfBlock(SharedScalars<R, T>& memory) : shared(memory) {}

  SL_DEVICE void update(const Words& words, int new_group, int64_t new_time) {
    if (new_group == group && new_time == time) return;
    __syncthreads();  // nobody still reads the old ones
    if (threadIdx.x == 0) {
      double hyper[kMaxHyper];
      SL_UNROLL
      for (int h = 0; h < kMaxHyper; ++h) hyper[h] = bit_cast<double>(words[new_group * kGroupWords + h]);
      if (const void* lr = words.address<void>(new_group * kGroupWords + kLrAddress)) {
        hyper[0] = words[new_group * kGroupWords + kLrIsDouble] != 0
                       ? *static_cast<const double*>(lr)
                       : static_cast<double>(*static_cast<const float*>(lr));
      }
      typename R::Hyper typed;
      memcpy(&typed, hyper, sizeof(typed));
      shared.scalars = R::template scalars<T>(typed, new_time);
    }
    __syncthreads();
    group = new_group;
    time = new_time;
  }
};

// A count that a step adds one to: float or double, as the optimizer's state has it.
SL_DEVICE int64_t read_count(const void* address, bool is_double) {
  if (address == nullptr) return 0;
  return is_double ? static_cast<int64_t>(*static_cast<const double*>(address))
                   : static_cast<int64_t>(*static_cast<const float*>(address));
}

SL_DEVICE int64_t next_step(const TableShape& shape, const Words& words, int tensor, Meta meta) {
  return read_count(words.address<void>(shape.step + tensor), meta.step_is_double()) + 1;
}

// The clock, where it is not the step count, is float.
SL_DEVICE int64_t next_time(const TableShape& shape, const Words& words, int tensor, Meta meta) {
  if (shape.clock == 0) return next_step(shape, words, tensor, meta);
  return read_count(words.address<void>(shape.clock + tensor), false) + 1;
}

// True in every thread of the block that ends last; only there may what others have read be overwritten.
SL_DEVICE bool is_last_block(uint32_t* ticket) {
  SL_SHARED(bool, last);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    if (last) *ticket = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

SL_DEVICE void count_steps(const TableShape& shape, const Words& words) {
  for (int t = threadIdx.x; t < shape.tensors; t += blockDim.x) {
    const Meta meta{words[shape.meta + t]};
    if (void* step = words.address<void>(shape.step + t)) {
      if (meta.step_is_double()) {
        *static_cast<double*>(step) += 1.0;
      } else {
        *static_cast<float*>(step) += 1.0f;
      }
    }
    if (shape.clock != 0 && words[shape.clock + t] != words[shape.step + t])
      *words.address<float>(shape.clock + t) += 1.0f;
  }
}

SL_DEVICE uint32_t random_bits(const Philox4& bits, int element) {
  const uint32_t low = element & 4 ? bits.word[2] : bits.word[0];
  const uint32_t high = element & 4 ? bits.word[3] : bits.word[1];
  const uint32_t word = element & 2 ? high : low;
  return element & 1 ? word >> 16 : word & 0xffffu;
}

}  // namespace stepladder
