// The one exception type of the runtime and the one macro that raises it.
//
// A message says what was expected and what was found, in one line. Nothing in csrc/ prints,
// exits or aborts.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace liveact {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A device, its driver or a library of it that is missing, out of memory or failing.
class DeviceError : public Error {
 public:
  using Error::Error;
};

// A block whose output has a NaN or an infinity. The stream is unusable afterwards, others are not.
class NonFiniteError : public Error {
 public:
  using Error::Error;
};

namespace detail {
template <typename Exception = Error, typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Exception(message.str());
}
}  // namespace detail

}  // namespace liveact

// LIVEACT_CHECK(rows == 8, "denoise: expected 8 latent frames, got ", rows);
#define LIVEACT_CHECK(condition, ...)                       \
  do {                                                      \
    if (!(condition)) ::liveact::detail::fail(__VA_ARGS__); \
  } while (false)
