// One session's state on one model: conditioning, the step-aligned contexts, scratch.
//
// Opening a stream fixes every buffer; `denoise` allocates nothing and costs the same for block 3
// and block 3000. One thread at a time may use a stream (except `cancel`); any number of streams
// may run on one model at once.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "liveact/api.h"
#include "liveact/error.h"
#include "liveact/kv_layout.h"
#include "liveact/model.h"

namespace liveact {

// From one step to the next, with x0 = z - sigma * v and the sigma' of the next step: the released
// generator draws fresh noise, z <- (1 - sigma') * x0 + sigma' * noise; the released demo does not,
// z <- z + (sigma' - sigma) * v.
enum class Sampler { renoise, euler };

LIVEACT_API Sampler sampler_from_name(std::string_view name);  // throws Error

struct StreamOptions {
  int64_t latent_height = 64;  // h = picture height / 8, even
  int64_t latent_width = 64;   // w = picture width / 8, even
  SlotCounts slots = {};
  MemoryPolicy memory = {};
  // Above 1: at steps 1 and 2 also evaluate without audio, v = v_null + g * (v - v_null).
  float audio_guidance = 1.0f;
  int64_t max_image_tokens = 257;
  Sampler sampler = Sampler::renoise;
};

// As the device takes them (events on a GPU, which its host runs ahead of).
struct BlockTimings {
  double conditioning_ms = 0;  // audio projection and its keys and values
  double step_ms[kSteps] = {};
};

class LIVEACT_API Stream {
 public:
  // Throws Error for sizes that cannot be, and DeviceError where the device has too little memory;
  // both before anything is allocated.
  Stream(std::shared_ptr<const Model> model, const StreamOptions& options);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  // The same model on each of two devices, which share every evaluation (docs/parallel.md). Throws
  // DeviceError also where one cannot write into the memory of the other.
  Stream(const std::vector<std::shared_ptr<const Model>>& models, const StreamOptions& options);

  // Bytes of memory that a stream with these options allocates on a device, of 1 or 2 that it has.
  static int64_t required_bytes(Device& device, const ModelConfig& config,
                                const Precision& precision, const StreamOptions& options,
                                int devices = 1);

  // text [tokens, text_dim], 1 <= tokens <= text_len: replaces the prompt from the next block on.
  void set_prompt(const float* text, int64_t tokens);

  // Once, before the first block: features [tokens, image_dim] of the image encoder and the
  // conditioning y [in_dim - out_dim, frames, h, w], frames >= first block + one block.
  void set_image(const float* features, int64_t tokens, const float* y, int64_t frames);

  // Latent frames of the next block: 6, then 8 (with the released slot counts).
  int64_t next_block() const;
  int64_t frames_of_next_block() const;
  // Features the next block needs: 4 * frames + 1 for block 0 (video frame -2 to its last + 2),
  // 4 * frames + 4 later (36 for 8 latent frames).
  int64_t audio_rows_of_next_block() const;

  // noise [out_dim, n, h, w]; renoise [2, out_dim, n, h, w] is the fresh noise after steps 0 and 1,
  // null with Sampler::euler; audio [rows, audio_dim]; latent [out_dim, n, h, w] receives the
  // result. velocities, where not null, receives [3, out_dim, n, h, w]. All fp32 on the host.
  // Throws NonFiniteError when the result has a NaN or infinity and CancelledError after cancel();
  // the stream is unusable then. NOTE: the latent of a 512x512 block is 16·8·64·64 fp32, 2.1 MB.
  // Through the host to a decoder on any device it is two copies of 0.2 ms each at 10 GB/s
  // (unpinned PCIe), under 0.05 % of a block of 0.9 s, so there is no handover from device to
  // device.
  void denoise(const float* noise, const float* renoise, const float* audio, float* latent,
               float* velocities);

  // From any thread: a running denoise throws CancelledError at its next layer.
  void cancel();

  // The context of (step, layer) as fp32 [context tokens, H, hd], keys un-rotated; to inspect.
  void export_context(int step, int64_t layer, float* k, float* v);

  const BlockTimings& timings() const;
  const StreamOptions& options() const;
  const Model& model() const;
  int64_t device_bytes() const;  // of all its devices
  int64_t tokens_per_frame() const;

 private:
  class LIVEACT_LOCAL Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace liveact
