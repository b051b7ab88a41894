// The three attentions.

#include <pybind11/stl.h>

#include <map>

#include "convert.h"
#include "core/check.h"
#include "dev/bind_dev.h"
#include "dev/call.h"

namespace py = pybind11;

namespace liveact {

namespace {

py::object self_attention(Device& device, const py::array& q, const std::optional<Floats>& q_scale,
                          const py::tuple& context, const py::tuple& current,
                          const std::string& out, const std::optional<Floats>& out_scale) {
  LIVEACT_CHECK(q.ndim() == 3, "self_attention: expected q [heads, tokens, head_dim]");
  Call call(device);
  const Heads heads{.data = call.put(q),
                    .dtype = dtype_of(q),
                    .heads = q.shape(0),
                    .tokens = q.shape(1),
                    .head_dim = q.shape(2),
                    .scale = call.put(q_scale)};
  const Rows result = call.new_rows(heads.tokens, heads.heads * heads.head_dim, out);
  call.ops().self_attention(heads, call.segment(context), call.segment(current),
                            call.put(out_scale), result, {});
  return call.get(result);
}

py::object cross_attention(Device& device, const py::object& q, const py::tuple& text,
                           int64_t pad_count, const py::tuple& image, const std::string& out) {
  Call call(device);
  const Rows in = call.rows(q);
  const Rows result = call.new_rows(in.rows, in.cols, out);
  call.ops().cross_attention(in, call.segment(text), pad_count, call.segment(image), result);
  return call.get(result);
}

py::object audio_attention(Device& device, const py::object& q, const py::object& kv, int64_t n,
                           int64_t kv_frames, int64_t heads, const std::string& out,
                           const std::optional<Floats>& v_scale) {
  Call call(device);
  const Rows in = call.rows(q);
  const Rows result = call.new_rows(in.rows, in.cols, out);
  call.ops().audio_attention(in, call.rows(kv), n, kv_frames, heads, call.put(v_scale), result);
  return call.get(result);
}

}  // namespace

void bind_ops_attention(py::module_& m) {
  m.def("self_attention", &self_attention, py::arg("device"), py::arg("q"), py::arg("q_scale"),
        py::arg("context"), py::arg("current"), py::arg("out"), py::arg("out_scale") = py::none());
  m.def("cross_attention", &cross_attention, py::arg("device"), py::arg("q"), py::arg("text"),
        py::arg("pad_count"), py::arg("image"), py::arg("out"));
  m.def("audio_attention", &audio_attention, py::arg("device"), py::arg("q"), py::arg("kv"),
        py::arg("n"), py::arg("kv_frames"), py::arg("heads"), py::arg("out"),
        py::arg("v_scale") = py::none());
}

}  // namespace liveact
