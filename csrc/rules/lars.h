// LARS: layer-wise adaptive rates (You, Gitman & Ginsburg, arXiv:1708.03888, algorithm 1).
//   ρ = ξ ‖w‖ / (‖g‖ + λ ‖w‖ + ε),   1 where ‖w‖ or ‖g‖ is 0
//   v ← μ v + ρ (g + λ w)
//   w ← w − η v
#pragma once

#include "common/math.h"

namespace stepladder {

struct Lars {
  static constexpr const char* kHyper = "lr momentum weight_decay trust_coefficient eps";
  static constexpr const char* kStates = "momentum_buffer";
  static constexpr int kNumStates = 1;
  static constexpr int kNumPrepared = 0;  // of them, those that the first pass reads or writes

  struct Hyper {
    double lr, momentum, weight_decay, trust_coefficient, eps;
  };

  template <class T>
  struct Scalars {
    T lr, momentum, weight_decay, trust_coefficient, eps;
  };

  template <class T>
  SL_HD static Scalars<T> scalars(const Hyper& h, int64_t) {
    return {static_cast<T>(h.lr), static_cast<T>(h.momentum), static_cast<T>(h.weight_decay),
            static_cast<T>(h.trust_coefficient), static_cast<T>(h.eps)};
  }

  // Norm-based rules come in three parts: states first, then two values whose norms are taken over the
  // whole tensor, then the update with the ratio made from the norms.
  template <class T>
  SL_HD static void prepare(const Scalars<T>&, T, T*) {}

  template <class T>
  SL_HD static void measure(const Scalars<T>&, T w, T g, const T*, T& first, T& second) {
    first = w;
    second = g;
  }

  template <class T>
  SL_HD static T ratio(const Scalars<T>& s, T weight_norm, T gradient_norm) {
    const T trust = s.trust_coefficient * weight_norm / (gradient_norm + s.weight_decay * weight_norm + s.eps);
    return weight_norm == T(0) || gradient_norm == T(0) ? T(1) : trust;
  }

  template <class T>
  SL_HD static void apply(const Scalars<T>& s, T ratio, T& w, T g, T* state) {
    T& v = state[0];
    v = s.momentum * v + ratio * (g + s.weight_decay * w);
    w = w - s.lr * v;
  }
};

}  // namespace stepladder
