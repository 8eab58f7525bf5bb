#include "newton_schulz/program.h"

#include <algorithm>

#include "common/error.h"

namespace stepladder::newton_schulz {

Program::Program(int64_t rows, int64_t cols, const Options& options, int threads) {
  const int64_t m = std::min(rows, cols), n = std::max(rows, cols);
  m_blocks = block_count(m);
  n_blocks = block_count(n);
  // Threads that share a matrix need more parts of its symmetric products than there are threads, and parts alike.
  macro = kMacro;
  if (threads > 1) {
    int macros = (m_blocks + kMacro - 1) / kMacro;
    while (macros * (macros + 1) / 2 <= threads && macros < (m_blocks + 1) / 2) ++macros;
    macro = (m_blocks + macros - 1) / macros;
  }
  small = m_blocks == 1;
  packs_at_once = !small && !options.aol;
  add({Phase::norm});
  add({Phase::pack});
  small ? add({Phase::small}) : add_packed(options);
  SL_CHECK(symmetric <= kMaxSymmetric, symmetric, " symmetric buffers, expected at most ", kMaxSymmetric);
}

void Program::add_packed(const Options& options) {
  if (options.aol) {
    Step gram{Phase::gram};
    add(gram);
    add({Phase::rows});
    Step again{Phase::pack};
    again.scaled_rows = true;
    add(again);
  }
  options.gram ? add_gram(options) : add_standard(options);
}

void Program::add(Step step) {
  const int macros = m_macros();
  switch (step.phase) {
    case Phase::norm:
    case Phase::pack: step.tasks = pack_rows() * pack_columns(); break;
    case Phase::rows:
    case Phase::small: step.tasks = 1; break;
    case Phase::gram:
    case Phase::product: step.tasks = macros * (macros + 1) / 2; break;
    case Phase::multiply: step.tasks = macros * n_macros(); break;
  }
  if (step.phase != Phase::multiply)
    symmetric = std::max({symmetric, step.left + 1, step.right + 1, step.added + 1, step.to + 1, step.also + 1});
  steps.push_back(step);
}

void Program::add_standard(const Options& options) {
  enum { kGram, kB };
  int parity = 0;
  for (const Triple& t : options.steps) {
    Step gram{Phase::gram};
    gram.to = kGram;
    Step multiply{Phase::multiply};
    multiply.add = static_cast<float>(t.a);
    multiply.parity = parity;
    multiply.last = &t == &options.steps.back();
    gram.unscaled = multiply.unscaled = packs_at_once && &t == &options.steps.front();
    parity ^= 1;
    if (t.c == 0.0) {  // cubic: B = bA
      multiply.left = kGram;
      multiply.acc = static_cast<float>(t.b);
    } else {
      multiply.left = kB;
    }
    add(gram);
    if (t.c != 0.0) {
      Step product{Phase::product};
      product.left = product.right = product.added = kGram;
      product.to = kB;
      product.acc = static_cast<float>(t.c);
      product.add = static_cast<float>(t.b);
      add(product);
    }
    add(multiply);
  }
}

void Program::add_gram(const Options& options) {
  enum { kR, kZ, kP, kQ, kOtherQ };
  const auto product = [&](int left, int right, int to, double acc, double added_scale, int added) {
    Step step{Phase::product};
    step.left = left;
    step.right = right;
    step.to = to;
    step.acc = static_cast<float>(acc);
    step.add = static_cast<float>(added_scale);
    step.added = added;
    return step;
  };
  Step gram{Phase::gram};
  gram.to = kR;
  gram.unscaled = packs_at_once;
  add(gram);
  const auto multiply = [&](int q, int parity, bool last) {
    Step step{Phase::multiply};
    step.left = q;
    step.parity = parity;
    step.last = last;
    step.unscaled = gram.unscaled;
    gram.unscaled = false;
    add(step);
  };
  int q = kQ, parity = 0;
  for (size_t k = 0; k < options.steps.size(); ++k) {
    const Triple& t = options.steps[k];
    const bool fresh = k % kRestartEvery == 0;  // Q stands for the identity
    if (fresh && k > 0) {
      multiply(q, parity, false);
      parity ^= 1;
      add(gram);
    }
    Step z = product(kR, kR, kZ, t.c, t.b, kR);
    if (fresh) {
      q = kQ;
      z.also = q;
      z.diagonal = static_cast<float>(t.a);
      add(z);
    } else {
      add(z);
      const int next = q == kQ ? kOtherQ : kQ;
      add(product(q, kZ, next, 1.0, t.a, q));
      q = next;
    }
    if ((k + 1) % kRestartEvery != 0 && k + 1 != options.steps.size()) {
      add(product(kR, kZ, kP, 1.0, t.a, kR));
      add(product(kZ, kP, kR, 1.0, t.a, kP));
    }
  }
  multiply(q, parity, true);
}

}  // namespace stepladder::newton_schulz
