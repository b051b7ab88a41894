// SHA-256 (FIPS 180-4), by which a file of a kernel is compared with its manifest.
#pragma once

#include <string>
#include <string_view>

namespace liveact {

std::string sha256(std::string_view bytes);  // 64 hexadecimal digits

}  // namespace liveact
