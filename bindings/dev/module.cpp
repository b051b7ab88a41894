// What only tests and benchmarks need of the runtime: its ops one by one, a device that times them,
// the tables of the memory. Built for an editable install, never shipped. Devices are those of
// _core.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <array>
#include <filesystem>
#include <map>
#include <vector>

#include "bind.h"
#include "dev/bind_dev.h"
#include "liveact/checkpoint.h"
#include "liveact/kv_layout.h"
#include "measure/timed.h"

namespace py = pybind11;

namespace liveact {

namespace {

std::map<int, std::vector<int>> sources(const std::array<int, 4>& slots, const std::string& memory,
                                        int64_t block) {
  std::map<int, std::vector<int>> result;
  for (const SlotUpdate& update :
       update_table({slots[0], slots[1], slots[2], slots[3]}, memory_from_name(memory), block)) {
    result[update.target].assign(update.sources.begin(),
                                 update.sources.begin() + update.num_sources);
  }
  return result;
}

using Formats = std::vector<std::map<std::string, std::string>>;  // per layer: product -> format

Formats formats_of(const Precision& precision) {
  Formats result;
  for (const LayerPrecision& layer : precision.layers) {
    auto& formats = result.emplace_back();
    for (const Product& product : kProducts) formats[product.name] = name(layer.*product.format);
  }
  return result;
}

std::pair<Formats, bool> policy(const std::filesystem::path& file) {
  const Precision found = read_policy(file);
  return {formats_of(found), found.full_sums};
}

Formats precision_of(const std::filesystem::path& directory, const std::string& name,
                     Device& device) {
  return formats_of(Checkpoint(directory).precision(name, device));
}

void bind_timed_device(py::module_& m) {
  py::class_<TimedDevice, Device, std::shared_ptr<TimedDevice>>(
      m, "TimedDevice", "A device whose ops are timed one by one, see csrc/measure/timed.h.")
      .def(
          py::init([](std::shared_ptr<Device> device, int64_t flush_bytes, int samples, bool warm) {
            return std::make_shared<TimedDevice>(std::move(device),
                                                 Timing{flush_bytes / 8, samples, warm});
          }),
          py::arg("device"), py::arg("flush_bytes"), py::arg("samples") = 1,
          py::arg("warm") = false)
      .def("take", &TimedDevice::take, "(op, milliseconds) of the ops since the last call.");
}

}  // namespace

}  // namespace liveact

PYBIND11_MODULE(_core_dev, m) {
  m.doc() = "Single ops of the runtime, for tests and benchmarks.";
  py::module_::import("liveact._core");  // registers Device
  liveact::bind_errors();
  liveact::bind_timed_device(m);
  m.def("update_table", &liveact::sources, py::arg("slots"), py::arg("memory"), py::arg("block"),
        "Target slot -> its source slots, after `block` was denoised.");
  m.def("read_policy", &liveact::policy, py::arg("file"),
        "(layers, sums in full) of a policy file, as C++ programs read it.");
  m.def("precision_of", &liveact::precision_of, py::arg("directory"), py::arg("name"),
        py::arg("device"), "The layers of what a name means for a checkpoint on a device.");
  py::module_ ops = m.def_submodule("ops", "Single ops of a device on arrays.");
  liveact::bind_ops_rows(ops);
  liveact::bind_ops_latent(ops);
  liveact::bind_ops_keys(ops);
  liveact::bind_ops_attention(ops);
}
