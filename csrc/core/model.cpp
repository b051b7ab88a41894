#include "liveact/model.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>

#include "core/memory.h"
#include "cpu/rows.h"
#include "liveact/error.h"

namespace liveact {

namespace {

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

int64_t element_count(const HostTensor& tensor) {
  int64_t count = 1;
  for (int64_t extent : tensor.shape) count *= extent;
  return count;
}

std::vector<float> to_f32(const HostTensor& tensor) {
  const int64_t n = element_count(tensor);
  std::vector<float> values(n);
  const float* source = cpu::read_f32(tensor.data, tensor.dtype, 0, n, 1.0f, values.data());
  if (source != values.data()) std::copy_n(source, n, values.data());
  return values;
}

// The rows of a bf16 or fp32 tensor in the format of `out`, which is host memory.
void encode_rows(const HostTensor& tensor, const Rows& out) {
#pragma omp parallel
  {
    std::vector<float> scratch(out.cols);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < out.rows; ++row) {
      cpu::write_row(
          out, row,
          cpu::read_f32(tensor.data, tensor.dtype, row * out.cols, out.cols, 1.0f, scratch.data()));
    }
  }
}

// out [rows, n] = x [rows, k] · weight [n, k]^T + bias on the host; rows is 1 here.
std::vector<float> host_linear(const std::vector<float>& x, const HostTensor& weight,
                               const HostTensor& bias) {
  const int64_t n = weight.shape[0];
  const int64_t k = weight.shape[1];
  std::vector<float> out = to_f32(bias);
#pragma omp parallel
  {
    std::vector<float> scratch(k);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
      const float* row = cpu::read_f32(weight.data, weight.dtype, i * k, k, 1.0f, scratch.data());
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < k; ++j) sum += row[j] * x[j];
      out[i] += sum;
    }
  }
  return out;
}

void silu(std::vector<float>& x) {
  for (float& value : x) value = value / (1.0f + std::exp(-value));
}

// [cos(t·10000^(−j/half)), sin(...)] in float64, rounded to fp32.
std::vector<float> timestep_embedding(float timestep, int64_t dim) {
  const int64_t half = dim / 2;
  std::vector<float> embedding(dim);
  for (int64_t j = 0; j < half; ++j) {
    const double angle =
        static_cast<double>(timestep) * std::pow(10000.0, -static_cast<double>(j) / half);
    embedding[j] = static_cast<float>(std::cos(angle));
    embedding[half + j] = static_cast<float>(std::sin(angle));
  }
  return embedding;
}

}  // namespace

void quantize_weight(const HostTensor& weight, uint8_t* codes, float* scale) {
  LIVEACT_CHECK(weight.dtype != DType::f8 && !weight.shape.empty() && weight.shape[0] > 0,
                "quantize_weight: expected rows in bf16 or fp32, got ", name(weight.dtype), " ",
                shape_text(weight.shape));
  const int64_t n = weight.shape[0];
  encode_rows(weight, {.data = codes,
                       .dtype = DType::f8,
                       .rows = n,
                       .cols = element_count(weight) / n,
                       .scale = scale});
}

class Model::Loader {
 public:
  Loader(Model& model, const HostTensors& tensors) : model_(model), tensors_(tensors) {
    for (const TensorSpec& spec : expected_tensors(model.config_)) {
      const auto found = tensors.find(spec.name);
      LIVEACT_CHECK(found != tensors.end(), "checkpoint: expected tensor ", spec.name, " ",
                    shape_text(spec.shape), ", found none");
      LIVEACT_CHECK(found->second.shape == spec.shape, "checkpoint: expected tensor ", spec.name,
                    " to be ", shape_text(spec.shape), ", found ", shape_text(found->second.shape));
    }
  }

  // A tensor that the host can read, with a copy where it lies on the device.
  struct Readable {
    HostTensor tensor;
    std::vector<uint8_t> copy;

    operator const HostTensor&() const { return tensor; }  // NOLINT(google-explicit-constructor)
  };

  Readable readable(const std::string& name) const {
    Readable result{tensors_.at(name), {}};
    if (model_.device_->is_device_memory(result.tensor.data)) {
      result.copy.resize(element_count(result.tensor) * size_bytes(result.tensor.dtype));
      model_.device_->download(result.copy.data(), result.tensor.data, std::ssize(result.copy));
      result.tensor.data = result.copy.data();
    }
    return result;
  }

  // The same for one whose values are wanted.
  Readable host(const std::string& name) const {
    LIVEACT_CHECK(tensors_.at(name).dtype != DType::f8, "checkpoint: expected ", name,
                  " in bf16 or fp32, found fp8");
    return readable(name);
  }

  const float* vector(const std::string& name) { return upload(to_f32(host(name))); }

  const float* upload(const std::vector<float>& values) {
    return static_cast<const float*>(
        store(values.data(), static_cast<int64_t>(sizeof(float) * values.size())));
  }

  // The filter [D, 1, 5] in the order the device wants.
  const float* taps(const std::string& name) {
    const std::vector<float> given = to_f32(host(name));
    if (!model_.device_->tap_major()) return upload(given);
    const size_t width = given.size() / kCompressTaps;
    std::vector<float> transposed(given.size());
    for (size_t i = 0; i < given.size(); ++i) {
      transposed[i % kCompressTaps * width + i / kCompressTaps] = given[i];
    }
    return upload(transposed);
  }

  Norm norm(const std::string& name) { return {vector(name + ".weight"), vector(name + ".bias")}; }
  Norm gain(const std::string& name) { return {vector(name + ".weight"), nullptr}; }

  // One linear, or several with the same input fused along the output channels. `out` is the format
  // that it writes.
  Linear linear(const std::vector<std::string>& names, DType precision, DType out) {
    Linear result;
    Weight& weight = result.weight;
    const DType stored = tensors_.at(names[0] + ".weight").dtype;
    bool alike = true;
    std::vector<float> bias;
    for (const std::string& name : names) {
      const HostTensor& tensor = tensors_.at(name + ".weight");
      LIVEACT_CHECK(tensor.dtype != DType::f8 || precision == DType::f8, "checkpoint: expected ",
                    name, ".weight in bf16 or fp32 for a product in ", liveact::name(precision),
                    ", found fp8: it was converted");
      alike = alike && tensor.dtype == stored;
      weight.k = element_count(tensor) / tensor.shape[0];
      weight.n += tensor.shape[0];
      const std::vector<float> part = to_f32(host(name + ".bias"));
      bias.insert(bias.end(), part.begin(), part.end());
    }
    weight.dtype = precision != DType::f32 ? precision : alike ? stored : DType::f32;
    host_scale_.assign(weight.dtype == DType::f8 ? weight.n : 0, 0.0f);
    if (!model_.device_->uses_host_weights(weight.dtype)) {
      weight.parts[0] = {convert(names, weight), weight.n};
    } else {
      // The same parts whether mapped or converted: how a device splits a product by them decides
      // the last bits, and a converted checkpoint must give those of its original.
      const bool mapped = alike && stored == weight.dtype;
      const char* converted = mapped ? nullptr : static_cast<const char*>(convert(names, weight));
      int64_t first_row = 0;
      for (size_t i = 0; i < names.size(); ++i) {
        const HostTensor& tensor = tensors_.at(names[i] + ".weight");
        const int64_t n = tensor.shape[0];
        weight.parts[i] = {
            mapped ? tensor.data : converted + first_row * weight.k * size_bytes(weight.dtype), n};
        if (mapped && stored == DType::f8) read_scale(names[i], host_scale_.data() + first_row);
        first_row += n;
      }
    }
    if (weight.dtype == DType::f8) weight.scale = upload(host_scale_);
    result.scale = weight.scale;
    out_ = out;
    result.bias = upload_bias(bias);
    host_bias_ = bias;
    return result;
  }

  // The epilogue of the linear loaded last with a gate [n] folded in.
  Epilogue gated(const std::vector<float>& gate) {
    std::vector<float> scale = gate;
    std::vector<float> bias = gate;
    for (size_t i = 0; i < gate.size(); ++i) {
      if (!host_scale_.empty()) scale[i] *= host_scale_[i];
      bias[i] *= host_bias_[i];
    }
    // fp8 takes the bias in the product's epilogue, other formats in the pass that applies the
    // gate.
    return {upload(scale), host_scale_.empty() ? upload(bias) : upload_bias(bias), true};
  }

 private:
  // The scales [n] of a product that is stored in fp8.
  void read_scale(const std::string& name, float* scale) const {
    const std::string key = name + ".weight_scale";
    const std::vector<int64_t> shape = {tensors_.at(name + ".weight").shape[0]};
    const auto found = tensors_.find(key);
    LIVEACT_CHECK(found != tensors_.end() && found->second.dtype == DType::f32 &&
                      found->second.shape == shape,
                  "checkpoint: expected tensor ", key, " ", shape_text(shape), " in fp32 beside ",
                  name, ".weight in fp8");
    const Readable given = readable(key);
    std::copy_n(static_cast<const float*>(given.tensor.data), shape[0], scale);
  }

  // The parts of a weight one after another in its format; what has that format already goes as it
  // lies. fp8 fills host_scale_ with one scale per row.
  //
  // NOTE: host memory. Tensors are converted one by one, so the runtime holds one of them at a time
  // (the largest of the released model has 142 MB in bf16). The checkpoint is mapped and read in
  // the order of the layers: its pages are clean copies of the file, which the system drops when it
  // needs room, whatever the size of a shard. Nothing is written to them.
  const void* convert(const std::vector<std::string>& names, const Weight& weight) {
    const int64_t row_bytes = weight.k * size_bytes(weight.dtype);
    model_.buffers_.emplace_back(*model_.device_, weight.n * row_bytes);
    char* target = static_cast<char*>(model_.buffers_.back().data());
    int64_t first_row = 0;
    for (const std::string& name : names) {
      const HostTensor& tensor = tensors_.at(name + ".weight");
      const int64_t n = tensor.shape[0];
      float* scale = weight.dtype == DType::f8 ? host_scale_.data() + first_row : nullptr;
      const void* source = tensor.data;
      std::vector<uint8_t> converted;
      if (tensor.dtype != weight.dtype) {
        converted.resize(n * row_bytes);
        source = converted.data();
        encode_rows(readable(name + ".weight"), {.data = converted.data(),
                                                 .dtype = weight.dtype,
                                                 .rows = n,
                                                 .cols = weight.k,
                                                 .scale = scale});
      } else if (scale != nullptr) {
        read_scale(name, scale);
      }
      model_.device_->upload(target + first_row * row_bytes, source, n * row_bytes);
      first_row += n;
    }
    return target;
  }

  const void* upload_bias(const std::vector<float>& bias) {
    if (model_.device_->bias_dtype(out_) == DType::f32) return upload(bias);
    std::vector<uint16_t> rounded(bias.size());
    cpu::encode_bf16(bias.data(), std::ssize(bias), rounded.data());
    return store(rounded.data(), static_cast<int64_t>(sizeof(uint16_t) * rounded.size()));
  }

  const void* store(const void* host, int64_t bytes) {
    model_.buffers_.emplace_back(*model_.device_, bytes);
    void* target = model_.buffers_.back().data();
    model_.device_->upload(target, host, bytes);
    return target;
  }

  Model& model_;
  const HostTensors& tensors_;
  std::vector<float> host_scale_;  // of the linear loaded last, as is what follows
  std::vector<float> host_bias_;
  DType out_ = DType::f32;
};

Model::Model(std::shared_ptr<Device> device, const ModelConfig& config, const HostTensors& tensors,
             const Precision& precision)
    : device_(std::move(device)), config_(config), precision_(precision) {
  config.check();
  precision.check(config.num_layers);
  Loader load(*this, tensors);
  const DType plain = precision.activations;
  const DType stored = tensors.at("head.head.weight").dtype;
  require_memory(*device_, "the weights",
                 {{"products", weight_bytes(config, precision, stored)},
                  {"constants", constant_bytes(*device_, config, precision)}});
  const int64_t d = config.dim;

  patch_embedding = load.linear({"patch_embedding"}, plain, plain);
  text_in = load.linear({"text_embedding.0"}, plain, plain);
  text_out = load.linear({"text_embedding.2"}, plain, plain);
  image_in_norm = load.norm("img_emb.proj.0");
  image_in = load.linear({"img_emb.proj.1"}, plain, plain);
  image_out = load.linear({"img_emb.proj.3"}, plain, plain);
  image_out_norm = load.norm("img_emb.proj.4");
  // audio_proj.proj1 serves the first latent frame only, whose audio contribution is zero.
  audio_window = load.linear({"audio_proj.proj1_vf"}, plain, plain);
  audio_hidden = load.linear({"audio_proj.proj2"}, plain, plain);
  audio_out = load.linear({"audio_proj.proj3"}, plain, plain);
  audio_norm = load.norm("audio_proj.norm");
  head = load.linear({"head.head"}, plain, DType::f32);

  std::vector<float> e[kSteps];
  std::vector<float> e0[kSteps];
  const auto through = [&](const std::string& name, std::vector<float>* rows, bool silu_before) {
    const Loader::Readable weight = load.host(name + ".weight");
    const Loader::Readable bias = load.host(name + ".bias");
    for (int step = 0; step < kSteps; ++step) {
      if (silu_before) silu(rows[step]);
      rows[step] = host_linear(rows[step], weight, bias);
    }
  };
  for (int step = 0; step < kSteps; ++step) {
    e[step] = timestep_embedding(kTimesteps[step], config.freq_dim);
  }
  through("time_embedding.0", e, false);
  through("time_embedding.2", e, true);
  std::copy(std::begin(e), std::end(e), std::begin(e0));
  through("time_projection.1", e0, true);
  // Row `index` of modulation + e, plus `offset`.
  const auto modulation = [&](const std::vector<float>& table, const std::vector<float>& time,
                              bool per_row, int index, float offset) {
    std::vector<float> out(d);
    for (int64_t i = 0; i < d; ++i) {
      out[i] = table[index * d + i] + time[(per_row ? index * d : 0) + i] + offset;
    }
    return out;
  };
  const std::vector<float> head_table = to_f32(load.host("head.modulation"));
  for (int step = 0; step < kSteps; ++step) {
    head_norm[step] = {load.upload(modulation(head_table, e[step], false, 1, 1.0f)),
                       load.upload(modulation(head_table, e[step], false, 0, 0.0f))};
  }

  layers.resize(config.num_layers);
  for (int64_t i = 0; i < config.num_layers; ++i) {
    Layer& layer = layers[i];
    const LayerPrecision& p = precision.layers[i];
    layer.range = RangeName("layer " + std::to_string(i));
    const std::string b = "blocks." + std::to_string(i) + ".";
    const std::vector<float> table = to_f32(load.host(b + "modulation"));
    const auto constant = [&](int step, int index, float offset) {
      return modulation(table, e0[step], true, index, offset);
    };
    layer.self_qkv =
        load.linear({b + "self_attn.q", b + "self_attn.k", b + "self_attn.v"}, p.self_qkv, plain);
    layer.self_o = load.linear({b + "self_attn.o"}, p.self_o, plain);
    for (int step = 0; step < kSteps; ++step) {
      layer.steps[step].self_norm = {load.upload(constant(step, 1, 1.0f)),
                                     load.upload(constant(step, 0, 0.0f))};
      layer.steps[step].self_o = load.gated(constant(step, 2, 0.0f));
    }
    layer.self_q_norm = load.gain(b + "self_attn.norm_q");
    layer.self_k_norm = load.gain(b + "self_attn.norm_k");
    layer.token_filter.key_taps = load.taps(b + "self_attn.memory_proj_k.weight");
    layer.token_filter.value_taps = load.taps(b + "self_attn.memory_proj_v.weight");
    layer.cross_norm = load.norm(b + "norm3");
    layer.cross_q = load.linear({b + "cross_attn.q"}, p.cross_q, plain);
    layer.cross_o = load.linear({b + "cross_attn.o"}, p.cross_o, plain);
    layer.text_k = load.linear({b + "cross_attn.k"}, p.cross_kv, plain);
    layer.text_v = load.linear({b + "cross_attn.v"}, p.cross_kv, plain);
    layer.image_k = load.linear({b + "cross_attn.k_img"}, p.cross_kv, plain);
    layer.image_v = load.linear({b + "cross_attn.v_img"}, p.cross_kv, plain);
    layer.cross_q_norm = load.gain(b + "cross_attn.norm_q");
    layer.text_k_norm = load.gain(b + "cross_attn.norm_k");
    layer.image_k_norm = load.gain(b + "cross_attn.norm_k_img");
    layer.audio_norm = load.norm(b + "norm_x");
    layer.audio_q = load.linear({b + "audio_cross_attn.q_linear"}, p.audio_q, plain);
    layer.audio_kv = load.linear({b + "audio_cross_attn.kv_linear"}, plain, plain);
    layer.audio_o = load.linear({b + "audio_cross_attn.proj"}, p.audio_o, plain);
    layer.ffn_up = load.linear({b + "ffn.0"}, p.ffn_up, plain);
    layer.ffn_down = load.linear({b + "ffn.2"}, p.ffn_down, plain);
    for (int step = 0; step < kSteps; ++step) {
      layer.steps[step].ffn_norm = {load.upload(constant(step, 4, 1.0f)),
                                    load.upload(constant(step, 3, 0.0f))};
      layer.steps[step].ffn_down = load.gated(constant(step, 5, 0.0f));
    }
  }
}

}  // namespace liveact
