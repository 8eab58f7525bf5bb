#include "common/gpu_runtime.h"

#include <cuda_runtime.h>

#include <atomic>

#include "common/error.h"

namespace stepladder {
namespace gpu {

namespace {

void check(cudaError_t error, const char* what, const char* file, int line) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  fail(file, line, what, ": ", cudaGetErrorName(error), ", ", cudaGetErrorString(error));
}
#define SL_CUDA(call) check(call, #call, __FILE__, __LINE__)

std::atomic<int64_t> launched{0};

// Lets calls pass that a stream capture elsewhere on this thread would forbid.
struct Relaxed {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  Relaxed() { SL_CUDA(cudaThreadExchangeStreamCaptureMode(&mode)); }
  ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode); }
};

// Apart from all others, so that it stays out of a capture.
struct OwnStream {
  cudaStream_t handle;
  OwnStream() { SL_CUDA(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking)); }
  ~OwnStream() { cudaStreamDestroy(handle); }
};

// Beyond 48 KiB a kernel has to ask, on each device.
void ask_for_shared(const Kernel& kernel) {
  if (kernel.shared_bytes <= 48 << 10) return;
  SL_CUDA(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(kernel.shared_bytes)));
}

struct Configuration {
  cudaLaunchConfig_t launch = {};
  cudaLaunchAttribute cluster = {};

  Configuration(const Kernel& kernel, int blocks, Stream stream) {
    launch.gridDim = dim3(blocks);
    launch.blockDim = dim3(kernel.threads);
    launch.dynamicSmemBytes = kernel.shared_bytes;
    launch.stream = static_cast<cudaStream_t>(stream);
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(kernel.cluster), 1, 1};
    launch.attrs = &cluster;
    launch.numAttrs = kernel.cluster > 1 ? 1 : 0;
  }
};

}  // namespace

std::vector<Device> devices(std::string* reason) {
  std::vector<Device> found;
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) *reason = cudaGetErrorString(error);
  for (int i = 0; error == cudaSuccess && i < count; ++i) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) continue;
    found.push_back({properties.name, properties.major, properties.minor, properties.multiProcessorCount,
                     properties.totalGlobalMem});
  }
  return found;
}

Guard::Guard(int device) {
  SL_CUDA(cudaGetDevice(&previous_));
  changed_ = device != previous_;
  if (changed_) SL_CUDA(cudaSetDevice(device));
}

Guard::~Guard() {
  if (changed_) cudaSetDevice(previous_);
}

int multiprocessors() {
  int device, count;
  SL_CUDA(cudaGetDevice(&device));
  SL_CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

int blocks_per_multiprocessor(const Kernel& kernel) {
  int blocks;
  ask_for_shared(kernel);
  SL_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel.function, kernel.threads, kernel.shared_bytes));
  SL_CHECK(blocks > 0, "the kernel ", kernel.name, " does not fit this device");
  return blocks;
}

int resident_clusters(const Kernel& kernel) {
  int clusters;
  ask_for_shared(kernel);
  const Configuration configuration(kernel, kernel.cluster, nullptr);
  SL_CUDA(cudaOccupancyMaxActiveClusters(&clusters, kernel.function, &configuration.launch));
  SL_CHECK(clusters > 0, "a cluster of the kernel ", kernel.name, " does not fit this device");
  return clusters;
}

std::string why_no_cluster(const Kernel& kernel) {
  int device, major, minor;
  SL_CUDA(cudaGetDevice(&device));
  SL_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  SL_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  if (major < 9) return "compute capability " + std::to_string(major) + "." + std::to_string(minor);
  // Code for an older architecture, compiled for this one by the driver, has none.
  cudaFuncAttributes attributes;
  SL_CUDA(cudaFuncGetAttributes(&attributes, kernel.function));
  return attributes.ptxVersion >= 90 ? "" : "kernels compiled for sm_" + std::to_string(attributes.ptxVersion);
}

size_t max_shared_bytes() {
  int device, bytes;
  SL_CUDA(cudaGetDevice(&device));
  SL_CUDA(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return static_cast<size_t>(bytes);
}

void* allocate(size_t bytes) {
  const Relaxed relaxed;
  void* memory;
  SL_CUDA(cudaMalloc(&memory, bytes));
  const OwnStream stream;
  SL_CUDA(cudaMemsetAsync(memory, 0, bytes, stream.handle));
  SL_CUDA(cudaStreamSynchronize(stream.handle));
  return memory;
}

void release(void* memory) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  cudaFree(memory);
  cudaThreadExchangeStreamCaptureMode(&mode);
}

void* allocate_pinned(size_t bytes) {
  const Relaxed relaxed;
  void* memory;
  SL_CUDA(cudaMallocHost(&memory, bytes));
  return memory;
}

void release_pinned(void* memory) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  cudaFreeHost(memory);
  cudaThreadExchangeStreamCaptureMode(&mode);
}

void copy_to_device(void* to, const void* from, size_t bytes, Stream stream) {
  SL_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream)));
}

void copy_to_host(void* to, const void* from, size_t bytes, Stream stream) {
  SL_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, static_cast<cudaStream_t>(stream)));
  SL_CUDA(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)));
}

void copy_outside_of_capture(void* to, const void* from, size_t bytes) {
  const Relaxed relaxed;
  const OwnStream stream;
  SL_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream.handle));
  SL_CUDA(cudaStreamSynchronize(stream.handle));
}

bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status;
  SL_CUDA(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status));
  return status != cudaStreamCaptureStatusNone;
}

Event::~Event() {
  if (handle_ != nullptr) cudaEventDestroy(static_cast<cudaEvent_t>(handle_));
}

void Event::record(Stream stream) {
  if (handle_ == nullptr) {
    cudaEvent_t event;
    SL_CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    handle_ = event;
  }
  SL_CUDA(cudaEventRecord(static_cast<cudaEvent_t>(handle_), static_cast<cudaStream_t>(stream)));
}

void Event::wait() {
  if (handle_ != nullptr) SL_CUDA(cudaEventSynchronize(static_cast<cudaEvent_t>(handle_)));
}

void Event::hold(Stream stream) {
  if (handle_ == nullptr) return;
  SL_CUDA(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), static_cast<cudaEvent_t>(handle_), 0));
}

void launch(const Kernel& kernel, int blocks, const void* arguments, Stream stream) {
  void* parameters[] = {const_cast<void*>(arguments)};
  ask_for_shared(kernel);
  const Configuration configuration(kernel, blocks, stream);
  SL_CUDA(cudaLaunchKernelExC(&configuration.launch, kernel.function, parameters));
  ++launched;
}

int64_t launches() { return launched; }

}  // namespace gpu
}  // namespace stepladder
