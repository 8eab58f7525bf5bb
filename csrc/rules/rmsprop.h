// RMSprop (Tieleman & Hinton, Coursera lecture 6.5, 2012), as torch.optim.RMSprop writes it: ε outside
// the root; centered (Graves 2013, arXiv:1308.0850) and momentum forms.
//   g ← g + λ w
//   v ← α v + (1 − α) g²            a ← a + (1 − α)(g − a)   (centered)
//   d = √v + ε,                     centered: √(v − a²) + ε
//   w ← w − η g / d,                momentum: b ← μ b + g / d,  w ← w − η b
#pragma once

#include "common/math.h"

namespace stepladder {

template <bool kCentered, bool kMomentum>
struct RMSprop {
  static constexpr const char* kHyper = "lr alpha eps weight_decay momentum";
  static constexpr const char* kStates = kCentered && kMomentum ? "square_avg grad_avg momentum_buffer"
                                         : kCentered            ? "square_avg grad_avg"
                                         : kMomentum            ? "square_avg momentum_buffer"
                                                                : "square_avg";
  static constexpr int kNumStates = 1 + kCentered + kMomentum;

  struct Hyper {
    double lr, alpha, eps, weight_decay, momentum;
  };

  template <class T>
  struct Scalars {
    T lr, alpha, one_minus_alpha, eps, weight_decay, momentum;
    Lerp<T> average;
  };

  template <class T>
  SL_HD static Scalars<T> scalars(const Hyper& h, int64_t) {
    return {static_cast<T>(h.lr),        static_cast<T>(h.alpha),        static_cast<T>(1.0 - h.alpha),
            static_cast<T>(h.eps),       static_cast<T>(h.weight_decay), static_cast<T>(h.momentum),
            Lerp<T>::make(1.0 - h.alpha)};
  }

  template <class T>
  SL_HD static void update(const Scalars<T>& s, T& w, T g, T* state) {
    T& v = state[0];
    if (s.weight_decay != T(0)) g = g + s.weight_decay * w;
    v = s.alpha * v + s.one_minus_alpha * g * g;
    T variance = v;
    if constexpr (kCentered) {
      T& a = state[1];
      a = s.average(a, g);
      variance = v - a * a;
    }
    const T denominator = square_root(variance) + s.eps;
    if constexpr (kMomentum) {
      T& b = state[1 + kCentered];
      b = s.momentum * b + g / denominator;
      w = w - s.lr * b;
    } else {
      w = w - s.lr * g / denominator;
    }
  }
};

}  // namespace stepladder
