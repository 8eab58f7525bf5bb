// What an iteration begins with where torch multiplies: matrices divided by their norms, in the dtype of the products.
#pragma once

#include <cstdint>
#include <vector>

#include "newton_schulz/matrix.h"

namespace stepladder::newton_schulz {

struct Normalised {
  int64_t rows = 0, cols = 0;
  View from, to;  // to: fp32 or bf16
};

// to ← from / (max(‖from‖F, eps)·divisor) for each matrix, in two passes over it. The sum of squares is taken in fp64,
// in an order that depends on the matrix's shape alone.
using Normalise = void (*)(const std::vector<Normalised>& matrices, double eps, double divisor, int threads);

}  // namespace stepladder::newton_schulz
