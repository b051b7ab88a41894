// Weight files: opened, checked and identified by the runtime, their bytes lent to torch.

#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <set>

#include "bind.h"
#include "checkpoint/dit_config.h"
#include "checkpoint/identify.h"
#include "liveact/checkpoint.h"

namespace py = pybind11;

namespace liveact {

namespace {

const StoredTensor& tensor_of(const TensorFiles& files, const std::string& name) {
  const auto found = files.tensors().find(name);
  if (found == files.tensors().end()) throw py::key_error(name);
  return found->second;
}

std::vector<std::string> names_of(const TensorFiles& files) {
  std::vector<std::string> names;
  for (const auto& [name, _] : files.tensors()) names.push_back(name);
  return names;
}

std::map<std::string, std::vector<std::string>> linears_of_products() {
  std::map<std::string, std::vector<std::string>> result;
  for (const ProductLinears& product : product_linears()) {
    result[product.product].assign(product.linears.begin(), product.linears.end());
  }
  return result;
}

}  // namespace

void bind_checkpoint(py::module_& m) {
  py::class_<StoredTensor>(m, "StoredTensor", py::buffer_protocol(),
                           "Bytes in a mapped file, which the object keeps mapped.")
      .def_readonly("dtype", &StoredTensor::dtype)
      .def_readonly("shape", &StoredTensor::shape)
      .def_readonly("file", &StoredTensor::file)
      .def_buffer([](StoredTensor& self) {
        return py::buffer_info(reinterpret_cast<uint8_t*>(self.data.get()), self.bytes);
      });
  py::class_<TensorFiles>(m, "TensorFiles", "The tensors of one or more safetensors files.")
      .def(py::init(py::overload_cast<const std::filesystem::path&>(&TensorFiles::open)),
           py::arg("file"))
      .def(py::init(py::overload_cast<const std::filesystem::path&, const std::string&>(
               &TensorFiles::open)),
           py::arg("directory"), py::arg("stem"))
      .def_property_readonly("source", &TensorFiles::source)
      .def_property_readonly("names", &names_of)
      .def("__getitem__", &tensor_of, py::return_value_policy::copy);
  m.def(
      "open_dit",
      [](const std::filesystem::path& directory) {
        const Checkpoint found(directory);
        return std::pair(found.config(), found.files());
      },
      py::arg("directory"), "(sizes, tensors) of the DiT in a checkpoint directory, checked.");
  m.def("other_form", &other_form, py::arg("path"), py::arg("expected"));
  m.def("other_files", &other_files, py::arg("directory"), py::arg("stem"), py::arg("expected"));
  m.def("other_names", &other_names, py::arg("found"), py::arg("name"));
  m.def("product_linears", &linears_of_products,
        "Product -> the linears of a layer that it is made of.");
}

}  // namespace liveact
