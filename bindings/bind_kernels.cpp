// Kernels that were compiled ahead of time: their manifest, a device with them, and launching one
// on a stream of the caller's, as the VAE does between torch's convolutions.

#include <pybind11/stl.h>

#include <map>
#include <vector>

#include "bind.h"
#include "core/check.h"
#include "cuda/cuda_backend.h"

namespace py = pybind11;

namespace liveact {

namespace {

using Type = KernelParameter::Type;

KernelParameter kernel_parameter(const py::dict& given, const std::string& kernel) {
  const auto type = given["type"].cast<std::string>();
  LIVEACT_CHECK(type[0] == '*' || type == "i32" || type == "f32", kernel,
                ": expected parameters of type *, i32 or f32, found ", type);
  KernelParameter result;
  result.name = given["name"].cast<std::string>();
  result.type = type[0] == '*' ? Type::pointer : type == "i32" ? Type::i32 : Type::f32;
  for (const char* key : {"align_bytes", "divisible_by"}) {
    if (given.contains(key)) result.multiple = given[key].cast<int>();
  }
  return result;
}

// An integer, or {parameter, divisor}.
GridFactor grid_factor(const py::handle& given, const KernelImage& image) {
  if (py::isinstance<py::int_>(given)) return {-1, given.cast<int64_t>()};
  const auto name = given["parameter"].cast<std::string>();
  for (size_t i = 0; i < image.parameters.size(); ++i) {
    if (image.parameters[i].name == name) {
      return {static_cast<int>(i), given["divisor"].cast<int64_t>()};
    }
  }
  detail::fail(image.name, ": expected a grid of its parameters, found ", name);
}

// A kernel as the manifest describes it, see triton_kernels/README.md.
KernelImage kernel_image(const py::dict& kernel) {
  KernelImage image;
  image.name = kernel["name"].cast<std::string>();
  image.cubin = kernel["cubin"].cast<std::string>();  // bytes
  image.symbol = kernel["symbol"].cast<std::string>();
  image.threads = kernel["threads"].cast<int>();
  image.shared_bytes = kernel["shared_bytes"].cast<int>();
  for (const auto& hidden : kernel["hidden_parameters"].cast<py::list>()) {
    LIVEACT_CHECK(hidden["bytes_per_program"].cast<int>() == 0, image.name,
                  ": expected a kernel without scratch memory, found one with");
    ++image.hidden_pointers;
  }
  for (const auto& parameter : kernel["parameters"].cast<py::list>()) {
    image.parameters.push_back(kernel_parameter(parameter.cast<py::dict>(), image.name));
  }
  size_t axis = 0;
  for (const auto& dimension : kernel["grid"].cast<py::list>()) {
    for (const auto& factor : dimension.cast<py::list>()) {
      image.grid.at(axis).push_back(grid_factor(factor, image));
    }
    ++axis;
  }
  return image;
}

std::shared_ptr<Device> open(int index, const py::list& kernels, const std::string& driver,
                             const std::string& cublaslt) {
  std::vector<KernelImage> images;
  for (const auto& kernel : kernels) images.push_back(kernel_image(kernel.cast<py::dict>()));
  return open_cuda(index, std::move(images), {driver, cublaslt});
}

cuda::Argument argument(const py::handle& value, Type type) {
  if (type == Type::f32) return value.cast<float>();
  if (type == Type::i32) return value.cast<int64_t>();
  return reinterpret_cast<const void*>(value.cast<uintptr_t>());
}

void launch(Device& device, const std::string& name, uintptr_t stream, const py::dict& values) {
  auto* gpu = dynamic_cast<cuda::CudaDevice*>(&device);
  LIVEACT_DEVICE_CHECK(gpu != nullptr, "launch: expected a CUDA device, found ", device.name());
  const std::vector<KernelParameter>& parameters = gpu->kernels().image(name).parameters;
  LIVEACT_DEVICE_CHECK(values.size() == parameters.size(), name, ": expected ", parameters.size(),
                       " arguments, found ", values.size());
  std::vector<cuda::Argument> arguments;
  for (const KernelParameter& parameter : parameters) {
    LIVEACT_DEVICE_CHECK(values.contains(parameter.name.c_str()), name, ": expected the argument ",
                         parameter.name, ", found none");
    arguments.push_back(argument(values[parameter.name.c_str()], parameter.type));
  }
  const py::gil_scoped_release release;  // the driver waits where its queue is full
  const cuda::ContextScope scope(gpu->driver(), gpu->context());
  gpu->kernels().launch(name, reinterpret_cast<cuda::CUstream>(stream), arguments);
}

}  // namespace

void bind_kernels(py::module_& m) {
  const CudaLibraries defaults;
  m.def("open_cuda", &open, py::arg("index"), py::arg("kernels"),
        py::arg("driver") = defaults.driver, py::arg("cublaslt") = defaults.cublaslt,
        "A CUDA device with kernels as in the manifest, `cubin` being their bytes.");
  m.def("launch", &launch, py::arg("device"), py::arg("name"), py::arg("stream"),
        py::arg("arguments"),
        "arguments: {parameter: address, integer or float}, as the kernel's spec names them.");
}

}  // namespace liveact
