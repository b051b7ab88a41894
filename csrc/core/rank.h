// One device's part of a stream: weights, memory and op queue, and the latent frames and heads that
// are its own.
//
// A stream has one rank, or two that share each evaluation. Whatever walks rows is done for the
// rank's own latent frames; self-attention and its context for its own heads, of all rows.
// split_qkv and self_attention write what is the other rank's straight into its memory, and the
// ranks meet after each of the two. stream.cpp drives the ranks, dit.cpp has their ops in order.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "core/stream_memory.h"
#include "core/weights.h"

namespace liveact {

class Rank {
 public:
  // `place`: which of how many. The ranks of a stream have models alike, each on its own device.
  Rank(std::shared_ptr<const Model> model, const StreamOptions& options, const Place& place);

  Ops& ops() { return *ops_; }
  const Model& model() const { return *model_; }
  int64_t device_bytes() const { return memory_.total_bytes; }
  int64_t tokens_per_frame() const { return rope_.tokens_per_frame(); }
  Pass& pass(bool null) { return null ? memory_.null : memory_.main; }

  // The two of a stream to one another: from now on each writes into the other's memory.
  void connect(Rank& other);
  // Every wait of this queue ends, now and from now on: the other rank has failed, or closes.
  void open_barrier() noexcept;
  // Nothing that was recorded is kept, and no recording is left open.
  void forget() noexcept;

  // Which latent frames are this rank's follows from the block.
  void begin_block(int64_t block);

  // Of a session and of a block, conditioning.cpp.
  void set_prompt(const float* text, int64_t tokens);
  void set_image(const float* features, int64_t tokens, const float* y, int64_t frames);
  void set_audio(const float* features, int64_t feature_rows);
  void set_silence();

  // Latents on the host have all frames of a block: z and the fresh noise (or null) in, the
  // velocity of `step` and the latent out.
  void upload_noise(const float* noise, const float* renoise);
  void download_velocity(float* velocities, int step) {
    download_frames(velocities, scratch_.v, step);
  }
  void download_latent(float* latent) { download_frames(latent, scratch_.z, 0); }
  bool latent_is_finite() { return ops_->all_finite(scratch_.z, latent_size()); }

  void swap_velocities() { std::swap(scratch_.v, scratch_.v_null); }
  void guide();
  void sampler_step(int step);

  // One velocity evaluation in parts, dit.cpp. Those of a layer in their order; where a part begins
  // with a wait, the other rank has done the one before.
  void embed();
  void project_qkv(int step, int64_t layer);
  void find_value_scale(const Pass& pass, int step, int64_t layer);
  void split_heads(const Pass& pass, int step, int64_t layer);
  void attend(const Pass& pass, int step, int64_t layer);
  void await_mixed();
  void find_mixed_scale(const Pass& pass, int step, int64_t layer);
  void project_mixed(int step, int64_t layer);
  void cross_attention_layer(int64_t layer);
  void audio_layer(const Pass& pass, int64_t layer);
  void ffn_layer(int step, int64_t layer);
  void head(int step);

  // The context of (step, layer) into k, v [context tokens, all heads, hd] on the host.
  void export_context(int step, int64_t layer, float* k, float* v);

 private:
  void upload_rope();
  void upload_frames(float* target, const float* host, int64_t channels);
  void download_frames(float* host, const float* source, int64_t leading);
  int64_t latent_size() const;  // elements, of this rank

  Rows operand_of(const Rows& given, const Rows& converted);
  void project_kv(const Rows& context, const Linear& key, const Norm& key_norm, const Linear& value,
                  const KvSegment& segment);
  void project_context(const Rows& context, const Rows& spare, bool image);
  void project_audio(const float* features, int64_t feature_rows, int64_t first_row, int64_t frames,
                     Pass& pass);

  Heads queries(DType dtype) const;
  KvSegment current(DType dtype, const float* k_scale, float* v_scale) const;
  // [H] of this rank's heads.
  const float* key_scale(int64_t layer) const {
    return weights_.layers[layer].key_scale + heads_.begin;
  }
  Rows mixed(int64_t layer);
  void update_context(const Layer& layer, const KvSegment& current, const KvSegment& context);
  Rows mixed_rows(int64_t rows, DType dtype);
  void project_out(const Rows& mixed, const Linear& linear, const Epilogue& epilogue,
                   DType precision, const Rows& x);

  const std::shared_ptr<const Model> model_;
  const Weights& weights_;
  const ModelConfig& config_;
  const Precision& precision_;
  const StreamOptions options_;
  const Place place_;
  const Share heads_;                                    // of all
  const std::vector<SlotUpdate> first_update_, update_;  // after block 0, after every later block

  StreamMemory memory_;  // and its parts by shorter names
  Rope& rope_ = memory_.rope;
  Conditioning& conditioning_ = memory_.conditioning;
  Scratch& scratch_ = memory_.scratch;
  std::unique_ptr<Ops> ops_;

  Rank* other_ = nullptr;
  Barrier barrier_;
  std::vector<float>
      host_frames_;  // [2, out_dim, frames, h, w]: latents on their way, of two ranks

  // Of the block.
  bool first_ = true;
  int64_t block_frames_ = 0;  // of all ranks
  Share frames_{0, 0, 1};     // of this one
  int64_t audio_frames_ = 0;  // the last of them: latent frame 0 of block 0 has no audio
  Share heard_{0, 0, 1};      // whose audio is projected here
  int64_t pad_count_ = 0;
};

}  // namespace liveact
