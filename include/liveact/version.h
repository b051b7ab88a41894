// The version of the runtime; that of the Python package is the same.
#pragma once

namespace liveact {

inline constexpr const char* kVersion = "0.1.0";

}  // namespace liveact
