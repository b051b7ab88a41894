// What Python gives, as the runtime takes it. Shapes and names are checked here, once.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "liveact/precision.h"

namespace liveact {

using Array = pybind11::array_t<float, pybind11::array::c_style>;

DType dtype_from_name(const std::string& text);  // "fp32", "bf16" or "fp8"

// "fp32", "bf16", "fp8", or a policy {activations: name, layers: [{product: name}]} with every
// product of every layer.
Precision precision_from(const pybind11::object& given, int64_t num_layers);

// The data of an array of this shape.
const float* checked(const Array& array, const char* what,
                     const std::vector<pybind11::ssize_t>& shape);

}  // namespace liveact
