// Which GPU kernels were compiled in.
#include "multi_tensor/gpu_kernels.h"

namespace stepladder {

#define SL_PAIRS(X) X(f64_f64) X(f32_f32) X(bf16_bf16) X(f16_f16) X(f64_f32) X(bf16_f32) X(f16_f32)

#define SL_DECLARE(pair) \
  namespace pair { \
  extern const GpuKernels kernels; \
  }
SL_PAIRS(SL_DECLARE)

namespace {

const GpuKernels* const kAll[] = {
#define SL_ADDRESS(pair) &pair::kernels,
    SL_PAIRS(SL_ADDRESS)};

}  // namespace

const GpuKernels* gpu_kernels(DType param, DType state) {
  for (const GpuKernels* kernels : kAll)
    if (kernels->param == param && kernels->state == state) return kernels;
  return nullptr;
}

}  // namespace stepladder
