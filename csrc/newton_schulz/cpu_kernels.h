// The tasks of an iteration on the CPU, once for each matrix unit they were compiled for.
//
// Operands are bf16 in tiles of 16 rows of 64 bytes, strips of them contiguous along the inner dimension k:
//   left   tile (i, k): rows 16i.. of the operand, 32 elements along k each
//   right  tile (j, k): 16 pairs of elements along k, for 16 columns of the product each
// The right tile of XXᵀ is the left one turned: its transpose as a 16×16 matrix of pairs. Only left tiles are kept of
// it and of symmetric matrices, and turned where a product reads them (cpu_macro.h).
//
// The diagonal D of a symmetric matrix D + O is kept apart in fp32, and products with it are added in the epilogue. As
// X nears an orthogonal matrix its Gram matrix nears the identity, and a rounded diagonal would be nearly all of the
// error: enough to make "polar_express" and "cans" diverge, whose singular values come within 2 % of where they grow.
#pragma once

#include <cstddef>
#include <vector>

#include "newton_schulz/matrix.h"
#include "newton_schulz/program.h"

namespace stepladder::newton_schulz {

constexpr int kTileBytes = 1024;
constexpr int kPanelDepth = 16;  // tiles along k of a panel of two strips

// The operands of one matrix in its workspace.
struct Operands {
  float* small = nullptr;               // X in fp32 of a small matrix, in place of its tiles; [32, n]
  char* left = nullptr;                 // X, pairs along n; [m/16, n/32] tiles
  char* across[2] = {};                 // Xᵀ, pairs along m: what B is multiplied by; [n/16, m/32]
  char* symmetric[kMaxSymmetric] = {};  // [m/16, m/32]
  float* diagonal[kMaxSymmetric] = {};  // [m], of the symmetric ones, whose tiles have zeros there
  float* row_scale = nullptr;           // [m]
  double* partials = nullptr;           // sums of squares, one for each task
};

// One matrix under way.
struct Work {
  const Job* job = nullptr;
  const Program* program = nullptr;
  Operands operands;
  int64_t m = 0, n = 0;
  View in, out, buffer;      // seen as m×n
  float scales[2] = {};      // what packing multiplies X by
  float scale = 1.0f;        // what X's tiles lack then
  bool past_caches = false;  // all results together would push everything else out of the caches
};

struct Engine {
  const char* name;
  // Of a thread that shares a matrix with others: with fewer operations it costs more than it gains.
  double least_shared_flops;
  // Around a thread's tasks.
  void (*enter)();
  void (*leave)();
  // `scratch`: kScratchBytes of this thread's own, aligned to 64.
  void (*run)(const Work& work, const Step& step, int task, char* scratch);
};

// Blocks of a task's product in fp32, two more to read and write memory through, a panel of its right operand, and two
// tiles.
constexpr size_t kScratchBytes =
    (kMacro * kMacro + 2) * kBlock * kBlock * sizeof(float) + (2 * kPanelDepth + 2) * kTileBytes;

// The fastest engine that was compiled in and runs here, or the one of that name; null where there is none.
const Engine* cpu_engine(const char* name);
std::vector<const char*> supported_engines();

}  // namespace stepladder::newton_schulz
