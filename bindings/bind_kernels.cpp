// Kernels that were compiled ahead of time: loading them, a device with them, and launching one on
// a stream of the caller's, as the VAE does between torch's convolutions.

#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <vector>

#include "bind.h"
#include "core/check.h"
#include "cuda/cuda_backend.h"

namespace py = pybind11;

namespace liveact {

namespace {

using Type = KernelParameter::Type;

std::shared_ptr<Device> open(int index, const std::vector<KernelImage>& kernels,
                             const std::string& driver, const std::string& cublaslt) {
  return open_cuda(index, kernels, {driver, cublaslt});
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
  py::class_<KernelImage>(m, "KernelImage", "A kernel that was compiled ahead of time.")
      .def_readonly("name", &KernelImage::name);
  m.def("kernel_architectures", &kernel_architectures, py::arg("folder"),
        "The architectures that a folder has kernels for.");
  m.def("load_kernels", &load_kernels, py::arg("folder"), py::arg("architecture"),
        "The kernels for an architecture, their files compared with the manifest.");
  m.def("open_cuda", &open, py::arg("index"), py::arg("kernels"),
        py::arg("driver") = defaults.driver, py::arg("cublaslt") = defaults.cublaslt,
        "A CUDA device with kernels of its architecture.");
  m.def("launch", &launch, py::arg("device"), py::arg("name"), py::arg("stream"),
        py::arg("arguments"),
        "arguments: {parameter: address, integer or float}, as the kernel's spec names them.");
}

}  // namespace liveact
