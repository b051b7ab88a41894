// One session's state on one model: conditioning, the step-aligned contexts, scratch.
//
// Opening a stream fixes every buffer; `denoise` allocates nothing and costs the same for block 3
// and block 3000. One thread at a time may use a stream (except `cancel`); any number of streams
// may run on one model at once.
#pragma once

#include <atomic>
#include <span>
#include <vector>

#include "liveact/error.h"
#include "liveact/model.h"

namespace liveact {

class CancelledError : public Error {
 public:
  using Error::Error;
};

struct StreamOptions {
  int64_t latent_height = 64;  // h = picture height / 8, even
  int64_t latent_width = 64;   // w = picture width / 8, even
  SlotCounts slots;
  MemoryPolicy memory;
  // Above 1: at steps 1 and 2 also evaluate without audio, v = v_null + g * (v - v_null).
  float audio_guidance = 1.0f;
  int64_t max_image_tokens = 257;
};

// As the device takes them (events on a GPU, which its host runs ahead of).
struct BlockTimings {
  double conditioning_ms = 0;  // audio projection and its keys and values
  double step_ms[kSteps] = {};
};

class Stream {
 public:
  // Throws Error for sizes that cannot be, and DeviceError where the device has too little room;
  // both before anything is allocated.
  Stream(std::shared_ptr<const Model> model, const StreamOptions& options);

  // Bytes of device memory that a stream with these options allocates in all.
  static int64_t required_bytes(Device& device, const ModelConfig& config,
                                const Precision& precision, const StreamOptions& options);

  // text [tokens, text_dim], 1 <= tokens <= text_len: replaces the prompt from the next block on.
  void set_prompt(const float* text, int64_t tokens);

  // Once, before the first block: features [tokens, image_dim] of the image encoder and the
  // conditioning y [in_dim - out_dim, frames, h, w], frames >= first block + one block.
  void set_image(const float* features, int64_t tokens, const float* y, int64_t frames);

  // Latent frames of the next block: 6, then 8 (with the released slot counts).
  int64_t next_block() const { return block_; }
  int64_t frames_of_next_block() const { return options_.slots.frames_of_block(block_); }
  // Features the next block needs: 4 * frames + 1 for block 0 (video frame -2 to its last + 2),
  // 4 * frames + 4 later (36 for 8 latent frames).
  int64_t audio_rows_of_next_block() const;

  // noise [out_dim, n, h, w]; renoise [2, out_dim, n, h, w] is the fresh noise after steps 0 and 1;
  // audio [rows, audio_dim]; latent [out_dim, n, h, w] receives the result. velocities, where not
  // null, receives [3, out_dim, n, h, w]. All fp32 on the host. Throws NonFiniteError when the
  // result has a NaN or infinity and CancelledError after cancel(); the stream is unusable then.
  // NOTE: the latent of a 512x512 block is 16·8·64·64 fp32, 2.1 MB. Through the host to a decoder
  // on any device it is two copies of 0.2 ms each at 10 GB/s (unpinned PCIe), under 0.05 % of a
  // block of 0.9 s, so there is no handover from device to device.
  void denoise(const float* noise, const float* renoise, const float* audio, float* latent,
               float* velocities);

  // From any thread: a running denoise throws CancelledError at its next layer.
  void cancel() { cancelled_ = true; }

  // The context of (step, layer) as fp32 [context tokens, H, hd], keys un-rotated; to inspect.
  void export_context(int step, int64_t layer, float* k, float* v);

  const BlockTimings& timings() const { return timings_; }
  const StreamOptions& options() const { return options_; }
  const Model& model() const { return *model_; }
  int64_t device_bytes() const { return device_bytes_; }
  int64_t tokens_per_frame() const { return rope_.tokens_per_frame(); }

 private:
  // With guidance a second pass runs without audio, on contexts of its own.
  struct Pass {
    std::vector<KvSegment> contexts;  // [kSteps * layers]; step 0 unused in the pass without audio
    std::vector<Rows> audio_kv;       // [layers]: [frames * tokens, 2D]
    int64_t audio_frames = 0;         // latent frames in audio_kv; 1 = the same for all
  };

  // Without a model nothing is allocated, only counted.
  Stream(Device& device, const ModelConfig& config, const Precision& precision,
         std::shared_ptr<const Model> model, const StreamOptions& options);

  bool guided() const { return options_.audio_guidance != 1.0f; }
  void* allocate(int64_t bytes);
  Rows make_rows(int64_t rows, int64_t cols, DType dtype);
  KvSegment kv_segment(int64_t tokens, DType dtype, float* v_scale);
  void make_pass(Pass& pass, int first_step, int64_t audio_frames);
  void make_rope();
  void upload_rope();
  void project_kv(const Rows& context, const Linear& key, const Norm& key_norm, const Linear& value,
                  const KvSegment& segment);
  void project_context(const Rows& context, const Rows& spare, bool image);
  void project_audio(const float* features, int64_t feature_rows, int64_t first_row, int64_t frames,
                     Pass& pass);

  void plan();
  void run_block(const float* noise, const float* renoise, const float* audio, float* latent,
                 float* velocities);
  void evaluate(Pass& pass, int step, int key, bool with_audio);
  void velocity(Pass& pass, int step, bool with_audio);
  void self_attention_layer(const Layer& layer, const LayerPrecision& p, Pass& pass, int step,
                            int64_t index);
  void cross_attention_layer(const Layer& layer, const LayerPrecision& p, int64_t index);
  void audio_layer(const Layer& layer, const LayerPrecision& p, const Pass& pass, int64_t index);
  void ffn_layer(const Layer& layer, const LayerPrecision& p, int step);

  Device& device_;
  const ModelConfig config_;
  const Precision precision_;
  std::shared_ptr<const Model> model_;
  StreamOptions options_;
  std::unique_ptr<Ops> ops_;
  std::vector<Buffer> buffers_;
  int64_t device_bytes_ = 0;  // of which
  int64_t context_bytes_ = 0, conditioning_bytes_ = 0;

  Rope rope_;
  Pass main_, null_;
  std::vector<KvSegment> text_kv_, image_kv_;  // [layers]
  int64_t pad_count_ = 0;
  int64_t text_capacity_ = 0;
  float* y_ = nullptr;  // [in_dim - out_dim, y_frames, h, w]
  int64_t y_frames_ = 0;

  // Scratch of one evaluation. M = tokens of the block.
  Rows x_;        // [M, D]: the residual stream
  Rows normed_;   // [M, max(D, ffn)]: operand of the next product, in its format
  Rows wide_;     // [M, max(3D, ffn)]: what the wide products write
  Rows mixed_;    // [M, D]: what attention writes
  Rows patches_;  // [M, 4 in_dim]
  Heads q_;       // [H, M, hd]
  KvSegment current_, staging_;
  std::vector<SlotUpdate> first_update_, update_;  // after block 0, after every later block
  float* z_ = nullptr;                             // [out_dim, n, h, w]
  float* noise_ = nullptr;
  float* v_ = nullptr;
  float* v_null_ = nullptr;
  Rows cond_in_, cond_a_, cond_b_;  // projections of text, image and audio

  int64_t block_ = 0;
  bool has_prompt_ = false;
  bool has_image_ = false;
  bool failed_ = false;
  std::atomic<bool> cancelled_{false};
  BlockTimings timings_;
};

}  // namespace liveact
