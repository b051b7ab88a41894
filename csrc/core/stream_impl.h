// What a Stream is inside: its ranks, one for each device, and where it stands. The methods are in
// stream.cpp (blocks) and dit.cpp (one evaluation).
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "core/rank.h"

namespace liveact {

class Stream::Impl {
 public:
  Impl(const std::vector<std::shared_ptr<const Model>>& models, const StreamOptions& options);
  ~Impl();

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
  const Model& model() const { return ranks_[0]->model(); }
  int64_t device_bytes() const;
  int64_t tokens_per_frame() const { return ranks_[0]->tokens_per_frame(); }

 private:
  // Every rank does its part, one after another: on a GPU that only puts it on the rank's queue.
  template <typename Part>
  void each(const Part& part) {
    std::unique_lock<std::recursive_mutex> turn;
    if (std::recursive_mutex* mutex = ranks_.size() > 1 ? ranks_[0]->ops().turn() : nullptr) {
      turn = std::unique_lock(*mutex);
    }
    for (const auto& rank : ranks_) part(*rank);
  }
  bool guided() const { return options_.audio_guidance != 1.0f; }
  void plan();
  void begin_block();
  void settle();
  void open_barriers() noexcept;

  void run_block(const float* noise, const float* renoise, const float* audio, float* latent,
                 float* velocities);
  void run_step(int step, bool with_audio);
  void evaluate(bool null, int step, int key, bool with_audio);

  // One velocity evaluation, dit.cpp.
  void velocity(bool null, int step, bool with_audio);
  void self_attention_layer(bool null, int step, int64_t layer);
  void agree(const std::vector<float*> Pass::* scales, bool null, int step, int64_t layer);

  const StreamOptions options_;
  std::vector<std::unique_ptr<Rank>> ranks_;

  int64_t block_ = 0;
  bool has_prompt_ = false;
  bool has_image_ = false;
  bool failed_ = false;
  std::atomic<bool> cancelled_{false};
  BlockTimings timings_;
};

}  // namespace liveact
