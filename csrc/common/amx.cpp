#include "common/amx.h"

#if defined(SL_MATRIX_UNITS) && !defined(SL_EMULATED_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace stepladder {

#if defined(SL_EMULATED_AMX)

bool has_amx() { return true; }

#elif defined(SL_MATRIX_UNITS)

namespace {

bool ask() {
  unsigned eax, ebx, ecx, edx;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if ((edx & kBf16) == 0 || (edx & kTile) == 0) return false;
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

bool has_amx() {
  static const bool found = ask();
  return found;
}

#else

bool has_amx() { return false; }

#endif

}  // namespace stepladder
