// Gradient norms on a GPU, for clipping: sums of each leaf, then norm and factor, then scaling in place.
#include "multi_tensor/gpu_sums.h"

namespace stepladder {

namespace {

// Added to the norm before dividing, as torch.nn.utils.clip_grad_norm_ does.
constexpr double kClipEps = 1e-6;

template <class T, class Combine, class Join>
SL_DEVICE bool sum_leaf(const Words& words, const Record<0>& record, int64_t leaf, T inverse, void* sums,
                        int64_t sums_at, Combine combine, Join join) {
  LaneSums<T> sum;
  bool not_finite = false;
  for (int row = 0; row < kLeaf / kLanes; ++row) {
    const int64_t at = leaf * kLeaf + row * kLanes + threadIdx.x % kLeafThreads * kVector;
    if (at >= record.numel) break;
    T g[kVector] = {};
    if (record.vectors && at + kVector <= record.numel) {
      load_vector(record.columns[kGrad], record.meta.grad_dtype(), at, g);
    } else {
      SL_UNROLL
      for (int k = 0; k < kVector; ++k) {
        if (at + k >= record.numel) break;
        g[k] = load_element<T>(record.columns[kGrad], record.meta.grad_dtype(), record.offset(words, kGrad, at + k));
      }
    }
    SL_UNROLL
    for (int k = 0; k < kVector; ++k) {
      not_finite = not_finite || g[k] - g[k] != T(0);
      // Lanes beyond the end add zero, which changes no bit.
      sum.lanes[k] = combine(sum.lanes[k], g[k] * inverse);
    }
  }
  const T total = sum.total(join);
  if (leaf * kLeaf < record.numel && threadIdx.x % kLeafThreads == 0) sum_at<T>(sums, sums_at + leaf) = total;
  return not_finite;
}

template <class T>
SL_DEVICE bool measure_leaf(const Words& words, const Record<0>& record, int64_t leaf, const NormLaunch& norm,
                            int64_t sums_at) {
  const T inverse = GradientReader<T>(norm.launch).inverse;
  switch (norm.kind) {
    case Norm::l1: return sum_leaf<T>(words, record, leaf, inverse, norm.launch.sums, sums_at, AddMagnitude(), Add());
    case Norm::l2: return sum_leaf<T>(words, record, leaf, inverse, norm.launch.sums, sums_at, AddSquare(), Add());
    case Norm::inf: return sum_leaf<T>(words, record, leaf, inverse, norm.launch.sums, sums_at, MaxMagnitude(), Max());
  }
  return false;
}

SL_KERNEL(kTileThreads)
measure(SL_ARGUMENTS(NormLaunch) norm) {
  const Launch& launch = norm.launch;
  const Words words(launch);
  bool not_finite = false;
  for (int64_t chunk = blockIdx.x; chunk < launch.chunks; chunk += gridDim.x) {
    const int tensor = find_tensor(launch.shape, words, chunk);
    const Record<0> record(launch.shape, words, tensor);
    const int64_t leaf = (chunk - record.first_chunk) * (kSumTile / kLeaf) + threadIdx.x / kLeafThreads;
    const int64_t sums_at = static_cast<int64_t>(words[launch.shape.sums + tensor]);
    const bool found = record.meta.wide() ? measure_leaf<double>(words, record, leaf, norm, sums_at)
                                          : measure_leaf<float>(words, record, leaf, norm, sums_at);
    not_finite = not_finite || found;
  }
  if (not_finite) *norm.not_finite = 1;  // every writer writes the same
}

template <class T>
SL_DEVICE void fold_tensor(const NormLaunch& norm, int tensor, int64_t sums_at, int64_t leaves) {
  if (norm.kind == Norm::inf) {
    fold_leaves<T>(norm.launch.sums, sums_at, leaves, Max());
  } else {
    fold_leaves<T>(norm.launch.sums, sums_at, leaves, Add());
  }
  if (threadIdx.x == 0)
    norm.partials[tensor] = leaves == 0 ? 0.0 : static_cast<double>(sum_at<T>(norm.launch.sums, sums_at));
}

// A block for each tensor; the last one to end folds the tensors' parts and leaves norm and factor behind.
SL_KERNEL(kFoldThreads)
fold(SL_ARGUMENTS(NormLaunch) norm) {
  const Launch& launch = norm.launch;
  const Words words(launch);
  for (int tensor = blockIdx.x; tensor < launch.shape.tensors; tensor += gridDim.x) {
    const Meta meta{words[launch.shape.meta + tensor]};
    const int64_t leaves = (static_cast<int64_t>(words[launch.shape.numel + tensor]) + kLeaf - 1) / kLeaf;
    const int64_t sums_at = static_cast<int64_t>(words[launch.shape.sums + tensor]);
    if (meta.wide()) {
      fold_tensor<double>(norm, tensor, sums_at, leaves);
    } else {
      fold_tensor<float>(norm, tensor, sums_at, leaves);
    }
  }
  if (!is_last_block(launch.ticket)) return;
  // The parts themselves are kept for whoever asks: they are folded in a copy behind them.
  const int n = launch.shape.tensors;
  double* const folded = norm.partials + n;
  for (int j = threadIdx.x; j < n; j += blockDim.x) folded[j] = norm.partials[j];
  if (norm.kind == Norm::inf) {
    fold_leaves<double>(folded, 0, n, Max());
  } else {
    fold_leaves<double>(folded, 0, n, Add());
  }
  if (threadIdx.x != 0) return;
  const double total = n == 0 ? 0.0 : folded[0];
  const double value = norm.kind == Norm::l2 ? square_root(total) : total;
  const double factor = norm.max_norm / (value + kClipEps);
  norm.norm[0] = value;
  norm.norm[1] = factor > 1.0 ? 1.0 : factor;
  if (norm.found_inf != nullptr) *norm.found_inf = *norm.not_finite != 0 ? 1.0f : 0.0f;
  *norm.not_finite = 0;
}

template <class T>
SL_DEVICE void scale_thread(const Words& words, const Record<0>& record, int64_t at, T factor) {
  void* const grad = record.columns[kGrad];
  const DType dtype = record.meta.grad_dtype();
  if (record.vectors && at + kVector <= record.numel) {
    T g[kVector];
    load_vector(grad, dtype, at, g);
    SL_UNROLL
    for (int k = 0; k < kVector; ++k) g[k] = g[k] * factor;
    store_vector(grad, dtype, at, g);
    return;
  }
  SL_ROLLED
  for (int64_t i = at; i < at + kVector && i < record.numel; ++i) {
    const int64_t offset = record.offset(words, kGrad, i);
    store_element(grad, dtype, offset, load_element<T>(grad, dtype, offset) * factor);
  }
}

// Where the factor is 1, nothing is written.
SL_KERNEL(kTileThreads)
scale(SL_ARGUMENTS(NormLaunch) norm) {
  const Launch& launch = norm.launch;
  const double factor = launch.clip_address != nullptr ? *launch.clip_address : launch.clip_factor;
  if (factor == 1.0) return;
  const Words words(launch);
  for (int64_t chunk = blockIdx.x; chunk < launch.chunks; chunk += gridDim.x) {
    const int tensor = find_tensor(launch.shape, words, chunk);
    const Record<0> record(launch.shape, words, tensor);
    const int64_t begin = (chunk - record.first_chunk) * kSumTile;
    for (int64_t at = begin + int64_t{threadIdx.x} * kVector; at < begin + kSumTile && at < record.numel; at += kTile) {
      if (record.meta.wide()) {
        scale_thread<double>(words, record, at, factor);
      } else {
        scale_thread<float>(words, record, at, static_cast<float>(factor));
      }
    }
  }
}

}  // namespace

const GpuNormKernels& gpu_norm_kernels() {
  static const GpuNormKernels kernels = {gpu::kernel("measure", kTileThreads, measure),
                                         gpu::kernel("fold", kFoldThreads, fold),
                                         gpu::kernel("scale", kTileThreads, scale)};
  return kernels;
}

}  // namespace stepladder
