// An iteration as a list of phases, each a number of independent tasks on blocks of one matrix.
//
// The matrix is seen with its shorter side first: m×n, m ≤ n, both padded with zeros to multiples of a block.
// Products of symmetric matrices that commute are symmetric: of them, and of XXᵀ, only blocks on and above the
// diagonal are computed, and written to both places.
#pragma once

#include <cstdint>
#include <vector>

#include "newton_schulz/matrix.h"

namespace stepladder::newton_schulz {

constexpr int kBlock = 32;        // rows and columns of the blocks in which products are computed
constexpr int kMacro = 8;         // blocks a side of what a task computes, at the most
constexpr int kPackRows = 2;      // blocks that a task packs: rows
constexpr int kPackCols = 16;     // and columns
constexpr int kMaxSymmetric = 5;  // symmetric buffers, those of the Gram form

constexpr int block_count(int64_t side) { return static_cast<int>((side + kBlock - 1) / kBlock); }

enum class Phase : int32_t {
  norm,      // momentum; sums of squares; X as it is into tiles, where a program packs at once
  pack,      // X from memory, scaled, into tiles
  rows,      // sums of the magnitudes of a symmetric matrix's rows
  gram,      // to ← XXᵀ
  product,   // to ← acc·(left·right) + add·S, S symmetric
  multiply,  // X ← acc·(left·X) + add·X
  small      // all of it in fp32, of a matrix of one block's rows
};

struct Step {
  Phase phase;
  int left = 0, right = 0, added = 0, to = 0;  // symmetric buffers
  float acc = 1.0f, add = 0.0f;
  int also = -1;  // a further symmetric buffer that gets the same with `diagonal` added
  float diagonal = 0.0f;
  bool last = false;  // the result goes to memory
  bool scaled_rows = false;
  bool unscaled = false;  // X's tiles still lack a part of the scale
  int parity = 0;         // which of Operands' two copies of Xᵀ is read; the other is written
  int tasks = 0;
};

// A matrix of one block's rows is iterated on in fp32: rounding would change the singular values of a few rows by more
// than that of many, and packing would take longer than the products.
struct Program {
  int m_blocks, n_blocks, macro;
  bool small;
  // The first phase packs X as it is, and the second, which packs it again, is left out unless the norm is so large or
  // small that the first products would leave the range. The first products are scaled in their epilogues.
  bool packs_at_once;
  int symmetric = 0;  // buffers
  std::vector<Step> steps;

  // `threads` of them share the matrix.
  Program(int64_t rows, int64_t cols, const Options& options, int threads);
  int m_macros() const { return (m_blocks + macro - 1) / macro; }
  int n_macros() const { return (n_blocks + macro - 1) / macro; }
  int pack_rows() const { return (m_blocks + kPackRows - 1) / kPackRows; }
  int pack_columns() const { return (n_blocks + kPackCols - 1) / kPackCols; }

 private:
  void add(Step step);
  void add_standard(const Options& options);
  void add_gram(const Options& options);
  void add_packed(const Options& options);
};

// Steps of the Gram form after which it starts afresh from X: the errors of a Gram matrix in bf16 grow by a² a step.
constexpr size_t kRestartEvery = 2;

}  // namespace stepladder::newton_schulz
