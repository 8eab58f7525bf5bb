// Stackful coroutines: own assembly on x86-64, ucontext elsewhere; announced to AddressSanitizer.
#pragma once

#include <cstddef>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

class Fiber {
 public:
  using Entry = void (*)(void* argument);

  Fiber() = default;  // whoever runs now
  // Starts in `entry(argument)`, which must end in switch_to() another fiber and never be resumed after.
  void start(char* stack, size_t bytes, Entry entry, void* argument);
  // Leaves this fiber, which is the running one, for `other`. `last`: this one has ended.
  void switch_to(Fiber& other, bool last = false);

 private:
  static void begin();
  void arrived();

#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  Entry entry_ = nullptr;
  void* argument_ = nullptr;
  const void* stack_bottom_ = nullptr;
  size_t stack_bytes_ = 0;
  void* fake_stack_ = nullptr;
};

}  // namespace emulator
