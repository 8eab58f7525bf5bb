// The tile instructions that the CPU's matrix kernels use, in plain C++: they run where the processor has no tiles.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "common/error.h"

namespace stepladder::emulator {

struct Tiles {
  bool configured = false;
  uint8_t rows[8] = {};
  uint16_t bytes[8] = {};
  uint32_t words[8][16][16] = {};
};

inline Tiles& tiles() {
  static thread_local Tiles t;
  return t;
}

inline void tile_loadconfig(const void* config) {
  Tiles& t = tiles();
  const auto* const bytes = static_cast<const uint8_t*>(config);
  SL_CHECK(bytes[0] == 1, "palette ", int{bytes[0]}, " of the tiles is not 1");
  memcpy(t.bytes, bytes + 16, sizeof(t.bytes));
  memcpy(t.rows, bytes + 48, sizeof(t.rows));
  memset(t.words, 0, sizeof(t.words));
  t.configured = true;
}

inline void tile_release() { tiles().configured = false; }

inline Tiles& configured() {
  Tiles& t = tiles();
  SL_CHECK(t.configured, "a tile is used before its configuration");
  return t;
}

inline void tile_zero(int tile) { memset(configured().words[tile], 0, sizeof(Tiles::words[0])); }

inline void tile_loadd(int tile, const void* from, int64_t stride) {
  Tiles& t = configured();
  for (int r = 0; r < t.rows[tile]; ++r)
    memcpy(t.words[tile][r], static_cast<const char*>(from) + r * stride, t.bytes[tile]);
}

inline void tile_stored(int tile, void* to, int64_t stride) {
  const Tiles& t = configured();
  for (int r = 0; r < t.rows[tile]; ++r) memcpy(static_cast<char*>(to) + r * stride, t.words[tile][r], t.bytes[tile]);
}

// c += a·b, pair by pair along k.
inline void tile_dpbf16ps(int c, int a, int b) {
  Tiles& t = configured();
  for (int i = 0; i < t.rows[c]; ++i) {
    for (int k = 0; k < t.bytes[a] / 4; ++k) {
      for (int j = 0; j < t.bytes[c] / 4; ++j) {
        float sum;
        memcpy(&sum, &t.words[c][i][j], sizeof(sum));
        const uint32_t x = t.words[a][i][k], y = t.words[b][k][j];
        sum += bit_cast<float>(x << 16) * bit_cast<float>(y << 16);
        sum += bit_cast<float>(x & 0xffff0000u) * bit_cast<float>(y & 0xffff0000u);
        memcpy(&t.words[c][i][j], &sum, sizeof(sum));
      }
    }
  }
}

}  // namespace stepladder::emulator

#define _tile_loadconfig(config) ::stepladder::emulator::tile_loadconfig(config)
#define _tile_release() ::stepladder::emulator::tile_release()
#define _tile_zero(tile) ::stepladder::emulator::tile_zero(tile)
#define _tile_loadd(tile, from, stride) ::stepladder::emulator::tile_loadd(tile, from, stride)
#define _tile_stream_loadd(tile, from, stride) _tile_loadd(tile, from, stride)
#define _tile_stored(tile, to, stride) ::stepladder::emulator::tile_stored(tile, to, stride)
#define _tile_dpbf16ps(c, a, b) ::stepladder::emulator::tile_dpbf16ps(c, a, b)
