// What a model holds on its device: the weights of every linear and norm as the ops take them, and
// what follows from the three fixed timesteps, computed once.
#pragma once

#include <vector>

#include "core/buffer.h"
#include "core/nvtx.h"
#include "core/ops.h"
#include "liveact/model.h"

namespace liveact {

// sigma of each diffusion step and of the end; timestep t = 1000 * sigma, both in fp32.
constexpr float kTimesteps[kSteps + 1] = {1000.0f, 937.5f, 833.33333333f, 0.0f};
constexpr int kAudioWindow = 8;  // features per latent frame after the first

// A linear layer: `scale` and `bias` are what its epilogue takes ([n] or null).
struct Linear {
  Weight weight;
  const float* scale = nullptr;
  const void* bias = nullptr;

  Epilogue epilogue(bool accumulate = false) const { return {scale, bias, accumulate}; }
};

struct Norm {
  const float* gain = nullptr;  // [dim]
  const float* bias = nullptr;  // [dim] or null
};

// What the fixed timestep makes constant: LayerNorm gain and bias (1 + scale, shift), and the
// projection whose gate is folded in scale and bias.
struct StepConstants {
  Norm self_norm;     // of LN before self-attention
  Epilogue self_o;    // gate0 folded in
  Norm ffn_norm;      // of LN before the FFN
  Epilogue ffn_down;  // gate1 folded in
};

struct Layer {
  Linear self_qkv, self_o;
  Norm self_q_norm, self_k_norm;
  const float* key_scale = nullptr;  // [heads], of the keys of self-attention in fp8 (core/ops.h)
  CompressFilter token_filter;       // key and value taps; the axis is the stream's choice
  Norm cross_norm;
  Linear cross_q, cross_o, text_k, text_v, image_k, image_v;
  Norm cross_q_norm, text_k_norm, image_k_norm;
  Norm audio_norm;
  Linear audio_q, audio_kv, audio_o;
  Linear ffn_up, ffn_down;
  StepConstants steps[kSteps];
  RangeName range;  // "layer 12"
};

struct Weights {
  Linear patch_embedding, text_in, text_out, image_in, image_out, head;
  Linear audio_window, audio_hidden, audio_out;  // proj1_vf, proj2, proj3
  Norm image_in_norm, image_out_norm, audio_norm;
  Norm head_norm[kSteps];  // 1 + scale, shift of each step
  std::vector<Layer> layers;

  std::vector<Buffer> buffers;  // the memory of all of it, but for what is used where it lies
};

}  // namespace liveact
