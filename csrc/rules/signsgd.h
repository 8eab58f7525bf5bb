// SignSGD and Signum (Bernstein et al., arXiv:1802.04434, algorithms 1 and 2), decoupled decay.
//   w ← (1 − η λ) w
//   w ← w − η sign(g),      Signum: m ← β m + (1 − β) g,  w ← w − η sign(m)
#pragma once

#include "common/math.h"

namespace stepladder {

struct SignSGD {
  static constexpr const char* kHyper = "lr weight_decay";
  static constexpr const char* kStates = "";
  static constexpr int kNumStates = 0;

  struct Hyper {
    double lr, weight_decay;
  };

  template <class T>
  struct Scalars {
    T lr, shrink;
  };

  template <class T>
  SL_HD static Scalars<T> scalars(const Hyper& h, int64_t) {
    return {static_cast<T>(h.lr), static_cast<T>(1.0 - h.lr * h.weight_decay)};
  }

  template <class T>
  SL_HD static void update(const Scalars<T>& s, T& w, T g, T*) {
    w = s.shrink * w - s.lr * sign(g);
  }
};

struct Signum {
  static constexpr const char* kHyper = "lr momentum weight_decay";
  static constexpr const char* kStates = "exp_avg";
  static constexpr int kNumStates = 1;

  struct Hyper {
    double lr, momentum, weight_decay;
  };

  template <class T>
  struct Scalars {
    T lr, momentum, one_minus_momentum, shrink;
  };

  template <class T>
  SL_HD static Scalars<T> scalars(const Hyper& h, int64_t) {
    return {static_cast<T>(h.lr), static_cast<T>(h.momentum), static_cast<T>(1.0 - h.momentum),
            static_cast<T>(1.0 - h.lr * h.weight_decay)};
  }

  template <class T>
  SL_HD static void update(const Scalars<T>& s, T& w, T g, T* state) {
    T& m = state[0];
    m = s.momentum * m + s.one_minus_momentum * g;
    w = s.shrink * w - s.lr * sign(m);
  }
};

}  // namespace stepladder
