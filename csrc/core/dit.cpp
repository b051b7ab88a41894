// One velocity evaluation, as in the paper: patch embedding, the layers, the head. A layer is a
// list of op calls; nothing here knows which backend runs them.

#include "core/nvtx.h"
#include "liveact/error.h"
#include "liveact/stream.h"

namespace liveact {

void Stream::velocity(Pass& pass, int step, bool with_audio) {
  const Model& model = *model_;
  const ModelConfig& c = config_;
  const DType plain = precision_.activations;
  const int64_t n = frames_of_next_block();
  const int64_t m = n * tokens_per_frame();
  const int64_t h = options_.latent_height;
  const int64_t w = options_.latent_width;
  x_ = x_.as(m, c.dim, plain);

  {
    static const RangeName name("embed");
    const Range range(name);
    const Rows patches = patches_.as(m, 4 * c.in_dim, plain);
    ops_->patchify(z_, y_, c.out_dim, c.in_dim - c.out_dim, y_frames_,
                   options_.slots.first_slot_of_block(block_), n, h, w, patches);
    ops_->linear(patches, model.patch_embedding.weight, model.patch_embedding.epilogue(), x_);
  }

  for (int64_t i = 0; i < c.num_layers; ++i) {
    if (cancelled_) throw CancelledError("denoise: cancelled");
    const Layer& layer = model.layers[i];
    const LayerPrecision& p = precision_.layers[i];
    const Range range(layer.range);
    self_attention_layer(layer, p, pass, step, i);
    cross_attention_layer(layer, p, i);
    if (with_audio) audio_layer(layer, p, pass, i);
    ffn_layer(layer, p, step);
  }

  static const RangeName name("head");
  const Range range(name);
  const Rows normed = normed_.as(m, c.dim, plain);
  const Rows out = wide_.as(m, 4 * c.out_dim, DType::f32);
  const Norm& norm = model.head_norm[step];
  ops_->layer_norm(x_, norm.gain, norm.bias, c.eps, normed);
  ops_->linear(normed, model.head.weight, model.head.epilogue(), out);
  ops_->unpatchify(out, c.out_dim, n, h, w, v_);
}

// x += gate0 · O(SelfAttn(LN(x)·(1 + scale0) + shift0)); then this layer's context for the next
// block, which reads nothing but what is here now.
void Stream::self_attention_layer(const Layer& layer, const LayerPrecision& p, Pass& pass, int step,
                                  int64_t index) {
  static const RangeName name("self_attention");
  const Range range(name);
  const ModelConfig& c = config_;
  const DType plain = precision_.activations;
  const StepConstants& constants = layer.steps[step];
  const int64_t m = x_.rows;
  const int64_t first_slot = options_.slots.first_slot_of_block(block_);
  const KvSegment& context = pass.contexts[step * c.num_layers + index];

  const Rows normed = normed_.as(m, c.dim, p.self_qkv);
  const Rows qkv = wide_.as(m, 3 * c.dim, plain);
  ops_->layer_norm(x_, constants.self_norm.gain, constants.self_norm.bias, c.eps, normed);
  ops_->linear(normed, layer.self_qkv.weight, layer.self_qkv.epilogue(), qkv);

  Heads q = q_;
  q.dtype = p.attention;
  q.tokens = m;
  KvSegment current = current_;
  current.dtype = p.attention;
  current.tokens = m;
  current.v_scale = context.v_scale;
  if (block_ == 0 && p.attention == DType::f8) ops_->value_scale(qkv, c.num_heads, context.v_scale);
  ops_->split_qkv(qkv, layer.self_q_norm.gain, layer.self_k_norm.gain, c.eps, rope_, first_slot, q,
                  current);

  KvSegment attended = context;
  if (block_ == 0) attended.tokens = 0;
  const Rows mixed = mixed_.as(m, c.dim, plain);
  ops_->self_attention(q, attended, current, mixed);
  const Rows o_in = p.self_o == plain ? mixed : normed_.as(m, c.dim, p.self_o);
  if (p.self_o != plain) ops_->quantize(mixed, o_in);
  ops_->linear(o_in, layer.self_o.weight, constants.self_o, x_);

  static const RangeName memory_name("memory_update");
  const Range memory_range(memory_name);
  CompressFilter filter = layer.token_filter;
  filter.axis = options_.memory.axis;
  if (options_.memory.values == ValueFilter::key) filter.value_taps = filter.key_taps;
  if (options_.memory.memory == Memory::mean) filter.key_taps = filter.value_taps = nullptr;
  KvSegment staging = staging_;
  staging.dtype = context.dtype;
  staging.v_scale = context.v_scale;
  ops_->update_memory(block_ == 0 ? first_update_ : update_, filter, rope_, first_slot, current,
                      staging, context);
}

// x += O(Attn(RMS(q(n3)), text) + Attn(RMS(q(n3)), image)), n3 = affine LN(x).
void Stream::cross_attention_layer(const Layer& layer, const LayerPrecision& p, int64_t index) {
  static const RangeName name("cross_attention");
  const Range range(name);
  const ModelConfig& c = config_;
  const DType plain = precision_.activations;
  const int64_t m = x_.rows;
  const Rows normed = normed_.as(m, c.dim, p.cross_q);
  const Rows q = wide_.as(m, c.dim, plain);
  ops_->layer_norm(x_, layer.cross_norm.gain, layer.cross_norm.bias, c.eps, normed);
  ops_->linear(normed, layer.cross_q.weight, layer.cross_q.epilogue(), q);
  ops_->rms_norm(q, layer.cross_q_norm.gain, c.eps, q);
  const Rows mixed = mixed_.as(m, c.dim, plain);
  ops_->cross_attention(q, text_kv_[index], pad_count_, image_kv_[index], mixed);
  const Rows o_in = p.cross_o == plain ? mixed : normed_.as(m, c.dim, p.cross_o);
  if (p.cross_o != plain) ops_->quantize(mixed, o_in);
  ops_->linear(o_in, layer.cross_o.weight, layer.cross_o.epilogue(true), x_);
}

// x += proj(Attn(q(LN(x)), audio tokens of the same latent frame)); nothing for latent frame 0 of
// block 0.
void Stream::audio_layer(const Layer& layer, const LayerPrecision& p, const Pass& pass,
                         int64_t index) {
  static const RangeName name("audio");
  const Range range(name);
  const ModelConfig& c = config_;
  const DType plain = precision_.activations;
  // The projection has a bias, so the rows of latent frame 0 are left out altogether.
  const int64_t skipped = block_ == 0 ? tokens_per_frame() : 0;
  const int64_t n = frames_of_next_block() - (block_ == 0 ? 1 : 0);
  const Rows x = x_.from(skipped);
  const Rows normed = normed_.as(x.rows, c.dim, p.audio_q);
  const Rows q = wide_.as(x.rows, c.dim, plain);
  ops_->layer_norm(x, layer.audio_norm.gain, layer.audio_norm.bias, c.eps, normed);
  ops_->linear(normed, layer.audio_q.weight, layer.audio_q.epilogue(), q);
  const Rows mixed = mixed_.as(x.rows, c.dim, plain);
  Rows kv = pass.audio_kv[index];
  const int64_t kv_frames = pass.audio_frames == 1 ? 1 : n;
  kv.rows = kv_frames * c.context_tokens;
  ops_->audio_attention(q, kv, n, kv_frames, c.num_heads, mixed);
  const Rows o_in = p.audio_o == plain ? mixed : normed_.as(x.rows, c.dim, p.audio_o);
  if (p.audio_o != plain) ops_->quantize(mixed, o_in);
  ops_->linear(o_in, layer.audio_o.weight, layer.audio_o.epilogue(true), x);
}

// x += gate1 · W2·GELU_tanh(W1·(LN(x)·(1 + scale1) + shift1)).
void Stream::ffn_layer(const Layer& layer, const LayerPrecision& p, int step) {
  static const RangeName name("ffn");
  const Range range(name);
  const ModelConfig& c = config_;
  const DType plain = precision_.activations;
  const StepConstants& constants = layer.steps[step];
  const int64_t m = x_.rows;
  const Rows normed = normed_.as(m, c.dim, p.ffn_up);
  const Rows up = wide_.as(m, c.ffn_dim, plain);
  ops_->layer_norm(x_, constants.ffn_norm.gain, constants.ffn_norm.bias, c.eps, normed);
  ops_->linear(normed, layer.ffn_up.weight, layer.ffn_up.epilogue(), up);
  const Rows activated = normed_.as(m, c.ffn_dim, p.ffn_down);
  ops_->activate(up, Activation::gelu_tanh, activated);
  ops_->linear(activated, layer.ffn_down.weight, constants.ffn_down, x_);
}

}  // namespace liveact
