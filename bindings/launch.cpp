// Single kernels of a CUDA device on a stream that the caller owns: what the VAE, whose
// convolutions are torch's, launches between them.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "bind_ops.h"
#include "cuda/cuda_backend.h"
#include "liveact/error.h"

namespace py = pybind11;

namespace liveact {

namespace {

using Type = cuda::KernelParameter::Type;

cuda::Argument argument(const py::handle& value, Type type) {
  if (type == Type::f32) return value.cast<float>();
  if (type == Type::i32) return value.cast<int64_t>();
  return reinterpret_cast<const void*>(value.cast<uintptr_t>());
}

void launch(Device& device, const std::string& name, uintptr_t stream, const py::dict& values) {
  auto* gpu = dynamic_cast<cuda::CudaDevice*>(&device);
  LIVEACT_CHECK(gpu != nullptr, "launch: expected a CUDA device, got ", device.name());
  const std::vector<cuda::KernelParameter>& parameters = gpu->kernels().image(name).parameters;
  LIVEACT_CHECK(values.size() == parameters.size(), name, ": expected ", parameters.size(),
                " arguments, got ", values.size());
  std::vector<cuda::Argument> arguments;
  for (const cuda::KernelParameter& parameter : parameters) {
    LIVEACT_CHECK(values.contains(parameter.name.c_str()), name, ": expected the argument ",
                  parameter.name, ", found none");
    arguments.push_back(argument(values[parameter.name.c_str()], parameter.type));
  }
  const py::gil_scoped_release release;  // the driver waits where its queue is full
  const cuda::ContextScope scope(gpu->driver(), gpu->context());
  gpu->kernels().launch(name, reinterpret_cast<cuda::CUstream>(stream), arguments);
}

}  // namespace

void bind_launch(py::module_& m) {
  // arguments: {parameter: address, integer or float}, as the kernel's spec names them.
  m.def("launch", &launch, py::arg("device"), py::arg("name"), py::arg("stream"),
        py::arg("arguments"));
}

}  // namespace liveact
