#include "newton_schulz/gpu_iteration.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/error.h"
#include "newton_schulz/program.h"

namespace stepladder::newton_schulz {

namespace {

// Wider matrices would keep one block busy for long: they are shared by many.
constexpr int64_t kMaxStreamedAspect = 32;
constexpr int64_t kStreamedSlots = 2;
constexpr int64_t kMaxSide = INT32_MAX - 1024;
constexpr size_t kRecordWords = sizeof(MatrixRecord) / sizeof(uint64_t);
constexpr int64_t kAlignment = 256;  // of buffers

int64_t parts(int64_t size, int64_t part) { return (size + part - 1) / part; }
int64_t short_side(const Job& job) { return std::min(job.rows, job.cols); }
int64_t long_side(const Job& job) { return std::max(job.rows, job.cols); }

void check_view(const View& view, const char* name) {
  SL_CHECK(view.data != nullptr, "the matrix '", name, "' has no address");
  SL_CHECK(view.dtype != DType::f64, "the matrix '", name,
           "' has the dtype float64, expected float32, bfloat16 or float16");
  const auto address = reinterpret_cast<uintptr_t>(view.data);
  SL_CHECK(address % item_size(view.dtype) == 0, "the matrix '", name, "' begins at ", address,
           ", which is not aligned to its elements");
}

void check(const Job& job) {
  SL_CHECK(job.rows >= 0 && job.cols >= 0 && long_side(job) <= kMaxSide, "a matrix has ", job.rows, " rows and ",
           job.cols, " columns, expected 0 to ", kMaxSide, " of each");
  SL_CHECK(job.options != nullptr, "a matrix has no options");
  const Options& o = *job.options;
  SL_CHECK(!o.steps.empty() && o.steps.size() <= kMaxSteps, "there are ", o.steps.size(), " steps, expected 1 to ",
           kMaxSteps);
  for (const Triple& t : o.steps)
    SL_CHECK(std::isfinite(t.a) && std::isfinite(t.b) && std::isfinite(t.c), "the coefficients (", t.a, ", ", t.b, ", ",
             t.c, ") are not finite");
  SL_CHECK(o.eps >= 0.0 && std::isfinite(o.eps), "eps=", o.eps, ", expected a finite number of at least 0");
  SL_CHECK(o.divisor > 0.0 && std::isfinite(o.divisor), "divisor=", o.divisor, ", expected a finite number above 0");
  if (short_side(job) == 0) return;
  check_view(job.in, "in");
  check_view(job.out, "out");
  if (job.muon.active) check_view(job.muon.buffer, "momentum");
}

// Panels for which there is room in as much shared memory; below 1 where not even A fits.
int64_t slots_in(int64_t memory, int side, bool streamed) {
  const int64_t none = on_chip_bytes(side, streamed, 0), panel = on_chip_bytes(side, streamed, 1) - none;
  return (memory - none) / panel;
}

Elements elements_of(View view, bool tall) {
  if (tall) view = view.transposed();
  return {view.data, view.row_stride, view.col_stride, static_cast<int64_t>(view.dtype)};
}

MatrixRecord record_of(const Job& job) {
  const bool tall = job.rows > job.cols;
  MatrixRecord record = {};
  record.in = elements_of(job.in, tall);
  record.out = elements_of(job.out, tall);
  record.rows = short_side(job);
  record.columns = long_side(job);
  if (!job.muon.active) return record;
  record.momentum = elements_of(job.muon.buffer, tall);
  record.weight = job.muon.momentum;
  record.grad_weight = job.muon.grad_weight;
  record.grad_scale = job.muon.grad_scale;
  record.decay = job.muon.decay;
  record.step = job.muon.step;
  record.rate = job.muon.rate;
  record.averages = job.muon.averages;
  record.nesterov = job.muon.nesterov;
  return record;
}

// Gives buffers their place, one behind the other.
struct Workspace {
  int64_t bytes = 0;
  int64_t add(int64_t elements) {
    const int64_t at = bytes;
    bytes += parts(elements * static_cast<int64_t>(sizeof(bf16)), kAlignment) * kAlignment;
    return at;
  }
  void add_iterate(MatrixRecord& record, int buffer) {
    record.buffers[buffer] = add(record.rows * record.iterate_stride());
  }
  void add_square(MatrixRecord& record, int square) {
    record.buffers[kNumIterates + square] =
        add(record.square_elements() + record.square_stride() * static_cast<int64_t>(sizeof(float) / sizeof(bf16)));
  }
};

}  // namespace

GpuIteration::GpuIteration(int device, int64_t shared_limit, bool clusters)
    : device_(device), shared_limit_(shared_limit), sides_(clusters ? kNumSides : kNumSides - 1) {
  if (!clusters) return;
  const gpu::Guard guard(device_);
  const std::string reason = gpu::why_no_cluster(cluster_kernel(false));
  SL_CHECK(reason.empty(), "clusters of blocks were asked for on GPU ", device_, ", which has ", reason,
           ", expected compute capability 9.0 or more and kernels compiled for it");
}

GpuIteration::~GpuIteration() {
  // At the process's end the runtime may be gone, and the device's memory with it.
  try {
    const gpu::Guard guard(device_);
    table_ = DeviceBuffer();
    frozen_.clear();
  } catch (const Error&) {
  }
}

std::vector<GpuIteration::Batch> GpuIteration::sort(const std::vector<Job>& jobs) const {
  const int64_t memory = std::min(static_cast<int64_t>(gpu::max_shared_bytes()), shared_limit_);
  std::vector<Batch> batches;
  for (const Job& job : jobs) {
    if (short_side(job) == 0) continue;
    auto batch = std::find_if(batches.begin(), batches.end(), [&](const Batch& b) { return b.options == job.options; });
    if (batch == batches.end()) {
      batches.emplace_back();
      batch = batches.end() - 1;
      batch->options = job.options;
    }
    const int side = static_cast<int>(std::lower_bound(kSides, kSides + sides_, short_side(job)) - kSides);
    const bool split = side < sides_ && planes_of(kSides[side]) > 1;
    // The standard form serves matrices with few rows whichever is asked for: they have nothing to gain from another.
    const bool fits = split || (side < sides_ && !job.options->gram);
    int64_t slots = 0, panels = 0;
    bool streamed = false;
    if (fits) {
      slots = slots_in(memory, kSides[side], false);
      panels = parts(long_side(job), int64_t{panel_width(kSides[side], false)} * blocks_of(kSides[side]));
      streamed = panels > slots;
      if (streamed) slots = slots_in(memory, kSides[side], true);
    }
    if (slots < 1 || (streamed && !split && long_side(job) > kMaxStreamedAspect * kSides[side])) {
      batch->grouped.push_back(&job);
      continue;
    }
    auto found = std::find_if(batch->on_chip.begin(), batch->on_chip.end(),
                              [&](const OnChip& o) { return o.side == side && o.streamed == streamed; });
    if (found == batch->on_chip.end()) {
      batch->on_chip.push_back({side, streamed, 0, {}, 0});
      found = batch->on_chip.end() - 1;
    }
    found->slots = std::max(found->slots, streamed ? std::min(slots, kStreamedSlots) : panels);
    found->jobs.push_back(&job);
  }
  // The longest first, so that the last to end are short.
  for (Batch& batch : batches)
    for (OnChip& o : batch.on_chip)
      std::stable_sort(o.jobs.begin(), o.jobs.end(),
                       [](const Job* a, const Job* b) { return long_side(*a) > long_side(*b); });
  return batches;
}

int64_t GpuIteration::place(Batch& batch) {
  Workspace workspace;
  const auto add_record = [&](const MatrixRecord& record) {
    words_.resize(words_.size() + kRecordWords);
    memcpy(words_.data() + words_.size() - kRecordWords, &record, sizeof(record));
  };
  std::vector<uint64_t> chunks, row_groups, symmetric, updates;
  const auto add_units = [](std::vector<uint64_t>& first, Units& units, int64_t count) {
    first.push_back(static_cast<uint64_t>(units.count));
    units.count += count;
  };
  batch.chunks.count = batch.row_groups.count = batch.symmetric.count = batch.updates.count = 0;
  for (const Job* job : batch.grouped) {
    const int64_t m = short_side(*job), n = long_side(*job), tiles = parts(m, kTileSide);
    add_units(chunks, batch.chunks, parts(m, kChunkRows) * parts(n, kChunkColumns));
    add_units(row_groups, batch.row_groups, parts(m, kRescaledRows));
    add_units(symmetric, batch.symmetric, tiles * (tiles + 1) / 2);
    add_units(updates, batch.updates, tiles * parts(n, kTileSide));
  }
  // The sums come first in the workspace.
  workspace.add(batch.chunks.count * static_cast<int64_t>(sizeof(double) / sizeof(bf16)));
  for (OnChip& o : batch.on_chip) {
    o.records = words_.size();
    for (const Job* job : o.jobs) {
      MatrixRecord record = record_of(*job);
      for (int plane = 0; o.streamed && plane < planes_of(kSides[o.side]); ++plane)
        workspace.add_iterate(record, plane);
      add_record(record);
    }
  }
  batch.records = words_.size();
  for (const Job* job : batch.grouped) {
    MatrixRecord record = record_of(*job);
    for (int k = 0; k < kNumIterates; ++k) workspace.add_iterate(record, k);
    for (int k = 0; k < (batch.options->gram ? kNumSquares : 2); ++k) workspace.add_square(record, k);
    add_record(record);
  }
  const auto add_words = [&](const std::vector<uint64_t>& first, Units& units) {
    units.first = words_.size();
    words_.insert(words_.end(), first.begin(), first.end());
  };
  add_words(chunks, batch.chunks);
  add_words(row_groups, batch.row_groups);
  add_words(symmetric, batch.symmetric);
  add_words(updates, batch.updates);
  return workspace.bytes;
}

const uint64_t* GpuIteration::upload(gpu::Stream stream) {
  const size_t bytes = words_.size() * sizeof(uint64_t);
  if (gpu::is_capturing(stream)) {
    frozen_.emplace_back();
    frozen_.back().at_least(bytes);
    gpu::copy_outside_of_capture(frozen_.back().as<void>(), words_.data(), bytes);
    return frozen_.back().as<uint64_t>();
  }
  if (bytes > table_.bytes()) {
    uploaded_.clear();
    // With room for more, as growing waits for the device.
    table_.at_least(2 * bytes);
  }
  if (words_ != uploaded_) {
    ring_.upload(table_.as<uint64_t>(), words_.data(), words_.size(), stream);
    uploaded_ = words_;
  }
  return table_.as<uint64_t>();
}

void GpuIteration::launch(const gpu::Kernel& kernel, const void* arguments, int64_t work, gpu::Stream stream) {
  if (work == 0) return;
  auto known = std::find_if(grids_.begin(), grids_.end(), [&](const Grid& g) {
    return g.function == kernel.function && g.shared_bytes == kernel.shared_bytes;
  });
  if (known == grids_.end()) {
    const int places = kernel.cluster > 1 ? gpu::resident_clusters(kernel)
                                          : gpu::multiprocessors() * gpu::blocks_per_multiprocessor(kernel);
    grids_.push_back({kernel.function, kernel.shared_bytes, places});
    known = grids_.end() - 1;
  }
  gpu::launch(kernel, static_cast<int>(std::min<int64_t>(known->places, work)) * kernel.cluster, arguments, stream);
}

void GpuIteration::run_on_chip(const Batch& batch, const uint64_t* words, char* workspace, gpu::Stream stream) {
  const Options& options = *batch.options;
  for (const OnChip& o : batch.on_chip) {
    OnChipLaunch arguments;
    arguments.matrices = reinterpret_cast<const MatrixRecord*>(words + o.records);
    arguments.count = static_cast<int64_t>(o.jobs.size());
    arguments.workspace = workspace;
    arguments.slots = static_cast<int32_t>(o.slots);
    arguments.prescale = options.aol;
    arguments.scaling = {options.eps, options.divisor};
    arguments.steps = static_cast<int32_t>(options.steps.size());
    for (size_t s = 0; s < options.steps.size(); ++s) {
      const Triple& t = options.steps[s];
      arguments.polynomials[s] = {static_cast<float>(t.a), static_cast<float>(t.b), static_cast<float>(t.c)};
    }
    gpu::Kernel kernel = on_chip_kernel(o.side, o.streamed);
    kernel.shared_bytes = static_cast<size_t>(on_chip_bytes(kSides[o.side], o.streamed, o.slots));
    launch(kernel, &arguments, arguments.count, stream);
  }
}

void GpuIteration::run_grouped(const Batch& batch, const uint64_t* words, char* workspace, gpu::Stream stream) {
  if (batch.grouped.empty()) return;
  const Options& options = *batch.options;
  const GroupedKernels& kernels = grouped_kernels();
  GroupedLaunch with_matrices;
  with_matrices.matrices = reinterpret_cast<const MatrixRecord*>(words + batch.records);
  with_matrices.count = static_cast<int64_t>(batch.grouped.size());
  with_matrices.workspace = workspace;
  with_matrices.sums = reinterpret_cast<double*>(workspace);
  with_matrices.scaling = {options.eps, options.divisor};
  const auto run = [&](const gpu::Kernel& kernel, GroupedLaunch arguments, const Units& units) {
    arguments.first = reinterpret_cast<const int64_t*>(words + units.first);
    arguments.work = units.count;
    launch(kernel, &arguments, arguments.work, stream);
  };
  int x = 0;  // the buffer of the iterate
  const auto square = [](int index) { return kNumIterates + index; };
  const auto product = [&](int left, int right, int out, double alpha, double beta = 0.0, int added = -1, int also = -1,
                           double diagonal = 0.0) {
    GroupedLaunch arguments = with_matrices;
    arguments.left = left;
    arguments.right = right;
    arguments.out = out;
    arguments.alpha = static_cast<float>(alpha);
    arguments.beta = static_cast<float>(beta);
    arguments.added = added;
    arguments.also = also;
    arguments.diagonal = static_cast<float>(diagonal);
    run(kernels.symmetric, arguments, batch.symmetric);
  };
  const auto update = [&](int left, double beta, bool last) {
    GroupedLaunch arguments = with_matrices;
    arguments.left = left;
    arguments.right = x;
    arguments.out = x = 1 - x;
    arguments.beta = static_cast<float>(beta);
    arguments.last = last;
    run(kernels.multiply, arguments, batch.updates);
  };

  with_matrices.out = x;
  run(kernels.measure, with_matrices, batch.chunks);
  run(kernels.pack, with_matrices, batch.chunks);
  if (options.aol) {
    product(x, x, square(0), 1.0);
    GroupedLaunch arguments = with_matrices;
    arguments.left = square(0);
    run(kernels.rescale, arguments, batch.row_groups);
  }

  const size_t steps = options.steps.size();
  if (!options.gram) {
    const int gram = square(0), b = square(1);
    for (size_t k = 0; k < steps; ++k) {
      const Triple& t = options.steps[k];
      if (t.c == 0.0) {
        product(x, x, gram, t.b);
      } else {
        product(x, x, gram, 1.0);
        product(gram, gram, b, t.c, t.b, gram);
      }
      update(t.c == 0.0 ? gram : b, t.a, k + 1 == steps);
    }
    return;
  }
  const int r = square(0), z = square(1);
  int q = square(2), spare = square(3);
  product(x, x, r, 1.0);
  for (size_t k = 0; k < steps; ++k) {
    const Triple& t = options.steps[k];
    const bool fresh = k % kRestartEvery == 0;  // Q stands for the identity
    if (fresh && k > 0) {
      update(q, 0.0, false);
      product(x, x, r, 1.0);
    }
    product(r, r, z, t.c, t.b, r, fresh ? q : -1, t.a);
    if (!fresh) {
      product(q, z, spare, 1.0, t.a, q);
      std::swap(q, spare);
    }
    if ((k + 1) % kRestartEvery != 0 && k + 1 != steps) {
      product(r, z, spare, 1.0, t.a, r);
      product(z, spare, r, 1.0, t.a, spare);
    }
  }
  update(q, 0.0, true);
}

void GpuIteration::run(const std::vector<Job>& jobs, const Allocate& allocate, gpu::Stream stream) {
  for (const Job& job : jobs) check(job);
  const gpu::Guard guard(device_);
  std::vector<Batch> batches = sort(jobs);
  if (batches.empty()) return;
  words_.clear();
  int64_t bytes = 0;
  // One batch after another takes the same workspace.
  for (Batch& batch : batches) bytes = std::max(bytes, place(batch));
  char* const workspace = bytes > 0 ? allocate(bytes) : nullptr;
  SL_CHECK(bytes == 0 || (workspace != nullptr && reinterpret_cast<uintptr_t>(workspace) % 16 == 0),
           "the workspace is at ", static_cast<void*>(workspace), ", expected an address aligned to 16 bytes");
  const bool captured = gpu::is_capturing(stream);
  // The table is the iteration's own: work on another stream waits for the last.
  if (!captured && stream != last_stream_) done_.hold(stream);
  const uint64_t* const words = upload(stream);
  for (const Batch& batch : batches) {
    run_on_chip(batch, words, workspace, stream);
    run_grouped(batch, words, workspace, stream);
  }
  if (captured) return;
  done_.record(stream);
  last_stream_ = stream;
}

}  // namespace stepladder::newton_schulz
