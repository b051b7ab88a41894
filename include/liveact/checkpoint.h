// The DiT of a checkpoint directory: as released, or as `liveact convert` writes it.
//
//   auto device = liveact::open_device("cuda:0");
//   auto model = liveact::load_model(device, "checkpoint/");
//   liveact::Stream stream(model, {.latent_height = 64, .latent_width = 64});
//
// A directory has config.json and diffusion_pytorch_model.safetensors, or shards with an index
// (docs/model.md, "Checkpoint directory"). Encoders and VAE are of the Python package.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <string>

#include "liveact/api.h"
#include "liveact/model.h"
#include "liveact/precision.h"
#include "liveact/tensor_files.h"

namespace liveact {

// An opened DiT: files mapped and compared with what config.json says, nothing read.
class LIVEACT_API Checkpoint {
 public:
  // Throws Error naming the file and the tensor, before anything large is allocated.
  explicit Checkpoint(const std::filesystem::path& directory);

  const std::filesystem::path& directory() const { return directory_; }
  const ModelConfig& config() const { return config_; }
  const TensorFiles& files() const { return files_; }
  // As a Model takes them; valid as long as this object or a copy of it.
  HostTensors tensors() const;

  // What the products of the DiT run in on `device`, by name:
  //   "fp32", "bf16", "fp8"   all of them (fp32 on a CPU only)
  //   "auto"                  fp8, but bf16 where that costs no time and its memory is free
  //   a file                  a policy of `liveact calibrate`
  //   ""                      what the checkpoint was converted to, else fp32 on a CPU, auto on a
  //   GPU
  // beside_bytes: memory of the device that somebody else will need, which "auto" leaves alone.
  // Throws Error for another name, a bad file, or what converted weights cannot give.
  Precision precision(const std::string& name, Device& device, int64_t beside_bytes = 0) const;

 private:
  std::filesystem::path directory_;
  TensorFiles files_;
  ModelConfig config_;
};

// The policy in a file of `liveact calibrate`. Throws Error naming the file, layer and product.
LIVEACT_API Precision read_policy(const std::filesystem::path& file);

// Opens a checkpoint and puts its DiT on a device; the model keeps what it maps. precision: as of
// Checkpoint::precision. Throws Error for files, DeviceError for too little memory.
LIVEACT_API std::shared_ptr<const Model> load_model(std::shared_ptr<Device> device,
                                                    const std::filesystem::path& directory,
                                                    const std::string& precision = "");

}  // namespace liveact
