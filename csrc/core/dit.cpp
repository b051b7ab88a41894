// One velocity evaluation, as in the paper: patch embedding, the layers, the head. A layer is a
// list of op calls; nothing here knows which backend runs them.

#include "core/stream_impl.h"

namespace liveact {

void Stream::Impl::velocity(Pass& pass, int step, bool with_audio) {
  const ModelConfig& c = config_;
  const DType activations = precision_.activations;
  const int64_t n = frames_of_next_block();
  const int64_t m = n * tokens_per_frame();
  const int64_t h = options_.latent_height;
  const int64_t w = options_.latent_width;
  scratch_.x = scratch_.x.as(m, c.dim, activations);

  {
    static const RangeName name("embed");
    const Range range(name);
    const Rows patches = scratch_.patches.as(m, 4 * c.in_dim, activations);
    ops_->patchify(scratch_.z, conditioning_.y, c.out_dim, c.in_dim - c.out_dim,
                   conditioning_.y_frames, options_.slots.first_slot_of_block(block_), n, h, w,
                   patches);
    ops_->linear(patches, weights_.patch_embedding.weight, weights_.patch_embedding.epilogue(),
                 scratch_.x);
  }

  for (int64_t i = 0; i < c.num_layers; ++i) {
    if (cancelled_) throw CancelledError("denoise: cancelled");
    const Layer& layer = weights_.layers[i];
    const LayerPrecision& p = precision_.layers[i];
    const Range range(layer.range);
    self_attention_layer(layer, p, pass, step, i);
    cross_attention_layer(layer, p, i);
    if (with_audio) audio_layer(layer, p, pass, i);
    ffn_layer(layer, p, step);
  }

  static const RangeName name("head");
  const Range range(name);
  const Rows normed = scratch_.normed.as(m, c.dim, activations);
  const Rows out = scratch_.wide.as(m, 4 * c.out_dim, DType::f32);
  const Norm& norm = weights_.head_norm[step];
  ops_->layer_norm(scratch_.x, norm.gain, norm.bias, c.eps, normed);
  ops_->linear(normed, weights_.head.weight, weights_.head.epilogue(), out);
  ops_->unpatchify(out, c.out_dim, n, h, w, scratch_.v);
}

// x += gate0 · O(SelfAttn(LN(x)·(1 + scale0) + shift0)); then this layer's context for the next
// block, which reads nothing but what is here now.
void Stream::Impl::self_attention_layer(const Layer& layer, const LayerPrecision& p, Pass& pass,
                                        int step, int64_t index) {
  static const RangeName name("self_attention");
  const Range range(name);
  const ModelConfig& c = config_;
  const DType activations = precision_.activations;
  const StepConstants& constants = layer.steps[step];
  const int64_t m = scratch_.x.rows;
  const int64_t first_slot = options_.slots.first_slot_of_block(block_);
  const KvSegment& context = pass.contexts[step * c.num_layers + index];

  const Rows normed = scratch_.normed.as(m, c.dim, p.self_qkv);
  const Rows qkv = scratch_.wide.as(m, 3 * c.dim, activations);
  ops_->layer_norm(scratch_.x, constants.self_norm.gain, constants.self_norm.bias, c.eps, normed);
  ops_->linear(normed, layer.self_qkv.weight, layer.self_qkv.epilogue(), qkv);

  Heads q = scratch_.q;
  q.dtype = p.attention;
  q.tokens = m;
  KvSegment current = scratch_.current;
  current.dtype = p.attention;
  current.tokens = m;
  current.v_scale = context.v_scale;
  if (block_ == 0 && p.attention == DType::f8) {
    ops_->value_scale(qkv.columns(2 * c.dim, c.dim), c.num_heads, context.v_scale);
  }
  ops_->split_qkv(qkv, layer.self_q_norm.gain, layer.self_k_norm.gain, c.eps, rope_, first_slot, q,
                  current);

  KvSegment attended = context;
  if (block_ == 0) attended.tokens = 0;
  // Block 0 finds the scale that the later ones write in fp8 with.
  float* mixed_scale = pass.mixed_scale[step * c.num_layers + index];
  const bool in_f8 = p.attention == DType::f8 && p.self_o == DType::f8;
  const Rows mixed = mixed_rows(m, in_f8 && block_ > 0 ? DType::f8 : activations);
  ops_->self_attention(q, attended, current, mixed_scale, mixed);
  if (in_f8 && block_ == 0) ops_->value_scale(mixed, c.num_heads, mixed_scale);
  project_out(mixed, layer.self_o, constants.self_o, p.self_o, scratch_.x);
  update_context(layer, current, context);
}

// `context` becomes that of the next block.
void Stream::Impl::update_context(const Layer& layer, const KvSegment& current,
                                  const KvSegment& context) {
  static const RangeName name("memory_update");
  const Range range(name);
  CompressFilter filter = layer.token_filter;
  filter.axis = options_.memory.axis;
  if (options_.memory.values == ValueFilter::key) filter.value_taps = filter.key_taps;
  if (options_.memory.memory == Memory::mean) filter.key_taps = filter.value_taps = nullptr;
  KvSegment staging = scratch_.staging;
  staging.dtype = context.dtype;
  staging.v_scale = context.v_scale;
  ops_->update_memory(block_ == 0 ? first_update_ : update_, filter, rope_,
                      options_.slots.first_slot_of_block(block_), current, staging, context);
}

// x += O(Attn(RMS(q(n3)), text) + Attn(RMS(q(n3)), image)), n3 = affine LN(x).
void Stream::Impl::cross_attention_layer(const Layer& layer, const LayerPrecision& p,
                                         int64_t index) {
  static const RangeName name("cross_attention");
  const Range range(name);
  const ModelConfig& c = config_;
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
void Stream::Impl::audio_layer(const Layer& layer, const LayerPrecision& p, const Pass& pass,
                               int64_t index) {
  static const RangeName name("audio");
  const Range range(name);
  const ModelConfig& c = config_;
  const DType activations = precision_.activations;
  // The projection has a bias, so the rows of latent frame 0 are left out altogether.
  const int64_t skipped = block_ == 0 ? tokens_per_frame() : 0;
  const int64_t n = frames_of_next_block() - (block_ == 0 ? 1 : 0);
  const Rows x = scratch_.x.from(skipped);
  const Rows normed = scratch_.normed.as(x.rows, c.dim, p.audio_q);
  const Rows q = scratch_.wide.as(x.rows, c.dim, activations);
  ops_->layer_norm(x, layer.audio_norm.gain, layer.audio_norm.bias, c.eps, normed);
  ops_->linear(normed, layer.audio_q.weight, layer.audio_q.epilogue(), q);
  const Rows mixed = mixed_rows(x.rows, p.audio_o == DType::f8 ? DType::f8 : activations);
  Rows kv = pass.audio_kv[index];
  const int64_t kv_frames = pass.audio_frames == 1 ? 1 : n;
  kv.rows = kv_frames * c.context_tokens;
  ops_->audio_attention(q, kv, n, kv_frames, c.num_heads, pass.audio_v_scale[index], mixed);
  project_out(mixed, layer.audio_o, layer.audio_o.epilogue(true), p.audio_o, x);
}

// x += gate1 · W2·GELU_tanh(W1·(LN(x)·(1 + scale1) + shift1)).
void Stream::Impl::ffn_layer(const Layer& layer, const LayerPrecision& p, int step) {
  static const RangeName name("ffn");
  const Range range(name);
  const ModelConfig& c = config_;
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
Rows Stream::Impl::mixed_rows(int64_t rows, DType dtype) {
  return (dtype == DType::f8 ? scratch_.normed : scratch_.mixed).as(rows, config_.dim, dtype);
}

// x = what attention mixed through its projection, in the format of that.
void Stream::Impl::project_out(const Rows& mixed, const Linear& linear, const Epilogue& epilogue,
                               DType precision, const Rows& x) {
  Rows operand = mixed;
  if (precision != mixed.dtype) {
    operand = scratch_.normed.as(mixed.rows, mixed.cols, precision);
    ops_->quantize(mixed, operand);
  }
  ops_->linear(operand, linear.weight, epilogue, x);
}

}  // namespace liveact
