#include "liveact/stream.h"

#include <algorithm>
#include <cmath>

#include "core/memory.h"
#include "core/nvtx.h"
#include "liveact/error.h"

namespace liveact {

namespace {

// Marks of a block: when it starts, then when each of its parts is done.
constexpr int kBlockStart = 0, kConditioned = 1, kStepDone = 2;
static_assert(kStepDone + kSteps <= kTimeMarks);

void check_options(const ModelConfig& config, const StreamOptions& options) {
  const int64_t h = options.latent_height;
  const int64_t w = options.latent_width;
  LIVEACT_CHECK(h > 0 && w > 0 && h % 2 == 0 && w % 2 == 0 && h <= 1024 && w <= 1024,
                "stream: expected an even latent height and width of 2 to 1024, got ", h, "x", w);
  LIVEACT_CHECK(options.max_image_tokens > 0, "stream: expected room for image tokens, got ",
                options.max_image_tokens);
  LIVEACT_CHECK(std::isfinite(options.audio_guidance) && options.audio_guidance >= 1.0f,
                "stream: expected a finite audio guidance >= 1, got ", options.audio_guidance);
  update_table(options.slots, options.memory.memory, 1);  // throws for impossible counts
  config.check();
}

}  // namespace

Stream::Stream(std::shared_ptr<const Model> model, const StreamOptions& options)
    : Stream(model->device(), model->config(), model->precision(), model, options) {}

int64_t Stream::required_bytes(Device& device, const ModelConfig& config,
                               const Precision& precision, const StreamOptions& options) {
  return Stream(device, config, precision, nullptr, options).device_bytes();
}

Stream::Stream(Device& device, const ModelConfig& config, const Precision& precision,
               std::shared_ptr<const Model> model, const StreamOptions& options)
    : device_(device),
      config_(config),
      precision_(precision),
      model_(std::move(model)),
      options_(options) {
  const ModelConfig& c = config_;
  check_options(c, options);
  precision_.check(c.num_layers);
  if (model_ != nullptr) {
    const Stream counted(device, config, precision, nullptr, options);
    const int64_t known = counted.context_bytes_ + counted.conditioning_bytes_;
    require_memory(device, "a session",
                   {{"context", counted.context_bytes_},
                    {"text, image and audio", counted.conditioning_bytes_},
                    {"scratch", counted.device_bytes_ - known}});
  }
  const SlotCounts& slots = options.slots;
  const DType plain = precision_.activations;
  make_rope();
  const int64_t frame = tokens_per_frame();
  const int64_t most_frames = std::max(slots.first_block(), slots.current);
  const int64_t m = most_frames * frame;
  first_update_ = update_table(slots, options.memory.memory, 0);
  update_ = update_table(slots, options.memory.memory, 1);
  text_capacity_ = c.text_len + 1;
  y_frames_ = slots.total();

  const int64_t before = device_bytes_;
  make_pass(main_, 0, most_frames);
  if (guided()) make_pass(null_, 1, 1);
  for (int64_t i = 0; i < c.num_layers; ++i) {
    text_kv_.push_back(kv_segment(text_capacity_, plain, nullptr));
    image_kv_.push_back(kv_segment(options.max_image_tokens, plain, nullptr));
  }
  conditioning_bytes_ = device_bytes_ - before - context_bytes_;

  // Also lent to the projections of text and image, which may have more rows than a small picture.
  const int64_t scratch_rows = std::max({m, text_capacity_, options.max_image_tokens});
  x_ = make_rows(m, c.dim, plain);
  normed_ = make_rows(scratch_rows, std::max(c.dim, c.ffn_dim), plain);
  // The head writes its 4 out_dim columns in fp32 whatever the format of the rest is.
  wide_ = make_rows(scratch_rows, std::max({3 * c.dim, c.ffn_dim, 8 * c.out_dim}), plain);
  mixed_ = make_rows(m, c.dim, plain);
  patches_ = make_rows(m, 4 * c.in_dim, plain);
  // Sized for the widest format a layer may ask for.
  const DType attention = plain;
  q_ = {.data = allocate(m * c.dim * size_bytes(attention)),
        .dtype = attention,
        .heads = c.num_heads,
        .tokens = m,
        .head_dim = c.head_dim(),
        .scale = static_cast<float*>(allocate(4 * m * c.num_heads))};
  current_ = kv_segment(m, attention, nullptr);
  staging_ = kv_segment(slots.context() * frame, attention, nullptr);

  const int64_t latent = c.out_dim * most_frames * options.latent_height * options.latent_width;
  z_ = static_cast<float*>(allocate(4 * latent));
  noise_ = static_cast<float*>(allocate(4 * latent * 2));
  v_ = static_cast<float*>(allocate(4 * latent));
  v_null_ = static_cast<float*>(allocate(4 * latent));
  y_ = static_cast<float*>(allocate(4 * (c.in_dim - c.out_dim) * y_frames_ * options.latent_height *
                                    options.latent_width));

  const int64_t audio_rows = 4 * most_frames + 4;
  const int64_t audio_tokens = most_frames * c.context_tokens;
  const int64_t cond_rows =
      std::max({text_capacity_, options.max_image_tokens, audio_rows, audio_tokens});
  const int64_t cond_cols =
      std::max({c.dim, c.text_dim, c.image_dim, c.intermediate_dim, c.output_dim});
  const int64_t cond_size = std::max({cond_rows * cond_cols, audio_rows * c.audio_dim,
                                      most_frames * c.context_tokens * c.output_dim});
  cond_in_ = make_rows(1, cond_size, DType::f32);
  cond_a_ = make_rows(1, cond_size, plain);
  cond_b_ = make_rows(1, cond_size, plain);
  for (Rows* rows : {&cond_a_, &cond_b_})
    rows->scale = static_cast<float*>(allocate(4 * cond_rows));

  OpsLimits limits;
  limits.max_cols = std::max({3 * c.dim, c.ffn_dim, c.text_dim, c.image_dim, c.audio_dim,
                              c.intermediate_dim, c.context_tokens * c.output_dim, 4 * c.in_dim});
  limits.max_operand = std::max({m * std::max({c.dim, c.ffn_dim, 4 * c.in_dim}), cond_size,
                                 most_frames * kAudioWindow * c.audio_dim});
  limits.max_keys =
      std::max(slots.context() * frame + m, text_capacity_ + options.max_image_tokens);
  limits.max_keys = std::max(limits.max_keys, c.context_tokens);
  limits.head_dim = c.head_dim();
  device_bytes_ += device_.ops_bytes(limits);
  if (model_ == nullptr) return;
  ops_ = device_.open_ops(limits);
  upload_rope();
  plan();
  if (guided()) {
    const std::vector<float> silence(audio_rows * c.audio_dim, 0.0f);
    project_audio(silence.data(), 4 + 4, 0, 1, null_);
  }
}

void* Stream::allocate(int64_t bytes) {
  device_bytes_ += bytes;
  if (model_ == nullptr) return nullptr;
  buffers_.emplace_back(device_, bytes);
  return buffers_.back().data();
}

Rows Stream::make_rows(int64_t rows, int64_t cols, DType dtype) {
  return {.data = allocate(rows * cols * size_bytes(dtype)),
          .dtype = dtype,
          .rows = rows,
          .cols = cols,
          .scale = static_cast<float*>(allocate(4 * rows))};
}

KvSegment Stream::kv_segment(int64_t tokens, DType dtype, float* v_scale) {
  const ModelConfig& c = config_;
  KvSegment segment{.dtype = dtype,
                    .heads = c.num_heads,
                    .tokens = tokens,
                    .head_dim = c.head_dim(),
                    .v_scale = v_scale};
  segment.k = allocate(segment.key_bytes());
  segment.v = allocate(segment.value_bytes());
  segment.k_scale = static_cast<float*>(allocate(4 * tokens * c.num_heads));
  return segment;
}

void Stream::make_pass(Pass& pass, int first_step, int64_t audio_frames) {
  const ModelConfig& c = config_;
  const DType plain = precision_.activations;
  const int64_t tokens = options_.slots.context() * tokens_per_frame();
  pass.contexts.resize(kSteps * c.num_layers);
  const int64_t before = device_bytes_;
  for (int step = first_step; step < kSteps; ++step) {
    for (int64_t i = 0; i < c.num_layers; ++i) {
      auto* v_scale = static_cast<float*>(allocate(4 * c.num_heads));
      const DType attention = precision_.layers[i].attention;
      pass.contexts[step * c.num_layers + i] = kv_segment(tokens, attention, v_scale);
    }
  }
  context_bytes_ += device_bytes_ - before;
  pass.audio_frames = audio_frames;
  for (int64_t i = 0; i < c.num_layers; ++i) {
    pass.audio_kv.push_back(make_rows(audio_frames * c.context_tokens, 2 * c.dim, plain));
  }
}

void Stream::make_rope() {
  const int64_t pairs = config_.head_dim() / 2;
  rope_.pairs_row = rope_.pairs_col = static_cast<int>(pairs / 3);
  rope_.pairs_frame = static_cast<int>(pairs - 2 * (pairs / 3));
  rope_.grid_rows = static_cast<int>(options_.latent_height / 2);
  rope_.grid_cols = static_cast<int>(options_.latent_width / 2);
  const auto table = [&](int64_t positions, int64_t axis_pairs) {
    return static_cast<float*>(allocate(4 * 2 * positions * axis_pairs));
  };
  rope_.frame = table(options_.slots.total(), rope_.pairs_frame);
  rope_.row = table(rope_.grid_rows, rope_.pairs_row);
  rope_.col = table(rope_.grid_cols, rope_.pairs_col);
}

void Stream::upload_rope() {
  const auto fill = [&](const float* target, int64_t positions, int64_t pairs) {
    std::vector<float> values(2 * positions * pairs);
    for (int64_t position = 0; position < positions; ++position) {
      for (int64_t j = 0; j < pairs; ++j) {
        const double angle =
            static_cast<double>(position) *
            std::pow(10000.0, -static_cast<double>(j) / static_cast<double>(pairs));
        values[2 * (position * pairs + j)] = static_cast<float>(std::cos(angle));
        values[2 * (position * pairs + j) + 1] = static_cast<float>(std::sin(angle));
      }
    }
    ops_->upload(const_cast<float*>(target), values.data(), 4 * std::ssize(values));
  };
  fill(rope_.frame, options_.slots.total(), rope_.pairs_frame);
  fill(rope_.row, rope_.grid_rows, rope_.pairs_row);
  fill(rope_.col, rope_.grid_cols, rope_.pairs_col);
}

void Stream::set_prompt(const float* text, int64_t tokens) {
  static const RangeName name("set_prompt");
  const Range range(name);
  const Model& model = *model_;
  const ModelConfig& c = config_;
  const DType plain = precision_.activations;
  LIVEACT_CHECK(tokens >= 1 && tokens <= c.text_len, "set_prompt: expected 1 to ", c.text_len,
                " tokens, got ", tokens);
  // The last row is the padding row: all zeros going in, and one key for all of them coming out.
  const int64_t n = tokens + 1;
  const Rows in = cond_in_.as(n, c.text_dim, DType::f32);
  const std::vector<float> zeros(c.text_dim, 0.0f);
  ops_->upload(in.data, text, 4 * tokens * c.text_dim);
  ops_->upload(in.from(tokens).data, zeros.data(), 4 * c.text_dim);
  const Rows operand = plain == DType::f32 ? in : cond_b_.as(n, c.text_dim, plain);
  if (plain != DType::f32) ops_->quantize(in, operand);
  const Rows hidden = cond_a_.as(n, c.dim, plain);
  const Rows context = cond_b_.as(n, c.dim, plain);
  ops_->linear(operand, model.text_in.weight, model.text_in.epilogue(), hidden);
  ops_->activate(hidden, Activation::gelu_tanh, hidden);
  ops_->linear(hidden, model.text_out.weight, model.text_out.epilogue(), context);
  project_context(context, cond_a_, false);
  pad_count_ = c.text_len - tokens;
  ops_->forget();  // recorded ops have the number of tokens in them
  has_prompt_ = true;
}

void Stream::set_image(const float* features, int64_t tokens, const float* y, int64_t frames) {
  static const RangeName name("set_image");
  const Range range(name);
  const Model& model = *model_;
  const ModelConfig& c = config_;
  const DType plain = precision_.activations;
  LIVEACT_CHECK(block_ == 0, "set_image: expected before the first block, got block ", block_);
  LIVEACT_CHECK(tokens >= 1 && tokens <= options_.max_image_tokens, "set_image: expected 1 to ",
                options_.max_image_tokens, " image tokens, got ", tokens);
  LIVEACT_CHECK(frames >= y_frames_, "set_image: expected at least ", y_frames_,
                " latent frames of conditioning, got ", frames);
  const int64_t plane = options_.latent_height * options_.latent_width;
  for (int64_t channel = 0; channel < c.in_dim - c.out_dim; ++channel) {
    ops_->upload(y_ + channel * y_frames_ * plane, y + channel * frames * plane,
                 4 * y_frames_ * plane);
  }
  const Rows in = cond_in_.as(tokens, c.image_dim, DType::f32);
  ops_->upload(in.data, features, 4 * tokens * c.image_dim);
  const Rows a = cond_a_.as(tokens, c.image_dim, plain);
  const Rows b = cond_b_.as(tokens, c.image_dim, plain);
  const Rows context = cond_a_.as(tokens, c.dim, plain);
  constexpr float kEps = 1e-5f;  // torch's LayerNorm default
  const Rows operand = plain == DType::f32 ? in : cond_b_.as(tokens, c.image_dim, plain);
  if (plain != DType::f32) ops_->quantize(in, operand);
  ops_->layer_norm(operand, model.image_in_norm.gain, model.image_in_norm.bias, kEps, a);
  ops_->linear(a, model.image_in.weight, model.image_in.epilogue(), b);
  ops_->activate(b, Activation::gelu_erf, b);
  ops_->linear(b, model.image_out.weight, model.image_out.epilogue(), context);
  ops_->layer_norm(context, model.image_out_norm.gain, model.image_out_norm.bias, kEps, context);
  project_context(context, cond_b_, true);
  has_image_ = true;
}

// Keys and values of every layer from a text or an image [tokens, D]. `spare` is room for it in the
// format of the products.
void Stream::project_context(const Rows& context, const Rows& spare, bool image) {
  Rows operand = context;
  for (int64_t i = 0; i < config_.num_layers; ++i) {
    const DType format = precision_.layers[i].cross_kv;
    if (format != operand.dtype) {
      operand = format == context.dtype ? context : spare.as(context.rows, context.cols, format);
      if (format != context.dtype) ops_->quantize(context, operand);
    }
    const Layer& layer = model_->layers[i];
    KvSegment& segment = image ? image_kv_[i] : text_kv_[i];
    segment.tokens = context.rows;
    if (image) {
      project_kv(operand, layer.image_k, layer.image_k_norm, layer.image_v, segment);
    } else {
      project_kv(operand, layer.text_k, layer.text_k_norm, layer.text_v, segment);
    }
  }
}

void Stream::project_kv(const Rows& context, const Linear& key, const Norm& key_norm,
                        const Linear& value, const KvSegment& segment) {
  const DType plain = precision_.activations;
  const int64_t dim = config_.dim;
  const Rows k = wide_.as(context.rows, dim, plain);
  const Rows v = normed_.as(context.rows, dim, plain);
  ops_->linear(context, key.weight, key.epilogue(), k);
  ops_->rms_norm(k, key_norm.gain, config_.eps, k);
  ops_->linear(context, value.weight, value.epilogue(), v);
  ops_->store_kv(k, v, segment);
}

// The features of latent frame j are kAudioWindow consecutive rows from first_row + 4 j on: a
// strided view, so nothing is gathered.
void Stream::project_audio(const float* features, int64_t feature_rows, int64_t first_row,
                           int64_t frames, Pass& pass) {
  static const RangeName name("conditioning");
  const Range range(name);
  const Model& model = *model_;
  const ModelConfig& c = config_;
  const DType plain = precision_.activations;
  const Rows in = cond_in_.as(feature_rows, c.audio_dim, DType::f32);
  ops_->upload(in.data, features, 4 * feature_rows * c.audio_dim);
  const Rows rows = plain == DType::f32 ? in : cond_a_.as(feature_rows, c.audio_dim, plain);
  if (plain != DType::f32) ops_->quantize(in, rows);
  Rows windows = rows.from(first_row).as(frames, kAudioWindow * c.audio_dim, plain);
  windows.stride = 4 * c.audio_dim;
  const Rows a = cond_b_.as(frames, c.intermediate_dim, plain);
  const Rows b = cond_a_.as(frames, c.intermediate_dim, plain);
  ops_->linear(windows, model.audio_window.weight, model.audio_window.epilogue(), a);
  ops_->activate(a, Activation::relu, a);
  ops_->linear(a, model.audio_hidden.weight, model.audio_hidden.epilogue(), b);
  ops_->activate(b, Activation::relu, b);
  const Rows projected = cond_b_.as(frames, c.context_tokens * c.output_dim, plain);
  ops_->linear(b, model.audio_out.weight, model.audio_out.epilogue(), projected);
  const Rows tokens = cond_b_.as(frames * c.context_tokens, c.output_dim, plain);
  ops_->layer_norm(tokens, model.audio_norm.gain, model.audio_norm.bias, 1e-5f, tokens);
  for (int64_t i = 0; i < c.num_layers; ++i) {
    const Linear& kv = model.layers[i].audio_kv;
    Rows target = pass.audio_kv[i];
    target.rows = tokens.rows;
    ops_->linear(tokens, kv.weight, kv.epilogue(), target);
  }
}

// Every block but the first does the same to the same buffers, so its evaluations are recorded.
void Stream::evaluate(Pass& pass, int step, int key, bool with_audio) {
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

int64_t Stream::audio_rows_of_next_block() const {
  return 4 * frames_of_next_block() + (block_ == 0 ? 1 : 4);
}

void Stream::denoise(const float* noise, const float* renoise, const float* audio, float* latent,
                     float* velocities) {
  LIVEACT_CHECK(has_prompt_ && has_image_,
                "denoise: expected set_prompt and set_image before the first block");
  LIVEACT_CHECK(!failed_, "denoise: expected a working stream, got one that failed before");
  failed_ = true;  // until the block is complete
  const Range block_range("block", block_);
  run_block(noise, renoise, audio, latent, velocities);
  failed_ = false;
}

// The ops of the first block and of a later one: what they are on this device is decided here.
void Stream::plan() {
  static const RangeName name("plan");
  const Range range(name);
  if (!ops_->begin_plan()) return;
  for (int block = 0; block < 2; ++block) run_block(nullptr, nullptr, nullptr, nullptr, nullptr);
  ops_->end_plan();
  block_ = 0;
}

void Stream::run_block(const float* noise, const float* renoise, const float* audio, float* latent,
                       float* velocities) {
  const ModelConfig& c = config_;
  const int64_t n = frames_of_next_block();
  const int64_t size = c.out_dim * n * options_.latent_height * options_.latent_width;
  ops_->mark(kBlockStart);
  // In block 0 latent frame 0 has no audio; its window would start 3 features earlier.
  const bool first = block_ == 0;
  if (!first || n > 1) {
    project_audio(audio, audio_rows_of_next_block(), first ? 1 : 0, first ? n - 1 : n, main_);
  }
  ops_->mark(kConditioned);

  ops_->upload(z_, noise, 4 * size);
  ops_->upload(noise_, renoise, 4 * size * 2);
  static const RangeName step_names[kSteps] = {RangeName("step 0"), RangeName("step 1"),
                                               RangeName("step 2")};
  for (int step = 0; step < kSteps; ++step) {
    const Range step_range(step_names[step]);
    evaluate(main_, step, step, step > 0 && (!first || n > 1));
    if (guided() && step > 0) {
      std::swap(v_, v_null_);
      evaluate(null_, step, kSteps + step, !first || n > 1);
      std::swap(v_, v_null_);
      ops_->guide(v_, v_null_, options_.audio_guidance, size);
    }
    if (velocities != nullptr) ops_->download(velocities + step * size, v_, 4 * size);
    const float sigma = kTimesteps[step] / 1000.0f;
    const float next_sigma = kTimesteps[step + 1] / 1000.0f;
    const bool last = step + 1 == kSteps;
    ops_->sampler_step(z_, v_, last ? nullptr : noise_ + step * size, sigma, next_sigma, size);
    ops_->mark(kStepDone + step);
  }
  if (!ops_->all_finite(z_, size)) {
    throw NonFiniteError("denoise: block " + std::to_string(block_) +
                         " has a NaN or an infinity in its latent");
  }
  ops_->download(latent, z_, 4 * size);
  timings_.conditioning_ms = ops_->marked_ms(kBlockStart, kConditioned);
  for (int step = 0; step < kSteps; ++step) {
    timings_.step_ms[step] = ops_->marked_ms(kConditioned + step, kStepDone + step);
  }
  ++block_;
}

void Stream::export_context(int step, int64_t layer, float* k, float* v) {
  LIVEACT_CHECK(step >= 0 && step < kSteps && layer >= 0 && layer < config_.num_layers,
                "export_context: expected step 0..2 and a layer of the model, got ", step, ", ",
                layer);
  LIVEACT_CHECK(block_ > 0, "export_context: expected at least one block, got none");
  const KvSegment& context = main_.contexts[step * config_.num_layers + layer];
  ops_->export_kv(context, rope_, 0, k, v);
}

}  // namespace liveact
