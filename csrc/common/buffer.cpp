#include "common/buffer.h"

#include <sys/mman.h>

#include <cstdlib>

#include "common/error.h"

namespace stepladder {

namespace {

constexpr size_t kPage = 4096, kHugePage = 2 << 20;

}  // namespace

Buffer::~Buffer() { release(); }

void Buffer::release() {
  free(memory_);
  memory_ = nullptr;
  bytes_ = 0;
}

char* Buffer::at_least(size_t bytes) {
  if (bytes <= bytes_) return memory_;
  release();
  const size_t alignment = bytes >= 2 * kHugePage ? kHugePage : kPage;
  const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  memory_ = static_cast<char*>(aligned_alloc(alignment, rounded));
  SL_CHECK(memory_ != nullptr, "no memory for ", rounded, " bytes of workspace");
#if defined(MADV_HUGEPAGE)
  if (alignment == kHugePage) madvise(memory_, rounded, MADV_HUGEPAGE);
#endif
  bytes_ = rounded;
  return memory_;
}

}  // namespace stepladder
