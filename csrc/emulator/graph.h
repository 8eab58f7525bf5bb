// The emulated counterpart of a CUDA graph: launches on a captured stream, with their arguments as they were.
#pragma once

namespace emulator {

void begin_capture();
void replay();

}  // namespace emulator
