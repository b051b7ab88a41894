// The weights of a DiT on one device: immutable, shared by all its streams.
//
// Tensors come in as named host memory in the released layout (checkpoint names, bf16 or fp32), or
// as `liveact convert` writes them: products in fp8, X.weight with the scales X.weight_scale [n].
// Where the device can use them in place they are not copied, so the host memory must outlive the
// model. They may also lie on the device itself (benchmarks make them there), written by work that
// is done: then the products whose format they have never pass through the host. Everything that
// derives from the three fixed timesteps is computed here once.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/nvtx.h"
#include "core/ops.h"

namespace liveact {

constexpr int kSteps = 3;
// sigma of each diffusion step and of the end; timestep t = 1000 * sigma, both in fp32.
constexpr float kTimesteps[kSteps + 1] = {1000.0f, 937.5f, 833.33333333f, 0.0f};
constexpr int kAudioWindow = 8;  // features per latent frame after the first

// Sizes of a DiT, named as in config.json. image_dim and audio_dim are not in the released file;
// they follow from the shapes of img_emb.proj.1 and audio_proj.proj1_vf.
struct ModelConfig {
  int64_t dim = 5120;
  int64_t ffn_dim = 13824;
  int64_t num_heads = 40;
  int64_t num_layers = 40;
  int64_t in_dim = 36;
  int64_t out_dim = 16;
  int64_t text_dim = 4096;
  int64_t text_len = 512;
  int64_t freq_dim = 256;
  int64_t intermediate_dim = 512;
  int64_t output_dim = 768;     // width of an audio token
  int64_t context_tokens = 32;  // audio tokens per latent frame
  int64_t image_dim = 1280;     // width of an image feature
  int64_t audio_dim = 9216;     // width of an audio feature: encoder layers * hidden size
  float eps = 1e-6f;

  int64_t head_dim() const { return dim / num_heads; }
  void check() const;  // throws Error
};

struct TensorSpec {
  std::string name;
  std::vector<int64_t> shape;
};

// Every tensor a checkpoint of this size has, in the order of the file format's documentation.
std::vector<TensorSpec> expected_tensors(const ModelConfig& config);

struct HostTensor {
  const void* data = nullptr;
  DType dtype = DType::bf16;  // fp8 only where a weight_scale belongs to it
  std::vector<int64_t> shape;
};
using HostTensors = std::map<std::string, HostTensor>;

// The rows of a bf16 or fp32 weight [n, k] in fp8: codes [n, k], scale [n]. What a model does when
// it loads such a weight for a product in fp8.
void quantize_weight(const HostTensor& weight, uint8_t* codes, float* scale);

// The operand format of each product in a layer. `attention` is that of q, k, v and P in
// self-attention and of the context between blocks.
struct LayerPrecision {
  DType self_qkv, self_o, cross_q, cross_kv, cross_o, audio_q, audio_o, ffn_up, ffn_down, attention;

  static LayerPrecision uniform(DType d) { return {d, d, d, d, d, d, d, d, d, d}; }
};

// `activations` is the format of x between sub-layers and of everything that is not an operand
// named above: fp32, or bf16 as in the released code.
struct Precision {
  DType activations = DType::f32;
  std::vector<LayerPrecision> layers;

  // fp32: all fp32. bf16: all bf16. fp8: bf16 between sub-layers, fp8 operands in the layers.
  static Precision uniform(DType dtype, int64_t num_layers);

  // Throws Error for another number of layers, or a layer format wider than `activations`, which
  // fixes the room of every buffer.
  void check(int64_t num_layers) const;
};

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
  CompressFilter token_filter;  // key and value taps; the axis is the stream's choice
  Norm cross_norm;
  Linear cross_q, cross_o, text_k, text_v, image_k, image_v;
  Norm cross_q_norm, text_k_norm, image_k_norm;
  Norm audio_norm;
  Linear audio_q, audio_kv, audio_o;
  Linear ffn_up, ffn_down;
  StepConstants steps[kSteps];
  RangeName range;  // "layer 12"
};

// What a precision policy chooses a format for, with the linears that have it (attention has none).
// The names are those of policy files.
struct Product {
  const char* name;
  DType LayerPrecision::* format;
  std::array<Linear Layer::*, 4> linears;  // null after the last
};
inline constexpr std::array<Product, 10> kProducts = {{
    {"self_qkv", &LayerPrecision::self_qkv, {&Layer::self_qkv}},
    {"self_o", &LayerPrecision::self_o, {&Layer::self_o}},
    {"cross_q", &LayerPrecision::cross_q, {&Layer::cross_q}},
    {"cross_kv",
     &LayerPrecision::cross_kv,
     {&Layer::text_k, &Layer::text_v, &Layer::image_k, &Layer::image_v}},
    {"cross_o", &LayerPrecision::cross_o, {&Layer::cross_o}},
    {"audio_q", &LayerPrecision::audio_q, {&Layer::audio_q}},
    {"audio_o", &LayerPrecision::audio_o, {&Layer::audio_o}},
    {"ffn_up", &LayerPrecision::ffn_up, {&Layer::ffn_up}},
    {"ffn_down", &LayerPrecision::ffn_down, {&Layer::ffn_down}},
    {"attention", &LayerPrecision::attention, {}},
}};

// Bytes that the weights of all layers take on a device, from shapes alone (fp8 scales included).
int64_t weight_bytes(const ModelConfig& config, const Precision& precision, DType stored);
// Bytes of everything else that a model keeps there: biases, norms, taps, what the steps fix.
int64_t constant_bytes(const Device& device, const ModelConfig& config, const Precision& precision);

class Model {
 public:
  // Throws Error naming the tensor that is missing or of another shape, and DeviceError where the
  // device has too little room; both before anything is allocated.
  Model(std::shared_ptr<Device> device, const ModelConfig& config, const HostTensors& tensors,
        const Precision& precision);

  Device& device() const { return *device_; }
  const ModelConfig& config() const { return config_; }
  const Precision& precision() const { return precision_; }

  Linear patch_embedding, text_in, text_out, image_in, image_out, head;
  Linear audio_window, audio_hidden, audio_out;  // proj1_vf, proj2, proj3
  Norm image_in_norm, image_out_norm, audio_norm;
  Norm head_norm[kSteps];  // 1 + scale, shift of each step
  std::vector<Layer> layers;

 private:
  class Loader;

  std::shared_ptr<Device> device_;
  ModelConfig config_;
  Precision precision_;
  std::vector<Buffer> buffers_;
};

}  // namespace liveact
