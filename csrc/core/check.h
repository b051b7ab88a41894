// The macros that throw. The message is put together only when it is needed.
#pragma once

#include <sstream>

#include "liveact/error.h"

namespace liveact::detail {

template <typename Exception = Error, typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Exception(message.str());
}

}  // namespace liveact::detail

// LIVEACT_CHECK(rows == 8, "denoise: expected 8 latent frames, found ", rows);
#define LIVEACT_CHECK(condition, ...)                       \
  do {                                                      \
    if (!(condition)) ::liveact::detail::fail(__VA_ARGS__); \
  } while (false)

// The same for what is the fault of a device.
#define LIVEACT_DEVICE_CHECK(condition, ...)                                        \
  do {                                                                              \
    if (!(condition)) ::liveact::detail::fail<::liveact::DeviceError>(__VA_ARGS__); \
  } while (false)
