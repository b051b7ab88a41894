// The launcher of kernels that were compiled ahead of time. It checks every promise that the
// compiler was given. Its errors are those of the device: these kernels cannot do what is asked.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cuda/driver.h"
#include "liveact/kernel_image.h"

namespace liveact::cuda {

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
  Argument(
      int64_t value);  // NOLINT(google-explicit-constructor): throws DeviceError beyond 32 bits
  Argument(int value) : Argument(static_cast<int64_t>(value)) {}           // NOLINT
  Argument(float value) : type(KernelParameter::Type::f32), f32(value) {}  // NOLINT
};

struct UnloadModule {
  CUresult (*unload)(CUmodule) = nullptr;
  void operator()(CUmodule module) const { unload(module); }
};

// The kernels of one device, loaded once.
class KernelTable {
 public:
  // The context of the device must be current, here and in every call.
  KernelTable(const Driver& driver, std::vector<KernelImage> images);
  KernelTable(const KernelTable&) = delete;
  KernelTable& operator=(const KernelTable&) = delete;

  bool has(const std::string& name) const { return kernels_.contains(name); }

  // Throws DeviceError for an unknown kernel.
  const KernelImage& image(const std::string& name) const;

  using Arguments = std::span<const Argument>;
  using Grid = std::array<unsigned, 3>;

  // The grid of this launch; an extent of 0 means that there is nothing to do. Throws DeviceError
  // for an unknown kernel, a wrong number or type of arguments, or a broken promise, which would
  // otherwise be wrong results.
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
    std::unique_ptr<CUmod_st, UnloadModule> module;
    CUfunction function = nullptr;
  };

  const Driver& driver_;
  std::map<std::string, Loaded> kernels_;
};

}  // namespace liveact::cuda
