// Files that a user hands over: mapped or read, with one clear error that names them.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <string_view>

#include "core/json.h"

namespace liveact {

// A private mapping of a whole file. NOTE: a file that is cut while it is mapped kills the process
// (SIGBUS): replace weight files by renaming, never in place.
class MappedFile {
 public:
  // Throws Error where `path` is no regular file, or the system refuses.
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  char* data() const { return data_; }  // writing changes this process only
  size_t size() const { return size_; }
  std::string_view bytes() const { return {data_, size_}; }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

// `path`, which must be a regular file (or lead to one); else Error.
const std::filesystem::path& require_file(const std::filesystem::path& path);

// The object in a JSON file of at most kMaxJsonBytes. Throws Error naming it.
constexpr size_t kMaxJsonBytes = size_t{1} << 28;
Json read_json(const std::filesystem::path& path);

}  // namespace liveact
