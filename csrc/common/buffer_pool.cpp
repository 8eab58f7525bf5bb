#include "common/buffer_pool.h"

#include <iterator>
#include <new>
#include <utility>

#include "common/error.h"

namespace stepladder {

std::unique_ptr<Buffer> BufferPool::take(size_t bytes) {
  std::unique_ptr<Buffer> taken;
  if (const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock); lock) {
    auto best = kept_.rend();
    for (auto it = kept_.rbegin(); it != kept_.rend(); ++it) {
      const size_t size = (*it)->bytes();
      if (size >= bytes && size - size / 5 <= bytes && (best == kept_.rend() || size < (*best)->bytes())) best = it;
    }
    if (best != kept_.rend()) {
      taken = std::move(*best);
      kept_bytes_ -= taken->bytes();
      kept_.erase(std::next(best).base());
    }
  }
  if (taken != nullptr) return taken;
  taken = std::make_unique<Buffer>();
  try {
    taken->at_least(bytes);
  } catch (const Error&) {
    emptied();
    taken->at_least(bytes);
  }
  return taken;
}

std::vector<std::unique_ptr<Buffer>> BufferPool::emptied() {
  std::vector<std::unique_ptr<Buffer>> all;
  if (const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock); lock) {
    all.swap(kept_);
    kept_bytes_ = 0;
  }
  return all;
}

void BufferPool::give_back(std::unique_ptr<Buffer> buffer) noexcept {
  // Released after the lock.
  std::vector<std::unique_ptr<Buffer>> dropped;
  const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
  if (!lock) return;
  try {
    kept_.push_back(std::move(buffer));
    kept_bytes_ += kept_.back()->bytes();
    while (kept_bytes_ > limit_) {
      dropped.push_back(std::move(kept_.front()));
      kept_.erase(kept_.begin());
      kept_bytes_ -= dropped.back()->bytes();
    }
  } catch (const std::bad_alloc&) {
    // What has no place in the list is freed.
  }
}

size_t BufferPool::kept_bytes() {
  const std::unique_lock<std::mutex> lock(mutex_);
  return kept_bytes_;
}

}  // namespace stepladder
