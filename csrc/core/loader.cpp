#include "core/loader.h"

#include <algorithm>

#include "core/check.h"
#include "core/host_rows.h"

namespace liveact {

// A tensor that the host can read, with a copy where it lies on the device.
struct Loader::Readable {
  HostTensor tensor;
  std::vector<uint8_t> copy;
};

Loader::Loader(Device& device, const ModelConfig& config, const HostTensors& tensors,
               std::vector<Buffer>& buffers, Conversions& conversions, int index)
    : device_(device),
      conversions_(conversions),
      index_(index),
      formats_(device.formats()),
      tensors_(tensors),
      buffers_(buffers) {
  for (const TensorSpec& spec : expected_tensors(config)) {
    const auto found = tensors.find(spec.name);
    LIVEACT_CHECK(found != tensors.end(), "checkpoint: expected tensor ", spec.name, " ",
                  shape_text(spec.shape), ", found none");
    LIVEACT_CHECK(found->second.shape == spec.shape, "checkpoint: expected tensor ", spec.name,
                  " to be ", shape_text(spec.shape), ", found ", shape_text(found->second.shape));
  }
}

Loader::Readable Loader::readable(const std::string& name) const {
  Readable result{tensors_.at(name), {}};
  if (device_.is_device_memory(result.tensor.data)) {
    result.copy.resize(element_count(result.tensor) * size_bytes(result.tensor.dtype));
    device_.download(result.copy.data(), result.tensor.data, std::ssize(result.copy));
    result.tensor.data = result.copy.data();
  }
  return result;
}

Loader::Readable Loader::wide(const std::string& name) const {
  LIVEACT_CHECK(stored(name) != DType::f8, "checkpoint: expected ", name,
                " in bf16 or fp32, found fp8");
  return readable(name);
}

std::vector<float> Loader::host(const std::string& name) const { return to_f32(wide(name).tensor); }

void Loader::host_linear(const std::string& name, std::vector<std::vector<float>>& rows) const {
  const Readable weight = wide(name + ".weight");
  const Readable bias = wide(name + ".bias");
  for (std::vector<float>& row : rows) {
    row = liveact::host_linear(row, weight.tensor, bias.tensor, conversions_.threads());
  }
}

const float* Loader::upload(const std::vector<float>& values) {
  return static_cast<const float*>(
      store(values.data(), static_cast<int64_t>(sizeof(float) * values.size())));
}

const float* Loader::taps(const std::string& name) {
  const std::vector<float> given = host(name);
  if (!formats_.tap_major) return upload(given);
  const size_t width = given.size() / kCompressTaps;
  std::vector<float> transposed(given.size());
  for (size_t i = 0; i < given.size(); ++i) {
    transposed[i % kCompressTaps * width + i / kCompressTaps] = given[i];
  }
  return upload(transposed);
}

LoadedLinear Loader::loaded_linear(const std::vector<std::string>& names, DType precision,
                                   DType out) {
  LoadedLinear loaded{.linear = {}, .scale = {}, .bias = {}, .out = out};
  Weight& weight = loaded.linear.weight;
  for (const std::string& name : names) {
    const HostTensor& tensor = weight_of(name);
    LIVEACT_CHECK(tensor.dtype != DType::f8 || precision == DType::f8, "checkpoint: expected ",
                  name, ".weight in bf16 or fp32 for a product in ", liveact::name(precision),
                  ", found fp8: it was converted");
    weight.k = element_count(tensor) / tensor.shape[0];
    weight.n += tensor.shape[0];
    const std::vector<float> part = host(name + ".bias");
    loaded.bias.insert(loaded.bias.end(), part.begin(), part.end());
  }
  weight.dtype = weight_format(names, precision);
  loaded.scale.assign(weight.dtype == DType::f8 ? weight.n : 0, 0.0f);
  place(names, loaded);
  if (weight.dtype == DType::f8) weight.scale = upload(loaded.scale);
  loaded.linear.scale = weight.scale;
  loaded.linear.bias = upload_bias(loaded.bias, out);
  return loaded;
}

// fp8 and bf16 are what the policy says; fp32 keeps the stored format, which is as exact.
DType Loader::weight_format(const std::vector<std::string>& names, DType precision) const {
  if (precision != DType::f32) return precision;
  const DType first = weight_of(names[0]).dtype;
  const bool alike = std::all_of(names.begin(), names.end(), [&](const std::string& name) {
    return weight_of(name).dtype == first;
  });
  return alike ? first : DType::f32;
}

// The parts of a weight, where the device uses it or in memory of the device.
void Loader::place(const std::vector<std::string>& names, LoadedLinear& loaded) {
  Weight& weight = loaded.linear.weight;
  if (!formats_.host_weights) {
    weight.parts[0] = {convert(names, loaded), weight.n};
    return;
  }
  // The same parts whether mapped or converted: how a device splits a product by them decides the
  // last bits, and a converted checkpoint must give those of its original.
  const bool mapped = std::all_of(names.begin(), names.end(), [&](const std::string& name) {
    return weight_of(name).dtype == weight.dtype;
  });
  const char* converted = mapped ? nullptr : convert(names, loaded);
  int64_t first_row = 0;
  for (size_t i = 0; i < names.size(); ++i) {
    const HostTensor& tensor = weight_of(names[i]);
    const int64_t offset = first_row * weight.k * size_bytes(weight.dtype);
    weight.parts[i] = {mapped ? tensor.data : converted + offset, tensor.shape[0]};
    if (mapped && weight.dtype == DType::f8) read_scale(names[i], loaded.scale.data() + first_row);
    first_row += tensor.shape[0];
  }
}

// The parts of a weight one after another in its format; what has that format already goes as it
// lies. fp8 fills the scales, one per row.
//
// NOTE: host memory. Tensors are converted one by one, so the runtime holds one of them at a time,
// or two with two devices (the largest of the released model has 142 MB in bf16). The checkpoint is
// mapped and read in the order of the layers: its pages are clean copies of the file, which the
// system drops when memory is short, whatever the size of a shard. Nothing is written to them.
const char* Loader::convert(const std::vector<std::string>& names, LoadedLinear& loaded) {
  const Weight& weight = loaded.linear.weight;
  const int64_t row_bytes = weight.k * size_bytes(weight.dtype);
  buffers_.emplace_back(device_, weight.n * row_bytes);
  char* target = static_cast<char*>(buffers_.back().data());
  int64_t first_row = 0;
  for (const std::string& name : names) {
    const HostTensor& tensor = weight_of(name);
    const int64_t n = tensor.shape[0];
    const bool as_stored = tensor.dtype == weight.dtype;
    const auto made = conversions_.next(
        index_, name, [&] { return as_stored ? Converted{} : converted(name, weight); });
    const void* source = as_stored ? tensor.data : made->rows.data();
    if (as_stored && weight.dtype == DType::f8) {
      read_scale(name, loaded.scale.data() + first_row);
    } else {
      std::copy(made->scale.begin(), made->scale.end(), loaded.scale.begin() + first_row);
    }
    device_.upload(target + first_row * row_bytes, source, n * row_bytes);
    first_row += n;
  }
  return target;
}

// The rows of one part in the format of the whole.
Converted Loader::converted(const std::string& name, const Weight& weight) const {
  const Readable given = readable(name + ".weight");
  const int64_t rows = given.tensor.shape[0];
  Converted result;
  result.rows.resize(rows * weight.k * size_bytes(weight.dtype));
  result.scale.resize(weight.dtype == DType::f8 ? rows : 0);
  encode_rows(given.tensor,
              {.data = result.rows.data(),
               .dtype = weight.dtype,
               .rows = rows,
               .cols = weight.k,
               .scale = result.scale.data()},
              conversions_.threads());
  return result;
}

// The scales [n] of a product that is stored in fp8.
void Loader::read_scale(const std::string& name, float* scale) const {
  const std::string key = name + ".weight_scale";
  const std::vector<int64_t> shape = {weight_of(name).shape[0]};
  const auto found = tensors_.find(key);
  LIVEACT_CHECK(
      found != tensors_.end() && found->second.dtype == DType::f32 && found->second.shape == shape,
      "checkpoint: expected tensor ", key, " ", shape_text(shape), " in fp32 beside ", name,
      ".weight in fp8");
  const Readable given = readable(key);
  std::copy_n(static_cast<const float*>(given.tensor.data), shape[0], scale);
}

Epilogue Loader::gated(const LoadedLinear& loaded, const std::vector<float>& gate) {
  std::vector<float> scale = gate;
  std::vector<float> bias = gate;
  for (size_t i = 0; i < gate.size(); ++i) {
    if (!loaded.scale.empty()) scale[i] *= loaded.scale[i];
    bias[i] *= loaded.bias[i];
  }
  // fp8 takes the bias in the product's epilogue, other formats in the pass that applies the gate.
  return {upload(scale), loaded.scale.empty() ? upload(bias) : upload_bias(bias, loaded.out), true};
}

const void* Loader::upload_bias(const std::vector<float>& bias, DType out) {
  if (formats_.bias(out) == DType::f32) return upload(bias);
  std::vector<uint16_t> rounded(bias.size());
  encode_bf16(bias.data(), std::ssize(bias), rounded.data());
  return store(rounded.data(), static_cast<int64_t>(sizeof(uint16_t) * rounded.size()));
}

const void* Loader::store(const void* host, int64_t bytes) {
  buffers_.emplace_back(device_, bytes);
  void* target = buffers_.back().data();
  device_.upload(target, host, bytes);
  return target;
}

}  // namespace liveact
