// What tests set of the emulated device.
#pragma once

namespace emulator {

// The major number of its compute capability; 9 at first.
void set_capability(int major);

}  // namespace emulator
