#include "matrix_root/gpu_launcher.h"

#include <algorithm>

#include "common/error.h"

namespace stepladder::matrix_root {

void check_address(const void* address, size_t item, const char* name) {
  SL_CHECK(address != nullptr && reinterpret_cast<uintptr_t>(address) % item == 0, "'", name, "' is at ", address,
           ", expected an address that is aligned to its elements");
}

char* checked_workspace(const Allocate& allocate, int64_t bytes) {
  char* const memory = allocate(bytes);
  SL_CHECK(memory != nullptr && reinterpret_cast<uintptr_t>(memory) % 16 == 0, "the workspace is at ",
           static_cast<void*>(memory), ", expected an address aligned to 16 bytes");
  return memory;
}

Launcher::~Launcher() {
  // At the process's end the runtime may be gone, and the device's memory with it.
  try {
    const gpu::Guard guard(device_);
    table_ = DeviceBuffer();
    frozen_.clear();
  } catch (const Error&) {
  }
}

const uint64_t* Launcher::upload(const std::vector<uint64_t>& words, gpu::Stream stream) {
  const size_t bytes = words.size() * sizeof(uint64_t);
  if (gpu::is_capturing(stream)) {
    frozen_.emplace_back();
    frozen_.back().at_least(bytes);
    gpu::copy_outside_of_capture(frozen_.back().as<void>(), words.data(), bytes);
    return frozen_.back().as<uint64_t>();
  }
  if (stream != last_stream_) done_.hold(stream);
  if (bytes > table_.bytes()) {
    uploaded_.clear();
    // With room for more, as growing waits for the device.
    table_.at_least(2 * bytes);
  }
  if (words != uploaded_) {
    ring_.upload(table_.as<uint64_t>(), words.data(), words.size(), stream);
    uploaded_ = words;
  }
  return table_.as<uint64_t>();
}

void Launcher::launch(const gpu::Kernel& kernel, const void* arguments, int64_t work, gpu::Stream stream) {
  if (work == 0) return;
  auto known = std::find_if(grids_.begin(), grids_.end(), [&](const Grid& g) { return g.function == kernel.function; });
  if (known == grids_.end()) {
    grids_.push_back({kernel.function, gpu::multiprocessors() * gpu::blocks_per_multiprocessor(kernel)});
    known = grids_.end() - 1;
  }
  gpu::launch(kernel, static_cast<int>(std::min<int64_t>(known->blocks, work)), arguments, stream);
}

void Launcher::end(gpu::Stream stream) {
  if (gpu::is_capturing(stream)) return;
  done_.record(stream);
  last_stream_ = stream;
}

}  // namespace stepladder::matrix_root
