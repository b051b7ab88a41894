// The Python face of the runtime: buffers in and out by pointer, the GIL released while it works.
// Shapes are checked here once; everything else is in csrc/.

#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "bind_ops.h"
#include "cpu/cpu_backend.h"
#include "cuda/cuda_backend.h"
#include "liveact/error.h"
#include "liveact/stream.h"
#include "measure/calibrate.h"

namespace py = pybind11;
using namespace liveact;

namespace {

using Array = py::array_t<float, py::array::c_style>;

DType dtype_from_name(const std::string& text) {
  if (text == "fp32") return DType::f32;
  if (text == "bf16") return DType::bf16;
  if (text == "fp8") return DType::f8;
  detail::fail("precision: expected fp32, bf16 or fp8, got '", text, "'");
}

// "fp32", "bf16", "fp8", or a policy {activations: name, layers: [{product: name}]} with every
// product of every layer.
Precision precision_from(const py::object& given, int64_t num_layers) {
  if (py::isinstance<py::str>(given)) {
    return Precision::uniform(dtype_from_name(given.cast<std::string>()), num_layers);
  }
  const auto policy = given.cast<py::dict>();
  Precision result;
  result.activations = dtype_from_name(policy["activations"].cast<std::string>());
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

std::string shape_text(const std::vector<py::ssize_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

const float* checked(const Array& array, const char* what, const std::vector<py::ssize_t>& shape) {
  const std::vector<py::ssize_t> found(array.shape(), array.shape() + array.ndim());
  LIVEACT_CHECK(found == shape, what, ": expected shape ", shape_text(shape), ", got ",
                shape_text(found));
  return array.data();
}

// One stream, with the Python objects that its model's weights live in.
struct PyStream {
  std::shared_ptr<const Model> model;
  std::unique_ptr<Stream> stream;

  std::vector<py::ssize_t> latent_shape(py::ssize_t leading = 0) const {
    const StreamOptions& options = stream->options();
    std::vector<py::ssize_t> shape = {model->config().out_dim, stream->frames_of_next_block(),
                                      options.latent_height, options.latent_width};
    if (leading > 0) shape.insert(shape.begin(), leading);
    return shape;
  }

  Array denoise(const Array& noise, const Array& renoise, const Array& audio,
                const py::object& velocities) {
    const float* noise_data = checked(noise, "noise", latent_shape());
    const float* renoise_data = checked(renoise, "renoise", latent_shape(kSteps - 1));
    const float* audio_data = checked(
        audio, "audio",
        {stream->audio_rows_of_next_block(), static_cast<py::ssize_t>(model->config().audio_dim)});
    Array latent(latent_shape());
    Array velocity_array;
    float* velocity_data = nullptr;
    if (!velocities.is_none()) {
      velocity_array = velocities.cast<Array>();
      checked(velocity_array, "velocities", latent_shape(kSteps));
      velocity_data = velocity_array.mutable_data();
    }
    float* latent_data = latent.mutable_data();
    py::gil_scoped_release release;
    stream->denoise(noise_data, renoise_data, audio_data, latent_data, velocity_data);
    return latent;
  }
};

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

// A kernel as the manifest describes it, see triton_kernels/README.md.
cuda::KernelImage kernel_image(const py::dict& kernel) {
  cuda::KernelImage image;
  image.name = kernel["name"].cast<std::string>();
  image.cubin = kernel["cubin"].cast<std::string>();  // bytes
  image.symbol = kernel["symbol"].cast<std::string>();
  image.threads = kernel["threads"].cast<int>();
  image.shared_bytes = kernel["shared_bytes"].cast<int>();
  for (const auto& hidden : kernel["hidden_parameters"].cast<py::list>()) {
    LIVEACT_CHECK(hidden["bytes_per_program"].cast<int>() == 0, image.name,
                  ": expected a kernel without scratch memory, got one with");
    ++image.hidden_pointers;
  }
  std::map<std::string, int> positions;
  for (const auto& entry : kernel["parameters"].cast<py::list>()) {
    const py::dict parameter = entry.cast<py::dict>();
    const std::string type = parameter["type"].cast<std::string>();
    using Type = cuda::KernelParameter::Type;
    cuda::KernelParameter result{parameter["name"].cast<std::string>(),
                                 type[0] == '*'  ? Type::pointer
                                 : type == "i32" ? Type::i32
                                                 : Type::f32,
                                 1};
    LIVEACT_CHECK(type[0] == '*' || type == "i32" || type == "f32", image.name,
                  ": expected parameters of type *, i32 or f32, got ", type);
    for (const char* key : {"align_bytes", "divisible_by"}) {
      if (parameter.contains(key)) result.multiple = parameter[key].cast<int>();
    }
    positions[result.name] = static_cast<int>(image.parameters.size());
    image.parameters.push_back(std::move(result));
  }
  size_t axis = 0;
  for (const auto& dimension : kernel["grid"].cast<py::list>()) {
    for (const auto& factor : dimension.cast<py::list>()) {
      if (py::isinstance<py::int_>(factor)) {
        image.grid.at(axis).push_back({-1, factor.cast<int64_t>()});
      } else {
        const std::string name = factor["parameter"].cast<std::string>();
        LIVEACT_CHECK(positions.contains(name), image.name, ": grid names no parameter: ", name);
        image.grid.at(axis).push_back({positions[name], factor["divisor"].cast<int64_t>()});
      }
    }
    ++axis;
  }
  return image;
}

StreamOptions stream_options(int64_t latent_height, int64_t latent_width,
                             const std::array<int, 4>& slots, const std::string& memory,
                             const std::string& compress_axis, const std::string& value_filter,
                             float audio_guidance, int64_t max_image_tokens) {
  StreamOptions options;
  options.latent_height = latent_height;
  options.latent_width = latent_width;
  options.slots = {slots[0], slots[1], slots[2], slots[3]};
  options.memory = {memory_from_name(memory), compress_axis_from_name(compress_axis),
                    value_filter_from_name(value_filter)};
  options.audio_guidance = audio_guidance;
  options.max_image_tokens = max_image_tokens;
  return options;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "LiveAct runtime: a DiT (Model), sessions on it (Stream), and the devices they run on.";
  bind_ops(m);
  py::register_exception<Error>(m, "CoreError", PyExc_RuntimeError);
  py::register_exception<DeviceError>(m, "DeviceError", m.attr("CoreError"));
  py::register_exception<NonFiniteError>(m, "NonFiniteError", m.attr("CoreError"));
  py::register_exception<CancelledError>(m, "CancelledError", m.attr("CoreError"));

  py::class_<Device, std::shared_ptr<Device>>(m, "Device", "Memory and op queues of one device.")
      .def_property_readonly("name", &Device::name)
      .def_property_readonly("allocated_bytes", &Device::allocated_bytes)
      .def_property_readonly("allocation_count", &Device::allocation_count)
      .def_property_readonly("free_bytes", &Device::free_bytes);
  bind_timed_device(m);
  bind_launch(m);
  m.def("open_cpu", []() -> std::shared_ptr<Device> { return std::make_shared<cpu::CpuDevice>(); });
  m.def(
      "cuda_architecture",
      [](int index, const std::string& driver) {
        return cuda::CudaDevice::architecture(index, driver);
      },
      py::arg("index"), py::arg("driver") = cuda::CudaLibraries{}.driver,
      "The architecture whose kernels device `index` takes, such as sm_90a.");
  m.def(
      "open_cuda",
      [](int index, const py::list& kernels, const std::string& driver,
         const std::string& cublaslt) -> std::shared_ptr<Device> {
        std::vector<cuda::KernelImage> images;
        for (const auto& kernel : kernels) images.push_back(kernel_image(kernel.cast<py::dict>()));
        return std::make_shared<cuda::CudaDevice>(index, std::move(images),
                                                  cuda::CudaLibraries{driver, cublaslt});
      },
      py::arg("index"), py::arg("kernels"), py::arg("driver") = cuda::CudaLibraries{}.driver,
      py::arg("cublaslt") = cuda::CudaLibraries{}.cublaslt,
      "A CUDA device with kernels as in the manifest, `cubin` being their bytes.");

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
  m.def(
      "expected_tensors",
      [](const ModelConfig& config) {
        config.check();
        std::map<std::string, std::vector<int64_t>> result;
        for (const TensorSpec& spec : expected_tensors(config)) result[spec.name] = spec.shape;
        return result;
      },
      "Name and shape of every tensor of a checkpoint of this size.");
  m.def(
      "update_table",
      [](const std::array<int, 4>& slots, const std::string& memory, int64_t block) {
        std::map<int, std::vector<int>> result;
        for (const SlotUpdate& update : update_table({slots[0], slots[1], slots[2], slots[3]},
                                                     memory_from_name(memory), block)) {
          result[update.target].assign(update.sources.begin(),
                                       update.sources.begin() + update.num_sources);
        }
        return result;
      },
      "Target slot -> its source slots, after `block` was denoised.");

  py::class_<Model, std::shared_ptr<Model>>(m, "Model", "The weights of a DiT on one device.")
      .def(py::init([](std::shared_ptr<Device> device, const ModelConfig& config,
                       const py::dict& tensors, const py::object& precision) {
             const HostTensors host = host_tensors(tensors);
             const Precision policy = precision_from(precision, config.num_layers);
             py::gil_scoped_release release;
             return std::make_shared<Model>(std::move(device), config, host, policy);
           }),
           py::arg("device"), py::arg("config"), py::arg("tensors"), py::arg("precision"))
      .def_property_readonly("config", &Model::config);
  m.def(
      "products",
      [] {
        std::vector<std::string> names;
        for (const Product& product : kProducts) names.emplace_back(product.name);
        return names;
      },
      "What a precision policy names in every layer.");
  m.def(
      "quantize_weight",
      [](uintptr_t address, const std::string& dtype, const std::vector<int64_t>& shape) {
        const HostTensor weight{reinterpret_cast<const void*>(address), dtype_from_name(dtype),
                                shape};
        py::array_t<uint8_t> codes(std::vector<py::ssize_t>(shape.begin(), shape.end()));
        Array scale(shape.empty() ? 0 : shape[0]);
        uint8_t* code_data = codes.mutable_data();
        float* scale_data = scale.mutable_data();
        {
          py::gil_scoped_release release;
          quantize_weight(weight, code_data, scale_data);
        }
        return std::make_pair(codes, scale);
      },
      py::arg("address"), py::arg("dtype"), py::arg("shape"),
      "(fp8 codes, one scale per row) of a weight in host memory, as a model makes them.");
  py::class_<CalibrationDevice, Device, std::shared_ptr<CalibrationDevice>>(
      m, "CalibrationDevice",
      "A device that measures what FP8 would cost, see csrc/measure/calibrate.h.")
      .def(py::init<std::shared_ptr<Device>>(), py::arg("device"))
      .def("watch", &CalibrationDevice::watch, py::arg("model"))
      .def(
          "errors",
          [](const CalibrationDevice& self) {
            std::vector<std::map<std::string, std::vector<std::pair<double, double>>>> result;
            for (const LayerErrors& layer : self.errors()) {
              auto& target = result.emplace_back();
              for (size_t p = 0; p < kProducts.size(); ++p) {
                auto& sums = target[kProducts[p].name];
                for (const SquaredError& e : layer[p]) sums.emplace_back(e.difference, e.reference);
              }
            }
            return result;
          },
          "Per layer: product -> (|fp8 - wide|^2, |wide|^2) of each of its linears, or of "
          "attention, summed over all that ran.");
  m.def(
      "required_bytes",
      [](Device& device, const ModelConfig& config, const py::object& precision,
         const std::string& stored, int64_t latent_height, int64_t latent_width,
         const std::array<int, 4>& slots, float audio_guidance, int64_t max_image_tokens) {
        config.check();
        const Precision policy = precision_from(precision, config.num_layers);
        const StreamOptions options =
            stream_options(latent_height, latent_width, slots, "sequential", "token", "key",
                           audio_guidance, max_image_tokens);
        return std::make_pair(weight_bytes(config, policy, dtype_from_name(stored)) +
                                  constant_bytes(device, config, policy),
                              Stream::required_bytes(device, config, policy, options));
      },
      py::arg("device"), py::arg("config"), py::arg("precision"), py::arg("stored"),
      py::arg("latent_height"), py::arg("latent_width"), py::arg("slots"),
      py::arg("audio_guidance"), py::arg("max_image_tokens"),
      "(bytes of the weights, bytes of a stream) on the device, from sizes alone.");

  py::class_<PyStream>(m, "Stream", "One session's state on a model.")
      .def(py::init([](std::shared_ptr<Model> model, int64_t latent_height, int64_t latent_width,
                       const std::array<int, 4>& slots, const std::string& memory,
                       const std::string& compress_axis, const std::string& value_filter,
                       float audio_guidance, int64_t max_image_tokens) {
             const StreamOptions options =
                 stream_options(latent_height, latent_width, slots, memory, compress_axis,
                                value_filter, audio_guidance, max_image_tokens);
             py::gil_scoped_release release;
             auto stream = std::make_unique<Stream>(model, options);
             return PyStream{std::move(model), std::move(stream)};
           }),
           py::arg("model"), py::arg("latent_height"), py::arg("latent_width"), py::arg("slots"),
           py::arg("memory"), py::arg("compress_axis"), py::arg("value_filter"),
           py::arg("audio_guidance"), py::arg("max_image_tokens"))
      .def(
          "set_prompt",
          [](PyStream& self, const Array& text) {
            LIVEACT_CHECK(text.ndim() == 2, "text: expected [tokens, text_dim], got ", text.ndim(),
                          " dimensions");
            const int64_t tokens = text.shape(0);
            const float* data = checked(
                text, "text", {tokens, static_cast<py::ssize_t>(self.model->config().text_dim)});
            py::gil_scoped_release release;
            self.stream->set_prompt(data, tokens);
          },
          py::arg("text"))
      .def(
          "set_image",
          [](PyStream& self, const Array& features, const Array& y) {
            LIVEACT_CHECK(features.ndim() == 2 && y.ndim() == 4,
                          "image: expected features [tokens, dim] and y [channels, frames, h, w]");
            const ModelConfig& c = self.model->config();
            const int64_t tokens = features.shape(0);
            const int64_t frames = y.shape(1);
            const StreamOptions& options = self.stream->options();
            const float* feature_data = checked(features, "image features",
                                                {tokens, static_cast<py::ssize_t>(c.image_dim)});
            const float* y_data = checked(y, "y",
                                          {static_cast<py::ssize_t>(c.in_dim - c.out_dim), frames,
                                           options.latent_height, options.latent_width});
            py::gil_scoped_release release;
            self.stream->set_image(feature_data, tokens, y_data, frames);
          },
          py::arg("features"), py::arg("y"))
      .def("denoise", &PyStream::denoise, py::arg("noise"), py::arg("renoise"), py::arg("audio"),
           py::arg("velocities") = py::none())
      .def("cancel", [](PyStream& self) { self.stream->cancel(); })
      .def("export_context",
           [](PyStream& self, int step, int64_t layer) {
             const ModelConfig& c = self.model->config();
             const int64_t tokens =
                 self.stream->options().slots.context() * self.stream->tokens_per_frame();
             Array k({tokens, c.num_heads, c.head_dim()});
             Array v({tokens, c.num_heads, c.head_dim()});
             self.stream->export_context(step, layer, k.mutable_data(), v.mutable_data());
             return std::make_pair(k, v);
           })
      .def_property_readonly("next_block", [](PyStream& s) { return s.stream->next_block(); })
      .def_property_readonly("frames_of_next_block",
                             [](PyStream& s) { return s.stream->frames_of_next_block(); })
      .def_property_readonly("audio_rows_of_next_block",
                             [](PyStream& s) { return s.stream->audio_rows_of_next_block(); })
      .def_property_readonly("device_bytes", [](PyStream& s) { return s.stream->device_bytes(); })
      .def_property_readonly("timings", [](PyStream& s) {
        const BlockTimings& t = s.stream->timings();
        py::dict result;
        result["conditioning_ms"] = t.conditioning_ms;
        result["step_ms"] = std::vector<double>(t.step_ms, t.step_ms + kSteps);
        return result;
      });
}
