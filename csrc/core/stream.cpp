// Opening a stream, and its blocks: three steps, each an evaluation that is recorded where it
// repeats.

#include "liveact/stream.h"

#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "core/memory.h"
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

StreamMemory allocate(const Model& model, const StreamOptions& options) {
  using Mode = StreamMemory::Mode;
  check_options(model.config(), model.precision(), options);
  const StreamMemory counted(model.device(), model.config(), model.precision(), options,
                             Mode::count);
  const int64_t known = counted.context_bytes + counted.conditioning_bytes;
  require_memory(model.device(), "a session",
                 {{"context", counted.context_bytes},
                  {"text, image and audio", counted.conditioning_bytes},
                  {"scratch", counted.total_bytes - known}});
  return {model.device(), model.config(), model.precision(), options, Mode::allocate};
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

Stream::Impl::Impl(std::shared_ptr<const Model> model, const StreamOptions& options)
    : model_(std::move(model)),
      weights_(model_->weights()),
      config_(model_->config()),
      precision_(model_->precision()),
      options_(options),
      first_update_(update_table(options.slots, options.memory.memory, 0)),
      update_(update_table(options.slots, options.memory.memory, 1)),
      memory_(allocate(*model_, options)),
      ops_(model_->device().open_ops(memory_.limits)) {
  upload_rope();
  plan();
  if (guided()) {
    constexpr int64_t kRows = 4 + 4;  // of one latent frame
    const std::vector<float> silence(kRows * config_.audio_dim, 0.0f);
    project_audio(silence.data(), kRows, 0, 1, null_);
  }
}

void Stream::Impl::upload_rope() {
  const auto fill = [&](const float* target, int64_t positions, int64_t pairs) {
    const std::vector<float> values = rotations(positions, pairs);
    ops_->upload(const_cast<float*>(target), values.data(), 4 * std::ssize(values));
  };
  fill(rope_.frame, options_.slots.total(), rope_.pairs_frame);
  fill(rope_.row, rope_.grid_rows, rope_.pairs_row);
  fill(rope_.col, rope_.grid_cols, rope_.pairs_col);
}

// The ops of the first block and of a later one: what they are on this device is decided here.
void Stream::Impl::plan() {
  static const RangeName name("plan");
  const Range range(name);
  if (!ops_->begin_plan()) return;
  for (int block = 0; block < 2; ++block) run_block(nullptr, nullptr, nullptr, nullptr, nullptr);
  ops_->end_plan();
  block_ = 0;
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
  run_block(noise, renoise, audio, latent, velocities);
  failed_ = false;
}

void Stream::Impl::run_block(const float* noise, const float* renoise, const float* audio,
                             float* latent, float* velocities) {
  const int64_t n = frames_of_next_block();
  const int64_t size = config_.out_dim * n * options_.latent_height * options_.latent_width;
  ops_->mark(kBlockStart);
  // In block 0 latent frame 0 has no audio; its window would start 3 features earlier.
  const bool first = block_ == 0;
  const bool with_audio = !first || n > 1;
  if (with_audio) {
    project_audio(audio, audio_rows_of_next_block(), first ? 1 : 0, first ? n - 1 : n, main_);
  }
  ops_->mark(kConditioned);

  ops_->upload(scratch_.z, noise, 4 * size);
  const bool fresh = options_.sampler == Sampler::renoise;
  if (fresh) ops_->upload(scratch_.noise, renoise, 4 * size * 2);
  for (int step = 0; step < kSteps; ++step) {
    run_step(step, with_audio, size);
    if (velocities != nullptr) {
      ops_->download(velocities + step * size, scratch_.v, 4 * size);
    }
    const float sigma = kTimesteps[step] / 1000.0f;
    const float next = kTimesteps[step + 1] / 1000.0f;
    if (fresh && step + 1 < kSteps) {
      ops_->sampler_step(scratch_.z, scratch_.v, scratch_.noise + step * size, sigma, next, size);
    } else {  // z - (sigma - next) * v
      ops_->sampler_step(scratch_.z, scratch_.v, nullptr, sigma - next, 0.0f, size);
    }
    ops_->mark(kStepDone + step);
  }
  if (!ops_->all_finite(scratch_.z, size)) {
    detail::fail<NonFiniteError>("denoise: block ", block_,
                                 " has a NaN or an infinity in its latent");
  }
  ops_->download(latent, scratch_.z, 4 * size);
  timings_.conditioning_ms = ops_->marked_ms(kBlockStart, kConditioned);
  for (int step = 0; step < kSteps; ++step) {
    timings_.step_ms[step] = ops_->marked_ms(kConditioned + step, kStepDone + step);
  }
  ++block_;
}

// The velocity of a step, guided from step 1 on where the stream is.
void Stream::Impl::run_step(int step, bool with_audio, int64_t size) {
  static const RangeName names[kSteps] = {RangeName("step 0"), RangeName("step 1"),
                                          RangeName("step 2")};
  const Range range(names[step]);
  evaluate(main_, step, step, step > 0 && with_audio);
  if (!guided() || step == 0) return;
  std::swap(scratch_.v, scratch_.v_null);
  evaluate(null_, step, kSteps + step, with_audio);
  std::swap(scratch_.v, scratch_.v_null);
  ops_->guide(scratch_.v, scratch_.v_null, options_.audio_guidance, size);
}

// Every block but the first does the same to the same buffers, so its evaluations are recorded.
void Stream::Impl::evaluate(Pass& pass, int step, int key, bool with_audio) {
  if (cancelled_) throw CancelledError("denoise: cancelled");
  if (block_ == 0) return velocity(pass, step, with_audio);
  if (ops_->replay(key)) return;
  ops_->begin_record(key);
  try {
    velocity(pass, step, with_audio);
  } catch (...) {
    ops_->forget();  // a recording left open would disturb others on the device
    throw;
  }
  ops_->end_record();
}

void Stream::Impl::export_context(int step, int64_t layer, float* k, float* v) {
  LIVEACT_CHECK(step >= 0 && step < kSteps && layer >= 0 && layer < config_.num_layers,
                "export_context: expected step 0..2 and a layer of the model, found ", step, ", ",
                layer);
  LIVEACT_CHECK(block_ > 0, "export_context: expected at least one block, found none");
  const KvSegment& context = main_.contexts[step * config_.num_layers + layer];
  ops_->export_kv(context, rope_, 0, k, v);
}

// ---------------------------------------------------------------------------------- the public
// face

Stream::Stream(std::shared_ptr<const Model> model, const StreamOptions& options)
    : impl_(std::make_unique<Impl>(std::move(model), options)) {}

Stream::~Stream() = default;

int64_t Stream::required_bytes(Device& device, const ModelConfig& config,
                               const Precision& precision, const StreamOptions& options) {
  check_options(config, precision, options);
  return StreamMemory(device, config, precision, options, StreamMemory::Mode::count).total_bytes;
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
