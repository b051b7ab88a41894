#include "liveact/checkpoint.h"

#include <set>

#include "checkpoint/dit_config.h"
#include "checkpoint/identify.h"
#include "core/check.h"
#include "core/host_tensors.h"
#include "core/json.h"
#include "liveact/stream.h"

namespace liveact {

namespace fs = std::filesystem;

namespace {

constexpr auto kAuto = "auto";
// What `auto` has in bf16 where it fits: computed once per prompt and picture, and read by all
// tokens, so that its error does not average out (docs/precision.md).
constexpr auto kRoomyProduct = &LayerPrecision::cross_kv;
// The session that `auto` leaves memory for: 720x416.
const StreamOptions kAutoSession = {.latent_height = 416 / 8, .latent_width = 720 / 8};

struct StoredFormat {
  const char* stored;  // in the file
  const char* shown;   // in messages
  DType dtype;
};
constexpr StoredFormat kFormats[] = {{"BF16", "bfloat16", DType::bf16},
                                     {"F32", "float32", DType::f32},
                                     {"F8_E4M3", "float8_e4m3fn", DType::f8}};

// The weights of the products that a precision is about, in the order of layers and products.
struct ProductWeight {
  std::string name;
  int64_t layer;
  const Product* product;
};
std::vector<ProductWeight> product_weights(int64_t num_layers) {
  std::vector<ProductWeight> result;
  for (int64_t layer = 0; layer < num_layers; ++layer) {
    const std::string prefix = "blocks." + std::to_string(layer) + ".";
    for (size_t p = 0; p < kProducts.size(); ++p) {
      for (const char* linear : product_linears()[p].linears) {
        result.push_back({prefix + linear + ".weight", layer, &kProducts[p]});
      }
    }
  }
  return result;
}

const StoredFormat* format_of(const StoredTensor& tensor) {
  for (const StoredFormat& format : kFormats) {
    if (tensor.dtype == format.stored) return &format;
  }
  return nullptr;
}

std::string lower_dtype(const StoredTensor& tensor) {
  const StoredFormat* format = format_of(tensor);
  return format == nullptr ? tensor.dtype : format->shown;
}

// Compares one tensor with what it must be. formats: names as in messages, in alphabetical order.
void check_tensor(const TensorFiles& files, const TensorSpec& spec,
                  const std::vector<DType>& formats) {
  const auto found = files.tensors().find(spec.name);
  if (found == files.tensors().end()) {
    std::set<std::string> names;
    for (const auto& [name, _] : files.tensors()) names.insert(name);
    detail::fail(files.source().string(), ": DiT: expected tensor ", repr(spec.name), " of shape ",
                 shape_text(spec.shape), ", found ", other_names(names, spec.name));
  }
  const StoredTensor& tensor = found->second;
  const std::string where = tensor.file.string() + ": DiT: tensor " + repr(spec.name);
  LIVEACT_CHECK(tensor.shape == spec.shape, where, ": expected shape ", shape_text(spec.shape),
                ", found ", shape_text(tensor.shape));
  const StoredFormat* format = format_of(tensor);
  std::string expected;
  bool good = false;
  for (const StoredFormat& known : kFormats) {
    for (DType allowed : formats) {
      if (known.dtype != allowed) continue;
      expected += (expected.empty() ? "" : " or ") + std::string(known.shown);
      good = good || format == &known;
    }
  }
  LIVEACT_CHECK(good, where, ": expected dtype ", expected, ", found ", lower_dtype(tensor));
  const auto address = reinterpret_cast<uintptr_t>(tensor.data.get());
  LIVEACT_CHECK(address % size_bytes(format->dtype) == 0, where,
                ": expected bytes at a multiple of ", size_bytes(format->dtype),
                " in the file, found others: write it with safetensors.torch.save_file");
}

// Weights in fp8 are believed only where config.json says that they were converted: scales of other
// makers mean other things.
void check_tensors(const TensorFiles& files, const ModelConfig& config, bool converted) {
  const std::vector<TensorSpec> specs = expected_tensors(config);
  std::set<std::string> weights;
  for (const ProductWeight& weight : product_weights(config.num_layers)) {
    weights.insert(weight.name);
  }
  std::set<std::string> expected;
  for (const TensorSpec& spec : specs) {
    expected.insert(spec.name);
    const auto found = files.tensors().find(spec.name);
    const bool narrow = converted && weights.contains(spec.name) &&
                        found != files.tensors().end() && found->second.dtype == "F8_E4M3";
    if (!narrow) {
      check_tensor(files, spec, {DType::bf16, DType::f32});
      continue;
    }
    const TensorSpec scale{spec.name + "_scale", {spec.shape[0]}};
    check_tensor(files, scale, {DType::f32});
    check_tensor(files, spec, {DType::f8});
    expected.insert(scale.name);
  }
  for (const auto& [name, tensor] : files.tensors()) {
    LIVEACT_CHECK(!name.starts_with("blocks.") || expected.contains(name), tensor.file.string(),
                  ": DiT: expected no more than the ", expected.size(),
                  " tensors that the configuration gives, found tensor ", repr(name));
  }
}

Precision auto_precision(int64_t num_layers, DType roomy) {
  Precision result = Precision::uniform(DType::f8, num_layers);
  for (LayerPrecision& layer : result.layers) layer.*kRoomyProduct = roomy;
  return result;
}

// Whether weights and a session of 720x416 in the wider `auto` fit into what is free.
bool roomy_fits(Device& device, const ModelConfig& config, int64_t beside_bytes) {
  const std::optional<int64_t> free_bytes = device.free_bytes();
  if (!free_bytes.has_value()) return true;
  const Precision wide = auto_precision(config.num_layers, DType::bf16);
  const int64_t bytes = weight_bytes(config, wide, DType::bf16) +
                        constant_bytes(device, config, wide) +
                        Stream::required_bytes(device, config, wide, kAutoSession);
  return bytes + beside_bytes <= *free_bytes;
}

NamedPrecision named(const std::string& name, const Device& device, const fs::path& directory) {
  const bool is_cpu = std::string_view(device.name()) == "cpu";
  if (name.empty()) {
    if (std::optional<NamedPrecision> converted = converted_precision(directory)) {
      return *std::move(converted);
    }
    return {is_cpu ? "fp32" : kAuto, std::nullopt};
  }
  if (name == "fp32" || name == "bf16" || name == "fp8" || name == kAuto) {
    LIVEACT_CHECK(is_cpu || name != "fp32", "precision: expected auto, fp8 or bf16 on ",
                  device.name(), ", found fp32 (which is cpu only)");
    return {name, std::nullopt};
  }
  std::error_code error;
  LIVEACT_CHECK(name.find('\0') == std::string::npos && fs::is_regular_file(name, error),
                "precision: expected fp32, auto, fp8, bf16 or a policy file, found ",
                repr(name, 200));
  return {fs::path(name).filename().string(), read_policy(name)};
}

// Converted weights cannot give more than was left of them.
void check_precision(const TensorFiles& files, const Precision& precision,
                     const fs::path& directory) {
  for (const auto& [weight, layer, product] : product_weights(std::ssize(precision.layers))) {
    const DType wanted = precision.layers[layer].*product->format;
    LIVEACT_CHECK(files.tensors().at(weight).dtype != "F8_E4M3" || wanted == DType::f8,
                  directory.string(), ": expected a precision with fp8 for ", product->name,
                  " of layer ", layer, ", as its weights were converted, found ", name(wanted),
                  " (use the original checkpoint for that)");
  }
}

struct MappedModel {
  Checkpoint checkpoint;  // outlives the model, which reads from its mappings
  Model model;
};

}  // namespace

Checkpoint::Checkpoint(const fs::path& directory)
    : directory_(directory), files_(TensorFiles::open(directory, "diffusion_pytorch_model")) {
  config_ = read_config(directory / "config.json", files_);
  check_tensors(files_, config_, converted_precision(directory).has_value());
}

HostTensors Checkpoint::tensors() const {
  HostTensors result;
  for (const auto& [name, tensor] : files_.tensors()) {
    if (const StoredFormat* format = format_of(tensor)) {
      result[name] = {tensor.data.get(), format->dtype, tensor.shape};
    }
  }
  return result;
}

Precision Checkpoint::precision(const std::string& wanted, Device& device,
                                int64_t beside_bytes) const {
  const NamedPrecision found = named(wanted, device, directory_);
  const int64_t layers = config_.num_layers;
  const Precision nominal = found.policy.has_value() ? *found.policy
                            : found.name == kAuto    ? auto_precision(layers, DType::bf16)
                            : found.name == "fp8"    ? Precision::uniform(DType::f8, layers)
                            : found.name == "bf16"   ? Precision::uniform(DType::bf16, layers)
                                                     : Precision::uniform(DType::f32, layers);
  LIVEACT_CHECK(std::ssize(nominal.layers) == layers, found.name, ": expected ", layers,
                " layers as in the checkpoint, found ", nominal.layers.size());
  check_precision(files_, nominal, directory_);
  const bool saves = found.name == kAuto && !found.policy.has_value() &&
                     !roomy_fits(device, config_, beside_bytes);
  return saves ? auto_precision(layers, DType::f8) : nominal;
}

std::shared_ptr<const Model> load_model(std::shared_ptr<Device> device, const fs::path& directory,
                                        const std::string& precision) {
  Checkpoint checkpoint(directory);
  const Precision chosen = checkpoint.precision(precision, *device);
  const HostTensors tensors = checkpoint.tensors();
  const ModelConfig config = checkpoint.config();
  auto both = std::shared_ptr<MappedModel>(
      new MappedModel{std::move(checkpoint), {std::move(device), config, tensors, chosen}});
  return {both, &both->model};
}

}  // namespace liveact
