// A GPU kernel that was compiled ahead of time, as its manifest describes it (triton_kernels/).
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "liveact/api.h"

namespace liveact {

// One runtime parameter in ABI order, and what the compiler was promised: addresses and integers
// are multiples of `multiple`.
struct KernelParameter {
  enum class Type { pointer, i32, f32 };
  std::string name;
  Type type = Type::pointer;
  int multiple = 1;
};

// One factor of a grid dimension: the constant `divisor` where parameter is negative, else
// parameter / divisor rounded up.
struct GridFactor {
  int parameter = -1;
  int64_t divisor = 1;
};

struct KernelImage {
  std::string name;   // `<op>` or `<op>.<variant>`
  std::string cubin;  // the bytes, whose hash was compared with the manifest
  std::string symbol;
  int threads = 0;
  int shared_bytes = 0;
  int hidden_pointers = 0;  // trailing scratch pointers, passed as null
  std::vector<KernelParameter> parameters;
  std::array<std::vector<GridFactor>, 3> grid;
};

// Where kernels are that came with the runtime: share/liveact/gpu of the tree that it was installed
// in, seen from the shared library, or from the program that it was linked into.
LIVEACT_API std::filesystem::path packaged_kernels();

// The architectures that `folder` has kernels for, sorted: <folder>/<architecture>/manifest.json.
LIVEACT_API std::vector<std::string> kernel_architectures(const std::filesystem::path& folder);

// The kernels for an architecture such as "sm_90a". Throws DeviceError where there are none, or a
// file is not what the manifest says (SHA-256).
LIVEACT_API std::vector<KernelImage> load_kernels(const std::filesystem::path& folder,
                                                  const std::string& architecture);

}  // namespace liveact
