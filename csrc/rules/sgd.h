// Stochastic gradient descent (Robbins & Monro 1951), with heavy-ball momentum (Polyak 1964) and
// Nesterov's form (Sutskever et al. 2013), as torch.optim.SGD writes them.
//   g ← g + λ w
//   v ← μ v + (1 − τ) g     (the first step: v = g)
//   w ← w − η v,            Nesterov: w ← w − η (g + μ v)
#pragma once

#include "common/math.h"

namespace stepladder {

struct Sgd {
  static constexpr const char* kHyper = "lr weight_decay";
  static constexpr const char* kStates = "";
  static constexpr int kNumStates = 0;

  struct Hyper {
    double lr, weight_decay;
  };

  template <class T>
  struct Scalars {
    T lr, weight_decay;
  };

  template <class T>
  SL_HD static Scalars<T> scalars(const Hyper& h, int64_t) {
    return {static_cast<T>(h.lr), static_cast<T>(h.weight_decay)};
  }

  template <class T>
  SL_HD static void update(const Scalars<T>& s, T& w, T g, T*) {
    if (s.weight_decay != T(0)) g = g + s.weight_decay * w;
    w = w - s.lr * g;
  }
};

struct Momentum {
  static constexpr const char* kHyper = "lr momentum dampening weight_decay nesterov";
  static constexpr const char* kStates = "momentum_buffer";
  static constexpr int kNumStates = 1;

  struct Hyper {
    double lr, momentum, dampening, weight_decay, nesterov;
  };

  template <class T>
  struct Scalars {
    T lr, momentum, one_minus_dampening, weight_decay;
    bool nesterov, first;
  };

  template <class T>
  SL_HD static Scalars<T> scalars(const Hyper& h, int64_t step) {
    return {static_cast<T>(h.lr),           static_cast<T>(h.momentum), static_cast<T>(1.0 - h.dampening),
            static_cast<T>(h.weight_decay), h.nesterov != 0.0,          step == 1};
  }

  template <class T>
  SL_HD static void update(const Scalars<T>& s, T& w, T g, T* state) {
    T& v = state[0];
    if (s.weight_decay != T(0)) g = g + s.weight_decay * w;
    v = s.first ? g : s.momentum * v + s.one_minus_dampening * g;
    w = w - s.lr * (s.nesterov ? g + s.momentum * v : v);
  }
};

}  // namespace stepladder
