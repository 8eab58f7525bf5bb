// LAMB: layer-wise adaptive moments (You et al., arXiv:1904.00962, algorithm 2).
//   m ← m + (1 − β₁)(g − m)         v ← β₂ v + (1 − β₂) g²
//   r = (m / bc₁) / (√v / √bc₂ + ε) + λ w,   bcᵢ = 1 − βᵢᵗ
//   w ← w − η (‖w‖ / ‖r‖) r,        the ratio 1 where a norm is 0
#pragma once

#include "common/math.h"

namespace stepladder {

struct Lamb {
  static constexpr const char* kHyper = "lr betas eps weight_decay";
  static constexpr const char* kStates = "exp_avg exp_avg_sq";
  static constexpr int kNumStates = 2;
  static constexpr int kNumPrepared = 2;  // of them, those that the first pass reads or writes

  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay;
  };

  template <class T>
  struct Scalars {
    Lerp<T> average;
    T beta2, one_minus_beta2, inverse_bias1, inverse_root_bias2, lr, eps, weight_decay;
  };

  template <class T>
  SL_HD static Scalars<T> scalars(const Hyper& h, int64_t step) {
    return {Lerp<T>::make(1.0 - h.beta1),
            static_cast<T>(h.beta2),
            static_cast<T>(1.0 - h.beta2),
            static_cast<T>(1.0 / (1.0 - power(h.beta1, step))),
            static_cast<T>(1.0 / square_root(1.0 - power(h.beta2, step))),
            static_cast<T>(h.lr),
            static_cast<T>(h.eps),
            static_cast<T>(h.weight_decay)};
  }

  template <class T>
  SL_HD static void prepare(const Scalars<T>& s, T g, T* state) {
    state[0] = s.average(state[0], g);
    state[1] = s.beta2 * state[1] + s.one_minus_beta2 * g * g;
  }

  // The direction is made from the moments as they are stored, so that both passes see the same values.
  template <class T>
  SL_HD static T direction(const Scalars<T>& s, T w, const T* state) {
    const T adam = s.inverse_bias1 * state[0] / (square_root(state[1]) * s.inverse_root_bias2 + s.eps);
    return adam + s.weight_decay * w;
  }

  template <class T>
  SL_HD static void measure(const Scalars<T>& s, T w, T, const T* state, T& first, T& second) {
    first = w;
    second = direction(s, w, state);
  }

  template <class T>
  SL_HD static T ratio(const Scalars<T>&, T weight_norm, T direction_norm) {
    return weight_norm == T(0) || direction_norm == T(0) ? T(1) : weight_norm / direction_norm;
  }

  template <class T>
  SL_HD static void apply(const Scalars<T>& s, T ratio, T& w, T, T* state) {
    w = w - s.lr * ratio * direction(s, w, state);
  }
};

}  // namespace stepladder
