// Runs a kernel on the emulated device.
#pragma once

#include <cstddef>

namespace emulator {

using Call = void (*)(const void* function, const void* arguments);

// Raises stepladder::Error for what a device would hang on or forbid. `cluster`: how many blocks run together.
void run(Call call, const void* function, const void* arguments, unsigned blocks, unsigned threads,
         size_t shared_bytes = 0, unsigned cluster = 1);

}  // namespace emulator
