// AdaGrad (Duchi, Hazan & Singer, JMLR 2011), as torch.optim.Adagrad writes it: ε outside the root.
//   g ← g + λ w
//   G ← G + g²
//   w ← w − η / (1 + (t − 1) δ) · g / (√G + ε)
#pragma once

#include "common/math.h"

namespace stepladder {

struct Adagrad {
  static constexpr const char* kHyper = "lr lr_decay weight_decay eps";
  static constexpr const char* kStates = "sum";
  static constexpr int kNumStates = 1;

  struct Hyper {
    double lr, lr_decay, weight_decay, eps;
  };

  template <class T>
  struct Scalars {
    T lr, weight_decay, eps;
  };

  template <class T>
  SL_HD static Scalars<T> scalars(const Hyper& h, int64_t step) {
    return {static_cast<T>(h.lr / (1.0 + static_cast<double>(step - 1) * h.lr_decay)), static_cast<T>(h.weight_decay),
            static_cast<T>(h.eps)};
  }

  template <class T>
  SL_HD static void update(const Scalars<T>& s, T& w, T g, T* state) {
    T& sum = state[0];
    if (s.weight_decay != T(0)) g = g + s.weight_decay * w;
    sum = sum + g * g;
    w = w - s.lr * g / (square_root(sum) + s.eps);
  }
};

}  // namespace stepladder
