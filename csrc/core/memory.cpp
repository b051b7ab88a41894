#include "core/memory.h"

#include <iomanip>
#include <sstream>

#include "core/check.h"

namespace liveact {

void require_memory(const Device& device, const std::string& what,
                    const std::vector<std::pair<std::string, int64_t>>& parts) {
  const std::optional<int64_t> free_bytes = device.free_bytes();
  int64_t total = 0;
  for (const auto& [name, bytes] : parts) total += bytes;
  if (!free_bytes.has_value() || total <= *free_bytes) return;
  const bool giga = total >= 1'000'000'000;
  const auto text = [&](int64_t bytes) {
    std::ostringstream number;
    number << std::fixed << std::setprecision(1) << static_cast<double>(bytes) / (giga ? 1e9 : 1e6);
    return number.str();
  };
  std::string arithmetic;
  for (const auto& [name, bytes] : parts) {
    arithmetic += (arithmetic.empty() ? "" : ", ") + name + " " + text(bytes);
  }
  const char* unit = giga ? " GB" : " MB";
  detail::fail<DeviceError>(device.name(), ": expected ", text(total), unit, " for ", what, " (",
                            arithmetic, "), found ", text(*free_bytes), unit, " free");
}

}  // namespace liveact
