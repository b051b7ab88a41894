// One velocity evaluation, as in the paper: patch embedding, the layers, the head. A layer is a
// list of op calls; nothing here knows which backend runs them.
//
// With two devices every part is done by both ranks before the next one begins. They meet twice in
// a layer: between split_qkv and self_attention, and after that.

#include <algorithm>

#include "core/stream_impl.h"

namespace liveact {

void Stream::Impl::velocity(bool null, int step, bool with_audio) {
  {
    static const RangeName name("embed");
    const Range range(name);
    each([](Rank& rank) { rank.embed(); });
  }
  const std::vector<Layer>& layers = model().weights().layers;
  for (int64_t i = 0; i < std::ssize(layers); ++i) {
    if (cancelled_) throw CancelledError("denoise: cancelled");
    const Range range(layers[i].range);
    self_attention_layer(null, step, i);
    each([&](Rank& rank) {
      rank.cross_attention_layer(i);
      if (with_audio) rank.audio_layer(rank.pass(null), i);
      rank.ffn_layer(step, i);
    });
  }
  static const RangeName name("head");
  const Range range(name);
  each([&](Rank& rank) { rank.head(step); });
}

// x += gate0 · O(SelfAttn(LN(x)·(1 + scale0) + shift0)); and this layer's context for the next
// block, which reads nothing but what is here now.
void Stream::Impl::self_attention_layer(bool null, int step, int64_t layer) {
  static const RangeName name("self_attention");
  const Range range(name);
  const LayerPrecision& p = model().precision().layers[layer];
  const bool f8 = p.attention == DType::f8;
  each([&](Rank& rank) { rank.project_qkv(step, layer); });
  if (block_ == 0 && f8) {
    each([&](Rank& rank) { rank.find_value_scale(rank.pass(null), step, layer); });
    agree(&Pass::value_scale, null, step, layer);
  }
  each([&](Rank& rank) { rank.split_heads(rank.pass(null), step, layer); });
  each([&](Rank& rank) { rank.attend(rank.pass(null), step, layer); });
  each([](Rank& rank) { rank.await_mixed(); });
  // Block 0 finds the scale that the later ones write in fp8 with.
  if (block_ == 0 && f8 && p.self_o == DType::f8) {
    each([&](Rank& rank) { rank.find_mixed_scale(rank.pass(null), step, layer); });
    agree(&Pass::mixed_scale, null, step, layer);
  }
  each([&](Rank& rank) { rank.project_mixed(step, layer); });
}

// Scales that each rank has found over its own rows: now the larger ones, on both. Through the
// host, in block 0 only.
void Stream::Impl::agree(const std::vector<float*> Pass::* scales, bool null, int step,
                         int64_t layer) {
  if (ranks_.size() == 1) return;
  const ModelConfig& c = model().config();
  const int64_t bytes = c.num_heads * static_cast<int64_t>(sizeof(float));
  std::vector<float> largest(c.num_heads), found(c.num_heads);
  const auto scale = [&](Rank& rank) {
    return (rank.pass(null).*scales)[step * c.num_layers + layer];
  };
  settle();
  each([&](Rank& rank) {
    rank.ops().download(found.data(), scale(rank), bytes);
    for (size_t i = 0; i < found.size(); ++i) largest[i] = std::max(largest[i], found[i]);
  });
  each([&](Rank& rank) { rank.ops().upload(scale(rank), largest.data(), bytes); });
}

void Rank::embed() {
  const ModelConfig& c = config_;
  const DType activations = precision_.activations;
  const int64_t n = frames_.end - frames_.begin;
  const int64_t m = n * tokens_per_frame();
  const int64_t first_slot = options_.slots.first_slot_of_block(first_ ? 0 : 1);
  scratch_.x = scratch_.x.as(m, c.dim, activations);
  const Rows patches = scratch_.patches.as(m, 4 * c.in_dim, activations);
  ops_->patchify(scratch_.z, conditioning_.y, c.out_dim, c.in_dim - c.out_dim,
                 conditioning_.y_frames, first_slot + frames_.begin, n, options_.latent_height,
                 options_.latent_width, patches);
  ops_->linear(patches, weights_.patch_embedding.weight, weights_.patch_embedding.epilogue(),
               scratch_.x);
}

void Rank::head(int step) {
  const ModelConfig& c = config_;
  const int64_t m = scratch_.x.rows;
  const Rows normed = scratch_.normed.as(m, c.dim, precision_.activations);
  const Rows out = scratch_.wide.as(m, 4 * c.out_dim, DType::f32);
  const Norm& norm = weights_.head_norm[step];
  ops_->layer_norm(scratch_.x, norm.gain, norm.bias, c.eps, normed);
  ops_->linear(normed, weights_.head.weight, weights_.head.epilogue(), out);
  ops_->unpatchify(out, c.out_dim, frames_.end - frames_.begin, options_.latent_height,
                   options_.latent_width, scratch_.v);
}

void Rank::project_qkv(int step, int64_t layer) {
  const ModelConfig& c = config_;
  const Layer& w = weights_.layers[layer];
  const Norm& norm = w.steps[step].self_norm;
  const int64_t m = scratch_.x.rows;
  const Rows normed = scratch_.normed.as(m, c.dim, precision_.layers[layer].self_qkv);
  const Rows qkv = scratch_.wide.as(m, 3 * c.dim, precision_.activations);
  ops_->layer_norm(scratch_.x, norm.gain, norm.bias, c.eps, normed);
  ops_->linear(normed, w.self_qkv.weight, w.self_qkv.epilogue(), qkv);
}

void Rank::find_value_scale(const Pass& pass, int step, int64_t layer) {
  const ModelConfig& c = config_;
  const Rows qkv = scratch_.wide.as(scratch_.x.rows, 3 * c.dim, precision_.activations);
  ops_->value_scale(qkv.columns(2 * c.dim, c.dim), c.num_heads,
                    pass.value_scale[step * c.num_layers + layer]);
}

// This rank's queries, keys and values of the block: of its heads, and the tokens of all ranks.
Heads Rank::queries(DType dtype) const {
  Heads q = scratch_.q;
  q.dtype = dtype;
  q.tokens = block_frames_ * tokens_per_frame();
  return q;
}

KvSegment Rank::current(DType dtype, const float* k_scale, float* v_scale) const {
  KvSegment current = scratch_.current;
  current.dtype = dtype;
  current.tokens = block_frames_ * tokens_per_frame();
  current.k_scale = k_scale;
  current.v_scale = v_scale;
  return current;
}

// From the rows of this rank to the heads of both.
void Rank::split_heads(const Pass& pass, int step, int64_t layer) {
  const ModelConfig& c = config_;
  const Layer& w = weights_.layers[layer];
  const DType dtype = precision_.layers[layer].attention;
  const Rank& lower = other_ == nullptr || place_.index == 0 ? *this : *other_;
  Heads q = lower.queries(dtype);
  KvSegment keys = lower.current(dtype, w.key_scale, pass.value_scale[step * c.num_layers + layer]);
  if (other_ != nullptr) {
    const Scratch& upper = (place_.index == 0 ? *other_ : *this).scratch_;
    q.heads = keys.heads = c.num_heads;
    q.upper = upper.q.data;
    q.upper_scale = upper.q.scale;
    keys.upper_k = upper.current.k;
    keys.upper_v = upper.current.v;
  }
  const Rows qkv = scratch_.wide.as(scratch_.x.rows, 3 * c.dim, precision_.activations);
  ops_->split_qkv(qkv, w.self_q_norm.gain, w.self_k_norm.gain, c.eps, rope_,
                  options_.slots.first_slot_of_block(first_ ? 0 : 1) + frames_.begin,
                  frames_.begin * tokens_per_frame(), q, keys);
  if (other_ != nullptr) ops_->signal(barrier_);
}

// From the heads of this rank to the rows of both; then the context, while the current block is
// there: once both have signalled, the next layer overwrites it.
void Rank::attend(const Pass& pass, int step, int64_t layer) {
  const ModelConfig& c = config_;
  const DType dtype = precision_.layers[layer].attention;
  const int64_t at = step * c.num_layers + layer;
  const KvSegment& context = pass.contexts[at];
  const KvSegment keys = current(dtype, context.k_scale, context.v_scale);
  KvSegment attended = context;
  if (first_) attended.tokens = 0;
  if (other_ != nullptr) ops_->wait(barrier_);
  Rank& lower = other_ == nullptr || place_.index == 0 ? *this : *other_;
  const int64_t columns = (heads_.end - heads_.begin) * c.head_dim();
  const auto of_heads = [&](Rank& rank) {
    return rank.mixed(layer).columns(heads_.begin * c.head_dim(), columns);
  };
  const Rows out = of_heads(lower);
  const Rows rest = other_ == nullptr ? Rows{} : of_heads(place_.index == 0 ? *other_ : *this);
  ops_->self_attention(queries(dtype), attended, keys, pass.mixed_scale[at], out, rest);
  update_context(weights_.layers[layer], keys, context);
  if (other_ != nullptr) ops_->signal(barrier_);
}

void Rank::await_mixed() {
  if (other_ != nullptr) ops_->wait(barrier_);
}

// What self-attention writes for the rows of this rank: in block 0 not yet in fp8, whose scale is
// found there.
Rows Rank::mixed(int64_t layer) {
  const LayerPrecision& p = precision_.layers[layer];
  const bool f8 = p.attention == DType::f8 && p.self_o == DType::f8 && !first_;
  return mixed_rows(scratch_.x.rows, f8 ? DType::f8 : precision_.activations);
}

void Rank::find_mixed_scale(const Pass& pass, int step, int64_t layer) {
  ops_->value_scale(mixed(layer), config_.num_heads,
                    pass.mixed_scale[step * config_.num_layers + layer]);
}

void Rank::project_mixed(int step, int64_t layer) {
  const Layer& w = weights_.layers[layer];
  project_out(mixed(layer), w.self_o, w.steps[step].self_o, precision_.layers[layer].self_o,
              scratch_.x);
}

// `context` becomes that of the next block.
void Rank::update_context(const Layer& layer, const KvSegment& current, const KvSegment& context) {
  static const RangeName name("memory_update");
  const Range range(name);
  CompressFilter filter = layer.token_filter;
  filter.axis = options_.memory.axis;
  filter.channels = config_.dim;
  if (options_.memory.values == ValueFilter::key) filter.value_taps = filter.key_taps;
  if (options_.memory.memory == Memory::mean) filter.key_taps = filter.value_taps = nullptr;
  filter = filter.from(heads_.begin * config_.head_dim(), model_->device().formats().tap_major);
  KvSegment staging = scratch_.staging;
  staging.dtype = context.dtype;
  staging.k_scale = context.k_scale;
  staging.v_scale = context.v_scale;
  ops_->update_memory(first_ ? first_update_ : update_, filter, rope_,
                      options_.slots.first_slot_of_block(first_ ? 0 : 1), current, staging,
                      context);
}

// x += O(Attn(RMS(q(n3)), text) + Attn(RMS(q(n3)), image)), n3 = affine LN(x).
void Rank::cross_attention_layer(int64_t index) {
  static const RangeName name("cross_attention");
  const Range range(name);
  const ModelConfig& c = config_;
  const Layer& layer = weights_.layers[index];
  const LayerPrecision& p = precision_.layers[index];
  const DType activations = precision_.activations;
  const int64_t m = scratch_.x.rows;
  const Rows normed = scratch_.normed.as(m, c.dim, p.cross_q);
  const Rows q = scratch_.wide.as(m, c.dim, activations);
  ops_->layer_norm(scratch_.x, layer.cross_norm.gain, layer.cross_norm.bias, c.eps, normed);
  ops_->linear(normed, layer.cross_q.weight, layer.cross_q.epilogue(), q);
  ops_->rms_norm(q, layer.cross_q_norm.gain, c.eps, q);
  const Rows mixed = mixed_rows(m, p.cross_o == DType::f8 ? DType::f8 : activations);
  ops_->cross_attention(q, conditioning_.text_kv[index], pad_count_, conditioning_.image_kv[index],
                        mixed);
  project_out(mixed, layer.cross_o, layer.cross_o.epilogue(true), p.cross_o, scratch_.x);
}

// x += proj(Attn(q(LN(x)), audio tokens of the same latent frame)); nothing for latent frame 0 of
// block 0.
void Rank::audio_layer(const Pass& pass, int64_t index) {
  static const RangeName name("audio");
  const Range range(name);
  const int64_t n = audio_frames_;
  if (n == 0) return;
  const ModelConfig& c = config_;
  const Layer& layer = weights_.layers[index];
  const LayerPrecision& p = precision_.layers[index];
  const DType activations = precision_.activations;
  // The projection has a bias, so the rows of latent frame 0 are left out altogether.
  const Rows x = scratch_.x.from(scratch_.x.rows - n * tokens_per_frame());
  const Rows normed = scratch_.normed.as(x.rows, c.dim, p.audio_q);
  const Rows q = scratch_.wide.as(x.rows, c.dim, activations);
  ops_->layer_norm(x, layer.audio_norm.gain, layer.audio_norm.bias, c.eps, normed);
  ops_->linear(normed, layer.audio_q.weight, layer.audio_q.epilogue(), q);
  const Rows mixed = mixed_rows(x.rows, p.audio_o == DType::f8 ? DType::f8 : activations);
  Rows kv = pass.audio_kv[index];
  const bool alike = pass.audio_frames == 1;
  const int64_t kv_frames = alike ? 1 : n;
  if (!alike) kv = kv.from((frames_.end - n - heard_.begin) * c.context_tokens);
  kv.rows = kv_frames * c.context_tokens;
  ops_->audio_attention(q, kv, n, kv_frames, c.num_heads, pass.audio_v_scale[index], mixed);
  project_out(mixed, layer.audio_o, layer.audio_o.epilogue(true), p.audio_o, x);
}

// x += gate1 · W2·GELU_tanh(W1·(LN(x)·(1 + scale1) + shift1)).
void Rank::ffn_layer(int step, int64_t index) {
  static const RangeName name("ffn");
  const Range range(name);
  const ModelConfig& c = config_;
  const Layer& layer = weights_.layers[index];
  const LayerPrecision& p = precision_.layers[index];
  const DType activations = precision_.activations;
  const StepConstants& constants = layer.steps[step];
  const int64_t m = scratch_.x.rows;
  const Rows normed = scratch_.normed.as(m, c.dim, p.ffn_up);
  const Rows up = scratch_.wide.as(m, c.ffn_dim, activations);
  ops_->layer_norm(scratch_.x, constants.ffn_norm.gain, constants.ffn_norm.bias, c.eps, normed);
  ops_->linear(normed, layer.ffn_up.weight, layer.ffn_up.epilogue(), up);
  const Rows activated = scratch_.normed.as(m, c.ffn_dim, p.ffn_down);
  ops_->activate(up, Activation::gelu_tanh, activated);
  ops_->linear(activated, layer.ffn_down.weight, constants.ffn_down, scratch_.x);
}

// Where attention writes: for its projection in fp8 the operand itself, whose memory is free by
// then.
Rows Rank::mixed_rows(int64_t rows, DType dtype) {
  return (dtype == DType::f8 ? scratch_.normed : scratch_.mixed).as(rows, config_.dim, dtype);
}

// x = what attention mixed through its projection, in the format of that.
void Rank::project_out(const Rows& mixed, const Linear& linear, const Epilogue& epilogue,
                       DType precision, const Rows& x) {
  Rows operand = mixed;
  if (precision != mixed.dtype) {
    operand = scratch_.normed.as(mixed.rows, mixed.cols, precision);
    ops_->quantize(mixed, operand);
  }
  ops_->linear(operand, linear.weight, epilogue, x);
}

}  // namespace liveact
