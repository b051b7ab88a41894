// Loads a model: what goes where, and what the three fixed timesteps make constant.

#include "liveact/model.h"

#include <algorithm>
#include <cmath>
#include <system_error>
#include <thread>

#include "core/check.h"
#include "core/host_rows.h"
#include "core/loader.h"
#include "core/memory.h"

namespace liveact {

namespace {

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

void silu(std::vector<std::vector<float>>& rows) {
  for (std::vector<float>& row : rows) {
    for (float& value : row) value = value / (1.0f + std::exp(-value));
  }
}

// The three timesteps through the time MLP, and what they make of the modulation tables.
class Timesteps {
 public:
  Timesteps(const Loader& load, const ModelConfig& config) : dim_(config.dim) {
    for (int step = 0; step < kSteps; ++step) {
      embedded_.push_back(timestep_embedding(kTimesteps[step], config.freq_dim));
    }
    load.host_linear("time_embedding.0", embedded_);
    silu(embedded_);
    load.host_linear("time_embedding.2", embedded_);
    projected_ = embedded_;
    silu(projected_);
    load.host_linear("time_projection.1", projected_);
  }

  // Row `row` of a table [rows, D] plus the time of that step, plus `offset`. The head adds the
  // same time [D] to each of its rows, a layer has one of its own [6, D] for each.
  std::vector<float> head(const std::vector<float>& table, int step, int row, float offset) const {
    return sum(table, row, embedded_[step].data(), offset);
  }
  std::vector<float> layer(const std::vector<float>& table, int step, int row, float offset) const {
    return sum(table, row, projected_[step].data() + row * dim_, offset);
  }

 private:
  std::vector<float> sum(const std::vector<float>& table, int row, const float* time,
                         float offset) const {
    std::vector<float> out(dim_);
    for (int64_t i = 0; i < dim_; ++i) out[i] = table[row * dim_ + i] + time[i] + offset;
    return out;
  }

  int64_t dim_;
  std::vector<std::vector<float>> embedded_;   // [steps, D]
  std::vector<std::vector<float>> projected_;  // [steps, 6 D]
};

void load_conditioning(Loader& load, DType activations, Weights& w) {
  const auto linear = [&](const char* name) { return load.linear(name, activations, activations); };
  w.patch_embedding = linear("patch_embedding");
  w.text_in = linear("text_embedding.0");
  w.text_out = linear("text_embedding.2");
  w.image_in_norm = load.norm("img_emb.proj.0");
  w.image_in = linear("img_emb.proj.1");
  w.image_out = linear("img_emb.proj.3");
  w.image_out_norm = load.norm("img_emb.proj.4");
  // audio_proj.proj1 serves the first latent frame only, whose audio contribution is zero.
  w.audio_window = linear("audio_proj.proj1_vf");
  w.audio_hidden = linear("audio_proj.proj2");
  w.audio_out = linear("audio_proj.proj3");
  w.audio_norm = load.norm("audio_proj.norm");
}

void load_head(Loader& load, const Timesteps& times, DType activations, Weights& w) {
  w.head = load.linear("head.head", activations, DType::f32);
  const std::vector<float> table = load.host("head.modulation");
  for (int step = 0; step < kSteps; ++step) {
    w.head_norm[step] = {load.upload(times.head(table, step, 1, 1.0f)),
                         load.upload(times.head(table, step, 0, 0.0f))};
  }
}

// Shift, scale and gate of self-attention are rows 0 to 2 of the modulation, those of the FFN rows
// 3 to 5.
void load_steps(Loader& load, const Timesteps& times, const std::vector<float>& table,
                const LoadedLinear& self_o, const LoadedLinear& ffn_down, Layer& layer) {
  const auto norm = [&](int step, int shift, int scale) -> Norm {
    return {load.upload(times.layer(table, step, scale, 1.0f)),
            load.upload(times.layer(table, step, shift, 0.0f))};
  };
  for (int step = 0; step < kSteps; ++step) {
    StepConstants& constants = layer.steps[step];
    constants.self_norm = norm(step, 0, 1);
    constants.self_o = load.gated(self_o, times.layer(table, step, 2, 0.0f));
    constants.ffn_norm = norm(step, 3, 4);
    constants.ffn_down = load.gated(ffn_down, times.layer(table, step, 5, 0.0f));
  }
}

// KvSegment::k_scale [heads], from the gain [D] of the norm before it.
std::vector<float> key_scales(const std::vector<float>& gain, int64_t heads) {
  const auto width = static_cast<int64_t>(gain.size());
  const int64_t hd = width / heads;
  std::vector<float> scales(heads);
  for (int64_t head = 0; head < heads; ++head) {
    const float largest = std::max(amax(gain.data() + head * hd, hd), kF8AmaxFloor);
    scales[head] = std::sqrt(static_cast<float>(width)) * largest / kF8Max;
  }
  return scales;
}

Layer load_layer(Loader& load, const Timesteps& times, int64_t index, const LayerPrecision& p,
                 DType activations, int64_t heads) {
  Layer layer;
  layer.range = RangeName("layer " + std::to_string(index));
  const std::string b = "blocks." + std::to_string(index) + ".";
  const auto linear = [&](const char* name, DType format) {
    return load.linear(b + name, format, activations);
  };
  layer.self_qkv = load.loaded_linear({b + "self_attn.q", b + "self_attn.k", b + "self_attn.v"},
                                      p.self_qkv, activations)
                       .linear;
  const LoadedLinear self_o = load.loaded_linear({b + "self_attn.o"}, p.self_o, activations);
  layer.self_o = self_o.linear;
  layer.self_q_norm = load.gain(b + "self_attn.norm_q");
  layer.self_k_norm = load.gain(b + "self_attn.norm_k");
  layer.key_scale = load.upload(key_scales(load.host(b + "self_attn.norm_k.weight"), heads));
  layer.token_filter.key_taps = load.taps(b + "self_attn.memory_proj_k.weight");
  layer.token_filter.value_taps = load.taps(b + "self_attn.memory_proj_v.weight");
  layer.cross_norm = load.norm(b + "norm3");
  layer.cross_q = linear("cross_attn.q", p.cross_q);
  layer.cross_o = linear("cross_attn.o", p.cross_o);
  layer.text_k = linear("cross_attn.k", p.cross_kv);
  layer.text_v = linear("cross_attn.v", p.cross_kv);
  layer.image_k = linear("cross_attn.k_img", p.cross_kv);
  layer.image_v = linear("cross_attn.v_img", p.cross_kv);
  layer.cross_q_norm = load.gain(b + "cross_attn.norm_q");
  layer.text_k_norm = load.gain(b + "cross_attn.norm_k");
  layer.image_k_norm = load.gain(b + "cross_attn.norm_k_img");
  layer.audio_norm = load.norm(b + "norm_x");
  layer.audio_q = linear("audio_cross_attn.q_linear", p.audio_q);
  layer.audio_kv = linear("audio_cross_attn.kv_linear", activations);
  layer.audio_o = linear("audio_cross_attn.proj", p.audio_o);
  layer.ffn_up = linear("ffn.0", p.ffn_up);
  const LoadedLinear ffn_down = load.loaded_linear({b + "ffn.2"}, p.ffn_down, activations);
  layer.ffn_down = ffn_down.linear;
  load_steps(load, times, load.host(b + "modulation"), self_o, ffn_down, layer);
  return layer;
}

}  // namespace

Model::Model(std::shared_ptr<Device> device, const ModelConfig& config, const HostTensors& tensors,
             const Precision& precision)
    : Model(std::move(device), config, tensors, precision, std::make_shared<Conversions>(1), 0) {}

Model::Model(std::shared_ptr<Device> device, const ModelConfig& config, const HostTensors& tensors,
             const Precision& precision, const std::shared_ptr<Conversions>& conversions, int index)
    : device_(std::move(device)), config_(config), precision_(precision) {
  config.check();
  precision.check(config.num_layers);
  auto weights = std::make_unique<Weights>();
  Loader load(*device_, config, tensors, weights->buffers, *conversions, index);
  require_memory(*device_, "the weights",
                 {{"products", weight_bytes(config, precision, load.stored("head.head.weight"))},
                  {"constants", constant_bytes(*device_, config, precision)}});
  const DType activations = precision.activations;
  load_conditioning(load, activations, *weights);
  const Timesteps times(load, config);
  load_head(load, times, activations, *weights);
  for (int64_t i = 0; i < config.num_layers; ++i) {
    weights->layers.push_back(
        load_layer(load, times, i, precision.layers[i], activations, config.num_heads));
  }
  weights_ = std::move(weights);
}

Model::~Model() = default;

std::vector<std::shared_ptr<const Model>> load_models(
    const std::vector<std::shared_ptr<Device>>& devices, const ModelConfig& config,
    const HostTensors& tensors, const Precision& precision) {
  const auto count = static_cast<int>(devices.size());
  LIVEACT_CHECK(count > 0, "load_models: expected a device, found none");
  const auto conversions = std::make_shared<Conversions>(count);
  std::vector<std::shared_ptr<const Model>> models(count);
  const auto load = [&](int index) {
    try {
      models[index].reset(
          new Model(devices[index], config, tensors, precision, conversions, index));
    } catch (const Conversions::Ended&) {
    } catch (...) {
      conversions->fail(std::current_exception());
    }
  };
  std::vector<std::thread> threads;
  try {
    for (int index = 1; index < count; ++index) threads.emplace_back(load, index);
  } catch (const std::system_error& error) {
    conversions->fail(std::make_exception_ptr(
        DeviceError(std::string("load_models: expected a thread for each device, found none (") +
                    error.what() + ")")));
  }
  load(0);
  for (std::thread& thread : threads) thread.join();
  conversions->check();
  return models;
}

}  // namespace liveact
