// Kernels that were compiled ahead of time: their images as the manifest describes them, and the
// launcher, which checks every promise the compiler was given.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cuda/driver.h"

namespace liveact::cuda {

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

// What triton_kernels/compile.py wrote about one cubin.
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

// A value for one parameter. Implicit, so that a launch reads like a call.
struct Argument {
  KernelParameter::Type type;
  union {
    CUdeviceptr pointer;
    int32_t i32;
    float f32;
  };

  Argument(const void* p)  // NOLINT(google-explicit-constructor)
      : type(KernelParameter::Type::pointer), pointer(reinterpret_cast<CUdeviceptr>(p)) {}
  Argument(int64_t value);  // NOLINT(google-explicit-constructor): throws Error beyond 32 bits
  Argument(int value) : Argument(static_cast<int64_t>(value)) {}           // NOLINT
  Argument(float value) : type(KernelParameter::Type::f32), f32(value) {}  // NOLINT
};

// The kernels of one device, loaded once.
class KernelTable {
 public:
  // The context of the device must be current, here and in every call.
  KernelTable(const Driver& driver, std::vector<KernelImage> images);
  ~KernelTable();
  KernelTable(const KernelTable&) = delete;
  KernelTable& operator=(const KernelTable&) = delete;

  bool has(const std::string& name) const { return kernels_.contains(name); }

  // Throws Error for an unknown kernel.
  const KernelImage& image(const std::string& name) const;

  using Arguments = std::span<const Argument>;
  using Grid = std::array<unsigned, 3>;

  // The grid of this launch; an extent of 0 means that there is nothing to do. Throws Error for an
  // unknown kernel, a wrong number or type of arguments, or a broken promise, which would otherwise
  // be wrong results.
  Grid check(const std::string& name, Arguments arguments) const;
  // Checks and launches.
  void launch(const std::string& name, CUstream stream, Arguments arguments) const;
  void launch(const std::string& name, CUstream stream,
              std::initializer_list<Argument> arguments) const {
    launch(name, stream, Arguments(arguments.begin(), arguments.size()));
  }

 private:
  struct Loaded {
    KernelImage image;
    CUmodule module = nullptr;
    CUfunction function = nullptr;
  };

  const Driver& driver_;
  std::map<std::string, Loaded> kernels_;
};

}  // namespace liveact::cuda
