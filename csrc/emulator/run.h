// Runs a kernel on the emulated device.
#pragma once

#include <cstddef>

namespace emulator {

using Call = void (*)(const void* function, const void* arguments);

// Raises stepladder::Error for what a device would hang on or forbid.
void run(Call call, const void* function, const void* arguments, unsigned blocks, unsigned threads,
         size_t shared_bytes = 0);

}  // namespace emulator
