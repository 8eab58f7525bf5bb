#include "matrix_root/gpu_basis_passes.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/error.h"

namespace stepladder::matrix_root {

namespace {

// Distances between elements of a matrix's buffers are counted in 32 bits.
constexpr int64_t kMaxElements = int64_t{1} << 30;

void check(const BasisStack& s) {
  SL_CHECK(s.count >= 0 && s.n >= 0 && s.m >= s.n, "there are ", s.count, " matrices with ", s.m, " rows and ", s.n,
           " columns, expected none or more, with at least as many rows as columns");
  if (s.count == 0 || s.n == 0) return;
  SL_CHECK(s.m <= kMaxElements / s.n, "a matrix has ", s.m, " rows and ", s.n, " columns, expected at most ",
           kMaxElements, " elements");
  check_address(s.in, sizeof(float), "in");
  check_address(s.out, sizeof(float), "out");
  check_address(s.fallback, 1, "fallback");
  check_address(s.finite, 1, "finite");
}

}  // namespace

void GpuBases::sort(const std::vector<BasisStack>& stacks) {
  records_.clear();
  batches_.clear();
  int64_t bytes = 0;
  for (const BasisStack& s : stacks) {
    if (s.n == 0) continue;
    for (int64_t k = 0; k < s.count; ++k) {
      BasisRecord record = {s.in + k * s.stride,
                            s.row_stride,
                            s.column_stride,
                            s.out + k * s.m * s.n,
                            s.fallback + k,
                            s.finite + k,
                            s.m,
                            s.n,
                            0};
      const int64_t blocks = parts(s.n, kBlockSide);
      const int64_t own = aligned((record.inverses() + blocks * kInverse) * static_cast<int64_t>(sizeof(double)));
      if (batches_.empty() || bytes + own > buffer_limit_) {
        batches_.push_back({records_.size(), 0, 0, {}, {}, {}});
        bytes = 0;
      }
      ++batches_.back().count;
      batches_.back().blocks = std::max(batches_.back().blocks, blocks);
      record.buffers = bytes;
      bytes += own;
      buffer_bytes_ = std::max(buffer_bytes_, bytes);
      records_.push_back(record);
    }
  }
}

void GpuBases::place(Batch& batch) {
  const auto add = [&](Units& units, auto units_of) {
    units = {words_.size(), 0};
    for (size_t k = batch.first; k < batch.first + batch.count; ++k) {
      words_.push_back(static_cast<uint64_t>(units.count));
      units.count += units_of(records_[k]);
    }
  };
  add(batch.tiles, [](const BasisRecord& r) { return triangle(r.n, kBlockSide); });
  add(batch.columns, [](const BasisRecord& r) { return parts(r.n, kBlockSide); });
  add(batch.rows, [](const BasisRecord& r) { return parts(r.m, kBlockSide); });
  max_tiles_ = std::max(max_tiles_, batch.tiles.count);
}

void GpuBases::run_batch(const Batch& batch, BasisLaunch launch, const uint64_t* words, double shift,
                         gpu::Stream stream) {
  launch.matrices = reinterpret_cast<const BasisRecord*>(words) + batch.first;
  launch.states += batch.first;
  launch.count = static_cast<int64_t>(batch.count);
  const BasisKernels& kernels = basis_kernels();
  const auto over = [&](const gpu::Kernel& kernel, const Units& units) {
    launch.first = reinterpret_cast<const int64_t*>(words + units.first);
    launch.work = units.count;
    launcher_.launch(kernel, &launch, launch.work, stream);
  };
  const auto each = [&](const gpu::Kernel& kernel) {
    launch.first = reinterpret_cast<const int64_t*>(words + batch.tiles.first);
    launch.work = batch.tiles.count;
    launcher_.launch(kernel, &launch, launch.count, stream);
  };
  each(kernels.begin);
  if (!launch.householder) {
    over(kernels.load, batch.rows);
    for (int pass = 0; pass < 3; ++pass) {
      launch.shift = pass == 0 ? shift : 0.0;
      over(kernels.gram, batch.tiles);
      for (launch.block = 0; launch.block < batch.blocks; ++launch.block) {
        each(kernels.factor);
        if (launch.block + 1 < batch.blocks) over(kernels.eliminate, batch.columns);
      }
      over(kernels.solve, batch.rows);
    }
    over(kernels.gram, batch.tiles);
  }
  each(kernels.judge);
  each(kernels.reflect);
  over(kernels.write, batch.rows);
}

void GpuBases::run(const std::vector<BasisStack>& stacks, bool householder, double shift, double limit,
                   const Allocate& allocate, gpu::Stream stream) {
  SL_CHECK(shift >= 0.0 && std::isfinite(shift), "shift=", shift, ", expected a finite number of at least 0");
  SL_CHECK(limit > 0.0 && std::isfinite(limit), "limit=", limit, ", expected a finite number above 0");
  for (const BasisStack& stack : stacks) check(stack);
  const gpu::Guard guard(launcher_.device());
  buffer_bytes_ = max_tiles_ = 0;
  sort(stacks);
  if (records_.empty()) return;
  words_.resize(records_.size() * (sizeof(BasisRecord) / sizeof(uint64_t)));
  memcpy(words_.data(), records_.data(), words_.size() * sizeof(uint64_t));
  for (Batch& batch : batches_) place(batch);

  const int64_t state_bytes = aligned(static_cast<int64_t>(records_.size() * sizeof(BasisState)));
  const int64_t sum_bytes = aligned(max_tiles_ * static_cast<int64_t>(sizeof(double)));
  char* const memory = checked_workspace(allocate, state_bytes + sum_bytes + buffer_bytes_);
  BasisLaunch launch;
  launch.states = reinterpret_cast<BasisState*>(memory);
  launch.sums = reinterpret_cast<double*>(memory + state_bytes);
  launch.workspace = memory + state_bytes + sum_bytes;
  launch.limit = limit;
  launch.householder = householder;
  const uint64_t* const words = launcher_.upload(words_, stream);
  for (const Batch& batch : batches_) run_batch(batch, launch, words, shift, stream);
  launcher_.end(stream);
}

}  // namespace stepladder::matrix_root
