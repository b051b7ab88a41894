#include "liveact/precision.h"

#include "core/check.h"

namespace liveact {

Precision Precision::uniform(DType dtype, int64_t num_layers) {
  return {dtype == DType::f32 ? DType::f32 : DType::bf16,
          std::vector<LayerPrecision>(num_layers, LayerPrecision::uniform(dtype))};
}

void Precision::check(int64_t num_layers) const {
  LIVEACT_CHECK(std::ssize(layers) == num_layers, "precision policy: expected ", num_layers,
                " layers, found ", layers.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    for (const Product& product : kProducts) {
      const DType dtype = layers[i].*product.format;
      LIVEACT_CHECK(size_bytes(dtype) <= size_bytes(activations),
                    "precision policy: expected no format in layer ", i, " wider than ",
                    name(activations), ", found ", name(dtype));
    }
  }
}

}  // namespace liveact
