// A model: its sizes, its tensors, its weights on a device.

#include <pybind11/stl.h>

#include <map>
#include <tuple>

#include "bind.h"
#include "convert.h"
#include "liveact/model.h"

namespace py = pybind11;

namespace liveact {

namespace {

HostTensors host_tensors(const py::dict& tensors) {
  HostTensors result;
  for (const auto& [key, value] : tensors) {
    // (address, "fp32" | "bf16" | "fp8", shape): memory that the caller keeps alive.
    const auto entry = value.cast<std::tuple<uintptr_t, std::string, std::vector<int64_t>>>();
    HostTensor tensor;
    tensor.data = reinterpret_cast<const void*>(std::get<0>(entry));
    tensor.dtype = dtype_from_name(std::get<1>(entry));
    tensor.shape = std::get<2>(entry);
    result.emplace(key.cast<std::string>(), std::move(tensor));
  }
  return result;
}

std::shared_ptr<Model> load(std::shared_ptr<Device> device, const ModelConfig& config,
                            const py::dict& tensors, const py::object& precision) {
  const HostTensors host = host_tensors(tensors);
  const Precision policy = precision_from(precision, config.num_layers);
  const py::gil_scoped_release release;
  return std::make_shared<Model>(std::move(device), config, host, policy);
}

std::vector<std::shared_ptr<Model>> load_all(const std::vector<std::shared_ptr<Device>>& devices,
                                             const ModelConfig& config, const py::dict& tensors,
                                             const py::object& precision) {
  const HostTensors host = host_tensors(tensors);
  const Precision policy = precision_from(precision, config.num_layers);
  const py::gil_scoped_release release;
  std::vector<std::shared_ptr<Model>> models;
  for (const auto& model : load_models(devices, config, host, policy)) {
    models.push_back(std::const_pointer_cast<Model>(model));  // Python knows no const
  }
  return models;
}

std::map<std::string, std::vector<int64_t>> tensor_shapes(const ModelConfig& config) {
  config.check();
  std::map<std::string, std::vector<int64_t>> result;
  for (const TensorSpec& spec : expected_tensors(config)) result[spec.name] = spec.shape;
  return result;
}

std::vector<std::string> product_names() {
  std::vector<std::string> names;
  for (const Product& product : kProducts) names.emplace_back(product.name);
  return names;
}

py::tuple quantize(uintptr_t address, const std::string& dtype, const std::vector<int64_t>& shape) {
  const HostTensor weight{reinterpret_cast<const void*>(address), dtype_from_name(dtype), shape};
  py::array_t<uint8_t> codes(std::vector<py::ssize_t>(shape.begin(), shape.end()));
  Array scale(shape.empty() ? 0 : shape[0]);
  uint8_t* code_data = codes.mutable_data();
  float* scale_data = scale.mutable_data();
  {
    const py::gil_scoped_release release;
    quantize_weight(weight, code_data, scale_data);
  }
  return py::make_tuple(codes, scale);
}

void bind_config(py::module_& m) {
  py::class_<ModelConfig>(m, "ModelConfig", "Sizes of a DiT, named as in config.json.")
      .def(py::init<>())
      .def_readwrite("dim", &ModelConfig::dim)
      .def_readwrite("ffn_dim", &ModelConfig::ffn_dim)
      .def_readwrite("num_heads", &ModelConfig::num_heads)
      .def_readwrite("num_layers", &ModelConfig::num_layers)
      .def_readwrite("in_dim", &ModelConfig::in_dim)
      .def_readwrite("out_dim", &ModelConfig::out_dim)
      .def_readwrite("text_dim", &ModelConfig::text_dim)
      .def_readwrite("text_len", &ModelConfig::text_len)
      .def_readwrite("freq_dim", &ModelConfig::freq_dim)
      .def_readwrite("intermediate_dim", &ModelConfig::intermediate_dim)
      .def_readwrite("output_dim", &ModelConfig::output_dim)
      .def_readwrite("context_tokens", &ModelConfig::context_tokens)
      .def_readwrite("image_dim", &ModelConfig::image_dim)
      .def_readwrite("audio_dim", &ModelConfig::audio_dim)
      .def_readwrite("eps", &ModelConfig::eps)
      .def("check", &ModelConfig::check);
}

}  // namespace

void bind_model(py::module_& m) {
  bind_config(m);
  m.def("expected_tensors", &tensor_shapes,
        "Name and shape of every tensor of a checkpoint of this size.");
  m.def("products", &product_names, "What a precision policy names in every layer.");
  m.def("quantize_weight", &quantize, py::arg("address"), py::arg("dtype"), py::arg("shape"),
        "(fp8 codes, one scale per row) of a weight in host memory, as a model makes them.");
  py::class_<Model, std::shared_ptr<Model>>(m, "Model", "The weights of a DiT on one device.",
                                            py::release_gil_before_calling_cpp_dtor())
      .def(py::init(&load), py::arg("device"), py::arg("config"), py::arg("tensors"),
           py::arg("precision"))
      .def_property_readonly("config", &Model::config);
  m.def("load_models", &load_all, py::arg("devices"), py::arg("config"), py::arg("tensors"),
        py::arg("precision"), "A model on each device, all at once; weights are converted once.");
}

}  // namespace liveact
