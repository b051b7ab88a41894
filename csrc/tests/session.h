// A tiny random model and sessions on it, for the tests of everything above the ops.
#pragma once

#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "liveact/stream.h"
#include "tests/operands.h"

namespace liveact::test {

inline const ModelConfig kConfig = {.dim = 64,
                                    .ffn_dim = 96,
                                    .num_heads = 2,
                                    .num_layers = 2,
                                    .in_dim = 7,
                                    .out_dim = 4,
                                    .text_dim = 24,
                                    .text_len = 16,
                                    .freq_dim = 32,
                                    .intermediate_dim = 16,
                                    .output_dim = 24,
                                    .context_tokens = 4,
                                    .image_dim = 20,
                                    .audio_dim = 12,
                                    .eps = 1e-6f};
constexpr int64_t kHeight = 4, kWidth = 6, kImageTokens = 9, kTextTokens = 5;

// Random weights in host memory, scaled so that activations keep their size.
struct Checkpoint {
  explicit Checkpoint(DType dtype, const ModelConfig& config = kConfig) {
    Random random(99);
    for (const TensorSpec& spec : expected_tensors(config)) {
      int64_t size = 1;
      for (const int64_t extent : spec.shape) size *= extent;
      const bool gain = spec.name.find("norm") != std::string::npos && spec.shape.size() == 1;
      const float fan_in = static_cast<float>(size / spec.shape[0]);
      std::vector<uint8_t>& bytes = memory.emplace_back(size * size_bytes(dtype));
      for (int64_t i = 0; i < size; ++i) {
        set_element(bytes.data(), dtype, i,
                    (gain ? 1.0f : 0.0f) + random.normal() / std::sqrt(fan_in + 3.0f));
      }
      tensors[spec.name] = {bytes.data(), dtype, spec.shape};
    }
  }
  std::vector<std::vector<uint8_t>> memory;
  HostTensors tensors;
};

struct Fixture {
  explicit Fixture(DType precision, DType stored = DType::bf16)
      : checkpoint(stored),
        device(std::make_shared<cpu::CpuDevice>()),
        model(std::make_shared<Model>(device, kConfig, checkpoint.tensors,
                                      Precision::uniform(precision, kConfig.num_layers))) {}
  Checkpoint checkpoint;
  std::shared_ptr<cpu::CpuDevice> device;
  std::shared_ptr<Model> model;
};

inline StreamOptions options_with(float audio_guidance = 1.0f) {
  return {.latent_height = kHeight,
          .latent_width = kWidth,
          .slots = {},
          .memory = {},
          .audio_guidance = audio_guidance,
          .max_image_tokens = kImageTokens};
}

// A stream with its conditioning and the inputs of its blocks, which depend on the seed.
class Session {
 public:
  Session(std::shared_ptr<const Model> model, const StreamOptions& options, uint64_t seed)
      : Session(std::vector{std::move(model)}, options, seed) {}
  Session(const std::vector<std::shared_ptr<const Model>>& models, const StreamOptions& options,
          uint64_t seed)
      : stream(models, options),
        plane_(options.latent_height * options.latent_width),
        random_(seed) {
    const SlotCounts& slots = options.slots;
    const int64_t frames = slots.total();
    set_prompt(kTextTokens);
    stream.set_image(random_.normals(kImageTokens * config().image_dim).data(), kImageTokens,
                     random_.normals((config().in_dim - config().out_dim) * frames * plane_).data(),
                     frames);
    const int64_t most = config().out_dim * std::max(slots.current, slots.first_block()) * plane_;
    noise = random_.normals(most);
    renoise_ = random_.normals(2 * most);
    audio_ = random_.normals((4 * std::max(slots.current, slots.first_block()) + 4) *
                             config().audio_dim);
    latent_.resize(most);
    velocities_.resize(3 * most);
  }
  void set_prompt(int64_t tokens) {
    stream.set_prompt(random_.normals(tokens * config().text_dim).data(), tokens);
  }
  // The same inputs at every block, so that this allocates nothing either.
  void denoise() {
    const bool fresh = stream.options().sampler == Sampler::renoise;
    stream.denoise(noise.data(), fresh ? renoise_.data() : nullptr, audio_.data(), latent_.data(),
                   velocities_.data());
  }
  // Latent and velocities of the next blocks, one after another.
  std::vector<float> run(int blocks) {
    std::vector<float> all;
    for (int i = 0; i < blocks; ++i) {
      const int64_t size = config().out_dim * stream.frames_of_next_block() * plane_;
      denoise();
      all.insert(all.end(), latent_.begin(), latent_.begin() + size);
      all.insert(all.end(), velocities_.begin(), velocities_.begin() + 3 * size);
    }
    return all;
  }

  const ModelConfig& config() const { return stream.model().config(); }

  Stream stream;
  std::vector<float> noise;

 private:
  const int64_t plane_;
  Random random_;
  std::vector<float> renoise_, audio_, latent_, velocities_;
};

// What another order of sums may change: fp32 over some 200 dependent operations of up to 96
// terms, sqrt(200 · 96) · u.
constexpr double kReordered = 140 * kUlp;

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), 4 * a.size()) == 0;
}

inline double relative_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0.0;
  double size = 0.0;
  for (size_t i = 0; i < a.size(); ++i) difference += std::pow(a[i] - b[i], 2);
  for (size_t i = 0; i < a.size(); ++i) size += std::pow(b[i], 2);
  return std::sqrt(difference / size);
}

}  // namespace liveact::test
