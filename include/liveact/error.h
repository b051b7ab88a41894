// The exceptions of the runtime. A message says what was expected and what was found, in one line.
// Nothing of the runtime prints, exits or aborts.
#pragma once

#include <stdexcept>

// Visible: one may be thrown in a shared library and caught in another.
#define LIVEACT_EXCEPTION class __attribute__((visibility("default")))

namespace liveact {

// Whatever the runtime throws on purpose; of this type itself: what was given cannot be used.
LIVEACT_EXCEPTION Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A device, its driver or a library of it that is missing, out of memory or failing.
LIVEACT_EXCEPTION DeviceError : public Error {
 public:
  using Error::Error;
};

// A block whose output has a NaN or an infinity. The stream is unusable afterwards, others are not.
LIVEACT_EXCEPTION NonFiniteError : public Error {
 public:
  using Error::Error;
};

// A block that was stopped by Stream::cancel.
LIVEACT_EXCEPTION CancelledError : public Error {
 public:
  using Error::Error;
};

}  // namespace liveact

#undef LIVEACT_EXCEPTION
