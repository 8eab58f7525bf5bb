#include "common/cuda_devices.h"

#include <cuda_runtime.h>

namespace stepladder {

std::vector<CudaDevice> cuda_devices(std::string* reason) {
  std::vector<CudaDevice> devices;
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) *reason = cudaGetErrorString(error);
  for (int i = 0; error == cudaSuccess && i < count; ++i) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) continue;
    devices.push_back({properties.name, properties.major, properties.minor, properties.multiProcessorCount,
                       properties.totalGlobalMem});
  }
  return devices;
}

}  // namespace stepladder
