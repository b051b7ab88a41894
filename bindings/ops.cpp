// Single ops of a device on NumPy arrays, so that tests can compare the backends and the kernels.
//
// Formats travel as array types: float32 is fp32, uint16 is bf16, uint8 is fp8. fp8 rows are a
// tuple (codes, scale). Every call uploads, runs one op and downloads: made for tests, not for
// speed.

#include "core/ops.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "bind_ops.h"
#include "liveact/error.h"

namespace py = pybind11;

namespace liveact {

namespace {

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;

DType dtype_of(const py::array& array) {
  if (py::isinstance<py::array_t<float>>(array)) return DType::f32;
  if (py::isinstance<py::array_t<uint16_t>>(array)) return DType::bf16;
  if (py::isinstance<py::array_t<uint8_t>>(array)) return DType::f8;
  detail::fail("ops: expected an array of float32 (fp32), uint16 (bf16) or uint8 (fp8)");
}

DType dtype_named(const std::string& text) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f8}) {
    if (text == name(dtype)) return dtype;
  }
  detail::fail("ops: expected fp32, bf16 or fp8, got '", text, "'");
}

py::array empty(DType dtype, const std::vector<py::ssize_t>& shape) {
  if (dtype == DType::f32) return py::array_t<float>(shape);
  if (dtype == DType::bf16) return py::array_t<uint16_t>(shape);
  return py::array_t<uint8_t>(shape);
}

// One call: a device, its ops, and the device memory of the operands.
class Call {
 public:
  explicit Call(Device& device) : device_(device) {
    // Room for any op on operands of the size that tests have.
    limits_.max_cols = 1 << 15;
    limits_.max_operand = 1 << 22;
    limits_.max_keys = 1 << 13;
    limits_.head_dim = 256;
    ops_ = device.open_ops(limits_);
  }

  Ops& ops() { return *ops_; }

  template <typename T = void>
  T* room(int64_t bytes) {
    buffers_.emplace_back(device_, bytes);
    return static_cast<T*>(buffers_.back().data());
  }

  template <typename T = void>
  T* put(const py::array& array) {
    LIVEACT_CHECK(array.flags() & py::array::c_style, "ops: expected contiguous arrays");
    T* pointer = room<T>(array.nbytes());
    ops_->upload(pointer, array.data(), array.nbytes());
    return pointer;
  }

  float* put(const std::optional<Floats>& array) {
    return array.has_value() ? put<float>(py::array(*array)) : nullptr;
  }

  py::array get(const void* pointer, DType dtype, const std::vector<py::ssize_t>& shape) {
    py::array result = empty(dtype, shape);
    ops_->download(result.mutable_data(), pointer, result.nbytes());
    return result;
  }

  // An array [rows, cols], or (codes, scale [rows]).
  Rows rows(const py::object& object) {
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
    LIVEACT_CHECK(data.ndim() == 2, "ops: expected rows [rows, cols], got ", data.ndim(),
                  " dimensions");
    result.dtype = dtype_of(data);
    LIVEACT_CHECK((result.dtype == DType::f8) == (result.scale != nullptr),
                  "ops: expected (codes, scale) for fp8 and a plain array otherwise");
    result.data = put(data);
    result.rows = data.shape(0);
    result.cols = data.shape(1);
    return result;
  }

  Rows new_rows(int64_t count, int64_t cols, DType dtype) {
    return {.data = room(count * cols * size_bytes(dtype)),
            .dtype = dtype,
            .rows = count,
            .cols = cols,
            .scale = dtype == DType::f8 ? room<float>(4 * count) : nullptr};
  }

  py::object get(const Rows& rows) {
    py::array data = get(rows.data, rows.dtype, {rows.rows, rows.cols});
    if (rows.dtype != DType::f8) return data;
    return py::make_tuple(data, get(rows.scale, DType::f32, {rows.rows}));
  }

  // (k, v, k_scale or None, v_scale or None); k is [H, tokens, hd], v in the backend's layout.
  KvSegment segment(const py::tuple& parts) {
    LIVEACT_CHECK(parts.size() == 4, "ops: expected a segment (k, v, k_scale, v_scale)");
    const auto k = parts[0].cast<py::array>();
    LIVEACT_CHECK(k.ndim() == 3, "ops: expected keys [heads, tokens, head_dim], got ", k.ndim(),
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

  KvSegment new_segment(int64_t heads, int64_t tokens, int64_t head_dim, DType dtype) {
    KvSegment result;
    result.dtype = dtype;
    result.heads = heads;
    result.tokens = tokens;
    result.head_dim = head_dim;
    result.k = room(result.key_bytes());
    result.v = room(result.value_bytes());
    if (dtype == DType::f8) result.k_scale = room<float>(4 * heads * tokens);
    return result;
  }

  // (k, v [value_shape], k_scale or None)
  py::tuple get(const KvSegment& s, const std::vector<py::ssize_t>& value_shape) {
    py::object scale = py::none();
    if (s.dtype == DType::f8) scale = get(s.k_scale, DType::f32, {s.heads, s.tokens});
    return py::make_tuple(get(s.k, s.dtype, {s.heads, s.tokens, s.head_dim}),
                          get(s.v, s.dtype, value_shape), scale);
  }

  // (frame [positions, pairs, 2], row [grid_rows, pairs, 2], col [grid_cols, pairs, 2])
  Rope rope(const std::array<Floats, 3>& tables) {
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

 private:
  Device& device_;
  OpsLimits limits_;
  std::unique_ptr<Ops> ops_;
  std::vector<Buffer> buffers_;
};

using Tables = std::array<Floats, 3>;

void bind_rows(py::module_& m) {
  m.def(
      "layer_norm",
      [](Device& device, const py::object& x, const Floats& gain, const Floats& bias, float eps,
         const std::string& out) {
        Call call(device);
        const Rows in = call.rows(x);
        const Rows result = call.new_rows(in.rows, in.cols, dtype_named(out));
        call.ops().layer_norm(in, call.put<float>(gain), call.put<float>(bias), eps, result);
        return call.get(result);
      },
      py::arg("device"), py::arg("x"), py::arg("gain"), py::arg("bias"), py::arg("eps"),
      py::arg("out"));
  m.def(
      "rms_norm",
      [](Device& device, const py::object& x, const Floats& gain, float eps,
         const std::string& out) {
        Call call(device);
        const Rows in = call.rows(x);
        const Rows result = call.new_rows(in.rows, in.cols, dtype_named(out));
        call.ops().rms_norm(in, call.put<float>(gain), eps, result);
        return call.get(result);
      },
      py::arg("device"), py::arg("x"), py::arg("gain"), py::arg("eps"), py::arg("out"));
  m.def(
      "activate",
      [](Device& device, const py::object& x, const std::string& activation,
         const std::string& out) {
        const std::map<std::string, Activation> names = {{"gelu_tanh", Activation::gelu_tanh},
                                                         {"gelu_erf", Activation::gelu_erf},
                                                         {"relu", Activation::relu}};
        const auto found = names.find(activation);
        LIVEACT_CHECK(found != names.end(), "activate: expected gelu_tanh, gelu_erf or relu, got '",
                      activation, "'");
        Call call(device);
        const Rows in = call.rows(x);
        const Rows result = call.new_rows(in.rows, in.cols, dtype_named(out));
        call.ops().activate(in, found->second, result);
        return call.get(result);
      },
      py::arg("device"), py::arg("x"), py::arg("activation"), py::arg("out"));
  m.def(
      "quantize",
      [](Device& device, const py::object& x, const std::string& out) {
        Call call(device);
        const Rows in = call.rows(x);
        const Rows result = call.new_rows(in.rows, in.cols, dtype_named(out));
        call.ops().quantize(in, result);
        return call.get(result);
      },
      py::arg("device"), py::arg("x"), py::arg("out"));
  m.def(
      "linear",
      [](Device& device, const py::object& x, const py::object& weight,
         const std::optional<Floats>& scale, const std::optional<py::array>& bias,
         const py::object& out, bool accumulate) {
        Call call(device);
        const Rows in = call.rows(x);
        const Rows w = call.rows(weight);
        LIVEACT_CHECK(w.cols == in.cols, "linear: expected a weight of ", in.cols, " columns, got ",
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
      },
      py::arg("device"), py::arg("x"), py::arg("weight"), py::arg("scale"), py::arg("bias"),
      py::arg("out"), py::arg("accumulate"), "out gives the format, and the values to add to.");
}

void bind_latent(py::module_& m) {
  m.def(
      "patchify",
      [](Device& device, const Floats& z, const Floats& y, int64_t y_first,
         const std::string& out) {
        LIVEACT_CHECK(z.ndim() == 4 && y.ndim() == 4, "patchify: expected [channels, n, h, w]");
        Call call(device);
        const int64_t n = z.shape(1), h = z.shape(2), w = z.shape(3);
        const Rows tokens =
            call.new_rows(n * h * w / 4, (z.shape(0) + y.shape(0)) * 4, dtype_named(out));
        call.ops().patchify(call.put<float>(z), call.put<float>(y), z.shape(0), y.shape(0),
                            y.shape(1), y_first, n, h, w, tokens);
        return call.get(tokens);
      },
      py::arg("device"), py::arg("z"), py::arg("y"), py::arg("y_first"), py::arg("out"));
  m.def(
      "unpatchify",
      [](Device& device, const py::object& tokens, int64_t channels, int64_t n, int64_t h,
         int64_t w) {
        Call call(device);
        auto* v = call.room<float>(4 * channels * n * h * w);
        call.ops().unpatchify(call.rows(tokens), channels, n, h, w, v);
        return call.get(v, DType::f32, {channels, n, h, w});
      },
      py::arg("device"), py::arg("tokens"), py::arg("channels"), py::arg("n"), py::arg("h"),
      py::arg("w"));
  m.def(
      "guide",
      [](Device& device, const Floats& v, const Floats& v_null, float guidance) {
        Call call(device);
        auto* out = call.put<float>(v);
        call.ops().guide(out, call.put<float>(v_null), guidance, v.size());
        return call.get(out, DType::f32, {v.size()});
      },
      py::arg("device"), py::arg("v"), py::arg("v_null"), py::arg("guidance"));
  m.def(
      "sampler_step",
      [](Device& device, const Floats& z, const Floats& v, const std::optional<Floats>& noise,
         float sigma, float next_sigma) {
        Call call(device);
        auto* out = call.put<float>(z);
        call.ops().sampler_step(out, call.put<float>(v), call.put(noise), sigma, next_sigma,
                                z.size());
        return call.get(out, DType::f32, {z.size()});
      },
      py::arg("device"), py::arg("z"), py::arg("v"), py::arg("noise"), py::arg("sigma"),
      py::arg("next_sigma"));
  m.def(
      "all_finite",
      [](Device& device, const Floats& x) {
        Call call(device);
        return call.ops().all_finite(call.put<float>(x), x.size());
      },
      py::arg("device"), py::arg("x"));
}

void bind_keys(py::module_& m) {
  m.def(
      "value_scale",
      [](Device& device, const py::object& qkv, int64_t heads) {
        Call call(device);
        auto* scale = call.room<float>(4 * heads);
        call.ops().value_scale(call.rows(qkv), heads, scale);
        return call.get(scale, DType::f32, {heads});
      },
      py::arg("device"), py::arg("qkv"), py::arg("heads"));
  m.def(
      "split_qkv",
      [](Device& device, const py::object& qkv, const Floats& q_gain, const Floats& k_gain,
         float eps, const Tables& rope, int64_t first_position, int64_t heads,
         const std::optional<Floats>& v_scale, const std::vector<py::ssize_t>& value_shape,
         const std::string& out) {
        Call call(device);
        const Rows in = call.rows(qkv);
        const DType dtype = dtype_named(out);
        const int64_t hd = in.cols / 3 / heads;
        KvSegment current = call.new_segment(heads, in.rows, hd, dtype);
        current.v_scale = call.put(v_scale);
        Heads q{.data = call.room(current.key_bytes()),
                .dtype = dtype,
                .heads = heads,
                .tokens = in.rows,
                .head_dim = hd};
        if (dtype == DType::f8) q.scale = call.room<float>(4 * heads * in.rows);
        call.ops().split_qkv(in, call.put<float>(q_gain), call.put<float>(k_gain), eps,
                             call.rope(rope), first_position, q, current);
        py::object q_scale = py::none();
        if (dtype == DType::f8) q_scale = call.get(q.scale, DType::f32, {heads, in.rows});
        return py::make_tuple(call.get(q.data, dtype, {heads, in.rows, hd}), q_scale,
                              call.get(current, value_shape));
      },
      py::arg("device"), py::arg("qkv"), py::arg("q_gain"), py::arg("k_gain"), py::arg("eps"),
      py::arg("rope"), py::arg("first_position"), py::arg("heads"), py::arg("v_scale"),
      py::arg("value_shape"), py::arg("out"), "-> q, q_scale or None, (k, v, k_scale or None)");
  m.def(
      "store_kv",
      [](Device& device, const py::object& k, const py::object& v, int64_t heads) {
        Call call(device);
        const Rows keys = call.rows(k);
        const int64_t hd = keys.cols / heads;
        const KvSegment segment = call.new_segment(heads, keys.rows, hd, keys.dtype);
        call.ops().store_kv(keys, call.rows(v), segment);
        return call.get(segment, {heads, keys.rows, hd});
      },
      py::arg("device"), py::arg("k"), py::arg("v"), py::arg("heads"));
  m.def(
      "update_memory",
      [](Device& device, const std::vector<std::pair<int, std::vector<int>>>& table,
         const std::optional<Floats>& key_taps, const std::optional<Floats>& value_taps,
         const std::string& axis, const Tables& rope, int64_t first_slot, const py::tuple& current,
         const py::tuple& context) {
        Call call(device);
        std::vector<SlotUpdate> updates;
        for (const auto& [target, sources] : table) {
          LIVEACT_CHECK(sources.size() == 1 || sources.size() == kCompressTaps,
                        "update_memory: expected 1 or ", kCompressTaps, " sources, got ",
                        sources.size());
          SlotUpdate update{target, static_cast<int>(sources.size()), {}};
          std::copy(sources.begin(), sources.end(), update.sources.begin());
          updates.push_back(update);
        }
        const KvSegment to = call.segment(context);
        KvSegment staging = call.new_segment(to.heads, to.tokens, to.head_dim, to.dtype);
        staging.v_scale = to.v_scale;
        const CompressFilter filter{call.put(key_taps), call.put(value_taps),
                                    compress_axis_from_name(axis)};
        call.ops().update_memory(updates, filter, call.rope(rope), first_slot,
                                 call.segment(current), staging, to);
        const auto v = context[1].cast<py::array>();
        return call.get(to, std::vector<py::ssize_t>(v.shape(), v.shape() + v.ndim()));
      },
      py::arg("device"), py::arg("table"), py::arg("key_taps"), py::arg("value_taps"),
      py::arg("axis"), py::arg("rope"), py::arg("first_slot"), py::arg("current"),
      py::arg("context"), "-> the context afterwards: (k, v, k_scale or None)");
}

void bind_attention(py::module_& m) {
  m.def(
      "self_attention",
      [](Device& device, const py::array& q, const std::optional<Floats>& q_scale,
         const py::tuple& context, const py::tuple& current, const std::string& out) {
        LIVEACT_CHECK(q.ndim() == 3, "self_attention: expected q [heads, tokens, head_dim]");
        Call call(device);
        const Heads heads{.data = call.put(q),
                          .dtype = dtype_of(q),
                          .heads = q.shape(0),
                          .tokens = q.shape(1),
                          .head_dim = q.shape(2),
                          .scale = call.put(q_scale)};
        const Rows result =
            call.new_rows(heads.tokens, heads.heads * heads.head_dim, dtype_named(out));
        call.ops().self_attention(heads, call.segment(context), call.segment(current), result);
        return call.get(result);
      },
      py::arg("device"), py::arg("q"), py::arg("q_scale"), py::arg("context"), py::arg("current"),
      py::arg("out"));
  m.def(
      "cross_attention",
      [](Device& device, const py::object& q, const py::tuple& text, int64_t pad_count,
         const py::tuple& image, const std::string& out) {
        Call call(device);
        const Rows in = call.rows(q);
        const Rows result = call.new_rows(in.rows, in.cols, dtype_named(out));
        call.ops().cross_attention(in, call.segment(text), pad_count, call.segment(image), result);
        return call.get(result);
      },
      py::arg("device"), py::arg("q"), py::arg("text"), py::arg("pad_count"), py::arg("image"),
      py::arg("out"));
  m.def(
      "audio_attention",
      [](Device& device, const py::object& q, const py::object& kv, int64_t n, int64_t kv_frames,
         int64_t heads, const std::string& out) {
        Call call(device);
        const Rows in = call.rows(q);
        const Rows result = call.new_rows(in.rows, in.cols, dtype_named(out));
        call.ops().audio_attention(in, call.rows(kv), n, kv_frames, heads, result);
        return call.get(result);
      },
      py::arg("device"), py::arg("q"), py::arg("kv"), py::arg("n"), py::arg("kv_frames"),
      py::arg("heads"), py::arg("out"));
}

}  // namespace

void bind_ops(py::module_& m) {
  py::module_ ops = m.def_submodule("ops", "Single ops of a device on arrays, for tests.");
  bind_rows(ops);
  bind_latent(ops);
  bind_keys(ops);
  bind_attention(ops);
}

}  // namespace liveact
