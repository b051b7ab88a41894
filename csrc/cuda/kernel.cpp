#include "cuda/kernel.h"

#include <limits>

#include "core/check.h"

namespace liveact::cuda {

namespace {

constexpr int kDefaultSharedBytes = 48 * 1024;  // more must be opted into
constexpr int kMaxArguments = 32;

const char* type_name(KernelParameter::Type type) {
  switch (type) {
    case KernelParameter::Type::pointer:
      return "a pointer";
    case KernelParameter::Type::i32:
      return "an integer";
    case KernelParameter::Type::f32:
      return "a float";
  }
  return "";
}

void check_argument(const std::string& kernel, const KernelParameter& parameter,
                    const Argument& argument) {
  using Type = KernelParameter::Type;
  LIVEACT_DEVICE_CHECK(argument.type == parameter.type, kernel, ": expected ",
                       type_name(parameter.type), " for ", parameter.name, ", found ",
                       type_name(argument.type));
  const auto multiple = static_cast<CUdeviceptr>(parameter.multiple);
  LIVEACT_DEVICE_CHECK(parameter.type != Type::pointer || argument.pointer % multiple == 0, kernel,
                       ": expected ", parameter.name, " to be aligned to ", multiple,
                       " bytes, found address ", argument.pointer);
  LIVEACT_DEVICE_CHECK(parameter.type != Type::i32 || argument.i32 % parameter.multiple == 0,
                       kernel, ": expected ", parameter.name, " to be a multiple of ", multiple,
                       ", found ", argument.i32);
}

}  // namespace

Argument::Argument(int64_t value)
    : type(KernelParameter::Type::i32), i32(static_cast<int32_t>(value)) {
  LIVEACT_DEVICE_CHECK(
      value >= std::numeric_limits<int32_t>::min() && value <= std::numeric_limits<int32_t>::max(),
      "kernel argument: expected 32 bits, found ", value);
}

KernelTable::KernelTable(const Driver& driver, std::vector<KernelImage> images) : driver_(driver) {
  for (KernelImage& image : images) {
    Loaded loaded;
    LIVEACT_DEVICE_CHECK(image.parameters.size() + image.hidden_pointers <= kMaxArguments,
                         image.name, ": expected at most ", kMaxArguments, " parameters, found ",
                         image.parameters.size() + image.hidden_pointers);
    CUmodule module = nullptr;
    driver.check(driver.module_load(&module, image.cubin.data()),
                 ("cuModuleLoadData of " + image.name).c_str());
    loaded.module = {module, {driver.module_unload}};
    driver.check(driver.module_function(&loaded.function, module, image.symbol.c_str()),
                 ("cuModuleGetFunction of " + image.name).c_str());
    if (image.shared_bytes > kDefaultSharedBytes) {
      driver.check(driver.function_set_attribute(loaded.function, kFunctionMaxDynamicShared,
                                                 image.shared_bytes),
                   ("cuFuncSetAttribute of " + image.name).c_str());
    }
    const std::string name = image.name;
    loaded.image = std::move(image);
    loaded.image.cubin.clear();  // the driver has its own copy
    const bool inserted = kernels_.emplace(name, std::move(loaded)).second;
    LIVEACT_DEVICE_CHECK(inserted, "kernels: expected each name once, found ", name, " twice");
  }
}

const KernelImage& KernelTable::image(const std::string& name) const {
  const auto found = kernels_.find(name);
  LIVEACT_DEVICE_CHECK(found != kernels_.end(), "kernels: expected ", name,
                       " to have been compiled for this device, found none");
  return found->second.image;
}

KernelTable::Grid KernelTable::check(const std::string& name, Arguments arguments) const {
  const KernelImage& image = this->image(name);
  LIVEACT_DEVICE_CHECK(arguments.size() == image.parameters.size(), name, ": expected ",
                       image.parameters.size(), " arguments, found ", arguments.size());
  const Argument* argument = arguments.data();
  for (size_t i = 0; i < image.parameters.size(); ++i) {
    check_argument(name, image.parameters[i], argument[i]);
  }
  Grid grid = {};
  for (int axis = 0; axis < 3; ++axis) {
    int64_t extent = 1;
    for (const GridFactor& factor : image.grid[axis]) {
      extent *= factor.parameter < 0
                    ? factor.divisor
                    : (argument[factor.parameter].i32 + factor.divisor - 1) / factor.divisor;
    }
    LIVEACT_DEVICE_CHECK(extent >= 0 && extent <= (axis == 0 ? 0x7fffffff : 65535), name,
                         ": expected a grid that a device can have, found ", extent, " along axis ",
                         axis);
    grid[axis] = static_cast<unsigned>(extent);
  }
  return grid;
}

void KernelTable::launch(const std::string& name, CUstream stream, Arguments arguments) const {
  const Grid grid = check(name, arguments);
  if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0) return;  // which a launch would refuse
  const Loaded& kernel = kernels_.at(name);
  void* values[kMaxArguments];
  size_t count = 0;
  for (const Argument& argument : arguments) {
    values[count++] = const_cast<int32_t*>(&argument.i32);  // every member starts there
  }
  CUdeviceptr null = 0;
  for (int i = 0; i < kernel.image.hidden_pointers; ++i) values[count++] = &null;
  driver_.check(driver_.launch_kernel(kernel.function, grid[0], grid[1], grid[2],
                                      static_cast<unsigned>(kernel.image.threads), 1, 1,
                                      static_cast<unsigned>(kernel.image.shared_bytes), stream,
                                      values, nullptr),
                ("cuLaunchKernel of " + name).c_str());
}

}  // namespace liveact::cuda
