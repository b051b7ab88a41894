#include "dev/call.h"

#include <pybind11/stl.h>

#include "convert.h"
#include "core/check.h"

namespace py = pybind11;

namespace liveact {

DType dtype_of(const py::array& array) {
  if (py::isinstance<py::array_t<float>>(array)) return DType::f32;
  if (py::isinstance<py::array_t<uint16_t>>(array)) return DType::bf16;
  if (py::isinstance<py::array_t<uint8_t>>(array)) return DType::f8;
  detail::fail("ops: expected an array of float32 (fp32), uint16 (bf16) or uint8 (fp8)");
}

namespace {

py::array empty(DType dtype, const std::vector<py::ssize_t>& shape) {
  if (dtype == DType::f32) return py::array_t<float>(shape);
  if (dtype == DType::bf16) return py::array_t<uint16_t>(shape);
  return py::array_t<uint8_t>(shape);
}

}  // namespace

Call::Call(Device& device, int64_t max_operand, bool full_sums) : device_(device) {
  const OpsLimits limits{.max_cols = 1 << 15,
                         .max_operand = max_operand,
                         .max_keys = 1 << 13,
                         .head_dim = 256,
                         .full_sums = full_sums};
  ops_ = device.open_ops(limits);
}

void* Call::put_bytes(const py::array& array) {
  LIVEACT_CHECK(array.flags() & py::array::c_style, "ops: expected contiguous arrays");
  void* pointer = memory(array.nbytes());
  ops_->upload(pointer, array.data(), array.nbytes());
  return pointer;
}

float* Call::put(const std::optional<Floats>& array) {
  return array.has_value() ? put<float>(py::array(*array)) : nullptr;
}

py::array Call::get(const void* pointer, DType dtype, const std::vector<py::ssize_t>& shape) {
  py::array result = empty(dtype, shape);
  ops_->download(result.mutable_data(), pointer, result.nbytes());
  return result;
}

Rows Call::rows(const py::object& object) {
  Rows result;
  py::array data;
  if (py::isinstance<py::tuple>(object)) {
    const auto pair = object.cast<std::pair<py::array, Floats>>();
    data = pair.first;
    LIVEACT_CHECK(pair.second.size() == data.shape(0), "ops: expected one scale per row");
    result.scale = put<float>(py::array(pair.second));
  } else {
    data = object.cast<py::array>();
  }
  LIVEACT_CHECK(data.ndim() == 2, "ops: expected rows [rows, cols], found ", data.ndim(),
                " dimensions");
  result.dtype = dtype_of(data);
  LIVEACT_CHECK((result.dtype == DType::f8) == (result.scale != nullptr),
                "ops: expected (codes, scale) for fp8 and an array otherwise");
  result.data = put(data);
  result.rows = data.shape(0);
  result.cols = data.shape(1);
  return result;
}

Rows Call::new_rows(int64_t count, int64_t cols, const std::string& format) {
  const DType dtype = dtype_from_name(format);
  return {.data = memory(count * cols * size_bytes(dtype)),
          .dtype = dtype,
          .rows = count,
          .cols = cols,
          .scale = dtype == DType::f8 ? memory<float>(4 * count) : nullptr};
}

py::object Call::get(const Rows& rows) {
  py::array data = get(rows.data, rows.dtype, {rows.rows, rows.cols});
  if (rows.dtype != DType::f8) return data;
  return py::make_tuple(data, get(rows.scale, DType::f32, {rows.rows}));
}

KvSegment Call::segment(const py::tuple& parts) {
  LIVEACT_CHECK(parts.size() == 4, "ops: expected a segment (k, v, k_scale, v_scale)");
  const auto k = parts[0].cast<py::array>();
  LIVEACT_CHECK(k.ndim() == 3, "ops: expected keys [heads, tokens, head_dim], found ", k.ndim(),
                " dimensions");
  KvSegment result;
  result.k = put(k);
  result.v = put(parts[1].cast<py::array>());
  result.dtype = dtype_of(k);
  result.heads = k.shape(0);
  result.tokens = k.shape(1);
  result.head_dim = k.shape(2);
  result.k_scale = put(parts[2].cast<std::optional<Floats>>());
  result.v_scale = put(parts[3].cast<std::optional<Floats>>());
  return result;
}

KvSegment Call::new_segment(int64_t heads, int64_t tokens, int64_t head_dim, DType dtype) {
  KvSegment result;
  result.dtype = dtype;
  result.heads = heads;
  result.tokens = tokens;
  result.head_dim = head_dim;
  result.k = memory(result.key_bytes());
  result.v = memory(result.value_bytes(device_.formats().value_multiple));
  return result;
}

py::tuple Call::get(const KvSegment& s, const std::vector<py::ssize_t>& value_shape) {
  return py::make_tuple(get(s.k, s.dtype, {s.heads, s.tokens, s.head_dim}),
                        get(s.v, s.dtype, value_shape));
}

Rope Call::rope(const Tables& tables) {
  for (const Floats& table : tables) {
    LIVEACT_CHECK(table.ndim() == 3 && table.shape(2) == 2,
                  "ops: expected rotation tables [n, pairs, 2]");
  }
  return {.frame = put<float>(py::array(tables[0])),
          .row = put<float>(py::array(tables[1])),
          .col = put<float>(py::array(tables[2])),
          .pairs_frame = static_cast<int>(tables[0].shape(1)),
          .pairs_row = static_cast<int>(tables[1].shape(1)),
          .pairs_col = static_cast<int>(tables[2].shape(1)),
          .grid_rows = static_cast<int>(tables[1].shape(0)),
          .grid_cols = static_cast<int>(tables[2].shape(0))};
}

}  // namespace liveact
