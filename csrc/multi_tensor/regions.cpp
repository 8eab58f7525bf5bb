#include "multi_tensor/regions.h"

#include <atomic>
#include <chrono>
#include <mutex>
#include <utility>

namespace stepladder {

namespace {

std::atomic<bool> on_{false};
std::mutex mutex_;
std::vector<Region> kept_;

}  // namespace

int64_t monotonic_nanoseconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

void RegionThread::add(const Kernel& kernel, int64_t nanoseconds, int64_t elements, int64_t chunks) {
  for (Share& share : shares) {
    if (!(share.kernel == kernel)) continue;
    share.nanoseconds += nanoseconds;
    share.elements += elements;
    share.chunks += chunks;
    return;
  }
  shares.push_back({kernel, nanoseconds, elements, chunks});
}

bool recording() { return on_.load(std::memory_order_relaxed); }

void set_recording(bool on) { on_.store(on, std::memory_order_relaxed); }

void keep(Region region) {
  const std::lock_guard<std::mutex> lock(mutex_);
  kept_.push_back(std::move(region));
}

std::vector<Region> take_regions() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(kept_, {});
}

}  // namespace stepladder
