// The header of a safetensors file: which tensor lies where.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace liveact {

struct HeaderEntry {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  size_t begin = 0;  // of its bytes in the file
  size_t end = 0;
};

// The tensors of a whole file in memory, in the order of their bytes. Every byte behind the header
// belongs to exactly one of them. Throws Error without naming the file: "a header of 9 bytes in a
// file of 8", or "tensor 'a': expected ..., found ...".
std::vector<HeaderEntry> read_header(std::string_view file);

}  // namespace liveact
