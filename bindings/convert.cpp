#include "convert.h"

#include <pybind11/stl.h>

#include <map>

#include "core/check.h"

namespace py = pybind11;

namespace liveact {

DType dtype_from_name(const std::string& text) {
  if (text == "fp32") return DType::f32;
  if (text == "bf16") return DType::bf16;
  if (text == "fp8") return DType::f8;
  detail::fail("precision: expected fp32, bf16 or fp8, found '", text, "'");
}

Precision precision_from(const py::object& given, int64_t num_layers) {
  if (py::isinstance<py::str>(given)) {
    return Precision::uniform(dtype_from_name(given.cast<std::string>()), num_layers);
  }
  const auto policy = given.cast<py::dict>();
  Precision result;
  result.activations = dtype_from_name(policy["activations"].cast<std::string>());
  if (policy.contains("sums")) {
    const auto sums = policy["sums"].cast<std::string>();
    LIVEACT_CHECK(sums == "fast" || sums == "full",
                  "precision policy: expected sums fast or full, found ", sums);
    result.full_sums = sums == "full";
  }
  for (const auto& item : policy["layers"].cast<py::list>()) {
    const auto formats = item.cast<std::map<std::string, std::string>>();
    LayerPrecision layer{};
    for (const Product& product : kProducts) {
      const auto found = formats.find(product.name);
      LIVEACT_CHECK(found != formats.end(), "precision policy: expected ", product.name,
                    " in layer ", result.layers.size(), ", found none");
      layer.*product.format = dtype_from_name(found->second);
    }
    result.layers.push_back(layer);
  }
  return result;
}

namespace {

std::string shape_text(const std::vector<py::ssize_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

}  // namespace

const float* checked(const Array& array, const char* what, const std::vector<py::ssize_t>& shape) {
  const std::vector<py::ssize_t> found(array.shape(), array.shape() + array.ndim());
  LIVEACT_CHECK(found == shape, what, ": expected shape ", shape_text(shape), ", found ",
                shape_text(found));
  return array.data();
}

}  // namespace liveact
