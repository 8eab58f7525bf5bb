// The blocks of a task: a product, block after block, beside the epilogues.
//
// An operand is a matrix of tiles, strips of 16 rows; along a strip, k runs over pairs of columns. The right operand of
// XXᵀ, and of a product of symmetric matrices, has the same tiles turned. They are turned for one column of blocks at a
// time, into a panel that stays in the first cache while all rows pass over it.
#pragma once

#include <optional>

#include "newton_schulz/cpu_epilogues.h"

namespace stepladder::newton_schulz {
namespace SL_UNIT {
namespace {

constexpr int kPassPanels = 4;  // of a pass, whose operands stay in the second cache

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

// Turns tiles into the panel, each after the last product with what lies in its place and before the first product with
// it: so there is one panel, which never leaves the first cache.
class Turning {
 public:
  // What the panel will hold. Tiles are turned in the order in which products read them.
  void begin(const Panel& from, char* to) {
    from_ = from;
    to_ = to;
    done_ = 0;
  }
  // Tiles up to the k-th ones are about to be read.
  void before(int k) {
    while (done_ < 2 * std::min(k + 2, from_.deep)) turn();
  }
  // The k-th tiles were read for the last time.
  void after(int k) {
    if (done_ < 2 * std::min(k + 1, from_.deep)) turn();
  }

 private:
  void turn() {
    const int k = done_ / 2, strip = done_ % 2;
    // The compiler does not know that tiles are loaded from the panel.
    asm volatile("" ::: "memory");
    turn_tile((strip == 0 ? from_.strip0 : from_.strip1) + k * kTileBytes,
              to_ + (strip * kPanelDepth + k) * kTileBytes);
    asm volatile("" ::: "memory");
    ++done_;
  }

  Panel from_{};
  char* to_ = nullptr;
  int done_ = 0;
};

template <class Epilogue>
struct Meanwhile {
  Pending<Epilogue> pending;
  Turning turning;
  bool first = false, last = false;  // of the blocks that read a panel

  void before_step(int k) {
    if (first) turning.before(k);
  }
  void advance(int depth) { pending.advance(depth); }
  void after_step(int k) {
    if (last) turning.after(k);
  }
};

// Blocks of left·right over [rows) × [cols); with `upper`, those on and above the diagonal. `turned`: the right operand
// is given by its rows. `epilogue(i, j, c)` is what becomes of a block. `c`: kMacro² blocks; `panel`: kPanelDepth tiles
// of two strips.
template <class Make>
void multiply_macro(const char* left, const char* right, int depth, Range rows, Range cols, bool upper, bool turned,
                    float* c, char* panel, Make epilogue) {
  // As equal as they can be: each begins and ends with products that wait for one another.
  const int num_panels = (depth + kPanelDepth - 1) / kPanelDepth;
  const int panel_depth = (depth + num_panels - 1) / num_panels, pass_depth = kPassPanels * panel_depth;
  const int64_t strip = int64_t{depth} * kTileBytes;
  const auto panel_at = [&](int j, int k) {
    const char* const at = right + 2 * j * strip + int64_t{k} * kTileBytes;
    return Panel{at, at + strip, std::min(panel_depth, depth - k)};
  };
  const auto last_row = [&](int j) { return upper ? std::min(rows.end, j + 1) : rows.end; };
  Meanwhile<decltype(epilogue(0, 0, c))> meanwhile;
  if (turned) meanwhile.turning.begin(panel_at(cols.begin, 0), panel);
  for (int pass = 0; pass < depth; pass += pass_depth) {
    const int pass_end = std::min(pass + pass_depth, depth);
    for (int j = cols.begin; j < cols.end; ++j) {
      for (int k = pass; k < pass_end; k += panel_depth) {
        Panel right_panel = panel_at(j, k);
        if (turned) {
          right_panel.strip0 = panel;
          right_panel.strip1 = panel + kPanelDepth * kTileBytes;
        }
        std::optional<Panel> next_panel;
        if (k + panel_depth < pass_end)
          next_panel = panel_at(j, k + panel_depth);
        else if (j + 1 < cols.end)
          next_panel = panel_at(j + 1, pass);
        else if (pass_end < depth)
          next_panel = panel_at(cols.begin, pass_end);
        for (int i = rows.begin; i < last_row(j); ++i) {
          const char* const l = left + 2 * i * strip + int64_t{k} * kTileBytes;
          meanwhile.first = turned && i == rows.begin;
          meanwhile.last = turned && i + 1 == last_row(j) && next_panel;
          if (meanwhile.last) {
            if (meanwhile.first) meanwhile.turning.before(right_panel.deep);
            meanwhile.first = false;
            meanwhile.turning.begin(*next_panel, panel);
          }
          // As few as there are under way, so that they stay in the first cache. The epilogue of the block before is
          // done when this one's sums are stored.
          const int place = depth <= panel_depth  ? 0
                            : depth <= pass_depth ? i - rows.begin
                                                  : (j - cols.begin) * kMacro + (i - rows.begin);
          float* const block = c + place * kBlockFloats;
          multiply_block(block, l, l + strip, right_panel.strip0, right_panel.strip1, right_panel.deep, k > 0,
                         meanwhile);
          if (k + panel_depth >= depth) meanwhile.pending.begin([&] { return epilogue(i, j, block); });
        }
      }
    }
  }
  meanwhile.pending.finish();
}

}  // namespace
}  // namespace SL_UNIT
}  // namespace stepladder::newton_schulz
