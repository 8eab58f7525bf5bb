// Chooses among the vector widths that were compiled in.
#include <cstring>

#include "multi_tensor/kernels.h"

namespace stepladder {

#define SL_DECLARE(isa) \
  namespace isa { \
  extern const CpuKernels kernels; \
  }
SL_DECLARE(baseline)
#if defined(SL_X86)
SL_DECLARE(avx2)
SL_DECLARE(avx512)
#endif
#undef SL_DECLARE

namespace {

struct Candidate {
  const CpuKernels* kernels;
  bool supported;
};

// Widest first.
std::vector<Candidate> candidates() {
  std::vector<Candidate> list;
#if defined(SL_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  list.push_back({&avx512::kernels, avx512});
  list.push_back({&avx2::kernels, avx2});
#endif
  list.push_back({&baseline::kernels, true});
  return list;
}

}  // namespace

const CpuKernels* cpu_kernels(const char* isa) {
  for (const Candidate& c : candidates())
    if (c.supported && (isa == nullptr || strcmp(isa, c.kernels->isa) == 0)) return c.kernels;
  return nullptr;
}

std::vector<const char*> supported_isas() {
  std::vector<const char*> names;
  for (const Candidate& c : candidates())
    if (c.supported) names.push_back(c.kernels->isa);
  return names;
}

}  // namespace stepladder
