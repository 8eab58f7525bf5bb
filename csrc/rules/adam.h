// Adam (Kingma & Ba, arXiv:1412.6980, algorithm 1) and AMSGrad (Reddi, Kale & Kumar, ICLR 2018).
//   g ← g + λ w                     (coupled decay; AdamW decouples it, see adamw.h)
//   m ← m + (1 − β₁)(g − m)         v ← β₂ v + (1 − β₂) g²
//   u = v, AMSGrad: u ← max(u, v)
//   w ← w − (η / bc₁) m / (√u / √bc₂ + ε),   bcᵢ = 1 − βᵢᵗ
#pragma once

#include "common/math.h"

namespace stepladder {

template <bool kDecoupled, bool kAmsgrad>
struct AdamRule {
  static constexpr const char* kHyper = "lr betas eps weight_decay";
  static constexpr const char* kStates = kAmsgrad ? "exp_avg exp_avg_sq max_exp_avg_sq" : "exp_avg exp_avg_sq";
  static constexpr int kNumStates = kAmsgrad ? 3 : 2;

  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay;
  };

  template <class T>
  struct Scalars {
    Lerp<T> average;
    T beta2, one_minus_beta2, step_size, inverse_root_bias2, eps, weight_decay, shrink;
  };

  template <class T>
  SL_HD static Scalars<T> scalars(const Hyper& h, int64_t step) {
    const double bias1 = 1.0 - power(h.beta1, step);
    const double bias2 = 1.0 - power(h.beta2, step);
    return {Lerp<T>::make(1.0 - h.beta1),
            static_cast<T>(h.beta2),
            static_cast<T>(1.0 - h.beta2),
            static_cast<T>(h.lr / bias1),
            static_cast<T>(1.0 / square_root(bias2)),
            static_cast<T>(h.eps),
            static_cast<T>(h.weight_decay),
            static_cast<T>(1.0 - h.lr * h.weight_decay)};
  }

  template <class T>
  SL_HD static void update(const Scalars<T>& s, T& w, T g, T* state) {
    T& m = state[0];
    T& v = state[1];
    if constexpr (kDecoupled) {
      w = s.shrink * w;
    } else {
      if (s.weight_decay != T(0)) g = g + s.weight_decay * w;
    }
    m = s.average(m, g);
    v = s.beta2 * v + s.one_minus_beta2 * g * g;
    T second = v;
    if constexpr (kAmsgrad) {
      state[2] = maximum(state[2], v);
      second = state[2];
    }
    w = w - s.step_size * m / (square_root(second) * s.inverse_root_bias2 + s.eps);
  }
};

template <bool kAmsgrad>
using Adam = AdamRule<false, kAmsgrad>;

}  // namespace stepladder
