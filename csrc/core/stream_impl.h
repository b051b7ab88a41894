// What a Stream is inside: its model, its memory, its op queue and where it stands. The methods are
// in stream.cpp (blocks), conditioning.cpp (prompt, image, audio) and dit.cpp (one evaluation).
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "core/stream_memory.h"
#include "core/weights.h"

namespace liveact {

class Stream::Impl {
 public:
  Impl(std::shared_ptr<const Model> model, const StreamOptions& options);

  void set_prompt(const float* text, int64_t tokens);
  void set_image(const float* features, int64_t tokens, const float* y, int64_t frames);
  void denoise(const float* noise, const float* renoise, const float* audio, float* latent,
               float* velocities);
  void cancel() { cancelled_ = true; }
  void export_context(int step, int64_t layer, float* k, float* v);

  int64_t next_block() const { return block_; }
  int64_t frames_of_next_block() const { return options_.slots.frames_of_block(block_); }
  int64_t audio_rows_of_next_block() const;
  const BlockTimings& timings() const { return timings_; }
  const StreamOptions& options() const { return options_; }
  const Model& model() const { return *model_; }
  int64_t device_bytes() const { return memory_.total_bytes; }
  int64_t tokens_per_frame() const { return rope_.tokens_per_frame(); }

 private:
  bool guided() const { return options_.audio_guidance != 1.0f; }
  void upload_rope();
  void plan();

  // Of a session and of a block, conditioning.cpp.
  Rows operand_of(const Rows& given, const Rows& converted);
  void project_kv(const Rows& context, const Linear& key, const Norm& key_norm, const Linear& value,
                  const KvSegment& segment);
  void project_context(const Rows& context, const Rows& spare, bool image);
  void project_audio(const float* features, int64_t feature_rows, int64_t first_row, int64_t frames,
                     Pass& pass);

  void run_block(const float* noise, const float* renoise, const float* audio, float* latent,
                 float* velocities);
  void run_step(int step, bool with_audio, int64_t size);
  void evaluate(Pass& pass, int step, int key, bool with_audio);

  // One velocity evaluation, dit.cpp.
  void velocity(Pass& pass, int step, bool with_audio);
  void self_attention_layer(const Layer& layer, const LayerPrecision& p, Pass& pass, int step,
                            int64_t index);
  void update_context(const Layer& layer, const KvSegment& current, const KvSegment& context);
  void cross_attention_layer(const Layer& layer, const LayerPrecision& p, int64_t index);
  void audio_layer(const Layer& layer, const LayerPrecision& p, const Pass& pass, int64_t index);
  void ffn_layer(const Layer& layer, const LayerPrecision& p, int step);
  Rows mixed_rows(int64_t rows, DType dtype);
  void project_out(const Rows& mixed, const Linear& linear, const Epilogue& epilogue,
                   DType precision, const Rows& x);

  const std::shared_ptr<const Model> model_;
  const Weights& weights_;
  const ModelConfig& config_;
  const Precision& precision_;
  const StreamOptions options_;
  const std::vector<SlotUpdate> first_update_, update_;  // after block 0, after every later block

  StreamMemory memory_;  // and its parts by shorter names
  Rope& rope_ = memory_.rope;
  Pass& main_ = memory_.main;
  Pass& null_ = memory_.null;
  Conditioning& conditioning_ = memory_.conditioning;
  Scratch& scratch_ = memory_.scratch;
  std::unique_ptr<Ops> ops_;

  int64_t block_ = 0;
  int64_t pad_count_ = 0;
  bool has_prompt_ = false;
  bool has_image_ = false;
  bool failed_ = false;
  std::atomic<bool> cancelled_{false};
  BlockTimings timings_;
};

}  // namespace liveact
