// Storage dtypes and the exact conversions between them and the arithmetic types float and double.
//
// Loads are exact. Stores round to nearest, ties to even; NaN stays NaN. A double is stored to a half
// type through float, as torch does. Written with integer operations so that every compiler and vector
// width gives the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/macros.h"

namespace stepladder {

enum class DType : int32_t { f64 = 0, f32 = 1, bf16 = 2, f16 = 3 };

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

template <class T>
struct dtype_of;
template <>
struct dtype_of<double> {
  static constexpr DType value = DType::f64;
};
template <>
struct dtype_of<float> {
  static constexpr DType value = DType::f32;
};
template <>
struct dtype_of<bf16> {
  static constexpr DType value = DType::bf16;
};
template <>
struct dtype_of<f16> {
  static constexpr DType value = DType::f16;
};

SL_HD int64_t item_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

template <class To, class From>
SL_HD To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs types of one size");
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

SL_HD float to_float(float value) { return value; }

SL_HD float to_float(bf16 value) { return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

SL_HD float to_float(f16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  // Subnormals are m * 2^-24, exact in float; normal numbers move the exponent bias from 15 to 127.
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 5.9604644775390625e-8f;
  const uint32_t bias = magnitude >= 0x7c00u ? (255u - 31u) << 23 : (127u - 15u) << 23;
  const uint32_t normal = (magnitude << 13) + bias;
  return bit_cast<float>(sign | (magnitude < 0x400u ? bit_cast<uint32_t>(subnormal) : normal));
}

SL_HD bf16 to_bf16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  return bf16{static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
}

// `random` holds 16 uniform bits: added below the kept mantissa, then truncated. Inf and NaN pass.
SL_HD bf16 to_bf16_stochastic(float value, uint32_t random) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t rounded = (bits + (magnitude < 0x7f800000u ? random : 0u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  return bf16{static_cast<uint16_t>(magnitude > 0x7f800000u ? nan : rounded)};
}

SL_HD f16 to_f16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the result is subnormal: adding 0.5f leaves the rounded m * 2^-24 in the low bits.
  const uint32_t half_bits = 0x3f000000u;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - half_bits;
  const uint32_t normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;  // 65520 and more round to infinity
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  return f16{static_cast<uint16_t>(sign | result)};
}

template <class T>
SL_HD T load_as(double value) {
  return static_cast<T>(value);
}
template <class T>
SL_HD T load_as(float value) {
  return static_cast<T>(value);
}
template <class T>
SL_HD T load_as(bf16 value) {
  return static_cast<T>(to_float(value));
}
template <class T>
SL_HD T load_as(f16 value) {
  return static_cast<T>(to_float(value));
}

template <class T>
SL_HD void store_as(double* out, T value) {
  *out = static_cast<double>(value);
}
template <class T>
SL_HD void store_as(float* out, T value) {
  *out = static_cast<float>(value);
}
template <class T>
SL_HD void store_as(bf16* out, T value) {
  *out = to_bf16(static_cast<float>(value));
}
template <class T>
SL_HD void store_as(f16* out, T value) {
  *out = to_f16(static_cast<float>(value));
}

}  // namespace stepladder
