#include "multi_tensor/gpu_executor.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/error.h"
#include "multi_tensor/plan.h"

namespace stepladder {

namespace {

constexpr int64_t kMaxChunkTiles = 16;
// Chunks that each block should get at the least, so that none ends much later than the others.
constexpr int64_t kChunksPerBlock = 8;

Launch with_scale(const GradientScale& scale) {
  Launch launch;
  launch.unscale = scale.unscale;
  launch.clip = scale.clip;
  launch.inverse_scale = scale.inverse_scale;
  launch.clip_factor = scale.clip_factor;
  launch.grad_scale = scale.grad_scale;
  launch.found_inf = scale.found_inf;
  launch.clip_address = scale.clip_address;
  return launch;
}

}  // namespace

DeviceBuffer::DeviceBuffer(DeviceBuffer&& other) noexcept
    : memory_(std::exchange(other.memory_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  std::swap(memory_, other.memory_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

DeviceBuffer::~DeviceBuffer() {
  if (memory_ != nullptr) gpu::release(memory_);
}

void* DeviceBuffer::at_least(size_t bytes) {
  if (bytes <= bytes_) return memory_;
  void* const fresh = gpu::allocate(bytes);
  if (memory_ != nullptr) gpu::release(memory_);
  memory_ = fresh;
  bytes_ = bytes;
  return memory_;
}

UploadRing::~UploadRing() {
  for (Slot& slot : slots_)
    if (slot.memory != nullptr) gpu::release_pinned(slot.memory);
}

void UploadRing::upload(uint64_t* to, const uint64_t* words, size_t count, gpu::Stream stream) {
  Slot& slot = slots_[next_++ % kSlots];
  const size_t bytes = count * sizeof(uint64_t);
  slot.done.wait();
  if (slot.bytes < bytes) {
    if (slot.memory != nullptr) gpu::release_pinned(slot.memory);
    slot.memory = nullptr;
    slot.memory = gpu::allocate_pinned(bytes);
    slot.bytes = bytes;
  }
  memcpy(slot.memory, words, bytes);
  gpu::copy_to_device(to, slot.memory, bytes, stream);
  slot.done.record(stream);
}

void PlacedTable::place(Launch* launch, UploadRing& ring, gpu::Stream stream) {
  const std::vector<uint64_t>& words = table.words();
  const size_t bytes = words.size() * sizeof(uint64_t);
  launch->shape = table.shape();
  launch->chunks = table.chunks();
  if (words.size() <= kInlineWords) {
    memcpy(launch->words, words.data(), bytes);
    return;
  }
  if (gpu::is_capturing(stream)) {
    frozen_.emplace_back();
    launch->table = static_cast<const uint64_t*>(frozen_.back().at_least(bytes));
    gpu::copy_outside_of_capture(frozen_.back().as<void>(), words.data(), bytes);
    return;
  }
  launch->table = static_cast<const uint64_t*>(device_.at_least(bytes));
  size_t begin = 0, end = words.size();
  if (uploaded_.size() == words.size()) {
    begin = std::mismatch(words.begin(), words.end(), uploaded_.begin()).first - words.begin();
    while (end > begin && words[end - 1] == uploaded_[end - 1]) --end;
  }
  if (begin == end) return;
  ring.upload(device_.as<uint64_t>() + begin, words.data() + begin, end - begin, stream);
  uploaded_.resize(words.size());
  std::copy(words.begin() + begin, words.begin() + end, uploaded_.begin() + begin);
}

GpuExecutor::~GpuExecutor() {
  // Buffers are the device's; at the process's end the runtime may be gone, and with it they.
  try {
    const gpu::Guard guard(device_);
    batches_.clear();
    retired_batches_.clear();
    retired_buffers_.clear();
  } catch (const Error&) {
  }
}

class GpuExecutor::Turn {
 public:
  Turn(GpuExecutor& executor, gpu::Stream stream)
      : guard_(executor.device_), executor_(executor), stream_(stream), captured_(gpu::is_capturing(stream)) {
    executor.captured_ = executor.captured_ || captured_;
    if (!captured_ && stream != executor.last_stream_) executor.done_.hold(stream);
  }
  bool captured() const { return captured_; }
  void end() {
    if (captured_) return;
    executor_.done_.record(stream_);
    executor_.last_stream_ = stream_;
  }

 private:
  const gpu::Guard guard_;
  GpuExecutor& executor_;
  const gpu::Stream stream_;
  const bool captured_;
};

int GpuExecutor::grid(const gpu::Kernel& kernel, int64_t work) {
  const auto known =
      std::find_if(grids_.begin(), grids_.end(), [&](const auto& entry) { return entry.first == kernel.function; });
  if (known != grids_.end()) return static_cast<int>(std::min<int64_t>(known->second, std::max<int64_t>(work, 1)));
  grids_.emplace_back(kernel.function, gpu::multiprocessors() * gpu::blocks_per_multiprocessor(kernel));
  return grid(kernel, work);
}

void GpuExecutor::grow(DeviceBuffer& buffer, size_t bytes) {
  if (captured_ && bytes > buffer.bytes()) {
    retired_buffers_.push_back(std::move(buffer));
    buffer = DeviceBuffer();
  }
  buffer.at_least(bytes);
}

void GpuExecutor::schedule(const std::vector<Tensor>& tensors, const std::vector<std::vector<int>>& waves) {
  const gpu::Guard guard(device_);
  for (auto& batch : batches_)
    if (batch->captured) retired_batches_.push_back(std::move(batch));
  batches_.clear();
  all_.clear();
  norms_current_ = false;
  ticket_.at_least(sizeof(uint32_t));
  for (const std::vector<int>& wave : waves) all_.insert(all_.end(), wave.begin(), wave.end());
  std::sort(all_.begin(), all_.end());
  for (const Batch& part : make_batches(tensors, waves)) {
    if (part.rule == Rule::count) continue;  // gradients alone
    const GpuKernels* kernels = gpu_kernels(part.param, part.state);
    SL_CHECK(kernels != nullptr, "no GPU kernel takes this pair of parameter and state dtypes");
    auto batch = std::make_unique<PlacedBatch>();
    batch->rule = part.rule;
    const RuleInfo& info = rule_info(part.rule);
    batch->kernels = info.num_states > 0 ? kernels : gpu_kernels(part.param, part.param);
    int64_t elements = 0;
    for (int i : part.members) elements += tensors[i].numel;
    const int64_t blocks = grid(batch->kernels->update[static_cast<int>(part.rule)], INT64_MAX);
    const int64_t chunk_tiles =
        info.norms ? 1 : std::clamp<int64_t>(elements / kTile / (blocks * kChunksPerBlock), 1, kMaxChunkTiles);
    batch->placed.table.build(tensors, part.members, info.num_states, info.norms ? kSumTile : kTile, chunk_tiles,
                              info.norms ? 2 : 0);
    if (info.norms) {
      batch->sums.at_least(std::max<int64_t>(batch->placed.table.num_sums(), 1) * 8);
      batch->ratios.at_least(part.members.size() * sizeof(double));
    }
    batches_.push_back(std::move(batch));
  }
}

void GpuExecutor::run(const std::vector<Tensor>& tensors, const GradientScale& scale, gpu::Stream stream) {
  Turn turn(*this, stream);
  for (const std::unique_ptr<PlacedBatch>& batch : batches_) {
    const int rule = static_cast<int>(batch->rule);
    const Table& table = batch->placed.table;
    batch->captured = batch->captured || turn.captured();
    batch->placed.table.refresh(tensors);
    Launch launch = with_scale(scale);
    batch->placed.place(&launch, ring_, stream);
    launch.ticket = ticket_.as<uint32_t>();
    launch.sums = batch->sums.as<void>();
    launch.ratios = batch->ratios.as<double>();
    const bool norms = rule_info(batch->rule).norms;
    launch.write_back = !norms;
    launch.chunk_tiles = table.chunk_tiles();
    const gpu::Kernel& update = batch->kernels->update[rule];
    gpu::launch(update, grid(update, table.chunks()), &launch, stream);
    if (!norms) continue;
    const gpu::Kernel& ratio = batch->kernels->ratio[rule];
    gpu::launch(ratio, grid(ratio, table.shape().tensors), &launch, stream);
    // The same chunks, of more tiles.
    launch.write_back = true;
    launch.chunk_tiles = static_cast<int32_t>(kSumTile / kTile);
    const gpu::Kernel& apply = batch->kernels->apply[rule];
    gpu::launch(apply, grid(apply, table.chunks()), &launch, stream);
  }
  turn.end();
}

void GpuExecutor::place_norms(const std::vector<Tensor>& tensors, Launch* launch, gpu::Stream stream) {
  if (!norms_current_) {
    norms_.table.build(tensors, all_, 0, kSumTile, 1, 1);
    norms_.forget();
    norms_current_ = true;
    grow(norm_sums_, std::max<int64_t>(norms_.table.num_sums(), 1) * 8);
    grow(partials_, 2 * std::max<size_t>(all_.size(), 1) * sizeof(double));
    // Norm, factor, the flag that kernels set for elements that are not finite, and what they make of it.
    norm_.at_least(4 * sizeof(double));
  }
  norms_.table.refresh(tensors);
  norms_.place(launch, ring_, stream);
  launch->ticket = ticket_.as<uint32_t>();
  launch->sums = norm_sums_.as<void>();
}

void GpuExecutor::measure(const std::vector<Tensor>& tensors, Norm kind, const GradientScale& scale, double max_norm,
                          double* result, float* found_inf, gpu::Stream stream) {
  Turn turn(*this, stream);
  NormLaunch norm;
  norm.launch = with_scale(scale);
  place_norms(tensors, &norm.launch, stream);
  norm.kind = kind;
  norm.max_norm = max_norm;
  norm.partials = partials_.as<double>();
  norm.norm = result != nullptr ? result : norm_.as<double>();
  norm.not_finite = reinterpret_cast<uint32_t*>(norm_.as<double>() + 2);
  norm.found_inf = found_inf != nullptr ? found_inf : reinterpret_cast<float*>(norm_.as<double>() + 3);
  const GpuNormKernels& kernels = gpu_norm_kernels();
  gpu::launch(kernels.measure, grid(kernels.measure, norms_.table.chunks()), &norm, stream);
  gpu::launch(kernels.fold, grid(kernels.fold, norms_.table.shape().tensors), &norm, stream);
  turn.end();
}

std::vector<double> GpuExecutor::partials(gpu::Stream stream, bool* finite) {
  const gpu::Guard guard(device_);
  if (stream != last_stream_) done_.hold(stream);
  std::vector<double> values(all_.size());
  float found_inf;
  gpu::copy_to_host(values.data(), partials_.as<void>(), values.size() * sizeof(double), stream);
  gpu::copy_to_host(&found_inf, norm_.as<double>() + 3, sizeof(found_inf), stream);
  *finite = found_inf == 0.0f;
  return values;
}

double GpuExecutor::norm(gpu::Stream stream) {
  const gpu::Guard guard(device_);
  if (stream != last_stream_) done_.hold(stream);
  double value;
  gpu::copy_to_host(&value, norm_.as<void>(), sizeof(value), stream);
  return value;
}

void GpuExecutor::scale_gradients(const std::vector<Tensor>& tensors, const double* factor_address, double factor,
                                  gpu::Stream stream) {
  Turn turn(*this, stream);
  NormLaunch norm;
  place_norms(tensors, &norm.launch, stream);
  norm.launch.clip_address = factor_address;
  norm.launch.clip_factor = factor;
  const gpu::Kernel& scale = gpu_norm_kernels().scale;
  gpu::launch(scale, grid(scale, norms_.table.chunks()), &norm, stream);
  turn.end();
}

}  // namespace stepladder
