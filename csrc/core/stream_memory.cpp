#include "core/stream_memory.h"

#include <algorithm>

#include "core/weights.h"

namespace liveact {

namespace {

constexpr int64_t kAlignment = 256;  // of a part of the arena, as of an allocation of its own

}  // namespace

StreamMemory::StreamMemory(Device& device, const ModelConfig& config, const Precision& precision,
                           const StreamOptions& options, const Place& place, Mode mode)
    : device_(&device),
      formats_(device.formats()),
      config_(config),
      precision_(precision),
      options_(options),
      place_(place),
      counting_(mode == Mode::count) {
  if (!counting_ && formats_.one_allocation) {
    const StreamMemory counted(device, config, precision, options, place, Mode::count);
    arena_ = Buffer(device, counted.own_bytes_);
  }
  const ModelConfig& c = config_;
  const SlotCounts& slots = options_.slots;
  const int64_t frames = std::max(slots.first_block(), slots.current);
  const auto own = [&](int64_t n) { return place.share(n).end - place.share(n).begin; };
  const int64_t own_frames = std::max(own(slots.first_block()), own(slots.current));
  const int64_t frame_tokens = options.latent_height / 2 * (options.latent_width / 2);
  const int64_t audio_rows = 4 * frames + 4;
  const int64_t rows =
      std::max({c.text_len + 1, options.max_image_tokens, audio_rows, frames * c.context_tokens});
  const int64_t cols = std::max({c.dim, c.text_dim, c.image_dim, c.intermediate_dim, c.output_dim});
  sizes_ = {.frames = frames,
            .own_frames = own_frames,
            .frame_tokens = frame_tokens,
            .tokens = frames * frame_tokens,
            .own_tokens = own_frames * frame_tokens,
            .own_heads = own(c.num_heads),
            .text_tokens = c.text_len + 1,
            .audio_rows = audio_rows,
            .conditioning = std::max(
                {rows * cols, audio_rows * c.audio_dim, frames * c.context_tokens * c.output_dim})};
  const bool scaled = std::any_of(precision.layers.begin(), precision.layers.end(),
                                  [](const auto& p) { return p.audio_o == DType::f8; });
  audio_place = scaled ? Place{} : place;
  make_rope();
  const int64_t before = total_bytes;
  make_pass(main, 0, scaled ? frames : own_frames);
  if (options_.audio_guidance != 1.0f) make_pass(null, 1, 1);
  make_conditioning_kv();
  conditioning_bytes = total_bytes - before - context_bytes;
  make_scratch();
  make_projections();
  if (place.count > 1) make_barrier();
  limits = ops_limits();
  own_bytes_ = total_bytes;
  total_bytes += device.ops_bytes(limits);
}

void* StreamMemory::allocate(int64_t bytes) {
  if (formats_.one_allocation) bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  const int64_t offset = total_bytes;
  total_bytes += bytes;
  if (counting_) return nullptr;
  if (formats_.one_allocation) return static_cast<char*>(arena_.data()) + offset;
  buffers_.emplace_back(*device_, bytes);
  return buffers_.back().data();
}

Rows StreamMemory::rows(int64_t count, int64_t cols, DType dtype) {
  return {.data = allocate(count * cols * size_bytes(dtype)),
          .dtype = dtype,
          .rows = count,
          .cols = cols,
          .scale = floats(count)};
}

KvSegment StreamMemory::kv_segment(int64_t tokens, int64_t heads, DType dtype, float* v_scale) {
  KvSegment segment{.dtype = dtype,
                    .heads = heads,
                    .tokens = tokens,
                    .head_dim = config_.head_dim(),
                    .v_scale = v_scale};
  segment.k = allocate(segment.key_bytes());
  segment.v = allocate(segment.value_bytes(formats_.value_multiple));
  return segment;
}

void StreamMemory::make_rope() {
  const int64_t pairs = config_.head_dim() / 2;
  rope.pairs_row = rope.pairs_col = static_cast<int>(pairs / 3);
  rope.pairs_frame = static_cast<int>(pairs - 2 * (pairs / 3));
  rope.grid_rows = static_cast<int>(options_.latent_height / 2);
  rope.grid_cols = static_cast<int>(options_.latent_width / 2);
  const auto table = [&](int64_t positions, int64_t axis_pairs) {
    return floats(2 * positions * axis_pairs);
  };
  rope.frame = table(options_.slots.total(), rope.pairs_frame);
  rope.row = table(rope.grid_rows, rope.pairs_row);
  rope.col = table(rope.grid_cols, rope.pairs_col);
}

void StreamMemory::make_pass(Pass& pass, int first_step, int64_t audio_frames) {
  const ModelConfig& c = config_;
  const int64_t tokens = options_.slots.context() * sizes_.frame_tokens;
  pass.contexts.resize(kSteps * c.num_layers);
  pass.value_scale.resize(kSteps * c.num_layers);
  pass.mixed_scale.resize(kSteps * c.num_layers);
  const int64_t before = total_bytes;
  for (int step = first_step; step < kSteps; ++step) {
    for (int64_t i = 0; i < c.num_layers; ++i) {
      const int64_t at = step * c.num_layers + i;
      float* v_scale = pass.value_scale[at] = floats(c.num_heads);
      if (!counting_) v_scale += place_.share(c.num_heads).begin;
      pass.contexts[at] =
          kv_segment(tokens, sizes_.own_heads, precision_.layers[i].attention, v_scale);
      pass.mixed_scale[at] = floats(c.num_heads);
    }
  }
  context_bytes += total_bytes - before;
  pass.audio_frames = audio_frames;
  for (int64_t i = 0; i < c.num_layers; ++i) {
    pass.audio_kv.push_back(
        rows(audio_frames * c.context_tokens, 2 * c.dim, precision_.activations));
    pass.audio_v_scale.push_back(floats(c.num_heads));
  }
}

void StreamMemory::make_conditioning_kv() {
  const auto segment = [&](int64_t tokens) {
    return kv_segment(tokens, config_.num_heads, precision_.activations, floats(config_.num_heads));
  };
  for (int64_t i = 0; i < config_.num_layers; ++i) {
    conditioning.text_kv.push_back(segment(sizes_.text_tokens));
    conditioning.image_kv.push_back(segment(options_.max_image_tokens));
  }
}

void StreamMemory::make_scratch() {
  const ModelConfig& c = config_;
  const int64_t m = sizes_.own_tokens;
  // The widest format that a layer may ask for.
  const DType widest = precision_.activations;
  // Also lent to the projections of text and image, which may have more rows than a small picture.
  const int64_t lent_rows = std::max({m, sizes_.text_tokens, options_.max_image_tokens});
  scratch.x = rows(m, c.dim, widest);
  scratch.normed = rows(lent_rows, std::max(c.dim, c.ffn_dim), widest);
  // The head writes its 4 out_dim columns in fp32 whatever the format of the rest is.
  scratch.wide = rows(lent_rows, std::max({3 * c.dim, c.ffn_dim, 8 * c.out_dim}), widest);
  scratch.mixed = rows(m, c.dim, widest);
  scratch.patches = rows(m, 4 * c.in_dim, widest);
  const int64_t heads = sizes_.own_heads;
  scratch.q = {.data = allocate(sizes_.tokens * heads * c.head_dim() * size_bytes(widest)),
               .dtype = widest,
               .heads = heads,
               .tokens = sizes_.tokens,
               .head_dim = c.head_dim(),
               .scale = floats(sizes_.tokens * heads)};
  scratch.current = kv_segment(sizes_.tokens, heads, widest, nullptr);
  scratch.staging =
      kv_segment(options_.slots.context() * sizes_.frame_tokens, heads, widest, nullptr);
  const int64_t plane = options_.latent_height * options_.latent_width;
  const int64_t latent = latent_elements = c.out_dim * sizes_.own_frames * plane;
  scratch.z = floats(latent);
  scratch.noise = floats(2 * latent);
  scratch.v = floats(latent);
  scratch.v_null = floats(latent);
  conditioning.y_frames = options_.slots.total();
  conditioning.y = floats((c.in_dim - c.out_dim) * conditioning.y_frames * plane);
}

void StreamMemory::make_projections() {
  const int64_t most_rows = std::max({sizes_.text_tokens, options_.max_image_tokens,
                                      sizes_.audio_rows, sizes_.frames * config_.context_tokens});
  conditioning.in = rows(1, sizes_.conditioning, DType::f32);
  conditioning.a = rows(1, sizes_.conditioning, precision_.activations);
  conditioning.b = rows(1, sizes_.conditioning, precision_.activations);
  for (Rows* projected : {&conditioning.a, &conditioning.b}) projected->scale = floats(most_rows);
}

void StreamMemory::make_barrier() {
  constexpr int64_t kCounts = 2;
  auto* counts = static_cast<int64_t*>(allocate((kCounts + 1) * sizeof(int64_t)));
  if (counting_) return;
  barrier = {.counts = counts, .arrived = counts + kCounts, .peer_arrived = nullptr};
}

OpsLimits StreamMemory::ops_limits() const {
  const ModelConfig& c = config_;
  const int64_t keys = std::max(options_.slots.context() * sizes_.frame_tokens + sizes_.tokens,
                                sizes_.text_tokens + options_.max_image_tokens);
  return {
      .max_cols = std::max({3 * c.dim, c.ffn_dim, c.text_dim, c.image_dim, c.audio_dim,
                            c.intermediate_dim, c.context_tokens * c.output_dim, 4 * c.in_dim}),
      .max_operand = std::max({sizes_.own_tokens * std::max({c.dim, c.ffn_dim, 4 * c.in_dim}),
                               sizes_.conditioning, sizes_.frames * kAudioWindow * c.audio_dim}),
      .max_keys = std::max(keys, c.context_tokens),
      .head_dim = c.head_dim(),
      .full_sums = precision_.full_sums};
}

}  // namespace liveact
