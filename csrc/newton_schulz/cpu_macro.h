// The blocks of a task: a product, block after block, beside the epilogues.
//
// An operand is a matrix of tiles, strips of 16 rows; along a strip, k runs over pairs of columns. The right operand of
// XXᵀ, and of a product of symmetric matrices, has the same tiles turned. They are turned for one column of blocks at a
// time, into a panel that stays in the first cache while all rows pass over it.
#pragma once

#include "newton_schulz/cpu_epilogues.h"

namespace stepladder::newton_schulz {
namespace SL_UNIT {
namespace {

constexpr int kPassDepth = 64;  // of a pass, whose operands stay in the second cache

struct Range {
  int begin, end;
};

inline Range macro_range(int macro, int size, int blocks) {
  return {macro * size, std::min((macro + 1) * size, blocks)};
}

// Two strips of a right operand, `deep` tiles along k from here.
struct Panel {
  const char *strip0, *strip1;
  int deep;
};

// Makes the next panel in the time of the products with this one.
class Turning {
 public:
  void begin(const Panel& from, char* to, int steps) {
    from_ = from;
    to_ = to;
    total_ = 2 * from.deep;
    done_ = credit_ = 0;
    steps_ = steps;
  }
  void advance() {
    for (credit_ += total_; credit_ >= steps_ && done_ < total_; credit_ -= steps_) turn();
  }
  void finish() {
    while (done_ < total_) turn();
  }

 private:
  void turn() {
    const bool first = done_ < from_.deep;
    const int k = first ? done_ : done_ - from_.deep;
    turn_tile((first ? from_.strip0 : from_.strip1) + k * kTileBytes,
              to_ + ((first ? 0 : kPanelDepth) + k) * kTileBytes);
    ++done_;
  }

  Panel from_{};
  char* to_ = nullptr;
  int total_ = 0, done_ = 0, credit_ = 0, steps_ = 1;
};

template <class Epilogue>
struct Meanwhile {
  Pending<Epilogue> before;
  Turning turning;

  void advance(int depth) {
    before.advance(depth);
    turning.advance();
  }
};

// Blocks of left·right over [rows) × [cols); with `upper`, those on and above the diagonal. `turned`: the right operand
// is given by its rows. `epilogue(i, j, c)` is what becomes of a block. `c`: kMacro² blocks; `panels`: two of them.
template <class Make>
void multiply_macro(const char* left, const char* right, int depth, Range rows, Range cols, bool upper, bool turned,
                    float* c, char* panels, Make epilogue) {
  constexpr int kPanelBytes = 2 * kPanelDepth * kTileBytes;
  const int64_t strip = int64_t{depth} * kTileBytes;
  const auto panel_at = [&](int j, int k) {
    const char* const at = right + 2 * j * strip + int64_t{k} * kTileBytes;
    return Panel{at, at + strip, std::min(kPanelDepth, depth - k)};
  };
  const auto last_row = [&](int j) { return upper ? std::min(rows.end, j + 1) : rows.end; };
  Meanwhile<decltype(epilogue(0, 0, c))> meanwhile;
  int turn = 0, blocks = 0;
  if (turned) {
    meanwhile.turning.begin(panel_at(cols.begin, 0), panels, 1);
    meanwhile.turning.finish();
  }
  for (int pass = 0; pass < depth; pass += kPassDepth) {
    const int pass_end = std::min(pass + kPassDepth, depth);
    for (int j = cols.begin; j < cols.end; ++j) {
      for (int k = pass; k < pass_end; k += kPanelDepth, ++turn) {
        Panel panel = panel_at(j, k);
        if (turned) {
          char* const here = panels + turn % 2 * kPanelBytes;
          panel.strip0 = here;
          panel.strip1 = here + kPanelDepth * kTileBytes;
          const bool same_column = k + kPanelDepth < pass_end, same_pass = same_column || j + 1 < cols.end;
          if (same_pass || pass_end < depth) {
            const int next_j = same_column ? j : same_pass ? j + 1 : cols.begin;
            const int next_k = same_column ? k + kPanelDepth : same_pass ? pass : pass_end;
            meanwhile.turning.begin(panel_at(next_j, next_k), panels + (turn + 1) % 2 * kPanelBytes,
                                    (last_row(j) - rows.begin) * panel.deep);
          }
        }
        for (int i = rows.begin; i < last_row(j); ++i) {
          const char* const l = left + 2 * i * strip + int64_t{k} * kTileBytes;
          // As few as there are under way, so that they stay in the first cache.
          const int place = depth <= kPanelDepth  ? blocks++ % 2
                            : depth <= kPassDepth ? i - rows.begin
                                                  : (j - cols.begin) * kMacro + (i - rows.begin);
          float* const block = c + place * kBlockFloats;
          multiply_block(block, l, l + strip, panel.strip0, panel.strip1, panel.deep, k > 0, meanwhile);
          if (k + kPanelDepth >= depth) meanwhile.before.begin(epilogue(i, j, block));
        }
        meanwhile.turning.finish();
      }
    }
  }
  meanwhile.before.finish();
}

}  // namespace
}  // namespace SL_UNIT
}  // namespace stepladder::newton_schulz
