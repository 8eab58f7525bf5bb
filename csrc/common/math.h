// Scalar helpers that several rules share.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"

namespace stepladder {

// base^exponent by repeated squaring, in double: one routine for host, device and reference, so that
// bias corrections agree to the last bit (libm's pow differs between platforms).
SL_HD double power(double base, int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result *= base;
    base *= base;
  }
  return result;
}

SL_HD float square_root(float x) { return sqrtf(x); }
SL_HD double square_root(double x) { return sqrt(x); }

// -1, 0 or 1; a zero stays itself and NaN stays NaN.
template <class T>
SL_HD T sign(T x) {
  return x > T(0) ? T(1) : x < T(0) ? T(-1) : x;
}

// max as torch.maximum has it: NaN in either argument wins.
template <class T>
SL_HD T maximum(T a, T b) {
  return a > b || a != a ? a : b;
}

// a + weight (b - a), from the nearer end: torch.lerp's two formulas.
template <class T>
struct Lerp {
  T weight;
  bool from_end;

  SL_HD static Lerp make(double weight) {
    const bool from_end = !(weight < 0.5);
    return {static_cast<T>(from_end ? 1.0 - weight : weight), from_end};
  }

  SL_HD T operator()(T a, T b) const {
    const T difference = b - a;
    return from_end ? b - difference * weight : a + weight * difference;
  }
};

}  // namespace stepladder
