// The tasks of an iteration. Compiled once for each matrix unit: SL_UNIT names it, SL_AMX chooses tiles. Needs AVX-512
// with bf16.
#include "newton_schulz/cpu_kernels.h"

#include <cmath>

#include "newton_schulz/cpu_macro.h"
#include "newton_schulz/cpu_small.h"

namespace stepladder::newton_schulz {
namespace SL_UNIT {

namespace {

// A thread's memory.
struct Scratch {
  float* c;               // kMacro² blocks
  float *first, *second;  // blocks to read and write memory through
  char *panel, *tiles;    // of two strips; two tiles

  explicit Scratch(char* memory)
      : c(reinterpret_cast<float*>(memory)),
        first(c + kMacro * kMacro * kBlockFloats),
        second(first + kBlockFloats),
        panel(reinterpret_cast<char*>(second + kBlockFloats)),
        tiles(panel + 2 * kPanelDepth * kTileBytes) {}
};

void store_x(const Work& work, int i, int j, const float* c) {
  const XTiles to(work, i, j, 0);
  for (int p = 0; p < kBlock / 2; ++p) to.store(Rows::load(c, p), p);
}

void norm(const Work& work, int task, float* c, float* other) {
  const Program& program = *work.program;
  const Range rows = macro_range(task / program.pack_columns(), kPackRows, program.m_blocks);
  const Range cols = macro_range(task % program.pack_columns(), kPackCols, program.n_blocks);
  __m512d sums[4] = {};
  for (int i = rows.begin; i < rows.end; ++i) {
    for (int j = cols.begin; j < cols.end; ++j) {
      read_update(work, int64_t{i} * kBlock, int64_t{j} * kBlock, true, c, other);
      for (int k = 0; k < kBlockFloats; k += 32) {
        for (int s = 0; s < 4; ++s) {
          const __m512d x = _mm512_cvtps_pd(_mm256_load_ps(c + k + 8 * s));
          sums[s] = _mm512_fmadd_pd(x, x, sums[s]);
        }
      }
      if (program.packs_at_once) store_x(work, i, j, c);
    }
  }
  work.operands.partials[task] =
      _mm512_reduce_add_pd(_mm512_add_pd(_mm512_add_pd(sums[0], sums[1]), _mm512_add_pd(sums[2], sums[3])));
}

void pack(const Work& work, bool scaled_rows, int task, float* c, float* other) {
  const Program& program = *work.program;
  const Range rows = macro_range(task / program.pack_columns(), kPackRows, program.m_blocks);
  const Range cols = macro_range(task % program.pack_columns(), kPackCols, program.n_blocks);
  const __m512 scale0 = _mm512_set1_ps(work.scales[0]), scale1 = _mm512_set1_ps(work.scales[1]);
  for (int i = rows.begin; i < rows.end; ++i) {
    for (int j = cols.begin; j < cols.end; ++j) {
      read_update(work, int64_t{i} * kBlock, int64_t{j} * kBlock, false, c, other);
      for (int r = 0; r < kBlock; ++r) {
        const __m512 row = _mm512_set1_ps(scaled_rows ? work.operands.row_scale[i * kBlock + r] : 1.0f);
        for (int h = 0; h < 2; ++h) {
          float* const at = c + r * kBlock + h * 16;
          const __m512 x = _mm512_mul_ps(_mm512_mul_ps(_mm512_load_ps(at), scale0), scale1);
          _mm512_store_ps(at, _mm512_mul_ps(x, row));
        }
      }
      if (program.small) {
        for (int r = 0; r < kBlock; ++r)
          memcpy(work.operands.small + (int64_t{r} * program.n_blocks + j) * kBlock, c + r * kBlock,
                 kBlock * sizeof(float));
      } else {
        store_x(work, i, j, c);
      }
    }
  }
}

// 1/√(Σⱼ|Aᵢⱼ|) of each row of the first symmetric matrix; 1 for a row of zeros.
void sum_rows(const Work& work) {
  const Program& program = *work.program;
  for (int strip = 0; strip < 2 * program.m_blocks; ++strip) {
    for (int r = 0; r < 16; ++r) {
      __m512 sum = _mm512_setzero_ps();
      for (int k = 0; k < program.m_blocks; ++k) {
        const char* const row = tile(work.operands.symmetric[0], strip, k, program.m_blocks) + r * 64;
        for (int h = 0; h < 2; ++h)
          sum = _mm512_add_ps(sum,
                              _mm512_abs_ps(widen(_mm256_load_si256(reinterpret_cast<const __m256i*>(row + h * 32)))));
      }
      const float total = _mm512_reduce_add_ps(sum) + std::fabs(work.operands.diagonal[0][strip * 16 + r]);
      work.operands.row_scale[strip * 16 + r] = total == 0.0f ? 1.0f : 1.0f / std::sqrt(total);
    }
  }
}

void symmetric(const Work& work, const Step& step, int task, const Scratch& scratch) {
  const Program& program = *work.program;
  const Operands& o = work.operands;
  // Those on the diagonal, which are the smaller ones, come last.
  int distance = 1;
  for (int length = program.m_macros() - 1; task >= length && length > 0; --length) {
    task -= length;
    ++distance;
  }
  if (distance == program.m_macros()) distance = 0;
  const Range rows = macro_range(task, program.macro, program.m_blocks);
  const Range cols = macro_range(task + distance, program.macro, program.m_blocks);
  const bool gram = step.phase == Phase::gram;
  multiply_macro(gram ? o.left : o.symmetric[step.left], gram ? o.left : o.symmetric[step.right],
                 gram ? program.n_blocks : program.m_blocks, rows, cols, distance == 0, true, scratch.c, scratch.panel,
                 [&](int i, int j, float* block) { return NextSymmetric(work, step, i, j, block, scratch.tiles); });
}

void multiply(const Work& work, const Step& step, int task, const Scratch& scratch) {
  const Program& program = *work.program;
  const Operands& o = work.operands;
  const Range rows = macro_range(task % program.m_macros(), program.macro, program.m_blocks);
  const Range cols = macro_range(task / program.m_macros(), program.macro, program.n_blocks);
  multiply_macro(o.symmetric[step.left], o.across[step.parity], program.m_blocks, rows, cols, false, false, scratch.c,
                 scratch.panel,
                 [&](int i, int j, float* block) { return NextX(work, step, i, j, block, scratch.first); });
}

void run(const Work& work, const Step& step, int task, char* memory) {
  const Scratch scratch(memory);
  switch (step.phase) {
    case Phase::norm: return norm(work, task, scratch.first, scratch.second);
    case Phase::pack: return pack(work, step.scaled_rows, task, scratch.first, scratch.second);
    case Phase::rows: return sum_rows(work);
    case Phase::gram:
    case Phase::product: return symmetric(work, step, task, scratch);
    case Phase::multiply: return multiply(work, step, task, scratch);
    case Phase::small: return small(work, scratch.c, scratch.first, scratch.second);
  }
}

}  // namespace

extern const Engine engine;
#define SL_STRINGIFY_(x) #x
#define SL_STRINGIFY(x) SL_STRINGIFY_(x)
const Engine engine = {SL_STRINGIFY(SL_UNIT), kLeastSharedFlops, enter, leave, run};

}  // namespace SL_UNIT
}  // namespace stepladder::newton_schulz
