// Which product of which layer has operands in which format.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "liveact/api.h"
#include "liveact/dtype.h"

namespace liveact {

// The operand format of each product in a layer. `attention` is that of q, k, v and P in
// self-attention and of the context between blocks.
struct LayerPrecision {
  DType self_qkv, self_o, cross_q, cross_kv, cross_o, audio_q, audio_o, ffn_up, ffn_down, attention;

  static LayerPrecision uniform(DType d) { return {d, d, d, d, d, d, d, d, d, d}; }
  bool operator==(const LayerPrecision&) const = default;
};

// `activations` is the format of x between sub-layers and of everything that is not an operand
// named above: fp32, or bf16 as in the released code.
struct LIVEACT_API Precision {
  DType activations = DType::f32;
  std::vector<LayerPrecision> layers;
  // Sums of fp8 products leave the tensor core for fp32 every few terms; else they stay in its
  // shorter accumulator, which is faster. On a CPU sums are fp32 either way.
  bool full_sums = false;

  // fp32: all fp32. bf16: all bf16. fp8: bf16 between sub-layers, fp8 operands in the layers.
  static Precision uniform(DType dtype, int64_t num_layers);

  // Throws Error for another number of layers, or a layer format wider than `activations`, which
  // fixes the memory of every buffer.
  void check(int64_t num_layers) const;

  bool operator==(const Precision&) const = default;
};

// The products by the names that policy files have for them.
struct Product {
  const char* name;
  DType LayerPrecision::* format;
};
inline constexpr std::array<Product, 10> kProducts = {{
    {"self_qkv", &LayerPrecision::self_qkv},
    {"self_o", &LayerPrecision::self_o},
    {"cross_q", &LayerPrecision::cross_q},
    {"cross_kv", &LayerPrecision::cross_kv},
    {"cross_o", &LayerPrecision::cross_o},
    {"audio_q", &LayerPrecision::audio_q},
    {"audio_o", &LayerPrecision::audio_o},
    {"ffn_up", &LayerPrecision::ffn_up},
    {"ffn_down", &LayerPrecision::ffn_down},
    {"attention", &LayerPrecision::attention},
}};

}  // namespace liveact
