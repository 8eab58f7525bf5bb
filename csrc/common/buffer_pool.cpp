#include "common/buffer_pool.h"

#include <utility>

namespace stepladder {

std::unique_ptr<Buffer> BufferPool::take(size_t bytes) {
  std::unique_ptr<Buffer> taken;
  if (const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock); lock) {
    auto best = kept_.rend();
    for (auto it = kept_.rbegin(); it != kept_.rend(); ++it) {
      const size_t size = (*it)->bytes();
      if (size >= bytes && size / 2 < bytes && (best == kept_.rend() || size < (*best)->bytes())) best = it;
    }
    if (best != kept_.rend()) {
      taken = std::move(*best);
      kept_bytes_ -= taken->bytes();
      kept_.erase(std::next(best).base());
    }
  }
  if (taken == nullptr) taken = std::make_unique<Buffer>();
  taken->at_least(bytes);
  return taken;
}

void BufferPool::give_back(std::unique_ptr<Buffer> buffer) {
  // Released after the lock.
  std::vector<std::unique_ptr<Buffer>> dropped;
  const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
  if (!lock) return;
  kept_bytes_ += buffer->bytes();
  kept_.push_back(std::move(buffer));
  size_t oldest = 0;
  for (; kept_bytes_ > limit_; ++oldest) {
    kept_bytes_ -= kept_[oldest]->bytes();
    dropped.push_back(std::move(kept_[oldest]));
  }
  kept_.erase(kept_.begin(), kept_.begin() + static_cast<std::ptrdiff_t>(oldest));
}

}  // namespace stepladder
