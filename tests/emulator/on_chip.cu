// Runs the on-chip Newton-Schulz kernels of one size of blocks and of clusters, resident and streamed, and says of each
// which race it had.
#include <cstdio>
#include <vector>

#include "common/error.h"
#include "emulator/run.h"
#include "newton_schulz/gpu_matrix.h"

using namespace stepladder;
using namespace stepladder::newton_schulz;

namespace {

struct Size {
  int side;  // index in kSides
  int rows, columns;
};
constexpr Size kBlock = {1, 60, 200}, kCluster = {3, 130, 250};

void run(const Size& size, bool streamed, int slots, bool prescale) {
  std::vector<float> in(size.rows * size.columns), out(in.size());
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i * 7919 % 1009) - 504.0f;
  std::vector<uint16_t> workspace(2 * size.rows * ((size.columns + 7) / 8 * 8));
  // Two, as what a block does for one must be done with when it begins the next.
  MatrixRecord matrices[2] = {};
  for (int i = 0; i < 2; ++i) {
    matrices[i].in = {in.data(), size.columns, 1, static_cast<int64_t>(DType::f32)};
    matrices[i].out = {out.data(), size.columns, 1, static_cast<int64_t>(DType::f32)};
    matrices[i].rows = size.rows;
    matrices[i].columns = size.columns;
    matrices[i].buffers[0] = static_cast<int64_t>(i * workspace.size());
  }
  OnChipLaunch launch;
  launch.matrices = matrices;
  launch.count = 2;
  launch.workspace = reinterpret_cast<char*>(workspace.data());
  launch.slots = slots;
  launch.prescale = prescale;
  launch.steps = 3;
  launch.polynomials[0] = launch.polynomials[1] = {3.4445f, -4.775f, 2.0315f};
  launch.polynomials[2] = {1.5f, -0.5f, 0.0f};
  const gpu::Kernel& kernel = on_chip_kernel(size.side, streamed);
  const auto shared = static_cast<size_t>(on_chip_bytes(kSides[size.side], streamed, slots));
  const auto cluster = static_cast<unsigned>(kernel.cluster);
  try {
    emulator::run(kernel.call, kernel.function, &launch, cluster, kernel.threads, shared, cluster);
    printf("right\n");
  } catch (const Error& error) {
    printf("error: %s\n", error.what());
  }
}

}  // namespace

int main() {
  for (const bool prescale : {false, true}) {
    run(kBlock, false, 4, prescale);
    for (const int slots : {1, 2, 3}) run(kBlock, true, slots, prescale);
    run(kCluster, false, 2, prescale);
    for (const int slots : {1, 2}) run(kCluster, true, slots, prescale);
  }
}
