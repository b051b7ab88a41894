#include "liveact/tensor_files.h"

#include <set>

#include "checkpoint/identify.h"
#include "checkpoint/safetensors.h"
#include "core/check.h"
#include "core/files.h"

namespace liveact {

namespace fs = std::filesystem;

namespace {

// The `weight_map` of an index: tensor -> name of a file beside the index.
std::vector<std::pair<std::string, std::string>> read_index(const fs::path& index) {
  const Json raw = read_json(index);
  const Json* map = raw.find("weight_map");
  LIVEACT_CHECK(map != nullptr && map->object() != nullptr && !map->object()->empty(),
                index.string(), ": expected an object 'weight_map', found ",
                map == nullptr ? Json().text() : map->text());
  std::vector<std::pair<std::string, std::string>> shard_of;
  for (const auto& [name, shard] : *map->object()) {
    // A plain name: an index must not reach outside of its directory.
    const std::string* file = shard.string();
    const bool plain = file != nullptr && !file->empty() && *file != "." && *file != ".." &&
                       file->find('/') == std::string::npos &&
                       file->find('\0') == std::string::npos;
    LIVEACT_CHECK(plain, index.string(), ": tensor ", repr(name, 200),
                  ": expected a file name, found ", shard.text());
    shard_of.emplace_back(name, *file);
  }
  return shard_of;
}

}  // namespace

TensorFiles TensorFiles::open(const fs::path& file) {
  TensorFiles result(file);
  result.add(file);
  return result;
}

TensorFiles TensorFiles::open(const fs::path& directory, const std::string& stem) {
  const fs::path single = directory / (stem + ".safetensors");
  const fs::path index = directory / (stem + ".safetensors.index.json");
  const std::string expected = directory.string() + ": expected " + single.filename().string() +
                               " or " + index.filename().string() + ", found ";
  std::error_code error;
  const bool has_single = fs::exists(single, error);
  const bool has_index = fs::exists(index, error);
  if (has_single && has_index) detail::fail(expected, "both");
  if (has_single) return open(single);
  if (!has_index) {
    std::string instead = other_files(directory, stem, "safetensors");
    if (instead.empty()) instead = other_files(directory, "", "safetensors");
    detail::fail(expected, "neither", instead);
  }

  const auto shard_of = read_index(index);
  std::set<std::string> shards;
  for (const auto& [_, shard] : shard_of) shards.insert(shard);
  TensorFiles result(index);
  for (const std::string& shard : shards) result.add(directory / shard);
  for (const auto& [name, shard] : shard_of) {
    const auto found = result.tensors_.find(name);
    const std::string where = found == result.tensors_.end()
                                  ? std::string("no shard")
                                  : found->second.file.filename().string();
    LIVEACT_CHECK(where == shard, index.string(), ": tensor ", repr(name, 200), ": expected in ",
                  shard, ", found in ", where);
  }
  return result;
}

void TensorFiles::add(const fs::path& file) {
  const auto mapped = std::make_shared<const MappedFile>(file);
  std::vector<HeaderEntry> entries;
  try {
    entries = read_header(mapped->bytes());
  } catch (const Error& error) {
    const std::string form = other_form(file, "safetensors");
    const std::string_view reason = error.what();
    if (form.empty() && reason.starts_with("tensor ")) detail::fail(file.string(), ": ", reason);
    detail::fail(file.string(), ": expected a safetensors file, found ",
                 form.empty() ? reason : std::string_view(form));
  }
  for (HeaderEntry& entry : entries) {
    auto* data = reinterpret_cast<std::byte*>(mapped->data() + entry.begin);
    StoredTensor tensor{.dtype = std::move(entry.dtype),
                        .shape = std::move(entry.shape),
                        .bytes = static_cast<int64_t>(entry.end - entry.begin),
                        .data = std::shared_ptr<std::byte>(mapped, data),
                        .file = file};
    const auto [found, inserted] = tensors_.emplace(entry.name, std::move(tensor));
    LIVEACT_CHECK(inserted, file.string(), ": tensor ", repr(entry.name, 200),
                  ": expected in one shard only, found in ", found->second.file.filename().string(),
                  " too");
  }
}

}  // namespace liveact
