// The weights of a DiT on one device: immutable, shared by all its streams.
//
// Tensors come in as named host memory in the released layout (checkpoint names, bf16 or fp32), or
// as `liveact convert` writes them: products in fp8, X.weight with the scales X.weight_scale [n].
// Where the device can use them in place they are not copied, so the host memory must outlive the
// model. They may also lie on the device itself (benchmarks make them there), written by work that
// is done: then the products whose format they have never pass through the host.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "liveact/api.h"
#include "liveact/device.h"
#include "liveact/dtype.h"
#include "liveact/precision.h"

namespace liveact {

constexpr int kSteps = 3;  // of diffusion, per block

// Sizes of a DiT, named as in config.json. image_dim and audio_dim are not in the released file;
// they follow from the shapes of img_emb.proj.1 and audio_proj.proj1_vf.
struct LIVEACT_API ModelConfig {
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

  bool operator==(const ModelConfig&) const = default;
};

struct TensorSpec {
  std::string name;
  std::vector<int64_t> shape;
};

// Every tensor a checkpoint of this size has, in the order of docs/model.md,
// "Tensors of the DiT".
LIVEACT_API std::vector<TensorSpec> expected_tensors(const ModelConfig& config);

struct HostTensor {
  const void* data = nullptr;
  DType dtype = DType::bf16;  // fp8 only where a weight_scale belongs to it
  std::vector<int64_t> shape;
};
using HostTensors = std::map<std::string, HostTensor>;

// The rows of a bf16 or fp32 weight [n, k] in fp8: codes [n, k], scale [n]. What a model does when
// it loads such a weight for a product in fp8.
LIVEACT_API void quantize_weight(const HostTensor& weight, uint8_t* codes, float* scale);

// Bytes that the weights of all layers take on a device, from shapes alone (fp8 scales included).
LIVEACT_API int64_t weight_bytes(const ModelConfig& config, const Precision& precision,
                                 DType stored);
// Bytes of everything else that a model keeps there: biases, norms, taps, what the steps fix.
LIVEACT_API int64_t constant_bytes(const Device& device, const ModelConfig& config,
                                   const Precision& precision);

struct Weights;     // csrc/core/weights.h, private
class Conversions;  // csrc/core/conversions.h, private

class LIVEACT_API Model {
 public:
  // Throws Error naming the tensor that is missing or of another shape, and DeviceError where the
  // device has too little memory; both before anything is allocated.
  Model(std::shared_ptr<Device> device, const ModelConfig& config, const HostTensors& tensors,
        const Precision& precision);
  ~Model();
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  Device& device() const { return *device_; }
  const ModelConfig& config() const { return config_; }
  const Precision& precision() const { return precision_; }
  const Weights& weights() const { return *weights_; }

  friend LIVEACT_API std::vector<std::shared_ptr<const Model>> load_models(
      const std::vector<std::shared_ptr<Device>>& devices, const ModelConfig& config,
      const HostTensors& tensors, const Precision& precision);

 private:
  LIVEACT_LOCAL Model(std::shared_ptr<Device> device, const ModelConfig& config,
                      const HostTensors& tensors, const Precision& precision,
                      const std::shared_ptr<Conversions>& conversions, int index);

  std::shared_ptr<Device> device_;
  ModelConfig config_;
  Precision precision_;
  std::unique_ptr<const Weights> weights_;
};

// The weights on each of several devices alike, at once, by a thread for each: they are read and
// converted once. Throws what the first device that fails would throw; the others end then.
LIVEACT_API std::vector<std::shared_ptr<const Model>> load_models(
    const std::vector<std::shared_ptr<Device>>& devices, const ModelConfig& config,
    const HostTensors& tensors, const Precision& precision);

}  // namespace liveact
