// Matrices whose smaller side is 129 to 256, a cluster of two blocks for each.
//
// Each block has all of B, as its panels are multiplied by all of it, but of X only every second panel. Of XX^T it
// computes what its panels contribute, on and below the diagonal, and then finishes one half of the tiles: for these it
// gets the other block's sums, and sends it the result in bf16. Of A^2 it computes and sends its half of the tiles.
//
// Two blocks, not four: B takes 132 of a block's 227 KiB, and two blocks have room beside it for 256 columns of X,
// which is a square matrix. Of one, each sends the other 144 KiB a step: 72 of sums, 36 of A and 36 of B. Each of four
// would multiply half as much, and send 216 KiB.
#include "newton_schulz/gpu_on_chip.h"

namespace stepladder::newton_schulz {

namespace {

// Eight warps: the sums of a share are 144 registers of a thread, and nine warps would have 168 each. Of the 36 tiles
// of 32x32 on and below the diagonal a warp has four, and half of one of the last four.
constexpr int kSquareSide = kSides[kNumSides - 1], kWarps = 8, kClusterThreads = 32 * kWarps;
constexpr int kTile = 32, kTilesOfWarp = 4, kOwnTiles = kTilesOfWarp / 2, kHalf = kTilesOfWarp;
static_assert(kSquareSide / kTile * (kSquareSide / kTile + 1) / 2 == kWarps * kTilesOfWarp + kWarps / 2,
              "each tile has a warp");
static_assert(blocks_of(kSquareSide) == 2, "a warp's tiles are shared by two blocks");

struct alignas(16) Quad {
  float of[4];
};

// A thread's part of a tile: four sums to a quad.
template <int kColumns>
struct Sums : Tile<kTile, kColumns> {
  using Base = Tile<kTile, kColumns>;
  static constexpr int kQuads = Base::kRowParts * Base::kColumnParts;
  SL_DEVICE float* quad(int k) { return Base::values[k / Base::kColumnParts][k % Base::kColumnParts]; }
};

// The same in bf16: two words to a quad, each of two neighbours.
template <int kColumns>
struct Packed {
  static constexpr int kQuads = Sums<kColumns>::kQuads, kParts = kQuads / 2;
  gpu::Bytes16 parts[kParts];

  SL_DEVICE void clear() {
    SL_UNROLL
    for (int k = 0; k < kParts; ++k) parts[k] = {};
  }

  SL_DEVICE void pack(Sums<kColumns>& sums) {
    SL_UNROLL
    for (int k = 0; k < kQuads; ++k) {
      const float* const q = sums.quad(k);
      parts[k / 2].word[k % 2 * 2] = gpu::pack_bf16(q[0], q[1]);
      parts[k / 2].word[k % 2 * 2 + 1] = gpu::pack_bf16(q[2], q[3]);
    }
  }

  // `visit(row, column, word)` for each 8x8 elements, by their corner.
  template <class Visit>
  SL_DEVICE void for_words(Visit visit) const {
    SL_UNROLL
    for (int k = 0; k < kQuads; ++k) {
      SL_UNROLL
      for (int half = 0; half < 2; ++half)
        visit(k / (kColumns / 8) * 16 + half * 8, k % (kColumns / 8) * 8, parts[k / 2].word[k % 2 * 2 + half]);
    }
  }
};

// A warp's share: first the tiles that its block finishes, then those of the other; the half belongs to either. Cleared
// even where everything is written before it is read: what is written under a condition alone would be taken for alive
// from one step to the next, and there are no registers for that.
template <template <int> class Piece>
struct Pieces {
  Piece<kTile> tiles[kTilesOfWarp];
  Piece<kTile / 2> half;

  SL_DEVICE void clear() {
    SL_UNROLL
    for (int t = 0; t < kTilesOfWarp; ++t) tiles[t].clear();
    half.clear();
  }
};

class SquareOfCluster {
 public:
  static constexpr int kSide = kSquareSide, kThreads = kClusterThreads, kBlocks = blocks_of(kSquareSide);
  using Elements = Planes<kSide, kSide, planes_of(kSide)>;
  static_assert(Elements::kCount == 1, "tiles are exchanged in one plane");

  // Of a panel, each warp takes 32 rows, so that what it reads of B serves the whole width.
  template <int kWidth>
  using PanelTile = Tile<kTile, kWidth>;

  using Gram = Pieces<Sums>;

  SL_DEVICE SquareOfCluster(bf16* elements, double* scratch)
      : elements_(elements),
        scratch_(scratch),
        diagonal_(reinterpret_cast<float*>(scratch + kScratch)),
        rank_(static_cast<int>(gpu::cluster_rank())) {
    const int warp = static_cast<int>(threadIdx.x / 32);
    SL_UNROLL
    for (int t = 0; t <= kTilesOfWarp; ++t) {
      const int owner = t < kOwnTiles ? rank_ : 1 - rank_;
      // In turns, so that smaller matrices too are shared evenly.
      const int tile =
          t == kHalf ? kWarps * kTilesOfWarp + warp / 2 : (t % kOwnTiles * kBlocks + owner) * kWarps + warp;
      int row = 0;
      while ((row + 1) * (row + 2) / 2 <= tile) ++row;
      rows_[t] = row * kTile;
      columns_[t] = (tile - row * (row + 1) / 2) * kTile + (t == kHalf ? warp % 2 * (kTile / 2) : 0);
    }
    half_is_own_ = warp * kBlocks / kWarps == rank_;
    gpu::cluster_barrier();  // the other block's memory is there
  }

  SL_DEVICE int rank() const { return rank_; }
  SL_DEVICE const float* diagonal() const { return diagonal_; }
  SL_DEVICE float* other_diagonal() const { return diagonal_ + kSide; }

  // Both blocks add the two sums in the same order. Before the next matrix's come these have long been read: `put`
  // waits for all.
  SL_DEVICE double sum(double value) const {
    const double own = block_sum(value, scratch_);
    double* const sums = scratch_ + kWarps;
    if (threadIdx.x == 0) sums[rank_] = *gpu::shared_of(1 - rank_, sums + rank_) = own;
    gpu::cluster_barrier();
    return sums[0] + sums[1];
  }

  template <class Panel>
  SL_DEVICE void add_gram(Gram& gram, const bf16* x, int rows, int columns) const {
    for_pieces(
        rows,
        [&](int t, auto& sums) {
          add_product<true, Panel, Panel>(sums, x + rows_[t] * Panel::kStride, x + columns_[t] * Panel::kStride,
                                          columns);
        },
        gram);
  }

  SL_DEVICE void put(Gram& gram, float factor, int rows) const {
    // The other block is done with its B, in whose place it gets sums, then tiles.
    gpu::cluster_barrier();
    Quad* const sent = gpu::shared_of(1 - rank_, sums_of_thread());
    for_pieces(
        rows,
        [&](int t, auto& sums) {
          if (is_own(t)) return;
          SL_UNROLL
          for (int k = 0; k < sums.kQuads; ++k) {
            const float* const q = sums.quad(k);
            sent[(slot(t) * kQuads + k) * kThreads] = {{q[0], q[1], q[2], q[3]}};
          }
        },
        gram);
    gpu::cluster_barrier();
    const Quad* const received = sums_of_thread();
    for_pieces(
        rows,
        [&](int t, auto& sums) {
          if (!is_own(t)) return;
          SL_UNROLL
          for (int k = 0; k < sums.kQuads; ++k) {
            float* const q = sums.quad(k);
            const Quad other = received[(slot(t) * kQuads + k) * kThreads];
            SL_UNROLL
            for (int i = 0; i < 4; ++i) q[i] = factor * (q[i] + other.of[i]);
          }
        },
        gram);
    share(gram, diagonal_, rows);
  }

  // bA + cA^2 in A's place, its diagonal in the other.
  SL_DEVICE void make_polynomial(const Polynomial& p, int rows) const {
    Gram product;
    product.clear();
    for_pieces(
        rows,
        [&](int t, auto& sums) {
          if (!is_own(t)) return;
          add_product<true, Elements, Elements>(sums, elements_ + rows_[t] * Elements::kStride,
                                                elements_ + columns_[t] * Elements::kStride, rows);
          sums.for_pairs([&](int r, int c, float& low, float& high) {
            const int row = rows_[t] + r, column = columns_[t] + c;
            float x, y;
            Elements::load(elements_ + row * Elements::kStride + column, x, y);
            add_polynomial(p, row, column, x, y, diagonal_, low, high);
          });
        },
        product);
    gpu::cluster_barrier();  // nobody reads A any more
    share(product, other_diagonal(), rows);
  }

 private:
  // What a block receives while it has neither A nor B: sums of its own tiles, as [slot][quad][thread], then the other
  // block's tiles, as [slot][part][thread].
  static constexpr int kQuads = Sums<kTile>::kQuads;
  static constexpr int kSums = (kOwnTiles * kQuads + Sums<kTile / 2>::kQuads) * kThreads;
  static_assert((kSums + kSums / 2) * 16 <= Elements::kElements * static_cast<int>(sizeof(bf16)), "there is room");
  static_assert(kWarps + kBlocks <= kScratch, "there is room for the sums");

  SL_DEVICE Quad* sums_of_thread() const { return reinterpret_cast<Quad*>(elements_) + threadIdx.x; }
  SL_DEVICE gpu::Bytes16* packed_of_thread() const {
    return reinterpret_cast<gpu::Bytes16*>(elements_) + kSums + threadIdx.x;
  }

  // Among those that a thread sends or gets.
  SL_DEVICE static int slot(int t) { return t == kHalf ? kOwnTiles : t % kOwnTiles; }
  SL_DEVICE bool is_own(int t) const { return t < kOwnTiles || (t == kHalf && half_is_own_); }

  // `visit(t, piece...)` for those that hold any of the matrix.
  template <class Visit, class... All>
  SL_DEVICE void for_pieces(int rows, Visit visit, All&... all) const {
    SL_UNROLL
    for (int t = 0; t < kTilesOfWarp; ++t)
      if (rows_[t] < rows) visit(t, all.tiles[t]...);
    if (rows_[kHalf] < rows) visit(kHalf, all.half...);
  }

  // This block's tiles to the other, its tiles here, all in both their places; the diagonal apart.
  SL_DEVICE void share(Gram& gram, float* diagonal, int rows) const {
    gpu::Bytes16* const sent = gpu::shared_of(1 - rank_, packed_of_thread());
    float* const sent_diagonal = gpu::shared_of(1 - rank_, diagonal);
    Pieces<Packed> all;
    all.clear();
    for_pieces(
        rows,
        [&](int t, auto& sums, auto& packed) {
          if (!is_own(t)) return;
          if (on_diagonal(t)) {
            sums.for_pairs([&](int r, int c, float& low, float& high) {
              take_diagonal(rows_[t] + r, columns_[t] + c, low, high,
                            [&](int i, float value) { diagonal[i] = sent_diagonal[i] = value; });
            });
          }
          packed.pack(sums);
          SL_UNROLL
          for (int k = 0; k < packed.kParts; ++k) sent[(slot(t) * kQuads / 2 + k) * kThreads] = packed.parts[k];
        },
        gram, all);
    gpu::cluster_barrier();
    const gpu::Bytes16* const received = packed_of_thread();
    for_pieces(
        rows,
        [&](int t, auto& packed) {
          if (is_own(t)) return;
          SL_UNROLL
          for (int k = 0; k < packed.kParts; ++k) packed.parts[k] = received[(slot(t) * kQuads / 2 + k) * kThreads];
        },
        all);
    __syncthreads();
    const int across = threadIdx.x % 32 / 4, along = threadIdx.x % 4 * 2;
    for_pieces(
        rows,
        [&](int t, auto& packed) {
          packed.for_words([&](int r, int c, uint32_t word) {
            store_word(rows_[t] + r + across, columns_[t] + c + along, word);
            if (!on_diagonal(t))
              store_word(columns_[t] + c + across, rows_[t] + r + along, gpu::transpose_matrix(word));
          });
        },
        all);
    __syncthreads();
  }

  SL_DEVICE bool on_diagonal(int t) const { return columns_[t] >= rows_[t]; }

  SL_DEVICE void store_word(int row, int column, uint32_t word) const {
    *reinterpret_cast<uint32_t*>(elements_ + row * Elements::kStride + column) = word;
  }

  bf16* const elements_;
  double* const scratch_;
  float* const diagonal_;
  const int rank_;
  int rows_[kTilesOfWarp + 1], columns_[kTilesOfWarp + 1];  // corners of this warp's tiles
  bool half_is_own_;
};

template <bool kStreamed>
SL_DEVICE void iterate_all(const OnChipLaunch& launch) {
  OnChip<SquareOfCluster, kStreamed> worker(launch);
  for (int64_t i = blockIdx.x / SquareOfCluster::kBlocks; i < launch.count; i += gridDim.x / SquareOfCluster::kBlocks)
    worker.iterate(launch.matrices[i]);
}

SL_KERNEL(kClusterThreads)
resident_256(SL_ARGUMENTS(OnChipLaunch) launch) { iterate_all<false>(launch); }
SL_KERNEL(kClusterThreads)
streamed_256(SL_ARGUMENTS(OnChipLaunch) launch) { iterate_all<true>(launch); }

gpu::Kernel of_cluster(gpu::Kernel kernel) {
  kernel.cluster = SquareOfCluster::kBlocks;
  return kernel;
}

}  // namespace

const gpu::Kernel& cluster_kernel(bool streamed) {
  static const gpu::Kernel kernels[2] = {of_cluster(gpu::kernel("resident_256", kClusterThreads, resident_256)),
                                         of_cluster(gpu::kernel("streamed_256", kClusterThreads, streamed_256))};
  return kernels[streamed];
}

}  // namespace stepladder::newton_schulz
