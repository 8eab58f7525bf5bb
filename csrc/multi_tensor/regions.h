// What parallel regions did, and when: for a profiler. Nothing is recorded unless it asks.
#pragma once

#include <cstdint>
#include <vector>

#include "multi_tensor/tensor.h"

namespace stepladder {

// One pass of the plan over tensors of one rule and one set of dtypes.
struct Kernel {
  const char* pass = nullptr;  // update, prepare or apply, measure, scale; gradients alone have Rule::count
  Rule rule = Rule::count;
  DType param = DType::f32, grad = DType::f32, state = DType::f32;

  bool operator==(const Kernel& o) const {
    return pass == o.pass && rule == o.rule && param == o.param && grad == o.grad && state == o.state;
  }
};

// What one thread did of it.
struct Share {
  Kernel kernel;
  int64_t nanoseconds = 0, elements = 0, chunks = 0;
};

// Times in nanoseconds of the monotonic clock.
struct RegionThread {
  int64_t begin = 0, end = 0;  // from its first look for work until it found no more
  std::vector<Share> shares;

  void add(const Kernel& kernel, int64_t nanoseconds, int64_t elements, int64_t chunks);
};

struct Region {
  int64_t begin = 0, end = 0;
  std::vector<RegionThread> threads;
};

int64_t monotonic_nanoseconds();

// Whether regions are recorded, by all plans of this process.
bool recording();
void set_recording(bool on);
void keep(Region region);
// Those since the last call.
std::vector<Region> take_regions();

}  // namespace stepladder
