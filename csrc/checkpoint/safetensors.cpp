#include "checkpoint/safetensors.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "core/check.h"
#include "core/json.h"

namespace liveact {

namespace {

constexpr size_t kLengthBytes = 8;
constexpr size_t kMaxHeaderBytes = 100'000'000;  // as of other readers of the format

constexpr std::array<std::pair<std::string_view, int64_t>, 12> kDtypes = {{
    {"BF16", 2},
    {"BOOL", 1},
    {"F16", 2},
    {"F32", 4},
    {"F64", 8},
    {"F8_E4M3", 1},
    {"F8_E5M2", 1},
    {"I16", 2},
    {"I32", 4},
    {"I64", 8},
    {"I8", 1},
    {"U8", 1},
}};

[[noreturn]] void refuse(const std::string& name, const std::string& what) {
  detail::fail("tensor ", repr(name, 200), ": ", what);
}

int64_t element_bytes(const std::string& name, const Json* dtype) {
  const std::string* text = dtype == nullptr ? nullptr : dtype->string();
  std::string known;
  for (const auto& [candidate, bytes] : kDtypes) {
    if (text != nullptr && *text == candidate) return bytes;
    known += (known.empty() ? "" : ", ") + repr(candidate);
  }
  const std::string found = text != nullptr    ? repr(*text, 80)
                            : dtype == nullptr ? "none"
                                               : dtype->text();
  refuse(name, "expected a dtype among [" + known + "], found " + found);
}

std::vector<int64_t> sizes(const std::string& name, const char* what, const Json* given) {
  std::vector<int64_t> found;
  bool good = given != nullptr && given->list() != nullptr;
  if (good) {
    for (const Json& item : *given->list()) {
      good = good && item.integer() != nullptr && *item.integer() >= 0;
      if (good) found.push_back(*item.integer());
    }
  }
  if (!good) {
    refuse(name, std::string("expected ") + what + " to be a list of sizes, found " +
                     (given == nullptr ? "none" : given->text()));
  }
  return found;
}

// shape · element_bytes; nothing where that is no int64.
bool multiply(const std::vector<int64_t>& shape, int64_t& bytes) {
  bool fits = true;
  for (int64_t extent : shape) {
    fits = fits && !__builtin_mul_overflow(bytes, extent, &bytes);
  }
  return fits;
}

HeaderEntry entry_of(const std::string& name, const Json& given, size_t data_start) {
  if (given.object() == nullptr) refuse(name, "expected an object, found " + given.text());
  HeaderEntry entry;
  entry.name = name;
  int64_t bytes = element_bytes(name, given.find("dtype"));
  entry.dtype = *given.find("dtype")->string();
  entry.shape = sizes(name, "shape", given.find("shape"));
  const std::vector<int64_t> range = sizes(name, "data_offsets", given.find("data_offsets"));
  if (range.size() != 2 || range[0] > range[1]) {
    refuse(name, "expected data_offsets to be a begin and an end, found " +
                     given.find("data_offsets")->text());
  }
  if (!multiply(entry.shape, bytes) || bytes != range[1] - range[0]) {
    refuse(name, "expected the bytes of shape " + given.find("shape")->text() + " in " +
                     entry.dtype + ", found " + std::to_string(range[1] - range[0]) + " bytes");
  }
  // Sums do not wrap: an end beyond the file is refused by the caller.
  entry.begin = data_start + static_cast<size_t>(range[0]);
  entry.end = data_start + static_cast<size_t>(range[1]);
  return entry;
}

void check_metadata(const Json& metadata) {
  bool good = metadata.object() != nullptr;
  if (good) {
    for (const auto& [_, value] : *metadata.object()) good = good && value.string() != nullptr;
  }
  LIVEACT_CHECK(good, "a __metadata__ that is no object of texts");
}

}  // namespace

std::vector<HeaderEntry> read_header(std::string_view file) {
  LIVEACT_CHECK(file.size() >= kLengthBytes, "a file of ", file.size(), " bytes");
  uint64_t length = 0;
  for (size_t i = 0; i < kLengthBytes; ++i) {
    length |= static_cast<uint64_t>(static_cast<unsigned char>(file[i])) << (8 * i);
  }
  LIVEACT_CHECK(length <= kMaxHeaderBytes && length <= file.size() - kLengthBytes, "a header of ",
                length, " bytes in a file of ", file.size());
  Json header;
  try {
    header = Json::parse(file.substr(kLengthBytes, length));
  } catch (const Error& error) {
    detail::fail("a header with ", error.what());
  }
  LIVEACT_CHECK(header.object() != nullptr, "a header that is no object");

  const size_t data_start = kLengthBytes + length;
  std::vector<HeaderEntry> entries;
  for (const auto& [name, value] : *header.object()) {
    if (name == "__metadata__") {
      check_metadata(value);
    } else {
      entries.push_back(entry_of(name, value, data_start));
    }
  }
  std::stable_sort(entries.begin(), entries.end(), [](const auto& a, const auto& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  size_t end = data_start;
  for (const HeaderEntry& entry : entries) {
    if (entry.begin != end) {
      refuse(entry.name, "expected its bytes to begin at " + std::to_string(end - data_start) +
                             ", where those before end, found " +
                             std::to_string(entry.begin - data_start));
    }
    end = entry.end;
  }
  LIVEACT_CHECK(end == file.size(), "tensors of ", end - data_start, " bytes in a file with ",
                file.size() - data_start);
  return entries;
}

}  // namespace liveact
