#include "cuda/manifest.h"

#include <dlfcn.h>

#include <algorithm>
#include <system_error>

#include "core/check.h"
#include "core/files.h"
#include "core/sha256.h"

namespace liveact {

namespace fs = std::filesystem;

namespace {

constexpr int64_t kFormat = 1;
constexpr auto kManifest = "manifest.json";

// A part of a manifest, and what to call it in messages.
class Entry {
 public:
  Entry(const Json& json, std::string where) : json_(json), where_(std::move(where)) {}

  const std::string& where() const { return where_; }

  std::string text(const char* key) const { return *typed(key, &Json::string, "a text"); }

  int whole(const char* key) const {
    const int64_t value = *typed(key, &Json::integer, "a size");
    LIVEACT_DEVICE_CHECK(value >= 0 && value < (int64_t{1} << 31), where_, ": expected ", key,
                         " to be a size, found ", value);
    return static_cast<int>(value);
  }

  std::vector<Entry> list(const char* key) const {
    return entries(*typed(key, &Json::list, "a list"), where_);
  }

  bool has(const char* key) const { return json_.find(key) != nullptr; }
  const Json& json() const { return json_; }

  static std::vector<Entry> entries(const Json::List& items, const std::string& where) {
    std::vector<Entry> result;
    for (const Json& item : items) result.emplace_back(item, where);
    return result;
  }

 private:
  template <typename T>
  const T* typed(const char* key, const T* (Json::*get)() const, const char* what) const {
    const Json* found = json_.find(key);
    const T* value = found == nullptr ? nullptr : (found->*get)();
    LIVEACT_DEVICE_CHECK(value != nullptr, where_, ": expected ", key, " to be ", what, ", found ",
                         found == nullptr ? "none" : found->text());
    return value;
  }

  const Json& json_;
  std::string where_;
};

KernelParameter parameter_of(const Entry& given) {
  using Type = KernelParameter::Type;
  const std::string type = given.text("type");
  LIVEACT_DEVICE_CHECK(type.starts_with('*') || type == "i32" || type == "f32", given.where(),
                       ": expected parameters of type *, i32 or f32, found ", repr(type, 80));
  KernelParameter result;
  result.name = given.text("name");
  result.type = type.starts_with('*') ? Type::pointer : type == "i32" ? Type::i32 : Type::f32;
  for (const char* key : {"align_bytes", "divisible_by"}) {
    if (given.has(key)) result.multiple = std::max(given.whole(key), 1);
  }
  return result;
}

// An integer, or {parameter, divisor}.
GridFactor factor_of(const Entry& given, const std::vector<KernelParameter>& parameters) {
  if (const int64_t* constant = given.json().integer()) return {-1, *constant};
  const std::string name = given.text("parameter");
  const int divisor = given.whole("divisor");
  LIVEACT_DEVICE_CHECK(divisor > 0, given.where(), ": expected a divisor, found ", divisor);
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (parameters[i].name == name) return {static_cast<int>(i), divisor};
  }
  detail::fail<DeviceError>(given.where(), ": expected a grid of its parameters, found ",
                            repr(name, 80));
}

std::string read_cubin(const fs::path& file, const std::string& digest) {
  std::error_code error;
  LIVEACT_DEVICE_CHECK(fs::is_regular_file(file, error), file.string(),
                       ": expected a kernel, found none");
  std::string cubin(MappedFile(file).bytes());
  const std::string found = sha256(cubin);
  LIVEACT_DEVICE_CHECK(found == digest, file.string(), ": expected SHA-256 ", repr(digest, 80),
                       ", found ", found);
  return cubin;
}

DescribedKernel kernel_of(const Json& given, const std::string& manifest) {
  const Entry kernel(given, manifest + ": " + repr(Entry(given, manifest).text("name"), 80));
  DescribedKernel result;
  KernelImage& image = result.image;
  image.name = kernel.text("name");
  result.file = kernel.text("file");
  LIVEACT_DEVICE_CHECK(fs::path(result.file).filename() == result.file && !result.file.empty(),
                       kernel.where(), ": expected a file beside the manifest, found ",
                       repr(result.file, 80));
  result.sha256 = kernel.text("sha256");
  image.symbol = kernel.text("symbol");
  image.threads = kernel.whole("threads");
  image.shared_bytes = kernel.whole("shared_bytes");
  for (const Entry& hidden : kernel.list("hidden_parameters")) {
    LIVEACT_DEVICE_CHECK(hidden.whole("bytes_per_program") == 0, kernel.where(),
                         ": expected a kernel without scratch memory, found one with");
    ++image.hidden_pointers;
  }
  for (const Entry& parameter : kernel.list("parameters")) {
    image.parameters.push_back(parameter_of(parameter));
  }
  const std::vector<Entry> grid = kernel.list("grid");
  LIVEACT_DEVICE_CHECK(grid.size() <= image.grid.size(), kernel.where(),
                       ": expected a grid of at most 3 dimensions, found ", grid.size());
  for (size_t axis = 0; axis < grid.size(); ++axis) {
    const Json::List* factors = grid[axis].json().list();
    LIVEACT_DEVICE_CHECK(factors != nullptr, kernel.where(),
                         ": expected a dimension to be a list, found ", grid[axis].json().text());
    for (const Entry& factor : Entry::entries(*factors, kernel.where())) {
      image.grid[axis].push_back(factor_of(factor, image.parameters));
    }
  }
  return result;
}

}  // namespace

std::vector<DescribedKernel> read_manifest(const Json& manifest, const std::string& where,
                                           const std::string& architecture) {
  const Json* format = manifest.find("format");
  const Json* arch = manifest.find("arch");
  const auto shown = [](const Json* value) { return value == nullptr ? "None" : value->text(); };
  LIVEACT_DEVICE_CHECK(format != nullptr && *format == Json(kFormat) && arch != nullptr &&
                           *arch == Json(architecture),
                       where, ": expected format ", kFormat, " for ", repr(architecture),
                       ", found format ", shown(format), " for ", shown(arch));
  std::vector<DescribedKernel> kernels;
  for (const Entry& kernel : Entry(manifest, where).list("kernels")) {
    kernels.push_back(kernel_of(kernel.json(), where));
  }
  return kernels;
}

fs::path packaged_kernels() {
  Dl_info found = {};
  dladdr(reinterpret_cast<const void*>(&packaged_kernels), &found);
  const fs::path binary = found.dli_fname == nullptr ? "" : found.dli_fname;
  std::error_code error;
  const fs::path real = fs::canonical(binary, error);
  return (real.parent_path() / LIVEACT_KERNELS_FROM_LIBRARY).lexically_normal();
}

std::vector<std::string> kernel_architectures(const fs::path& folder) {
  std::vector<std::string> found;
  std::error_code error;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    std::error_code ignored;
    if (fs::exists(it->path() / kManifest, ignored))
      found.push_back(it->path().filename().string());
  }
  std::sort(found.begin(), found.end());
  return found;
}

std::vector<KernelImage> load_kernels(const fs::path& folder, const std::string& architecture) {
  const std::vector<std::string> known = kernel_architectures(folder);
  if (std::find(known.begin(), known.end(), architecture) == known.end()) {
    std::string names;
    for (const std::string& name : known) names += (names.empty() ? "" : ", ") + name;
    detail::fail<DeviceError>("kernels: expected some compiled for ", architecture, " in ",
                              folder.string(), ", found ", names.empty() ? "none" : names);
  }
  const fs::path path = folder / architecture / kManifest;
  Json manifest;
  try {
    manifest = read_json(path);
  } catch (const DeviceError&) {
    throw;
  } catch (const Error& error) {
    throw DeviceError(error.what());
  }
  std::vector<KernelImage> images;
  for (DescribedKernel& kernel : read_manifest(manifest, path.string(), architecture)) {
    kernel.image.cubin = read_cubin(path.parent_path() / kernel.file, kernel.sha256);
    images.push_back(std::move(kernel.image));
  }
  return images;
}

}  // namespace liveact
