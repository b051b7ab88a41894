#include "core/files.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "core/check.h"

namespace liveact {

namespace {

[[noreturn]] void refuse(const std::filesystem::path& path, int error) {
  detail::fail(path.string(), ": expected a readable file, found ",
               std::generic_category().message(error));
}

struct Descriptor {
  int number;
  ~Descriptor() { close(number); }
};

}  // namespace

const std::filesystem::path& require_file(const std::filesystem::path& path) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) {
    const bool something = std::filesystem::exists(path, error);
    detail::fail(path.string(), ": expected a file, found ",
                 something ? "something else" : "nothing");
  }
  return path;
}

MappedFile::MappedFile(const std::filesystem::path& path) {
  const Descriptor file{open(require_file(path).c_str(), O_RDONLY | O_CLOEXEC)};
  if (file.number < 0) refuse(path, errno);
  struct stat status = {};
  if (fstat(file.number, &status) != 0) refuse(path, errno);
  size_ = static_cast<size_t>(status.st_size);
  if (size_ == 0) return;
  // MAP_NORESERVE: clean pages of a file need no memory of their own, so that a checkpoint larger
  // than the memory can be mapped.
  void* mapped =
      mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, file.number, 0);
  if (mapped == MAP_FAILED) refuse(path, errno);
  data_ = static_cast<char*>(mapped);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(data_, size_);
}

Json read_json(const std::filesystem::path& path) {
  const MappedFile file(path);
  LIVEACT_CHECK(file.size() <= kMaxJsonBytes, path.string(), ": expected at most ", kMaxJsonBytes,
                " bytes, found ", file.size());
  Json value;
  try {
    value = Json::parse(file.bytes());
  } catch (const Error& error) {
    detail::fail(path.string(), ": expected JSON, found ", error.what());
  }
  LIVEACT_CHECK(value.object() != nullptr, path.string(), ": expected a JSON object, found ",
                value.type_name());
  return value;
}

}  // namespace liveact
