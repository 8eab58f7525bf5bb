#include "matrix_root/gpu_iteration.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/error.h"

namespace stepladder::matrix_root {

namespace {

// Distances between elements are counted in 32 bits.
constexpr int64_t kMaxSide = 1 << 15;

void check(const Stack& stack) {
  SL_CHECK(stack.count >= 0 && stack.n >= 0 && stack.n <= kMaxSide, "there are ", stack.count, " matrices of side ",
           stack.n, ", expected none or more, of a side from 0 to ", kMaxSide);
  if (stack.count == 0 || stack.n == 0) return;
  check_address(stack.in, sizeof(float), "in");
  check_address(stack.out, sizeof(float), "out");
  check_address(stack.iterations, sizeof(int32_t), "iterations");
  check_address(stack.status, sizeof(int8_t), "status");
}

void check(const Attempt& attempt) {
  SL_CHECK(attempt.num_starts >= 1 && attempt.num_starts <= kMaxStarts, "there are ", attempt.num_starts,
           " polynomials to begin with, expected 1 to ", kMaxStarts);
  for (int i = 0; i < attempt.num_starts; ++i) {
    const Start& s = attempt.starts[i];
    SL_CHECK(std::isfinite(s.a) && std::isfinite(s.b) && std::isfinite(s.c) && s.condition > 0.0, "the coefficients (",
             s.a, ", ", s.b, ", ", s.c, ") for a condition of ", s.condition, " are not finite");
  }
  SL_CHECK(attempt.newton_steps >= 1, "there are ", attempt.newton_steps, " Newton steps, expected 1 or more");
}

void check(const Options& o) {
  SL_CHECK(o.p == 1 || o.p == 2 || o.p == 4, "p=", o.p, ", expected 1, 2 or 4");
  SL_CHECK(o.eps >= 0.0 && std::isfinite(o.eps), "eps=", o.eps, ", expected a finite number of at least 0");
  SL_CHECK(o.relative_eps >= 0.0 && std::isfinite(o.relative_eps), "relative_eps=", o.relative_eps,
           ", expected a finite number of at least 0");
  SL_CHECK(o.squarings >= 1 && o.multiplications >= 1, "there are ", o.squarings, " squarings and ", o.multiplications,
           " multiplications, expected 1 or more of each");
  check(o.fast);
  check(o.wide);
}

// Operations of the longest course.
int most_operations(const Attempt& attempt, int p) {
  const int powers = p == 4 ? 2 : p == 2 ? 1 : 0;
  const int first = 2 + powers + 1;                                      // D^2, T; T's powers, M
  const int starts = (attempt.num_starts - 1) * (2 + powers + 1);        // T, X; T's powers, M
  const int newton = (attempt.newton_steps - 1) * (1 + powers + 1) + 1;  // X; T's powers, M
  return first + starts + newton;
}

}  // namespace

// What the launches of one call have in common.
struct GpuRoots::Turn {
  RootLaunch launch;
  const uint64_t* words;
  RootState* states;
  gpu::Stream stream;
};

void GpuRoots::sort(const std::vector<Stack>& stacks) {
  records_.clear();
  on_chip_.clear();
  batches_.clear();
  const int64_t memory = std::min(static_cast<int64_t>(gpu::max_shared_bytes()), shared_limit_);
  // The smallest block that takes a matrix whole, or kNumSides.
  const auto side_of = [&](const Stack& s) {
    const int side = static_cast<int>(std::lower_bound(kSides, kSides + kNumSides, s.n) - kSides);
    return side < kNumSides && on_chip_bytes(kSides[side], sizeof(float)) <= memory ? side : kNumSides;
  };
  for (int side = 0; side <= kNumSides; ++side) {
    const size_t first = records_.size();
    for (const Stack& s : stacks) {
      if (s.n == 0 || side_of(s) != side) continue;
      for (int64_t k = 0; k < s.count; ++k)
        records_.push_back({s.in + k * s.stride, s.row_stride, s.column_stride, s.out + k * s.n * s.n, s.iterations + k,
                            s.status + k, s.n, 0});
    }
    const size_t count = records_.size() - first;
    if (count == 0) continue;
    if (side < kNumSides) on_chip_.push_back({side, first, count});
    const bool fits_wide = side < kNumWideSides && on_chip_bytes(kSides[side], sizeof(double)) <= memory;
    if (!fits_wide) add_batches(first, count, side < kNumSides);
  }
}

void GpuRoots::add_batches(size_t first, size_t count, bool wide_only) {
  int64_t bytes = 0;
  for (size_t k = first; k < first + count; ++k) {
    RootRecord& record = records_[k];
    // fp32 takes the first half of what fp64 takes later.
    const int64_t own = aligned(kNumBuffers * record.n * record.stride() * static_cast<int64_t>(sizeof(double)));
    if (k == first || bytes + own > buffer_limit_) {
      batches_.push_back({wide_only, k, 0, {}, {}, {}});
      bytes = 0;
    }
    ++batches_.back().count;
    record.buffers = bytes;
    bytes += own;
    buffer_bytes_ = std::max(buffer_bytes_, bytes);
  }
}

void GpuRoots::place(Batch& batch) {
  const auto add = [&](Units& units, auto units_of) {
    units = {words_.size(), 0};
    for (size_t k = batch.first; k < batch.first + batch.count; ++k) {
      words_.push_back(static_cast<uint64_t>(units.count));
      units.count += units_of(records_[k].n);
    }
    max_units_ = std::max(max_units_, units.count);
  };
  add(batch.fast, [](int64_t n) { return triangle(n, kFastSide); });
  add(batch.wide, [](int64_t n) { return triangle(n, kWideSide); });
  add(batch.rows, [](int64_t n) { return parts(n, kWrittenRows); });
}

void GpuRoots::run_batch(const Batch& batch, const Turn& turn) {
  RootLaunch launch = turn.launch;
  launch.matrices = reinterpret_cast<const RootRecord*>(turn.words) + batch.first;
  launch.states = turn.states + batch.first;
  launch.count = static_cast<int64_t>(batch.count);
  const auto over = [&](const gpu::Kernel& kernel, const Units& units, int times = 1) {
    launch.first = reinterpret_cast<const int64_t*>(turn.words + units.first);
    launch.work = units.count;
    for (int k = 0; k < times; ++k) launcher_.launch(kernel, &launch, launch.work, turn.stream);
  };
  const GroupedKernels& kernels = grouped_kernels();
  const Options& options = launch.options;
  if (!batch.wide_only) {
    launcher_.launch(kernels.begin, &launch, launch.count, turn.stream);
    if (options.relative_eps > 0.0) {
      over(kernels.load_fast, batch.wide);
      over(kernels.fast, batch.fast, options.squarings);
      launcher_.launch(kernels.find_top, &launch, launch.count, turn.stream);
    }
    over(kernels.load_fast, batch.wide);
    over(kernels.fast, batch.fast, most_operations(options.fast, options.p));
    over(kernels.write_fast, batch.rows);
  }
  over(kernels.load_wide, batch.wide);
  over(kernels.wide, batch.wide, most_operations(options.wide, options.p));
  over(kernels.write_wide, batch.rows);
}

void GpuRoots::run(const std::vector<Stack>& stacks, const Options& options, const Allocate& allocate,
                   gpu::Stream stream) {
  check(options);
  for (const Stack& stack : stacks) check(stack);
  const gpu::Guard guard(launcher_.device());
  buffer_bytes_ = max_units_ = 0;
  sort(stacks);
  if (records_.empty()) return;
  words_.resize(records_.size() * (sizeof(RootRecord) / sizeof(uint64_t)));
  memcpy(words_.data(), records_.data(), words_.size() * sizeof(uint64_t));
  for (Batch& batch : batches_) place(batch);

  const int64_t state_bytes = aligned(static_cast<int64_t>(records_.size() * sizeof(RootState)));
  const int64_t sum_bytes = aligned(max_units_ * static_cast<int64_t>(sizeof(double)));
  char* const memory = checked_workspace(allocate, state_bytes + sum_bytes + buffer_bytes_);
  Turn turn;
  turn.words = launcher_.upload(words_, stream);
  turn.states = reinterpret_cast<RootState*>(memory);
  turn.stream = stream;
  turn.launch.sums = reinterpret_cast<double*>(memory + state_bytes);
  turn.launch.workspace = memory + state_bytes + sum_bytes;
  turn.launch.options = options;
  for (const OnChip& o : on_chip_) {
    RootLaunch launch = turn.launch;
    launch.matrices = reinterpret_cast<const RootRecord*>(turn.words) + o.first;
    launch.states = turn.states + o.first;
    launch.count = static_cast<int64_t>(o.count);
    launcher_.launch(on_chip_kernel(o.side, false), &launch, launch.count, stream);
    const bool followed =
        std::any_of(batches_.begin(), batches_.end(), [&](const Batch& b) { return b.first == o.first; });
    if (!followed) launcher_.launch(on_chip_kernel(o.side, true), &launch, launch.count, stream);
  }
  for (const Batch& batch : batches_) run_batch(batch, turn);
  launcher_.end(stream);
}

}  // namespace stepladder::matrix_root
