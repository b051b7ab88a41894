// CalibrationDevice: measures what FP8 would cost.

#include <pybind11/stl.h>

#include <map>

#include "bind.h"
#include "measure/calibrate.h"

namespace py = pybind11;

namespace liveact {

namespace {

using Sums = std::vector<std::pair<double, double>>;

std::vector<std::map<std::string, Sums>> errors(const CalibrationDevice& device) {
  std::vector<std::map<std::string, Sums>> result;
  for (const LayerErrors& layer : device.errors()) {
    auto& target = result.emplace_back();
    for (size_t p = 0; p < kProducts.size(); ++p) {
      Sums& sums = target[kProducts[p].name];
      for (const SquaredError& e : layer[p]) sums.emplace_back(e.difference, e.reference);
    }
  }
  return result;
}

}  // namespace

void bind_calibration(py::module_& m) {
  py::class_<CalibrationDevice, Device, std::shared_ptr<CalibrationDevice>>(
      m, "CalibrationDevice",
      "A device that measures what FP8 would cost, see csrc/measure/calibrate.h.")
      .def(py::init<std::shared_ptr<Device>>(), py::arg("device"))
      .def("watch", &CalibrationDevice::watch, py::arg("model"))
      .def("errors", &errors,
           "Per layer: product -> (|fp8 - wide|^2, |wide|^2) of each of its linears, or of "
           "attention, summed over all that ran.");
}

}  // namespace liveact
