// What strangers' bytes meet: JSON, headers of weight files, policies, manifests of kernels. Each
// input goes to all of them, and is taken or refused with an Error; anything else is a finding.
//
// With clang and LIVEACT_FUZZ it becomes a libFuzzer program (see CONTRIBUTING.md); corpus.cpp runs
// it without.

#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/dit_config.h"
#include "checkpoint/safetensors.h"
#include "core/json.h"
#include "core/sha256.h"
#include "cuda/manifest.h"

namespace {

using namespace liveact;

// A message is one line that a terminal can show.
void check_message(std::string_view message) {
  if (message.empty() || message.size() > 4096) std::abort();
  for (unsigned char c : message) {
    if (c < 0x20) std::abort();
  }
}

template <typename Read>
void expect_no_more_than_an_error(const Read& read) {
  try {
    read();
  } catch (const Error& error) {
    check_message(error.what());
  }
}

// Every byte that a tensor is said to have is there, and no other is.
void check_header(std::string_view file) {
  const std::vector<HeaderEntry> entries = read_header(file);
  size_t end = entries.empty() ? file.size() : entries.front().begin;
  for (const HeaderEntry& entry : entries) {
    if (entry.begin != end || entry.end < entry.begin) std::abort();
    end = entry.end;
  }
  if (end != file.size()) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  if (sha256(bytes).size() != 64) std::abort();
  expect_no_more_than_an_error([&] { check_header(bytes); });
  Json json;
  try {
    json = Json::parse(bytes);
  } catch (const Error& error) {
    check_message(error.what());
    return 0;
  }
  if (json.text(64).size() > 64) std::abort();
  expect_no_more_than_an_error([&] { policy_from(json, "policy.json"); });
  expect_no_more_than_an_error([&] { read_manifest(json, "manifest.json", "sm_90a"); });
  return 0;
}
