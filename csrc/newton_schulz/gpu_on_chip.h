// The whole iteration of a matrix in one launch, by one block or a cluster of them: A, then B in its place, stay in
// shared memory, their diagonals apart in fp32, and panels of X, as high as A, pass by. Where all panels fit they stay
// as well (resident); else each is read from the work space, multiplied, added to the next A and written back
// (streamed).
#pragma once

#include "newton_schulz/gpu_tiles.h"

namespace stepladder::newton_schulz {

// How a matrix of kRows x kColumns stands in shared memory: as the sum of kPlanes matrices of bf16.
template <int kRows, int kColumns, int kPlanes>
struct Planes {
  static constexpr int kCount = kPlanes;
  static constexpr int kStride = kColumns + 8;  // apart by a bank group, so that 8 rows are read at once
  static constexpr int kPlane = kRows * kStride, kElements = kPlanes * kPlane;

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
};

// Adds left x right to a warp's part. The product of two second planes is below what fp32 keeps of the others.
template <bool kRightTransposed, class Left, class Right, class Part>
SL_DEVICE void add_product(Part& sum, const bf16* left, const bf16* right, int depth) {
  static_assert(Left::kCount == Right::kCount && Left::kCount <= 2, "operands have the same planes");
  sum.template add_product<kRightTransposed>(left, Left::kStride, right, Right::kStride, depth);
  if (Left::kCount == 1) return;
  sum.template add_product<kRightTransposed>(left + Left::kPlane, Left::kStride, right, Right::kStride, depth);
  sum.template add_product<kRightTransposed>(left, Left::kStride, right + Right::kPlane, Right::kStride, depth);
}

// `put(i, value)` what of two neighbours is the diagonal's element i; zero in its place.
template <class Put>
SL_DEVICE void take_diagonal(int row, int column, float& low, float& high, Put put) {
  if (row == column) {
    put(row, low);
    low = 0.0f;
  }
  if (row == column + 1) {
    put(row, high);
    high = 0.0f;
  }
}

// bA + cA^2 of two neighbours, where A = O + D; `x` and `y` are O's, `low` and `high` those of O^2.
SL_DEVICE void add_polynomial(const Polynomial& p, int row, int column, float x, float y, const float* diagonal,
                              float& low, float& high) {
  const float d = diagonal[row], first = diagonal[column], second = diagonal[column + 1];
  // On the diagonal A's own element is D's.
  x = row == column ? d : x;
  y = row == column + 1 ? d : y;
  low += row == column ? d * d : (d + first) * x;
  high += row == column + 1 ? d * d : (d + second) * y;
  low = p.b * x + p.c * low;
  high = p.b * y + p.c * high;
}

// `Square` is where A and B are, who computes them, and what tiles warps compute of a panel: see SquareOfBlock and
// SquareOfCluster. In a cluster, the panels go round its blocks.
template <class Square, bool kStreamed>
class OnChip {
 public:
  SL_DEVICE explicit OnChip(const OnChipLaunch& launch)
      : launch_(launch),
        elements_(reinterpret_cast<bf16*>(gpu::dynamic_shared())),
        panels_(elements_ + Square::Elements::kElements),
        square_(elements_, reinterpret_cast<double*>(panels_ + launch.slots * Panel::kElements)),
        row_(threadIdx.x / 32 / kWarpsInRow * Part::kRows),
        column_(threadIdx.x / 32 % kWarpsInRow * Part::kColumns) {}

  SL_DEVICE void iterate(const MatrixRecord& matrix) {
    const int rows = whole_parts(matrix.rows);
    const int all = static_cast<int>((matrix.columns + kWidth - 1) / kWidth);
    const int count = (all + Square::kBlocks - 1 - square_.rank()) / Square::kBlocks;
    const double factor = measure(matrix, count);
    typename Square::Gram gram;
    gram.clear();
    for (int j = 0; j < count; ++j) {
      bf16* const to = panel(j);
      gather<kSide, kWidth>(matrix, 0, first_column(j), factor, [&](int r, int c, float value) {
        const bf16 high = to_bf16(value);
        to[r * Panel::kStride + c] = high;
        if (Panel::kCount == 2) to[Panel::kPlane + r * Panel::kStride + c] = to_bf16(value - to_float(high));
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
      square_.put(gram, p.c == 0.0f ? p.b : 1.0f, rows);
      const float* diagonal = square_.diagonal();
      if (p.c != 0.0f) {
        square_.make_polynomial(p, rows);
        diagonal = square_.other_diagonal();
      }
      gram.clear();
      begin_panels(matrix);
      for (int j = 0; j < count; ++j) {
        bf16* const panel = next_panel(matrix, j, count);
        Part x;
        x.clear();
        const bool active = row_ < rows && column_ < columns_of(matrix, j);
        if (active) {
          add_product<false, typename Square::Elements, Panel>(x, elements_ + row_ * Square::Elements::kStride,
                                                               panel + column_, rows);
          x.for_pairs([&](int r, int c, float& low, float& high) {
            float first, second;
            Panel::load(panel + (row_ + r) * Panel::kStride + column_ + c, first, second);
            const float factor = p.a + diagonal[row_ + r];
            low += factor * first;
            high += factor * second;
          });
        }
        if (last) {
          if (active) write_output(matrix, row_, first_column(j) + column_, x);
          continue;
        }
        __syncthreads();
        if (active) {
          x.for_pairs([&](int r, int c, float& low, float& high) {
            Panel::store(panel + (row_ + r) * Panel::kStride + column_ + c, low, high);
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
  static constexpr int kSide = Square::kSide, kWidth = panel_width(kSide, kStreamed);
  using Part = typename Square::template PanelTile<kWidth>;
  using Panel = Planes<kSide, kWidth, Square::Elements::kCount>;
  static constexpr int kWarpsInRow = kWidth / Part::kColumns;
  static_assert(Square::kThreads / 32 >= kSide / Part::kRows * kWarpsInRow, "a warp for each tile");

  SL_DEVICE bf16* panel(int j) const { return panels_ + (kStreamed ? j % launch_.slots : j) * Panel::kElements; }
  // Panel j of this block, in the matrix.
  SL_DEVICE int first_column(int j) const { return (j * Square::kBlocks + square_.rank()) * kWidth; }
  // Of panel j, the columns of whole 16x16 parts that hold any of the matrix.
  SL_DEVICE int columns_of(const MatrixRecord& matrix, int j) const {
    return whole_parts(min(int64_t{kWidth}, matrix.columns - first_column(j)));
  }

  SL_DEVICE double measure(const MatrixRecord& matrix, int count) {
    double sum = 0.0;
    for (int j = 0; j < count; ++j) sum += sum_of_squares<kSide, kWidth>(matrix, 0, first_column(j));
    return launch_.scaling.factor(square_.sum(sum));
  }

  SL_DEVICE void add_gram(const MatrixRecord& matrix, int j, typename Square::Gram& gram) {
    square_.template add_gram<Panel>(gram, panel(j), whole_parts(matrix.rows), columns_of(matrix, j));
  }

  SL_DEVICE void add_all_grams(const MatrixRecord& matrix, int count, typename Square::Gram& gram) {
    __syncthreads();
    for (int j = 0; j < count; ++j) add_gram(matrix, j, gram);
  }

  // Rows divided by the root of the sum of their A's magnitudes; a row of zeros stays one.
  SL_DEVICE void prescale(const MatrixRecord& matrix, int count, typename Square::Gram& gram) {
    square_.put(gram, 1.0f, whole_parts(matrix.rows));
    float* const factors = square_.other_diagonal();
    if (threadIdx.x < kSide) {
      const bf16* const row = elements_ + threadIdx.x * Square::Elements::kStride;
      float sum = fabsf(square_.diagonal()[threadIdx.x]);
      for (int k = 0; k < matrix.rows && static_cast<int>(threadIdx.x) < matrix.rows; ++k)
        sum += fabsf(to_float(row[k]) + (Panel::kCount == 2 ? to_float(row[Square::Elements::kPlane + k]) : 0.0f));
      factors[threadIdx.x] = row_factor(sum);
    }
    __syncthreads();
    gram.clear();
    begin_panels(matrix);
    for (int j = 0; j < count; ++j) {
      bf16* const x = next_panel(matrix, j, count);
      for (int i = threadIdx.x; i < kSide * kWidth / 2; i += Square::kThreads) {
        const int r = i / (kWidth / 2);
        bf16* const at = x + r * Panel::kStride + i % (kWidth / 2) * 2;
        float low, high;
        Panel::load(at, low, high);
        Panel::store(at, low * factors[r], high * factors[r]);
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
  static constexpr int kVectors = Panel::kCount * kSide * kWidth / 8;

  SL_DEVICE Vector vector_at(const MatrixRecord& matrix, int j, int i) const {
    const int plane = i / (kSide * kWidth / 8), r = i / (kWidth / 8) % kSide, c = i % (kWidth / 8) * 8;
    const bool inside = r < matrix.rows && first_column(j) + c < matrix.iterate_stride();
    bf16* const buffer = reinterpret_cast<bf16*>(launch_.workspace + matrix.buffers[plane]);
    return {plane * Panel::kPlane + r * Panel::kStride + c, inside,
            buffer + (inside ? r * matrix.iterate_stride() + first_column(j) + c : 0)};
  }

  SL_DEVICE void start(const MatrixRecord& matrix, int j) {
    bf16* const to = panel(j);
    for (int i = threadIdx.x; i < kVectors; i += Square::kThreads) {
      const Vector v = vector_at(matrix, j, i);
      gpu::copy_async(to + v.place, v.stored, v.inside);
    }
    gpu::commit_copies();
  }

  SL_DEVICE void write_back(const MatrixRecord& matrix, int j) {
    const bf16* const from = panel(j);
    for (int i = threadIdx.x; i < kVectors; i += Square::kThreads) {
      const Vector v = vector_at(matrix, j, i);
      if (v.inside) gpu::store16(v.stored, *reinterpret_cast<const gpu::Bytes16*>(from + v.place));
    }
  }

  const OnChipLaunch& launch_;
  bf16* const elements_;
  bf16* const panels_;
  Square square_;
  const int row_, column_;  // corner of this warp's tile in a panel
};

}  // namespace stepladder::newton_schulz
