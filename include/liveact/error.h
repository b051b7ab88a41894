// The exceptions of the runtime. A message says what was expected and what was found, in one line.
// Nothing of the runtime prints, exits or aborts.
#pragma once

#include <stdexcept>

#include "liveact/api.h"

namespace liveact {

// Whatever the runtime throws on purpose; of this type itself: what was given cannot be used.
class LIVEACT_API Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A device, its driver or a library of it that is missing, out of memory or failing.
class LIVEACT_API DeviceError : public Error {
 public:
  using Error::Error;
};

// A block whose output has a NaN or an infinity. The stream is unusable afterwards, others are not.
class LIVEACT_API NonFiniteError : public Error {
 public:
  using Error::Error;
};

// A block that was stopped by Stream::cancel.
class LIVEACT_API CancelledError : public Error {
 public:
  using Error::Error;
};

}  // namespace liveact
