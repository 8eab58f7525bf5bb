// Chooses among the matrix units that were compiled in.
#include <cstring>

#include "common/amx.h"
#include "newton_schulz/cpu_kernels.h"

namespace stepladder::newton_schulz {

#define SL_DECLARE(unit) \
  namespace unit { \
  extern const Engine engine; \
  }
#if defined(SL_MATRIX_UNITS)
SL_DECLARE(amx)
SL_DECLARE(avx512_bf16)
#endif
#undef SL_DECLARE

namespace {

#if defined(SL_MATRIX_UNITS)

bool has_avx512_bf16() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

#endif

// Fastest first.
std::vector<const Engine*> engines() {
  std::vector<const Engine*> list;
#if defined(SL_MATRIX_UNITS)
  static const bool bf16_products = has_avx512_bf16(), tiles = bf16_products && has_amx();
  if (tiles) list.push_back(&amx::engine);
  if (bf16_products) list.push_back(&avx512_bf16::engine);
#endif
  return list;
}

}  // namespace

const Engine* cpu_engine(const char* name) {
  for (const Engine* engine : engines())
    if (name == nullptr || strcmp(name, engine->name) == 0) return engine;
  return nullptr;
}

std::vector<const char*> supported_engines() {
  std::vector<const char*> names;
  for (const Engine* engine : engines()) names.push_back(engine->name);
  return names;
}

}  // namespace stepladder::newton_schulz
