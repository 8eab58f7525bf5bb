// The one exception type of the extension; Python sees it as RuntimeError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace stepladder {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
[[noreturn]] void fail(const char* file, int line, const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  message << " (" << file << ":" << line << ")";
  throw Error(message.str());
}

}  // namespace stepladder

// SL_CHECK(size > 0, "size is ", size, ", expected more than 0");
#define SL_CHECK(condition, ...) \
  do { \
    if (!(condition)) ::stepladder::fail(__FILE__, __LINE__, __VA_ARGS__); \
  } while (0)
