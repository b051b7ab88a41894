// Keys, values and the memory.

#include <pybind11/stl.h>

#include <map>

#include "convert.h"
#include "core/check.h"
#include "dev/bind_dev.h"
#include "dev/call.h"

namespace py = pybind11;

namespace liveact {

namespace {

py::object value_scale(Device& device, const py::object& qkv, int64_t heads) {
  Call call(device);
  auto* scale = call.memory<float>(4 * heads);
  const Rows rows = call.rows(qkv);
  call.ops().value_scale(rows.columns(2 * rows.cols / 3, rows.cols / 3), heads, scale);
  return call.get(scale, DType::f32, {heads});
}

py::object split_qkv(Device& device, const py::object& qkv, const Floats& q_gain,
                     const Floats& k_gain, float eps, const Tables& rope, int64_t first_position,
                     int64_t heads, const std::optional<Floats>& k_scale,
                     const std::optional<Floats>& v_scale,
                     const std::vector<py::ssize_t>& value_shape, const std::string& out) {
  Call call(device);
  const Rows in = call.rows(qkv);
  const DType dtype = dtype_from_name(out);
  const int64_t hd = in.cols / 3 / heads;
  KvSegment current = call.new_segment(heads, in.rows, hd, dtype);
  current.k_scale = call.put(k_scale);
  current.v_scale = call.put(v_scale);
  Heads q{.data = call.memory(current.key_bytes()),
          .dtype = dtype,
          .heads = heads,
          .tokens = in.rows,
          .head_dim = hd};
  if (dtype == DType::f8) q.scale = call.memory<float>(4 * heads * in.rows);
  call.ops().split_qkv(in, call.put<float>(q_gain), call.put<float>(k_gain), eps, call.rope(rope),
                       first_position, 0, q, current);
  py::object q_scale = py::none();
  if (dtype == DType::f8) q_scale = call.get(q.scale, DType::f32, {heads, in.rows});
  return py::make_tuple(call.get(q.data, dtype, {heads, in.rows, hd}), q_scale,
                        call.get(current, value_shape));
}

py::object store_kv(Device& device, const py::object& k, const py::object& v, int64_t heads) {
  Call call(device);
  const Rows keys = call.rows(k);
  const int64_t hd = keys.cols / heads;
  const KvSegment segment = call.new_segment(heads, keys.rows, hd, keys.dtype);
  call.ops().store_kv(keys, call.rows(v), segment);
  return call.get(segment, {heads, keys.rows, hd});
}

py::object update_memory(Device& device, const std::vector<std::pair<int, std::vector<int>>>& table,
                         const std::optional<Floats>& key_taps,
                         const std::optional<Floats>& value_taps, const std::string& axis,
                         const Tables& rope, int64_t first_slot, const py::tuple& current,
                         const py::tuple& context) {
  Call call(device);
  std::vector<SlotUpdate> updates;
  for (const auto& [target, sources] : table) {
    LIVEACT_CHECK(sources.size() == 1 || sources.size() == kCompressTaps,
                  "update_memory: expected 1 or ", kCompressTaps, " sources, found ",
                  sources.size());
    SlotUpdate update{target, static_cast<int>(sources.size()), {}};
    std::copy(sources.begin(), sources.end(), update.sources.begin());
    updates.push_back(update);
  }
  const KvSegment to = call.segment(context);
  KvSegment staging = call.new_segment(to.heads, to.tokens, to.head_dim, to.dtype);
  staging.k_scale = to.k_scale;
  staging.v_scale = to.v_scale;
  const CompressFilter filter{call.put(key_taps), call.put(value_taps),
                              compress_axis_from_name(axis), to.heads * to.head_dim};
  call.ops().update_memory(updates, filter, call.rope(rope), first_slot, call.segment(current),
                           staging, to);
  const auto v = context[1].cast<py::array>();
  return call.get(to, std::vector<py::ssize_t>(v.shape(), v.shape() + v.ndim()));
}

}  // namespace

void bind_ops_keys(py::module_& m) {
  m.def("value_scale", &value_scale, py::arg("device"), py::arg("qkv"), py::arg("heads"));
  m.def("split_qkv", &split_qkv, py::arg("device"), py::arg("qkv"), py::arg("q_gain"),
        py::arg("k_gain"), py::arg("eps"), py::arg("rope"), py::arg("first_position"),
        py::arg("heads"), py::arg("k_scale"), py::arg("v_scale"), py::arg("value_shape"),
        py::arg("out"), "-> q, q_scale or None, (k, v)");
  m.def("store_kv", &store_kv, py::arg("device"), py::arg("k"), py::arg("v"), py::arg("heads"));
  m.def("update_memory", &update_memory, py::arg("device"), py::arg("table"), py::arg("key_taps"),
        py::arg("value_taps"), py::arg("axis"), py::arg("rope"), py::arg("first_slot"),
        py::arg("current"), py::arg("context"), "-> the context afterwards: (k, v)");
}

}  // namespace liveact
