// What the matrix units multiply: blocks of 32×32 out of packed tiles of bf16. Included once by cpu_kernels.cpp, which
// is compiled for each unit: SL_UNIT names it, SL_AMX chooses tiles.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "common/amx.h"
#include "common/avx512.h"
#include "newton_schulz/cpu_kernels.h"

namespace stepladder::newton_schulz {
namespace SL_UNIT {
namespace {

constexpr int kPairs = 16;  // rows of a right tile
constexpr int kBlockFloats = kBlock * kBlock;

inline __m512bh as_bf16(__m512i v) { return reinterpret_cast<__m512bh>(v); }
inline __m512i as_ints(__m512bh v) { return reinterpret_cast<__m512i>(v); }

// c (32×32, fp32) = or += left (two strips of tiles) · right (two strips), `depth` tiles along k. The matrix unit works
// beside the others: `meanwhile` does what is left to do for the block before, a part after each tile along k, and is
// told before and after the right operand's tiles are read.
#if defined(SL_AMX)

// Measured for one of 256×512 on two threads, as quick as on one.
constexpr double kLeastSharedFlops = 5e8;

void enter() { _tile_loadconfig(&kWholeTiles); }

// Results that went past the caches are there before other threads are told so.
void leave() {
  _tile_release();
  _mm_sfence();
}

template <class Pieces>
void multiply_block(float* c, const char* left0, const char* left1, const char* right0, const char* right1, int depth,
                    bool accumulate, Pieces& meanwhile) {
  constexpr int kRow = kBlock * sizeof(float);
  // The compiler does not know that tiles are loaded from memory, and stored to it.
  asm volatile("" ::: "memory");
  if (accumulate) {
    _tile_loadd(0, c, kRow);
    _tile_loadd(1, c + 16, kRow);
    _tile_loadd(2, c + 16 * kBlock, kRow);
    _tile_loadd(3, c + 16 * kBlock + 16, kRow);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  // The left operand, which is longer than the first cache, is not to push out the right one's panel there.
  _tile_stream_loadd(4, left0, 64);
  for (int k = 0; k < depth; ++k) {
    meanwhile.before_step(k);
    _tile_loadd(6, right0 + k * kTileBytes, 64);
    _tile_loadd(7, right1 + k * kTileBytes, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_stream_loadd(5, left1 + k * kTileBytes, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    if (k + 1 < depth) _tile_stream_loadd(4, left0 + (k + 1) * kTileBytes, 64);
    meanwhile.advance(depth);
    meanwhile.after_step(k);
  }
  asm volatile("" ::: "memory");
  _tile_stored(0, c, kRow);
  _tile_stored(1, c + 16, kRow);
  _tile_stored(2, c + 16 * kBlock, kRow);
  _tile_stored(3, c + 16 * kBlock + 16, kRow);
  asm volatile("" ::: "memory");
}

#else

// As much as of a thread with a matrix of its own.
constexpr double kLeastSharedFlops = 2e7;

void enter() {}
void leave() { _mm_sfence(); }

// Eight rows at a time: sixteen sums in registers hide the latency of the products.
template <class Pieces>
void multiply_block(float* c, const char* left0, const char* left1, const char* right0, const char* right1, int depth,
                    bool accumulate, Pieces& meanwhile) {
  for (int k = 0; k < depth; ++k) {
    meanwhile.before_step(k);
    meanwhile.advance(depth);
  }
  constexpr int kRows = 8;
  for (int part = 0; part < kBlock / kRows; ++part) {
    const char* const left = (part < 2 ? left0 : left1) + part % 2 * kRows * 64;
    float* const rows = c + part * kRows * kBlock;
    __m512 sums[kRows][2];
    for (int r = 0; r < kRows; ++r) {
      for (int h = 0; h < 2; ++h)
        sums[r][h] = accumulate ? _mm512_load_ps(rows + r * kBlock + h * 16) : _mm512_setzero_ps();
    }
    for (int k = 0; k < depth; ++k) {
      const char* const a = left + k * kTileBytes;
      const char* const b0 = right0 + k * kTileBytes;
      const char* const b1 = right1 + k * kTileBytes;
      for (int p = 0; p < kPairs; ++p) {
        const __m512bh columns0 = as_bf16(_mm512_load_si512(b0 + p * 64));
        const __m512bh columns1 = as_bf16(_mm512_load_si512(b1 + p * 64));
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          int pair;
          memcpy(&pair, a + r * 64 + p * 4, sizeof(pair));
          const __m512bh row = as_bf16(_mm512_set1_epi32(pair));
          sums[r][0] = _mm512_dpbf16_ps(sums[r][0], row, columns0);
          sums[r][1] = _mm512_dpbf16_ps(sums[r][1], row, columns1);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int h = 0; h < 2; ++h) _mm512_store_ps(rows + r * kBlock + h * 16, sums[r][h]);
    }
  }
  for (int k = 0; k < depth; ++k) meanwhile.after_step(k);
}

#endif

}  // namespace
}  // namespace SL_UNIT
}  // namespace stepladder::newton_schulz
