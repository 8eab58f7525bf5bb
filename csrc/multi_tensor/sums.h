// What sums of leaves are made of, on every backend.
#pragma once

#include "common/math.h"

namespace stepladder {

struct AddSquare {
  template <class T>
  SL_HD T operator()(T sum, T x) const {
    return sum + x * x;
  }
};
struct AddMagnitude {
  template <class T>
  SL_HD T operator()(T sum, T x) const {
    return sum + (x < T(0) ? -x : x);
  }
};
struct MaxMagnitude {
  template <class T>
  SL_HD T operator()(T largest, T x) const {
    return maximum(largest, x < T(0) ? -x : x);
  }
};
struct Add {
  template <class T>
  SL_HD T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <class T>
  SL_HD T operator()(T a, T b) const {
    return maximum(a, b);
  }
};

}  // namespace stepladder
