// What the host asks of a GPU, without a toolkit header: implemented over the CUDA runtime
// (gpu_runtime.cu) and by the emulator. Every function raises Error where the runtime reports one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace stepladder {
namespace gpu {

struct Device {
  std::string name;
  int major, minor;  // compute capability
  int multiprocessors;
  size_t memory;  // bytes
};

// Empty where there is no device; `reason` then says why, in the runtime's words.
std::vector<Device> devices(std::string* reason);

struct Kernel {
  using Call = void (*)(const void* function, const void* arguments);
  const char* name;
  int threads;  // of a block
  size_t argument_bytes;
  const void* function;
  Call call;                // the emulator's; null under CUDA
  size_t shared_bytes = 0;  // dynamic shared memory of a block
  int cluster = 1;          // blocks that run together, from sm_90 on
};

using Stream = void*;

// Makes a device current, and the one before it on leaving.
class Guard {
 public:
  explicit Guard(int device);
  ~Guard();
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;

 private:
  int previous_;
  bool changed_ = false;
};

// All below act on the current device.
int multiprocessors();
int blocks_per_multiprocessor(const Kernel& kernel);
int resident_clusters(const Kernel& kernel);
// Empty where the device and the code that was compiled for it have clusters; else the reason.
std::string why_no_cluster(const Kernel& kernel);
size_t max_shared_bytes();  // of a block, where it asks for it

void* allocate(size_t bytes);  // zeroed
void release(void* memory);
void* allocate_pinned(size_t bytes);
void release_pinned(void* memory);
void copy_to_device(void* to, const void* from, size_t bytes, Stream stream);
void copy_to_host(void* to, const void* from, size_t bytes, Stream stream);  // waits for it
// Of a captured step: outside of the graph, and waits for it.
void copy_outside_of_capture(void* to, const void* from, size_t bytes);
bool is_capturing(Stream stream);

// Marks a point in a stream.
class Event {
 public:
  Event() = default;
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(Stream stream);
  void wait();               // on the host
  void hold(Stream stream);  // another stream, until the point is passed

 private:
  void* handle_ = nullptr;
};

// `arguments` points to the kernel's one parameter; `blocks` is a multiple of the kernel's cluster.
void launch(const Kernel& kernel, int blocks, const void* arguments, Stream stream);
// How many launches this process has made.
int64_t launches();

}  // namespace gpu
}  // namespace stepladder
