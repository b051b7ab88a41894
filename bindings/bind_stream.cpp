// A session on a model. Arrays are checked against the sizes of the next block, then the GIL is
// released.

#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "bind.h"
#include "convert.h"
#include "core/check.h"
#include "liveact/stream.h"

namespace py = pybind11;

namespace liveact {

namespace {

StreamOptions stream_options(int64_t latent_height, int64_t latent_width,
                             const std::array<int, 4>& slots, const std::string& memory,
                             const std::string& compress_axis, const std::string& value_filter,
                             float audio_guidance, int64_t max_image_tokens,
                             const std::string& sampler) {
  StreamOptions options;
  options.latent_height = latent_height;
  options.latent_width = latent_width;
  options.slots = {slots[0], slots[1], slots[2], slots[3]};
  options.memory = {memory_from_name(memory), compress_axis_from_name(compress_axis),
                    value_filter_from_name(value_filter)};
  options.audio_guidance = audio_guidance;
  options.max_image_tokens = max_image_tokens;
  options.sampler = sampler_from_name(sampler);
  return options;
}

class PyStream {
 public:
  PyStream(const std::vector<std::shared_ptr<const Model>>& models, const StreamOptions& options)
      : stream_(models, options) {}

  void set_prompt(const Array& text) {
    LIVEACT_CHECK(text.ndim() == 2, "text: expected [tokens, text_dim], found ", text.ndim(),
                  " dimensions");
    const int64_t tokens = text.shape(0);
    const float* data = checked(text, "text", {tokens, config().text_dim});
    const py::gil_scoped_release release;
    stream_.set_prompt(data, tokens);
  }

  void set_image(const Array& features, const Array& y) {
    LIVEACT_CHECK(features.ndim() == 2 && y.ndim() == 4,
                  "image: expected features [tokens, dim] and y [channels, frames, h, w]");
    const int64_t tokens = features.shape(0);
    const int64_t frames = y.shape(1);
    const float* feature_data = checked(features, "image features", {tokens, config().image_dim});
    const float* y_data =
        checked(y, "y",
                {config().in_dim - config().out_dim, frames, stream_.options().latent_height,
                 stream_.options().latent_width});
    const py::gil_scoped_release release;
    stream_.set_image(feature_data, tokens, y_data, frames);
  }

  Array denoise(const Array& noise, const std::optional<Array>& renoise, const Array& audio,
                const py::object& velocities) {
    const float* noise_data = checked(noise, "noise", latent_shape());
    const float* renoise_data =
        renoise ? checked(*renoise, "renoise", latent_shape(kSteps - 1)) : nullptr;
    const float* audio_data =
        checked(audio, "audio", {stream_.audio_rows_of_next_block(), config().audio_dim});
    Array latent(latent_shape());
    Array velocity_array;
    float* velocity_data = nullptr;
    if (!velocities.is_none()) {
      velocity_array = velocities.cast<Array>();
      checked(velocity_array, "velocities", latent_shape(kSteps));
      velocity_data = velocity_array.mutable_data();
    }
    float* latent_data = latent.mutable_data();
    const py::gil_scoped_release release;
    stream_.denoise(noise_data, renoise_data, audio_data, latent_data, velocity_data);
    return latent;
  }

  void cancel() { stream_.cancel(); }

  std::pair<Array, Array> export_context(int step, int64_t layer) {
    const int64_t tokens = stream_.options().slots.context() * stream_.tokens_per_frame();
    Array k({tokens, config().num_heads, config().head_dim()});
    Array v({tokens, config().num_heads, config().head_dim()});
    stream_.export_context(step, layer, k.mutable_data(), v.mutable_data());
    return {k, v};
  }

  py::dict timings() const {
    const BlockTimings& found = stream_.timings();
    py::dict result;
    result["conditioning_ms"] = found.conditioning_ms;
    result["step_ms"] = std::vector<double>(found.step_ms, found.step_ms + kSteps);
    return result;
  }

  const Stream& stream() const { return stream_; }

 private:
  const ModelConfig& config() const { return stream_.model().config(); }

  // Of the next block.
  std::vector<py::ssize_t> latent_shape(py::ssize_t leading = 0) const {
    std::vector<py::ssize_t> shape = {config().out_dim, stream_.frames_of_next_block(),
                                      stream_.options().latent_height,
                                      stream_.options().latent_width};
    if (leading > 0) shape.insert(shape.begin(), leading);
    return shape;
  }

  Stream stream_;
};

std::unique_ptr<PyStream> open(const std::vector<std::shared_ptr<Model>>& models,
                               int64_t latent_height, int64_t latent_width,
                               const std::array<int, 4>& slots, const std::string& memory,
                               const std::string& compress_axis, const std::string& value_filter,
                               float audio_guidance, int64_t max_image_tokens,
                               const std::string& sampler) {
  const StreamOptions options =
      stream_options(latent_height, latent_width, slots, memory, compress_axis, value_filter,
                     audio_guidance, max_image_tokens, sampler);
  const py::gil_scoped_release release;
  return std::make_unique<PyStream>(
      std::vector<std::shared_ptr<const Model>>(models.begin(), models.end()), options);
}

std::pair<int64_t, int64_t> required_bytes(Device& device, const ModelConfig& config,
                                           const py::object& precision, const std::string& stored,
                                           int64_t latent_height, int64_t latent_width,
                                           const std::array<int, 4>& slots, float audio_guidance,
                                           int64_t max_image_tokens, int devices) {
  config.check();
  const Precision policy = precision_from(precision, config.num_layers);
  const StreamOptions options =
      stream_options(latent_height, latent_width, slots, "sequential", "token", "key",
                     audio_guidance, max_image_tokens, "renoise");
  return {weight_bytes(config, policy, dtype_from_name(stored)) +
              constant_bytes(device, config, policy),
          Stream::required_bytes(device, config, policy, options, devices)};
}

// A property that the stream itself has.
template <auto Getter>
auto of_stream(const PyStream& self) {
  return (self.stream().*Getter)();
}

}  // namespace

void bind_stream(py::module_& m) {
  // To free memory of a GPU waits for what runs there: other Python threads go on meanwhile.
  py::class_<PyStream>(m, "Stream", "One session's state on a model.",
                       py::release_gil_before_calling_cpp_dtor())
      .def(py::init(&open), py::arg("models"), py::arg("latent_height"), py::arg("latent_width"),
           py::arg("slots"), py::arg("memory"), py::arg("compress_axis"), py::arg("value_filter"),
           py::arg("audio_guidance"), py::arg("max_image_tokens"), py::arg("sampler"))
      .def("set_prompt", &PyStream::set_prompt, py::arg("text"))
      .def("set_image", &PyStream::set_image, py::arg("features"), py::arg("y"))
      .def("denoise", &PyStream::denoise, py::arg("noise"), py::arg("renoise"), py::arg("audio"),
           py::arg("velocities") = py::none())
      .def("cancel", &PyStream::cancel)
      .def("export_context", &PyStream::export_context, py::arg("step"), py::arg("layer"))
      .def_property_readonly("next_block", &of_stream<&Stream::next_block>)
      .def_property_readonly("frames_of_next_block", &of_stream<&Stream::frames_of_next_block>)
      .def_property_readonly("audio_rows_of_next_block",
                             &of_stream<&Stream::audio_rows_of_next_block>)
      .def_property_readonly("device_bytes", &of_stream<&Stream::device_bytes>)
      .def_property_readonly("timings", &PyStream::timings);
  m.def(
      "check_slots",
      [](const std::array<int, 4>& slots, const std::string& memory) {
        update_table({slots[0], slots[1], slots[2], slots[3]}, memory_from_name(memory), 1);
      },
      py::arg("slots"), py::arg("memory"), "Raises for counts that do not go together.");
  m.def("required_bytes", &required_bytes, py::arg("device"), py::arg("config"),
        py::arg("precision"), py::arg("stored"), py::arg("latent_height"), py::arg("latent_width"),
        py::arg("slots"), py::arg("audio_guidance"), py::arg("max_image_tokens"),
        py::arg("devices") = 1,
        "(bytes of the weights, bytes of a stream) on the device, of 1 or 2 that share the stream, "
        "from sizes alone.");
}

}  // namespace liveact
