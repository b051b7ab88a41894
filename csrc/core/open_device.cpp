// Devices by their names.

#include <algorithm>
#include <string_view>

#include "core/check.h"
#include "core/json.h"
#include "liveact/device.h"

namespace liveact {

std::shared_ptr<Device> open_device(const std::string& name, const std::filesystem::path& kernels,
                                    const CudaLibraries& libraries) {
  if (name == "cpu") return open_cpu();
  std::string_view index = name;
  const bool is_cuda = index.starts_with("cuda");
  if (is_cuda) index.remove_prefix(4);
  const bool is_first = is_cuda && index.empty();
  const bool has_index = is_cuda && index.size() >= 2 && index.size() <= 5 && index[0] == ':' &&
                         std::all_of(index.begin() + 1, index.end(),
                                     [](unsigned char c) { return c >= '0' && c <= '9'; });
  LIVEACT_CHECK(is_first || has_index, "device: expected cpu or cuda:N, found ", repr(name, 80));
  const int number = is_first ? 0 : std::stoi(std::string(index.substr(1)));
  const std::string architecture = cuda_architecture(number, libraries);
  const std::filesystem::path& folder = kernels.empty() ? packaged_kernels() : kernels;
  return open_cuda(number, load_kernels(folder, architecture), libraries);
}

}  // namespace liveact
