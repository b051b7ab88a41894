// Norms, activations, formats and products of rows.

#include <pybind11/stl.h>

#include <algorithm>
#include <map>

#include "convert.h"
#include "core/check.h"
#include "dev/bind_dev.h"
#include "dev/call.h"

namespace py = pybind11;

namespace liveact {

namespace {

py::object layer_norm(Device& device, const py::object& x, const Floats& gain, const Floats& bias,
                      float eps, const std::string& out) {
  Call call(device);
  const Rows in = call.rows(x);
  const Rows result = call.new_rows(in.rows, in.cols, out);
  call.ops().layer_norm(in, call.put<float>(gain), call.put<float>(bias), eps, result);
  return call.get(result);
}

py::object rms_norm(Device& device, const py::object& x, const Floats& gain, float eps,
                    const std::string& out) {
  Call call(device);
  const Rows in = call.rows(x);
  const Rows result = call.new_rows(in.rows, in.cols, out);
  call.ops().rms_norm(in, call.put<float>(gain), eps, result);
  return call.get(result);
}

py::object activate(Device& device, const py::object& x, const std::string& activation,
                    const std::string& out) {
  const std::map<std::string, Activation> names = {{"gelu_tanh", Activation::gelu_tanh},
                                                   {"gelu_erf", Activation::gelu_erf},
                                                   {"relu", Activation::relu}};
  const auto found = names.find(activation);
  LIVEACT_CHECK(found != names.end(), "activate: expected gelu_tanh, gelu_erf or relu, found '",
                activation, "'");
  Call call(device);
  const Rows in = call.rows(x);
  const Rows result = call.new_rows(in.rows, in.cols, out);
  call.ops().activate(in, found->second, result);
  return call.get(result);
}

py::object quantize(Device& device, const py::object& x, const std::string& out) {
  Call call(device);
  const Rows in = call.rows(x);
  const Rows result = call.new_rows(in.rows, in.cols, out);
  call.ops().quantize(in, result);
  return call.get(result);
}

// Elements of rows as `Call::rows` takes them.
int64_t count(const py::object& rows) {
  const py::object data = py::isinstance<py::tuple>(rows) ? rows[py::int_(0)] : rows;
  return data.cast<py::array>().size();
}

py::object linear(Device& device, const py::object& x, const py::object& weight,
                  const std::optional<Floats>& scale, const std::optional<py::array>& bias,
                  const py::object& out, bool accumulate, std::optional<int64_t> max_operand,
                  bool full_sums) {
  Call call(device, max_operand.value_or(std::max(count(x), count(out))), full_sums);
  const Rows in = call.rows(x);
  const Rows w = call.rows(weight);
  LIVEACT_CHECK(w.cols == in.cols, "linear: expected a weight of ", in.cols, " columns, found ",
                w.cols);
  const Rows result = call.rows(out);  // its values are those to add to
  Weight operand;
  operand.parts[0] = {w.data, w.rows};
  operand.dtype = w.dtype;
  operand.scale = w.scale;
  operand.n = w.rows;
  operand.k = w.cols;
  const Epilogue epilogue{call.put(scale), bias ? call.put(*bias) : nullptr, accumulate};
  call.ops().linear(in, operand, epilogue, result);
  return call.get(result);
}

}  // namespace

void bind_ops_rows(py::module_& m) {
  m.def("layer_norm", &layer_norm, py::arg("device"), py::arg("x"), py::arg("gain"),
        py::arg("bias"), py::arg("eps"), py::arg("out"));
  m.def("rms_norm", &rms_norm, py::arg("device"), py::arg("x"), py::arg("gain"), py::arg("eps"),
        py::arg("out"));
  m.def("activate", &activate, py::arg("device"), py::arg("x"), py::arg("activation"),
        py::arg("out"));
  m.def("quantize", &quantize, py::arg("device"), py::arg("x"), py::arg("out"));
  m.def("linear", &linear, py::arg("device"), py::arg("x"), py::arg("weight"), py::arg("scale"),
        py::arg("bias"), py::arg("out"), py::arg("accumulate"), py::arg("max_operand") = py::none(),
        py::arg("full_sums") = false,
        "out gives the format, and the values to add to. max_operand: for which the queue is "
        "opened; as much as x and out need.");
}

}  // namespace liveact
