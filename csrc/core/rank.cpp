// A rank: its memory, where it meets the other one, and latents in and out. Its ops are in dit.cpp
// and conditioning.cpp.

#include "core/rank.h"

#include <algorithm>
#include <cmath>

#include "core/memory.h"

namespace liveact {

namespace {

StreamMemory allocate(const Model& model, const StreamOptions& options, const Place& place) {
  using Mode = StreamMemory::Mode;
  const StreamMemory counted(model.device(), model.config(), model.precision(), options, place,
                             Mode::count);
  const int64_t known = counted.context_bytes + counted.conditioning_bytes;
  require_memory(model.device(), "a session",
                 {{"context", counted.context_bytes},
                  {"text, image and audio", counted.conditioning_bytes},
                  {"scratch", counted.total_bytes - known}});
  return {model.device(), model.config(), model.precision(), options, place, Mode::allocate};
}

std::vector<float> rotations(int64_t positions, int64_t pairs) {  // [positions, pairs, 2]
  std::vector<float> values(2 * positions * pairs);
  for (int64_t position = 0; position < positions; ++position) {
    for (int64_t j = 0; j < pairs; ++j) {
      const double angle = static_cast<double>(position) *
                           std::pow(10000.0, -static_cast<double>(j) / static_cast<double>(pairs));
      values[2 * (position * pairs + j)] = static_cast<float>(std::cos(angle));
      values[2 * (position * pairs + j) + 1] = static_cast<float>(std::sin(angle));
    }
  }
  return values;
}

}  // namespace

Rank::Rank(std::shared_ptr<const Model> model, const StreamOptions& options, const Place& place)
    : model_(std::move(model)),
      weights_(model_->weights()),
      config_(model_->config()),
      precision_(model_->precision()),
      options_(options),
      place_(place),
      heads_(place.share(config_.num_heads)),
      first_update_(update_table(options.slots, options.memory.memory, 0)),
      update_(update_table(options.slots, options.memory.memory, 1)),
      memory_(allocate(*model_, options, place)),
      ops_(model_->device().open_ops(memory_.limits)),
      barrier_(memory_.barrier) {
  upload_rope();
  for (Pass* pass : {&memory_.main, &memory_.null}) {
    for (size_t i = 0; i < pass->contexts.size(); ++i) {
      pass->contexts[i].k_scale = key_scale(static_cast<int64_t>(i) % config_.num_layers);
    }
  }
  if (place_.count > 1) host_frames_.resize(2 * memory_.latent_elements);
}

void Rank::upload_rope() {
  const auto fill = [&](const float* target, int64_t positions, int64_t pairs) {
    const std::vector<float> values = rotations(positions, pairs);
    ops_->upload(const_cast<float*>(target), values.data(), 4 * std::ssize(values));
  };
  fill(rope_.frame, options_.slots.total(), rope_.pairs_frame);
  fill(rope_.row, rope_.grid_rows, rope_.pairs_row);
  fill(rope_.col, rope_.grid_cols, rope_.pairs_col);
}

void Rank::connect(Rank& other) {
  model_->device().connect(other.model_->device());
  other_ = &other;
  barrier_.peer_arrived = other.barrier_.arrived;
}

void Rank::open_barrier() noexcept {
  try {
    model_->device().upload(barrier_.arrived, &kBarrierOpen, sizeof(kBarrierOpen));
  } catch (const Error&) {  // a device that failed waits for nothing either
  }
}

void Rank::forget() noexcept {
  try {
    ops_->forget();
  } catch (const Error&) {  // of a device that failed
  }
}

void Rank::begin_block(int64_t block) {
  first_ = block == 0;
  block_frames_ = options_.slots.frames_of_block(block);
  frames_ = place_.share(block_frames_);
  const int64_t silent = first_ ? 1 : 0;
  audio_frames_ = frames_.end - std::max(frames_.begin, silent);
  heard_ = memory_.audio_place.share(block_frames_);
  heard_.begin = std::max(heard_.begin, silent);
}

int64_t Rank::latent_size() const {
  return config_.out_dim * (frames_.end - frames_.begin) * options_.latent_height *
         options_.latent_width;
}

void Rank::upload_noise(const float* noise, const float* renoise) {
  upload_frames(scratch_.z, noise, config_.out_dim);
  if (options_.sampler == Sampler::renoise) {
    upload_frames(scratch_.noise, renoise, (kSteps - 1) * config_.out_dim);
  }
}

// host [channels, n, h, w] -> the frames of this rank. While a stream plans, host is null.
void Rank::upload_frames(float* target, const float* host, int64_t channels) {
  const int64_t plane = options_.latent_height * options_.latent_width;
  const int64_t size = (frames_.end - frames_.begin) * plane;
  const float* source = host;
  if (place_.count > 1 && host != nullptr) {
    for (int64_t channel = 0; channel < channels; ++channel) {
      std::copy_n(host + (channel * block_frames_ + frames_.begin) * plane, size,
                  host_frames_.data() + channel * size);
    }
    source = host_frames_.data();
  }
  ops_->upload(target, source, 4 * channels * size);
}

// The frames of this rank -> host [leading, out_dim, n, h, w], at index `leading` of it.
void Rank::download_frames(float* host, const float* source, int64_t leading) {
  const int64_t plane = options_.latent_height * options_.latent_width;
  const int64_t size = (frames_.end - frames_.begin) * plane;
  const int64_t first = leading * config_.out_dim;
  if (place_.count == 1 || host == nullptr) {
    float* target = host == nullptr ? nullptr : host + first * size;
    ops_->download(target, source, 4 * latent_size());
    return;
  }
  ops_->download(host_frames_.data(), source, 4 * latent_size());
  for (int64_t channel = 0; channel < config_.out_dim; ++channel) {
    std::copy_n(host_frames_.data() + channel * size, size,
                host + ((first + channel) * block_frames_ + frames_.begin) * plane);
  }
}

void Rank::guide() {
  ops_->guide(scratch_.v, scratch_.v_null, options_.audio_guidance, latent_size());
}

void Rank::sampler_step(int step) {
  const float sigma = kTimesteps[step] / 1000.0f;
  const float next = kTimesteps[step + 1] / 1000.0f;
  const int64_t size = latent_size();
  if (options_.sampler == Sampler::renoise && step + 1 < kSteps) {
    ops_->sampler_step(scratch_.z, scratch_.v, scratch_.noise + step * size, sigma, next, size);
  } else {  // z - (sigma - next) * v
    ops_->sampler_step(scratch_.z, scratch_.v, nullptr, sigma - next, 0.0f, size);
  }
}

void Rank::export_context(int step, int64_t layer, float* k, float* v) {
  const KvSegment& context = memory_.main.contexts[step * config_.num_layers + layer];
  if (place_.count == 1) return ops_->export_kv(context, rope_, 0, k, v);
  const int64_t hd = config_.head_dim();
  const int64_t own = (heads_.end - heads_.begin) * hd;
  std::vector<float> keys(context.tokens * own);
  std::vector<float> values(context.tokens * own);
  ops_->export_kv(context, rope_, 0, keys.data(), values.data());
  for (int64_t token = 0; token < context.tokens; ++token) {
    const int64_t at = token * config_.dim + heads_.begin * hd;
    std::copy_n(keys.data() + token * own, own, k + at);
    std::copy_n(values.data() + token * own, own, v + at);
  }
}

}  // namespace liveact
