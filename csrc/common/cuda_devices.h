// What the CUDA runtime says of this machine. No toolkit header, so that the bindings stay free of it.
#pragma once

#include <string>
#include <vector>

namespace stepladder {

struct CudaDevice {
  std::string name;
  int major, minor;  // compute capability
  int multiprocessors;
  size_t memory;  // bytes
};

// Empty where there is no device; `reason` then says why, in the runtime's words.
std::vector<CudaDevice> cuda_devices(std::string* reason);

}  // namespace stepladder
