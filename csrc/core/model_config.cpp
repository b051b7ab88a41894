// The sizes of a model: which are refused, and the tensors that follow from them.

#include "core/check.h"
#include "core/weights.h"

namespace liveact {

void ModelConfig::check() const {
  LIVEACT_CHECK(num_heads > 0 && dim > 0 && dim % num_heads == 0,
                "config: expected dim to be a multiple of num_heads, found ", dim, " and ",
                num_heads);
  LIVEACT_CHECK(head_dim() % 2 == 0 && head_dim() >= 8,
                "config: expected an even head dim of at least 8, found ", head_dim());
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

}  // namespace liveact
