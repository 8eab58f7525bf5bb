// AdamW: decoupled weight decay (Loshchilov & Hutter, arXiv:1711.05101, algorithm 2).
//   w ← (1 − η λ) w, then Adam (adam.h) without λ in the gradient
#pragma once

#include "rules/adam.h"

namespace stepladder {

template <bool kAmsgrad>
using AdamW = AdamRule<true, kAmsgrad>;

}  // namespace stepladder
