// Whether a device has memory for what is about to be allocated, asked before any of it is.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "liveact/device.h"

namespace liveact {

// Throws DeviceError when the parts (name, bytes) do not fit in what is free, with the arithmetic:
// "cuda:0: expected 8.6 GB for a session (context 7.5, scratch 1.1), found 6.0 GB free".
void require_memory(const Device& device, const std::string& what,
                    const std::vector<std::pair<std::string, int64_t>>& parts);

}  // namespace liveact
