#include "emulator/fiber.h"

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

namespace {

thread_local Fiber* from = nullptr;  // who switched last
thread_local Fiber* to = nullptr;

}  // namespace

#if defined(__x86_64__)
// Saves what a callee must preserve on the old stack, and takes it from the new one.
extern "C" void sl_fiber_switch(void** save, void* load);
asm(R"(
.text
.globl sl_fiber_switch
.hidden sl_fiber_switch
.type sl_fiber_switch, @function
sl_fiber_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size sl_fiber_switch, .-sl_fiber_switch
)");
#endif

void Fiber::begin() {
  to->arrived();
  to->entry_(to->argument_);
}

void Fiber::arrived() {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &bytes);
  from->stack_bottom_ = bottom;
  from->stack_bytes_ = bytes;
#endif
}

void Fiber::start(char* stack, size_t bytes, Entry entry, void* argument) {
  entry_ = entry;
  argument_ = argument;
  stack_bottom_ = stack;
  stack_bytes_ = bytes;
  fake_stack_ = nullptr;
#if defined(__x86_64__)
  auto** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15});
  *--top = nullptr;  // begin() returns nowhere, and finds the stack aligned as after a call
  *--top = reinterpret_cast<void*>(&Fiber::begin);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  stack_pointer_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::begin, 0);
#endif
}

void Fiber::switch_to(Fiber& other, bool last) {
  from = this;
  to = &other;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack_, other.stack_bottom_, other.stack_bytes_);
#else
  (void)last;
#endif
#if defined(__x86_64__)
  sl_fiber_switch(&stack_pointer_, other.stack_pointer_);
#else
  swapcontext(&context_, &other.context_);
#endif
  arrived();
}

}  // namespace emulator
