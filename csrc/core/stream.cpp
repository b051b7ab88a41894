// Opening a stream, and its blocks: three steps, each an evaluation that is recorded where it
// repeats. With two devices this thread drives both.

#include "liveact/stream.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <thread>

#include "core/check.h"
#include "core/stream_impl.h"

namespace liveact {

Sampler sampler_from_name(std::string_view name) {
  if (name == "renoise") return Sampler::renoise;
  if (name == "euler") return Sampler::euler;
  detail::fail("sampler: expected renoise or euler, found '", name, "'");
}

namespace {

// Marks of a block: when it starts, then when each of its parts is done.
constexpr int kBlockStart = 0, kConditioned = 1, kStepDone = 2;
static_assert(kStepDone + kSteps <= kTimeMarks);

constexpr std::chrono::microseconds kPollInterval(20);  // of two devices, at the end of a block

void check_options(const ModelConfig& config, const Precision& precision,
                   const StreamOptions& options) {
  const int64_t h = options.latent_height;
  const int64_t w = options.latent_width;
  LIVEACT_CHECK(h > 0 && w > 0 && h % 2 == 0 && w % 2 == 0 && h <= 1024 && w <= 1024,
                "stream: expected an even latent height and width of 2 to 1024, found ", h, "x", w);
  LIVEACT_CHECK(options.max_image_tokens > 0, "stream: expected at least 1 image token, found ",
                options.max_image_tokens);
  LIVEACT_CHECK(std::isfinite(options.audio_guidance) && options.audio_guidance >= 1.0f,
                "stream: expected a finite audio guidance >= 1, found ", options.audio_guidance);
  update_table(options.slots, options.memory.memory, 1);  // throws for impossible counts
  config.check();
  precision.check(config.num_layers);
}

void check_models(const std::vector<std::shared_ptr<const Model>>& models,
                  const StreamOptions& options) {
  LIVEACT_CHECK(models.size() == 1 || models.size() == 2,
                "stream: expected a model on each of 1 or 2 devices, found ", models.size());
  check_options(models[0]->config(), models[0]->precision(), options);
  if (models.size() == 1) return;
  const int64_t heads = models[0]->config().num_heads;
  LIVEACT_CHECK(heads % 2 == 0, "two devices: expected an even number of heads, found ", heads);
  const SlotCounts& slots = options.slots;
  LIVEACT_CHECK(std::min(slots.first_block(), slots.current) >= 2,
                "two devices: expected at least 2 latent frames in every block, found ",
                slots.first_block(), " in the first and ", slots.current, " in later ones");
  LIVEACT_CHECK(models[0]->config() == models[1]->config(),
                "two devices: expected the same model on both, found two sizes");
  LIVEACT_CHECK(models[0]->precision() == models[1]->precision(),
                "two devices: expected the same formats on both, found two precisions");
  LIVEACT_CHECK(&models[0]->device() != &models[1]->device(),
                "two devices: expected two of them, found ", models[0]->device().name(), " twice");
}

}  // namespace

Stream::Impl::Impl(const std::vector<std::shared_ptr<const Model>>& models,
                   const StreamOptions& options)
    : options_(options) {
  check_models(models, options);
  for (const auto& model : models) {
    const Place place{static_cast<int>(ranks_.size()), static_cast<int>(models.size())};
    ranks_.push_back(std::make_unique<Rank>(model, options, place));
  }
  if (ranks_.size() == 2) {
    ranks_[0]->connect(*ranks_[1]);
    ranks_[1]->connect(*ranks_[0]);
  }
  begin_block();
  plan();
  if (guided()) each([](Rank& rank) { rank.set_silence(); });
}

// No memory goes before both devices are done: each writes into that of the other.
Stream::Impl::~Impl() {
  if (ranks_.size() == 1) return;
  open_barriers();
  each([](Rank& rank) {
    try {
      while (!rank.ops().idle()) std::this_thread::sleep_for(kPollInterval);
    } catch (const Error&) {  // a device that failed does nothing any more
    }
  });
}

// The ops of the first block and of a later one: what they are on this device is decided here.
void Stream::Impl::plan() {
  static const RangeName name("plan");
  const Range range(name);
  bool planning = false;
  each([&](Rank& rank) { planning |= rank.ops().begin_plan(); });
  if (!planning) return;
  for (int block = 0; block < 2; ++block) run_block(nullptr, nullptr, nullptr, nullptr, nullptr);
  each([](Rank& rank) { rank.ops().end_plan(); });
  block_ = 0;
  begin_block();
}

void Stream::Impl::begin_block() {
  each([&](Rank& rank) { rank.begin_block(block_); });
}

int64_t Stream::Impl::device_bytes() const {
  int64_t total = 0;
  for (const auto& rank : ranks_) total += rank->device_bytes();
  return total;
}

void Stream::Impl::set_prompt(const float* text, int64_t tokens) {
  const int64_t most = model().config().text_len;
  LIVEACT_CHECK(tokens >= 1 && tokens <= most, "set_prompt: expected 1 to ", most,
                " tokens, found ", tokens);
  each([&](Rank& rank) { rank.set_prompt(text, tokens); });
  has_prompt_ = true;
}

void Stream::Impl::set_image(const float* features, int64_t tokens, const float* y,
                             int64_t frames) {
  LIVEACT_CHECK(block_ == 0, "set_image: expected before the first block, found block ", block_);
  LIVEACT_CHECK(tokens >= 1 && tokens <= options_.max_image_tokens, "set_image: expected 1 to ",
                options_.max_image_tokens, " image tokens, found ", tokens);
  LIVEACT_CHECK(frames >= options_.slots.total(), "set_image: expected at least ",
                options_.slots.total(), " latent frames of conditioning, found ", frames);
  each([&](Rank& rank) { rank.set_image(features, tokens, y, frames); });
  has_image_ = true;
}

int64_t Stream::Impl::audio_rows_of_next_block() const {
  return 4 * frames_of_next_block() + (block_ == 0 ? 1 : 4);
}

void Stream::Impl::denoise(const float* noise, const float* renoise, const float* audio,
                           float* latent, float* velocities) {
  LIVEACT_CHECK(has_prompt_ && has_image_,
                "denoise: expected set_prompt and set_image before the first block");
  LIVEACT_CHECK((renoise != nullptr) == (options_.sampler == Sampler::renoise),
                "denoise: expected fresh noise with the sampler renoise only, found ",
                renoise == nullptr ? "none" : "some");
  LIVEACT_CHECK(!failed_, "denoise: expected a working stream, found one that failed before");
  failed_ = true;  // until the block is complete
  const Range block_range("block", block_);
  try {
    run_block(noise, renoise, audio, latent, velocities);
  } catch (...) {
    open_barriers();
    throw;
  }
  failed_ = false;
}

void Stream::Impl::run_block(const float* noise, const float* renoise, const float* audio,
                             float* latent, float* velocities) {
  begin_block();
  Ops& clock = ranks_[0]->ops();  // the ranks go in step
  clock.mark(kBlockStart);
  const bool with_audio = block_ > 0 || frames_of_next_block() > 1;
  if (with_audio) {
    each([&](Rank& rank) { rank.set_audio(audio, audio_rows_of_next_block()); });
  }
  clock.mark(kConditioned);

  each([&](Rank& rank) { rank.upload_noise(noise, renoise); });
  for (int step = 0; step < kSteps; ++step) {
    run_step(step, with_audio);
    if (velocities != nullptr) {
      settle();
      each([&](Rank& rank) { rank.download_velocity(velocities, step); });
    }
    each([&](Rank& rank) { rank.sampler_step(step); });
    clock.mark(kStepDone + step);
  }
  settle();
  bool finite = true;
  each([&](Rank& rank) { finite &= rank.latent_is_finite(); });
  if (!finite) {
    detail::fail<NonFiniteError>("denoise: block ", block_,
                                 " has a NaN or an infinity in its latent");
  }
  each([&](Rank& rank) { rank.download_latent(latent); });
  timings_.conditioning_ms = clock.marked_ms(kBlockStart, kConditioned);
  for (int step = 0; step < kSteps; ++step) {
    timings_.step_ms[step] = clock.marked_ms(kConditioned + step, kStepDone + step);
  }
  ++block_;
}

// The velocity of a step, guided from step 1 on where the stream is.
void Stream::Impl::run_step(int step, bool with_audio) {
  static const RangeName names[kSteps] = {RangeName("step 0"), RangeName("step 1"),
                                          RangeName("step 2")};
  const Range range(names[step]);
  evaluate(false, step, step, step > 0 && with_audio);
  if (!guided() || step == 0) return;
  each([](Rank& rank) { rank.swap_velocities(); });
  evaluate(true, step, kSteps + step, with_audio);
  each([](Rank& rank) {
    rank.swap_velocities();
    rank.guide();
  });
}

// Every block but the first does the same to the same buffers, so its evaluations are recorded.
void Stream::Impl::evaluate(bool null, int step, int key, bool with_audio) {
  if (cancelled_) throw CancelledError("denoise: cancelled");
  if (block_ == 0) return velocity(null, step, with_audio);
  const auto replay = [&] {
    bool replayed = false;
    each([&](Rank& rank) { replayed |= rank.ops().replay(key); });
    return replayed;
  };
  if (replay()) return;
  try {
    each([&](Rank& rank) { rank.ops().begin_record(key); });
    velocity(null, step, with_audio);
    each([](Rank& rank) { rank.ops().end_record(); });
    replay();  // where they were recorded they have not run yet
  } catch (...) {
    // A recording left open would disturb others on the device. To forget waits for the queue.
    open_barriers();
    each([](Rank& rank) { rank.forget(); });
    throw;
  }
}

// Waits for the ops of all ranks. Not for one after another: where a device has failed, the other
// one waits for it for ever, and only its own queue says so.
void Stream::Impl::settle() {
  if (ranks_.size() == 1) return;
  const auto is_idle = [](const std::unique_ptr<Rank>& rank) { return rank->ops().idle(); };
  while (std::count_if(ranks_.begin(), ranks_.end(), is_idle) < std::ssize(ranks_)) {
    std::this_thread::sleep_for(kPollInterval);
  }
}

// So that no rank waits for another one: what it computes from here on is of no use.
void Stream::Impl::open_barriers() noexcept {
  if (ranks_.size() == 1) return;
  each([](Rank& rank) { rank.open_barrier(); });
}

void Stream::Impl::export_context(int step, int64_t layer, float* k, float* v) {
  const int64_t layers = model().config().num_layers;
  LIVEACT_CHECK(step >= 0 && step < kSteps && layer >= 0 && layer < layers,
                "export_context: expected step 0..2 and a layer of the model, found ", step, ", ",
                layer);
  LIVEACT_CHECK(block_ > 0, "export_context: expected at least one block, found none");
  each([&](Rank& rank) { rank.export_context(step, layer, k, v); });
}

// ---------------------------------------------------------------------------------- the public
// face

Stream::Stream(std::shared_ptr<const Model> model, const StreamOptions& options)
    : Stream(std::vector{std::move(model)}, options) {}

Stream::Stream(const std::vector<std::shared_ptr<const Model>>& models,
               const StreamOptions& options)
    : impl_(std::make_unique<Impl>(models, options)) {}

Stream::~Stream() = default;

int64_t Stream::required_bytes(Device& device, const ModelConfig& config,
                               const Precision& precision, const StreamOptions& options,
                               int devices) {
  check_options(config, precision, options);
  const Place largest{0, devices};
  return StreamMemory(device, config, precision, options, largest, StreamMemory::Mode::count)
      .total_bytes;
}

void Stream::set_prompt(const float* text, int64_t tokens) { impl_->set_prompt(text, tokens); }
void Stream::set_image(const float* features, int64_t tokens, const float* y, int64_t frames) {
  impl_->set_image(features, tokens, y, frames);
}
void Stream::denoise(const float* noise, const float* renoise, const float* audio, float* latent,
                     float* velocities) {
  impl_->denoise(noise, renoise, audio, latent, velocities);
}
void Stream::cancel() { impl_->cancel(); }
void Stream::export_context(int step, int64_t layer, float* k, float* v) {
  impl_->export_context(step, layer, k, v);
}
int64_t Stream::next_block() const { return impl_->next_block(); }
int64_t Stream::frames_of_next_block() const { return impl_->frames_of_next_block(); }
int64_t Stream::audio_rows_of_next_block() const { return impl_->audio_rows_of_next_block(); }
const BlockTimings& Stream::timings() const { return impl_->timings(); }
const StreamOptions& Stream::options() const { return impl_->options(); }
const Model& Stream::model() const { return impl_->model(); }
int64_t Stream::device_bytes() const { return impl_->device_bytes(); }
int64_t Stream::tokens_per_frame() const { return impl_->tokens_per_frame(); }

}  // namespace liveact
