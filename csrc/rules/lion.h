// Lion (Chen et al., Symbolic Discovery of Optimization Algorithms, arXiv:2302.06675, algorithm 2).
//   w ← (1 − η λ) w − η sign(β₁ m + (1 − β₁) g)
//   m ← β₂ m + (1 − β₂) g
#pragma once

#include "common/math.h"

namespace stepladder {

struct Lion {
  static constexpr const char* kHyper = "lr betas weight_decay";
  static constexpr const char* kStates = "exp_avg";
  static constexpr int kNumStates = 1;

  struct Hyper {
    double lr, beta1, beta2, weight_decay;
  };

  template <class T>
  struct Scalars {
    T lr, beta1, one_minus_beta1, beta2, one_minus_beta2, shrink;
  };

  template <class T>
  SL_HD static Scalars<T> scalars(const Hyper& h, int64_t) {
    return {static_cast<T>(h.lr),    static_cast<T>(h.beta1),       static_cast<T>(1.0 - h.beta1),
            static_cast<T>(h.beta2), static_cast<T>(1.0 - h.beta2), static_cast<T>(1.0 - h.lr * h.weight_decay)};
  }

  template <class T>
  SL_HD static void update(const Scalars<T>& s, T& w, T g, T* state) {
    T& m = state[0];
    w = s.shrink * w - s.lr * sign(s.beta1 * m + s.one_minus_beta1 * g);
    m = s.beta2 * m + s.one_minus_beta2 * g;
  }
};

}  // namespace stepladder
