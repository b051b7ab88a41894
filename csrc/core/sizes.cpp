// Bytes of a model on a device, from its sizes and the formats of its products alone.

#include "core/weights.h"

namespace liveact {

int64_t weight_bytes(const ModelConfig& c, const Precision& precision, DType stored) {
  // As in Loader::weight_format: fp8 and bf16 are what the policy says, fp32 keeps the stored
  // format.
  const auto bytes = [&](DType dtype, int64_t n, int64_t k) {
    const int64_t element = size_bytes(dtype == DType::f32 ? stored : dtype);
    return n * k * element + (dtype == DType::f8 ? 4 * n : 0);
  };
  const DType activations = precision.activations;
  const int64_t d = c.dim;
  int64_t total = bytes(activations, d, 4 * c.in_dim) + bytes(activations, d, c.text_dim) +
                  bytes(activations, d, d) + bytes(activations, c.image_dim, c.image_dim) +
                  bytes(activations, d, c.image_dim) +
                  bytes(activations, c.intermediate_dim, kAudioWindow * c.audio_dim) +
                  bytes(activations, c.intermediate_dim, c.intermediate_dim) +
                  bytes(activations, c.context_tokens * c.output_dim, c.intermediate_dim) +
                  bytes(activations, 4 * c.out_dim, d);
  for (const LayerPrecision& p : precision.layers) {
    total += bytes(p.self_qkv, 3 * d, d) + bytes(p.self_o, d, d) + bytes(p.cross_q, d, d) +
             bytes(p.cross_o, d, d) + 4 * bytes(p.cross_kv, d, d) + bytes(p.audio_q, d, d) +
             bytes(activations, 2 * d, c.output_dim) + bytes(p.audio_o, d, d) +
             bytes(p.ffn_up, c.ffn_dim, d) + bytes(p.ffn_down, d, c.ffn_dim);
  }
  return total;
}

int64_t constant_bytes(const Device& device, const ModelConfig& c, const Precision& precision) {
  const DType activations = precision.activations;
  const int64_t f32 = size_bytes(DType::f32);
  const int64_t bias = size_bytes(device.formats().bias(activations));
  const int64_t d = c.dim;
  int64_t total =
      bias * (4 * d + c.image_dim + 2 * c.intermediate_dim + c.context_tokens * c.output_dim) +
      size_bytes(device.formats().bias(DType::f32)) * 4 * c.out_dim +
      f32 * 2 * (c.image_dim + d + c.output_dim + kSteps * d);  // norms
  for (const LayerPrecision& p : precision.layers) {
    // A projection with a gate has its scale and bias at every step.
    const auto gated = [&](DType dtype) { return (f32 + (dtype == DType::f8 ? bias : f32)) * d; };
    total +=
        bias * (15 * d + c.ffn_dim) +  // qkv 3, k and v of text and image 4, audio_kv 2, 6 of 1
        kSteps * (gated(p.self_o) + gated(p.ffn_down) + f32 * 4 * d) +  // and two norms
        f32 * d * (2 + 2 * kCompressTaps + 2 + 3 + 2) +                 // gains, taps, norms
        f32 * c.num_heads;                                              // scales of keys
  }
  return total;
}

}  // namespace liveact
