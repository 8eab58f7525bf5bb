// The GPU runtime over the emulator: device memory is the host's, streams are in order and done at once.
#include "common/gpu_runtime.h"

#include <cstdlib>
#include <cstring>

#include "common/error.h"
#include "emulator/device.h"
#include "emulator/graph.h"
#include "emulator/run.h"

namespace stepladder {
namespace gpu {

namespace {

int64_t launched = 0;

struct Node {
  Kernel kernel;
  int blocks;
  std::vector<char> arguments;
};
std::vector<Node> graph;
int capability = 9;

void run(const Kernel& kernel, int blocks, const void* arguments) {
  emulator::run(kernel.call, kernel.function, arguments, static_cast<unsigned>(blocks),
                static_cast<unsigned>(kernel.threads), kernel.shared_bytes, static_cast<unsigned>(kernel.cluster));
}

}  // namespace

std::vector<Device> devices(std::string*) { return {{"emulator", capability, 0, 2, size_t{1} << 30}}; }

Guard::Guard(int device) : previous_(device) {}
Guard::~Guard() = default;

// Few, so that blocks take several chunks each.
int multiprocessors() { return 2; }
int blocks_per_multiprocessor(const Kernel&) { return 2; }
int resident_clusters(const Kernel&) { return 2; }
std::string why_no_cluster(const Kernel&) {
  return capability >= 9 ? "" : "compute capability " + std::to_string(capability) + ".0";
}
size_t max_shared_bytes() { return size_t{227} << 10; }

void* allocate(size_t bytes) {
  void* memory = calloc(1, bytes);
  SL_CHECK(memory != nullptr, "no memory for ", bytes, " bytes");
  return memory;
}
void release(void* memory) { free(memory); }
void* allocate_pinned(size_t bytes) { return allocate(bytes); }
void release_pinned(void* memory) { free(memory); }
void copy_to_device(void* to, const void* from, size_t bytes, Stream) { memcpy(to, from, bytes); }
void copy_to_host(void* to, const void* from, size_t bytes, Stream) { memcpy(to, from, bytes); }
void copy_outside_of_capture(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
// Any stream but the default one is being captured: its launches are kept for a replay.
bool is_capturing(Stream stream) { return stream != nullptr; }

Event::~Event() = default;
void Event::record(Stream) {}
void Event::wait() {}
void Event::hold(Stream) {}

void launch(const Kernel& kernel, int blocks, const void* arguments, Stream stream) {
  ++launched;
  if (!is_capturing(stream)) return run(kernel, blocks, arguments);
  const char* bytes = static_cast<const char*>(arguments);
  graph.push_back({kernel, blocks, std::vector<char>(bytes, bytes + kernel.argument_bytes)});
}

int64_t launches() { return launched; }

}  // namespace gpu
}  // namespace stepladder

namespace emulator {

void set_capability(int major) { stepladder::gpu::capability = major; }

void begin_capture() { stepladder::gpu::graph.clear(); }
void replay() {
  for (const auto& node : stepladder::gpu::graph) stepladder::gpu::run(node.kernel, node.blocks, node.arguments.data());
}

}  // namespace emulator
