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
  py::class_<Device, std::shared_ptr<Device>>(m, "Device", "Memory and op queues of one device.")
      .def_property_readonly("name", &Device::name)
      .def_property_readonly("threads", &Device::threads)
      .def_property_readonly("allocated_bytes", &Device::allocated_bytes)
      .def_property_readonly("allocation_count", &Device::allocation_count)
      .def_property_readonly("free_bytes", &Device::free_bytes)
      .def_property_readonly("choices", &Device::choices,
                             "What was chosen by trial when streams opened: call -> choice.");
  m.def("open_cpu", &open_cpu);
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
