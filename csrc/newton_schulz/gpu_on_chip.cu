// Matrices whose smaller side is at most 128, a block for each.
#include "newton_schulz/gpu_on_chip.h"

namespace stepladder::newton_schulz {

namespace {

// How the warps of a block share a product of kSide x kSide.
template <int kSide>
struct Shape;
template <>
struct Shape<32> {
  static constexpr int kThreads = 64, kRows = 32, kColumns = 16;
};
template <>
struct Shape<64> {
  static constexpr int kThreads = 128, kRows = 32, kColumns = 32;
};
template <>
struct Shape<128> {
  static constexpr int kThreads = 256, kRows = 64, kColumns = 32;
};

// A and B of one block: each warp computes one tile of them.
template <int kSquareSide>
class SquareOfBlock {
  using S = Shape<kSquareSide>;

 public:
  static constexpr int kSide = kSquareSide, kThreads = S::kThreads, kBlocks = 1;
  using Elements = Planes<kSide, kSide, planes_of(kSide)>;
  using Gram = Tile<S::kRows, S::kColumns>;
  template <int kWidth>
  using PanelTile = Gram;

  SL_DEVICE SquareOfBlock(bf16* elements, double* scratch)
      : elements_(elements),
        scratch_(scratch),
        diagonal_(reinterpret_cast<float*>(scratch + kScratch)),
        other_diagonal_(diagonal_ + kSide),
        row_(threadIdx.x / 32 / kWarpsInRow * S::kRows),
        column_(threadIdx.x / 32 % kWarpsInRow * S::kColumns) {}

  SL_DEVICE static int rank() { return 0; }
  SL_DEVICE double sum(double value) const { return block_sum(value, scratch_); }
  SL_DEVICE const float* diagonal() const { return diagonal_; }
  SL_DEVICE float* other_diagonal() const { return other_diagonal_; }

  template <class Panel>
  SL_DEVICE void add_gram(Gram& gram, const bf16* x, int rows, int columns) const {
    if (row_ < rows && column_ < rows)
      add_product<true, Panel, Panel>(gram, x + row_ * Panel::kStride, x + column_ * Panel::kStride, columns);
  }

  // What is off the diagonal as bf16, the diagonal apart. Nobody may still read either.
  SL_DEVICE void put(Gram& gram, float factor, int) const {
    gram.for_pairs([&](int r, int c, float& low, float& high) {
      put_pair(row_ + r, column_ + c, factor * low, factor * high, diagonal_);
    });
    __syncthreads();
  }

  // bA + cA^2 in A's place, its diagonal in the other.
  SL_DEVICE void make_polynomial(const Polynomial& p, int rows) const {
    Gram product;
    product.clear();
    if (row_ < rows && column_ < rows)
      add_product<true, Elements, Elements>(product, elements_ + row_ * Elements::kStride,
                                            elements_ + column_ * Elements::kStride, rows);
    __syncthreads();
    product.for_pairs([&](int r, int c, float& low, float& high) {
      const int row = row_ + r, column = column_ + c;
      float x, y;
      Elements::load(elements_ + row * Elements::kStride + column, x, y);
      add_polynomial(p, row, column, x, y, diagonal_, low, high);
      put_pair(row, column, low, high, other_diagonal_);
    });
    __syncthreads();
  }

 private:
  static constexpr int kWarpsInRow = kSide / S::kColumns;
  static_assert(S::kThreads == kSide / S::kRows * kWarpsInRow * 32, "a warp for each tile");

  SL_DEVICE void put_pair(int row, int column, float low, float high, float* diagonal) const {
    take_diagonal(row, column, low, high, [&](int i, float value) { diagonal[i] = value; });
    Elements::store(elements_ + row * Elements::kStride + column, low, high);
  }

  bf16* const elements_;
  double* const scratch_;
  float* const diagonal_;
  float* const other_diagonal_;
  const int row_, column_;  // corner of this warp's tile
};

template <int kSide, bool kStreamed>
SL_DEVICE void iterate_all(const OnChipLaunch& launch) {
  OnChip<SquareOfBlock<kSide>, kStreamed> worker(launch);
  for (int64_t i = blockIdx.x; i < launch.count; i += gridDim.x) worker.iterate(launch.matrices[i]);
}

#define SL_ON_CHIP(side) \
  SL_KERNEL_OF_TWO(Shape<side>::kThreads) \
  resident_##side(SL_ARGUMENTS(OnChipLaunch) launch) { iterate_all<side, false>(launch); } \
  SL_KERNEL(Shape<side>::kThreads) \
  streamed_##side(SL_ARGUMENTS(OnChipLaunch) launch) { iterate_all<side, true>(launch); }
SL_ON_CHIP(32)
SL_ON_CHIP(64)
SL_ON_CHIP(128)

}  // namespace

const gpu::Kernel& on_chip_kernel(int side, bool streamed) {
  static const gpu::Kernel kernels[kNumSides - 1][2] = {
      {gpu::kernel("resident_32", Shape<32>::kThreads, resident_32),
       gpu::kernel("streamed_32", Shape<32>::kThreads, streamed_32)},
      {gpu::kernel("resident_64", Shape<64>::kThreads, resident_64),
       gpu::kernel("streamed_64", Shape<64>::kThreads, streamed_64)},
      {gpu::kernel("resident_128", Shape<128>::kThreads, resident_128),
       gpu::kernel("streamed_128", Shape<128>::kThreads, streamed_128)}};
  return blocks_of(kSides[side]) == 1 ? kernels[side][streamed] : cluster_kernel(streamed);
}

}  // namespace stepladder::newton_schulz
