// Devices: opening them, and what they say of themselves.

#include <pybind11/stl.h>

#include "bind.h"
#include "liveact/device.h"

namespace py = pybind11;

namespace liveact {

namespace {

py::dict versions(int index, const std::string& driver, const std::string& cublaslt) {
  const CudaVersions found = cuda_versions(index, {driver, cublaslt});
  py::dict result;
  result["device"] = found.device;
  result["driver"] = found.driver;
  result["cublaslt"] = found.cublaslt;
  return result;
}

}  // namespace

void bind_device(py::module_& m) {
  const CudaLibraries defaults;
  py::class_<Device, std::shared_ptr<Device>>(m, "Device", "Memory and op queues of one device.",
                                              py::release_gil_before_calling_cpp_dtor())
      .def_property_readonly("name", &Device::name)
      .def_property_readonly("threads", &Device::threads)
      .def_property_readonly("allocated_bytes", &Device::allocated_bytes)
      .def_property_readonly("allocation_count", &Device::allocation_count)
      .def_property_readonly("free_bytes", &Device::free_bytes)
      .def("connect", &Device::connect, py::arg("other"),
           "From now on ops of this device may write into memory of the other one.")
      .def_property_readonly("choices", &Device::choices,
                             "What was chosen by trial when streams opened: call -> choice.");
  m.def("open_cpu", &open_cpu);
  m.def(
      "cuda_device_count",
      [](const std::string& driver) { return cuda_device_count({.driver = driver}); },
      py::arg("driver") = defaults.driver);
  m.def(
      "cuda_peer_obstacle",
      [](int first, int second, const std::string& driver) {
        return cuda_peer_obstacle(first, second, {.driver = driver});
      },
      py::arg("first"), py::arg("second"), py::arg("driver") = defaults.driver,
      "Why two GPUs cannot share an evaluation, as words that follow `expected`; '' where they "
      "can.");
  m.def(
      "cuda_architecture",
      [](int index, const std::string& driver) {
        return cuda_architecture(index, {.driver = driver});
      },
      py::arg("index"), py::arg("driver") = defaults.driver,
      "The architecture whose kernels device `index` takes, such as sm_90a.");
  m.def("cuda_versions", &versions, py::arg("index"), py::arg("driver") = defaults.driver,
        py::arg("cublaslt") = defaults.cublaslt,
        "The name of device `index`, and the versions of the driver and of cuBLASLt.");
}

}  // namespace liveact
