// Runs a kernel on the emulated device.
#pragma once

namespace emulator {

using Call = void (*)(const void* function, const void* arguments);

// Raises stepladder::Error for what a device would hang on or forbid.
void run(Call call, const void* function, const void* arguments, unsigned blocks, unsigned threads);

}  // namespace emulator
