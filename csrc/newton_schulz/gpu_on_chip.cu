// The whole iteration in one launch, a block for each matrix whose smaller side fits: A, then B in its place, stay in
// shared memory, their diagonals apart in fp32, and panels of X, each as wide as A, pass by. Where all panels fit they
// stay as well (resident); else each is read from the work space, multiplied, added to the next A and written back
// (streamed).
#include "newton_schulz/gpu_tiles.h"

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

template <int kSide, bool kStreamed>
class OnChip {
 public:
  SL_DEVICE explicit OnChip(const OnChipLaunch& launch)
      : launch_(launch),
        square_(reinterpret_cast<bf16*>(gpu::dynamic_shared())),
        panels_(square_ + kPanel),
        scratch_(reinterpret_cast<double*>(panels_ + launch.slots * kPanel)),
        diagonal_(reinterpret_cast<float*>(scratch_ + 32)),
        other_diagonal_(diagonal_ + kSide),
        row_(threadIdx.x / 32 / kWarpsInRow * S::kRows),
        column_(threadIdx.x / 32 % kWarpsInRow * S::kColumns) {}

  SL_DEVICE void iterate(const MatrixRecord& matrix) {
    const int rows = whole_parts(matrix.rows);
    const int count = static_cast<int>((matrix.columns + kSide - 1) / kSide);
    const bool in_square = row_ < rows && column_ < rows;
    const double factor = measure(matrix, count);
    Part gram;
    gram.clear();
    for (int j = 0; j < count; ++j) {
      bf16* const to = panel(j);
      gather<kSide, kSide>(matrix, 0, j * kSide, factor, [&](int r, int c, float value) {
        const bf16 high = to_bf16(value);
        to[r * kStride + c] = high;
        if (kPlanes == 2) to[kPlane + r * kStride + c] = to_bf16(value - to_float(high));
      });
      if (!kStreamed) continue;
      __syncthreads();
      add_gram(matrix, j, gram);
      write_back(matrix, j);
      __syncthreads();
    }
    if (!kStreamed) add_all_grams(matrix, count, gram);
    if (launch_.prescale) prescale(matrix, count, gram);

    for (int s = 0; s < launch_.steps; ++s) {
      const Polynomial p = launch_.polynomials[s];
      const bool last = s + 1 == launch_.steps;
      put_square(gram, p.c == 0.0f ? p.b : 1.0f);
      const float* diagonal = diagonal_;
      if (p.c != 0.0f) {
        Part product;
        product.clear();
        if (in_square) add_product<true>(product, square_ + row_ * kStride, square_ + column_ * kStride, rows);
        __syncthreads();
        square_polynomial(p, product);
        diagonal = other_diagonal_;
      }
      gram.clear();
      begin_panels(matrix);
      for (int j = 0; j < count; ++j) {
        bf16* const panel = next_panel(matrix, j, count);
        Part x;
        x.clear();
        const bool active = row_ < rows && column_ < columns_of(matrix, j);
        if (active) {
          add_product<false>(x, square_ + row_ * kStride, panel + column_, rows);
          x.for_pairs([&](int r, int c, float& low, float& high) {
            float first, second;
            load(panel + (row_ + r) * kStride + column_ + c, first, second);
            const float factor = p.a + diagonal[row_ + r];
            low += factor * first;
            high += factor * second;
          });
        }
        if (last) {
          if (active) write_output(matrix, row_, j * kSide + column_, x);
          continue;
        }
        __syncthreads();
        if (active) {
          x.for_pairs([&](int r, int c, float& low, float& high) {
            store(panel + (row_ + r) * kStride + column_ + c, low, high);
          });
        }
        if (!kStreamed) continue;
        __syncthreads();
        add_gram(matrix, j, gram);
        write_back(matrix, j);
      }
      if (!kStreamed && !last) add_all_grams(matrix, count, gram);
    }
  }

 private:
  using S = Shape<kSide>;
  using Part = Tile<S::kRows, S::kColumns>;
  static constexpr int kWarpsInRow = kSide / S::kColumns;
  static constexpr int kStride = kSide + 8;  // apart by a bank group, so that 8 rows are read at once
  static constexpr int kPlanes = planes_of(kSide);
  static constexpr int kPlane = kSide * kStride, kPanel = kPlanes * kPlane;
  static_assert(S::kThreads == kSide / S::kRows * kWarpsInRow * 32, "a warp for each tile");

  // Two neighbours in memory, summed over the planes, and split into them.
  SL_DEVICE static void load(const bf16* from, float& low, float& high) {
    const Pair pair = load_pair(from);
    low = pair.low();
    high = pair.high();
    if (kPlanes == 1) return;
    const Pair rest = load_pair(from + kPlane);
    low += rest.low();
    high += rest.high();
  }

  SL_DEVICE static void store(bf16* to, float low, float high) {
    store_pair(to, low, high);
    if (kPlanes == 1) return;
    const Pair pair = load_pair(to);
    store_pair(to + kPlane, low - pair.low(), high - pair.high());
  }

  // The product of two second planes is below what fp32 keeps of the others.
  template <bool kRightTransposed>
  SL_DEVICE static void add_product(Part& sum, const bf16* left, const bf16* right, int depth) {
    sum.template add_product<kRightTransposed>(left, kStride, right, kStride, depth);
    if (kPlanes == 1) return;
    sum.template add_product<kRightTransposed>(left + kPlane, kStride, right, kStride, depth);
    sum.template add_product<kRightTransposed>(left, kStride, right + kPlane, kStride, depth);
  }

  SL_DEVICE bf16* panel(int j) const { return panels_ + (kStreamed ? j % launch_.slots : j) * kPanel; }
  // Of panel j, the columns of whole 16x16 parts that hold any of the matrix.
  SL_DEVICE static int columns_of(const MatrixRecord& matrix, int j) {
    return whole_parts(min(int64_t{kSide}, matrix.columns - j * kSide));
  }

  SL_DEVICE double measure(const MatrixRecord& matrix, int count) {
    double sum = 0.0;
    for (int j = 0; j < count; ++j) sum += sum_of_squares<kSide, kSide>(matrix, 0, j * kSide);
    return launch_.scaling.factor(block_sum(sum, scratch_));
  }

  SL_DEVICE void add_gram(const MatrixRecord& matrix, int j, Part& gram) {
    const int rows = whole_parts(matrix.rows);
    const bf16* const x = panel(j);
    if (row_ < rows && column_ < rows)
      add_product<true>(gram, x + row_ * kStride, x + column_ * kStride, columns_of(matrix, j));
  }

  SL_DEVICE void add_all_grams(const MatrixRecord& matrix, int count, Part& gram) {
    __syncthreads();
    for (int j = 0; j < count; ++j) add_gram(matrix, j, gram);
  }

  // What is off the diagonal as bf16, the diagonal apart. Nobody may still read either.
  SL_DEVICE void put_square(Part& gram, float factor) {
    gram.for_pairs([&](int r, int c, float& low, float& high) {
      put(row_ + r, column_ + c, factor * low, factor * high, diagonal_);
    });
    __syncthreads();
  }

  SL_DEVICE void put(int row, int column, float low, float high, float* diagonal) {
    if (row == column) diagonal[row] = low;
    if (row == column + 1) diagonal[row] = high;
    store(square_ + row * kStride + column, row == column ? 0.0f : low, row == column + 1 ? 0.0f : high);
  }

  // bA + cA^2 in A's place, where A = O + D and `product` is O^2.
  SL_DEVICE void square_polynomial(const Polynomial& p, Part& product) {
    product.for_pairs([&](int r, int c, float& low, float& high) {
      const int row = row_ + r, column = column_ + c;
      float x, y;
      load(square_ + row * kStride + column, x, y);
      const float d = diagonal_[row], first = diagonal_[column], second = diagonal_[column + 1];
      // On the diagonal A's own element is D's.
      x = row == column ? d : x;
      y = row == column + 1 ? d : y;
      low += row == column ? d * d : (d + first) * x;
      high += row == column + 1 ? d * d : (d + second) * y;
      put(row, column, p.b * x + p.c * low, p.b * y + p.c * high, other_diagonal_);
    });
    __syncthreads();
  }

  // Rows divided by the root of the sum of their A's magnitudes; a row of zeros stays one.
  SL_DEVICE void prescale(const MatrixRecord& matrix, int count, Part& gram) {
    put_square(gram, 1.0f);
    float* const factors = other_diagonal_;
    if (threadIdx.x < kSide) {
      float sum = fabsf(diagonal_[threadIdx.x]);
      for (int k = 0; k < matrix.rows && static_cast<int>(threadIdx.x) < matrix.rows; ++k)
        sum += fabsf(to_float(square_[threadIdx.x * kStride + k]) +
                     (kPlanes == 2 ? to_float(square_[kPlane + threadIdx.x * kStride + k]) : 0.0f));
      factors[threadIdx.x] = row_factor(sum);
    }
    __syncthreads();
    gram.clear();
    begin_panels(matrix);
    for (int j = 0; j < count; ++j) {
      bf16* const x = next_panel(matrix, j, count);
      for (int i = threadIdx.x; i < kSide * kSide / 2; i += S::kThreads) {
        const int r = i / (kSide / 2);
        bf16* const at = x + r * kStride + i % (kSide / 2) * 2;
        float low, high;
        load(at, low, high);
        store(at, low * factors[r], high * factors[r]);
      }
      if (!kStreamed) continue;
      __syncthreads();
      add_gram(matrix, j, gram);
      write_back(matrix, j);
    }
    if (!kStreamed) add_all_grams(matrix, count, gram);
  }

  // Streamed panels pass through the slots in turn; the next is on its way while one is worked on.
  SL_DEVICE void begin_panels(const MatrixRecord& matrix) {
    if (kStreamed && launch_.slots > 1) start(matrix, 0);
  }

  SL_DEVICE bf16* next_panel(const MatrixRecord& matrix, int j, int count) {
    if (kStreamed) {
      if (launch_.slots == 1) {
        __syncthreads();  // nobody reads the panel before any more
        start(matrix, j);
      }
      gpu::wait_for_copies<0>();
      __syncthreads();
      if (launch_.slots > 1 && j + 1 < count) start(matrix, j + 1);
    }
    return panel(j);
  }

  // Vector i of a panel: which plane it is in, where in the panel, and where in the work space.
  struct Vector {
    int place;
    bool inside;
    bf16* stored;
  };
  static constexpr int kVectors = kPlanes * kSide * kSide / 8;

  SL_DEVICE Vector vector_at(const MatrixRecord& matrix, int j, int i) const {
    const int plane = i / (kSide * kSide / 8), r = i / (kSide / 8) % kSide, c = i % (kSide / 8) * 8;
    const bool inside = r < matrix.rows && j * kSide + c < matrix.iterate_stride();
    bf16* const buffer = reinterpret_cast<bf16*>(launch_.workspace + matrix.buffers[plane]);
    return {plane * kPlane + r * kStride + c, inside,
            buffer + (inside ? r * matrix.iterate_stride() + j * kSide + c : 0)};
  }

  SL_DEVICE void start(const MatrixRecord& matrix, int j) {
    bf16* const to = panel(j);
    for (int i = threadIdx.x; i < kVectors; i += S::kThreads) {
      const Vector v = vector_at(matrix, j, i);
      gpu::copy_async(to + v.place, v.stored, v.inside);
    }
    gpu::commit_copies();
  }

  SL_DEVICE void write_back(const MatrixRecord& matrix, int j) {
    const bf16* const from = panel(j);
    for (int i = threadIdx.x; i < kVectors; i += S::kThreads) {
      const Vector v = vector_at(matrix, j, i);
      if (v.inside) gpu::store16(v.stored, *reinterpret_cast<const gpu::Bytes16*>(from + v.place));
    }
  }

  const OnChipLaunch& launch_;
  bf16* const square_;
  bf16* const panels_;
  double* const scratch_;
  float* const diagonal_;
  float* const other_diagonal_;
  const int row_, column_;  // corner of this warp's tile
};

template <int kSide, bool kStreamed>
SL_DEVICE void iterate_all(const OnChipLaunch& launch) {
  OnChip<kSide, kStreamed> worker(launch);
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
  static const gpu::Kernel kernels[kNumSides][2] = {{gpu::kernel("resident_32", Shape<32>::kThreads, resident_32),
                                                     gpu::kernel("streamed_32", Shape<32>::kThreads, streamed_32)},
                                                    {gpu::kernel("resident_64", Shape<64>::kThreads, resident_64),
                                                     gpu::kernel("streamed_64", Shape<64>::kThreads, streamed_64)},
                                                    {gpu::kernel("resident_128", Shape<128>::kThreads, resident_128),
                                                     gpu::kernel("streamed_128", Shape<128>::kThreads, streamed_128)}};
  return kernels[side][streamed];
}

}  // namespace stepladder::newton_schulz
