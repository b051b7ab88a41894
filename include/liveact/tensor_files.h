// The tensors of safetensors files, mapped: opening 28 GB costs the reading of a header.
//
// Whatever is wrong with a file becomes one Error of one line that names the file and, where there
// is one, the tensor, what was expected and what was found. No size that a header claims is
// believed before it was compared with the size of the file. Objects of these types are values; any
// number of threads may read them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "liveact/api.h"

namespace liveact {

struct StoredTensor {
  std::string dtype;  // as the file says: "BF16", "F32", "F8_E4M3", ...
  std::vector<int64_t> shape;
  int64_t bytes = 0;
  // Little-endian, row-major, anywhere in the file: not aligned. It keeps its mapping alive.
  // Writing there changes this process only. NOTE: a file that is cut while it is mapped kills the
  // process (SIGBUS): replace weight files by renaming, never in place.
  std::shared_ptr<std::byte> data;
  std::filesystem::path file;
};

class LIVEACT_API TensorFiles {
 public:
  // One file. Throws Error.
  static TensorFiles open(const std::filesystem::path& file);

  // `<stem>.safetensors` in a directory, or the shards of `<stem>.safetensors.index.json`. The
  // index says which shards there are, and every tensor it names must be in the shard it names.
  // Tensors of a shard that the index forgets are there all the same. Throws Error, also where
  // neither or both exist.
  static TensorFiles open(const std::filesystem::path& directory, const std::string& stem);

  // The file, or the index of the shards, that this was opened from.
  const std::filesystem::path& source() const { return source_; }
  const std::map<std::string, StoredTensor>& tensors() const { return tensors_; }

 private:
  explicit TensorFiles(std::filesystem::path source) : source_(std::move(source)) {}
  void add(const std::filesystem::path& file);

  std::filesystem::path source_;
  std::map<std::string, StoredTensor> tensors_;
};

}  // namespace liveact
