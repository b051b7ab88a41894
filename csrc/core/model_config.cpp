// What follows from the sizes of a model and the formats of its products alone: the tensors of a
// checkpoint, bytes on a device, what is refused.

#include "liveact/error.h"
#include "liveact/model.h"

namespace liveact {

void ModelConfig::check() const {
  LIVEACT_CHECK(num_heads > 0 && dim > 0 && dim % num_heads == 0,
                "config: expected dim to be a multiple of num_heads, got ", dim, " and ",
                num_heads);
  LIVEACT_CHECK(head_dim() % 2 == 0 && head_dim() >= 8,
                "config: expected an even head dim of at least 8, got ", head_dim());
  LIVEACT_CHECK(num_layers > 0 && ffn_dim > 0 && text_dim > 0 && text_len > 0 && in_dim > out_dim &&
                    out_dim > 0 && intermediate_dim > 0 && output_dim > 0 && context_tokens > 0 &&
                    image_dim > 0 && audio_dim > 0 && freq_dim > 0 && freq_dim % 2 == 0,
                "config: expected positive sizes with in_dim > out_dim");
}

std::vector<TensorSpec> expected_tensors(const ModelConfig& c) {
  const int64_t d = c.dim;
  std::vector<TensorSpec> specs;
  const auto linear = [&](const std::string& name, int64_t n, int64_t k) {
    specs.push_back({name + ".weight", {n, k}});
    specs.push_back({name + ".bias", {n}});
  };
  const auto norm = [&](const std::string& name, int64_t n) {
    specs.push_back({name + ".weight", {n}});
    specs.push_back({name + ".bias", {n}});
  };
  specs.push_back({"patch_embedding.weight", {d, c.in_dim, 1, 2, 2}});
  specs.push_back({"patch_embedding.bias", {d}});
  linear("text_embedding.0", d, c.text_dim);
  linear("text_embedding.2", d, d);
  linear("time_embedding.0", d, c.freq_dim);
  linear("time_embedding.2", d, d);
  linear("time_projection.1", 6 * d, d);
  norm("img_emb.proj.0", c.image_dim);
  linear("img_emb.proj.1", c.image_dim, c.image_dim);
  linear("img_emb.proj.3", d, c.image_dim);
  norm("img_emb.proj.4", d);
  linear("audio_proj.proj1", c.intermediate_dim, 5 * c.audio_dim);
  linear("audio_proj.proj1_vf", c.intermediate_dim, kAudioWindow * c.audio_dim);
  linear("audio_proj.proj2", c.intermediate_dim, c.intermediate_dim);
  linear("audio_proj.proj3", c.context_tokens * c.output_dim, c.intermediate_dim);
  norm("audio_proj.norm", c.output_dim);
  for (int64_t i = 0; i < c.num_layers; ++i) {
    const std::string b = "blocks." + std::to_string(i) + ".";
    specs.push_back({b + "modulation", {1, 6, d}});
    for (const char* part : {"q", "k", "v", "o"}) linear(b + "self_attn." + part, d, d);
    for (const char* part : {"norm_q", "norm_k"}) {
      specs.push_back({b + "self_attn." + part + ".weight", {d}});
    }
    for (const char* part : {"memory_proj_k", "memory_proj_v"}) {
      specs.push_back({b + "self_attn." + part + ".weight", {d, 1, kCompressTaps}});
    }
    norm(b + "norm3", d);
    for (const char* part : {"q", "k", "v", "o", "k_img", "v_img"}) {
      linear(b + "cross_attn." + part, d, d);
    }
    for (const char* part : {"norm_q", "norm_k", "norm_k_img"}) {
      specs.push_back({b + "cross_attn." + part + ".weight", {d}});
    }
    norm(b + "norm_x", d);
    linear(b + "audio_cross_attn.q_linear", d, d);
    linear(b + "audio_cross_attn.kv_linear", 2 * d, c.output_dim);
    linear(b + "audio_cross_attn.proj", d, d);
    linear(b + "ffn.0", c.ffn_dim, d);
    linear(b + "ffn.2", d, c.ffn_dim);
  }
  specs.push_back({"head.modulation", {1, 2, d}});
  linear("head.head", 4 * c.out_dim, d);
  return specs;
}

int64_t weight_bytes(const ModelConfig& c, const Precision& precision, DType stored) {
  // As in Loader::linear: fp8 and bf16 are what the policy says, fp32 keeps the stored format.
  const auto bytes = [&](DType dtype, int64_t n, int64_t k) {
    const int64_t element = size_bytes(dtype == DType::f32 ? stored : dtype);
    return n * k * element + (dtype == DType::f8 ? 4 * n : 0);
  };
  const DType plain = precision.activations;
  const int64_t d = c.dim;
  int64_t total = bytes(plain, d, 4 * c.in_dim) + bytes(plain, d, c.text_dim) + bytes(plain, d, d) +
                  bytes(plain, c.image_dim, c.image_dim) + bytes(plain, d, c.image_dim) +
                  bytes(plain, c.intermediate_dim, kAudioWindow * c.audio_dim) +
                  bytes(plain, c.intermediate_dim, c.intermediate_dim) +
                  bytes(plain, c.context_tokens * c.output_dim, c.intermediate_dim) +
                  bytes(plain, 4 * c.out_dim, d);
  for (const LayerPrecision& p : precision.layers) {
    total += bytes(p.self_qkv, 3 * d, d) + bytes(p.self_o, d, d) + bytes(p.cross_q, d, d) +
             bytes(p.cross_o, d, d) + 4 * bytes(p.cross_kv, d, d) + bytes(p.audio_q, d, d) +
             bytes(plain, 2 * d, c.output_dim) + bytes(p.audio_o, d, d) +
             bytes(p.ffn_up, c.ffn_dim, d) + bytes(p.ffn_down, d, c.ffn_dim);
  }
  return total;
}

int64_t constant_bytes(const Device& device, const ModelConfig& c, const Precision& precision) {
  const DType plain = precision.activations;
  const int64_t f32 = size_bytes(DType::f32);
  const int64_t bias = size_bytes(device.bias_dtype(plain));
  const int64_t d = c.dim;
  int64_t total =
      bias * (4 * d + c.image_dim + 2 * c.intermediate_dim + c.context_tokens * c.output_dim) +
      size_bytes(device.bias_dtype(DType::f32)) * 4 * c.out_dim +
      f32 * 2 * (c.image_dim + d + c.output_dim + kSteps * d);  // norms
  for (const LayerPrecision& p : precision.layers) {
    // A projection with a gate has its scale and bias at every step.
    const auto gated = [&](DType dtype) { return (f32 + (dtype == DType::f8 ? bias : f32)) * d; };
    total +=
        bias * (15 * d + c.ffn_dim) +  // qkv 3, k and v of text and image 4, audio_kv 2, 6 of 1
        kSteps * (gated(p.self_o) + gated(p.ffn_down) + f32 * 4 * d) +  // and two norms
        f32 * d * (2 + 2 * kCompressTaps + 2 + 3 + 2);                  // gains, taps, norms
  }
  return total;
}

Precision Precision::uniform(DType dtype, int64_t num_layers) {
  return {dtype == DType::f32 ? DType::f32 : DType::bf16,
          std::vector<LayerPrecision>(num_layers, LayerPrecision::uniform(dtype))};
}

void Precision::check(int64_t num_layers) const {
  LIVEACT_CHECK(std::ssize(layers) == num_layers, "precision policy: expected ", num_layers,
                " layers, got ", layers.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    for (const Product& product : kProducts) {
      const DType dtype = layers[i].*product.format;
      LIVEACT_CHECK(size_bytes(dtype) <= size_bytes(activations),
                    "precision policy: expected no format in layer ", i, " wider than ",
                    name(activations), ", got ", name(dtype));
    }
  }
}

}  // namespace liveact
