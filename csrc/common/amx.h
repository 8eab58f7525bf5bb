// The tiles of a processor that has AMX: whether they may be used, and their configuration.
#pragma once

#include <cstdint>

#if defined(SL_EMULATED_AMX)
#include "emulator/amx.h"
#endif

namespace stepladder {

// Whether processor and operating system have tiles of bf16; the latter is asked for them, for the whole process.
bool has_amx();

struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
// Eight tiles of 16 rows of 64 bytes. A constant: of a local one GCC sees only the first 8 bytes read, and leaves the
// stores of the others out.
alignas(64) constexpr TileConfig kWholeTiles{
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

}  // namespace stepladder
