// Patches and the sampler.

#include <pybind11/stl.h>

#include <map>

#include "convert.h"
#include "core/check.h"
#include "dev/bind_dev.h"
#include "dev/call.h"

namespace py = pybind11;

namespace liveact {

namespace {

py::object patchify(Device& device, const Floats& z, const Floats& y, int64_t y_first,
                    const std::string& out) {
  LIVEACT_CHECK(z.ndim() == 4 && y.ndim() == 4, "patchify: expected [channels, n, h, w]");
  Call call(device);
  const int64_t n = z.shape(1), h = z.shape(2), w = z.shape(3);
  const Rows tokens = call.new_rows(n * h * w / 4, (z.shape(0) + y.shape(0)) * 4, out);
  call.ops().patchify(call.put<float>(z), call.put<float>(y), z.shape(0), y.shape(0), y.shape(1),
                      y_first, n, h, w, tokens);
  return call.get(tokens);
}

py::object unpatchify(Device& device, const py::object& tokens, int64_t channels, int64_t n,
                      int64_t h, int64_t w) {
  Call call(device);
  auto* v = call.memory<float>(4 * channels * n * h * w);
  call.ops().unpatchify(call.rows(tokens), channels, n, h, w, v);
  return call.get(v, DType::f32, {channels, n, h, w});
}

py::object guide(Device& device, const Floats& v, const Floats& v_null, float guidance) {
  Call call(device);
  auto* out = call.put<float>(v);
  call.ops().guide(out, call.put<float>(v_null), guidance, v.size());
  return call.get(out, DType::f32, {v.size()});
}

py::object sampler_step(Device& device, const Floats& z, const Floats& v,
                        const std::optional<Floats>& noise, float sigma, float next_sigma) {
  Call call(device);
  auto* out = call.put<float>(z);
  call.ops().sampler_step(out, call.put<float>(v), call.put(noise), sigma, next_sigma, z.size());
  return call.get(out, DType::f32, {z.size()});
}

bool all_finite(Device& device, const Floats& x) {
  Call call(device);
  return call.ops().all_finite(call.put<float>(x), x.size());
}

}  // namespace

void bind_ops_latent(py::module_& m) {
  m.def("patchify", &patchify, py::arg("device"), py::arg("z"), py::arg("y"), py::arg("y_first"),
        py::arg("out"));
  m.def("unpatchify", &unpatchify, py::arg("device"), py::arg("tokens"), py::arg("channels"),
        py::arg("n"), py::arg("h"), py::arg("w"));
  m.def("guide", &guide, py::arg("device"), py::arg("v"), py::arg("v_null"), py::arg("guidance"));
  m.def("sampler_step", &sampler_step, py::arg("device"), py::arg("z"), py::arg("v"),
        py::arg("noise"), py::arg("sigma"), py::arg("next_sigma"));
  m.def("all_finite", &all_finite, py::arg("device"), py::arg("x"));
}

}  // namespace liveact
