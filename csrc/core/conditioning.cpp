// The prompt, the image and the audio, projected to keys and values of every layer.

#include "core/rank.h"

namespace liveact {

namespace {
constexpr float kTorchEps = 1e-5f;  // torch's LayerNorm default
}

// fp32 rows in the format of the activations, in `spare` where that is another.
Rows Rank::operand_of(const Rows& given, const Rows& spare) {
  if (precision_.activations == DType::f32) return given;
  const Rows converted = spare.as(given.rows, given.cols, precision_.activations);
  ops_->quantize(given, converted);
  return converted;
}

void Rank::set_prompt(const float* text, int64_t tokens) {
  static const RangeName name("set_prompt");
  const Range range(name);
  const Weights& w = weights_;
  const ModelConfig& c = config_;
  const DType activations = precision_.activations;
  // The last row is the padding row: all zeros going in, and one key for all of them coming out.
  const int64_t n = tokens + 1;
  const Rows in = conditioning_.in.as(n, c.text_dim, DType::f32);
  const std::vector<float> zeros(c.text_dim, 0.0f);
  ops_->upload(in.data, text, 4 * tokens * c.text_dim);
  ops_->upload(in.from(tokens).data, zeros.data(), 4 * c.text_dim);
  const Rows operand = operand_of(in, conditioning_.b);
  const Rows hidden = conditioning_.a.as(n, c.dim, activations);
  const Rows context = conditioning_.b.as(n, c.dim, activations);
  ops_->linear(operand, w.text_in.weight, w.text_in.epilogue(), hidden);
  ops_->activate(hidden, Activation::gelu_tanh, hidden);
  ops_->linear(hidden, w.text_out.weight, w.text_out.epilogue(), context);
  project_context(context, conditioning_.a, false);
  pad_count_ = c.text_len - tokens;
  ops_->forget();  // recorded ops have the number of tokens in them
}

void Rank::set_image(const float* features, int64_t tokens, const float* y, int64_t frames) {
  static const RangeName name("set_image");
  const Range range(name);
  const Weights& w = weights_;
  const ModelConfig& c = config_;
  const DType activations = precision_.activations;
  const int64_t plane = options_.latent_height * options_.latent_width;
  for (int64_t channel = 0; channel < c.in_dim - c.out_dim; ++channel) {
    ops_->upload(conditioning_.y + channel * conditioning_.y_frames * plane,
                 y + channel * frames * plane, 4 * conditioning_.y_frames * plane);
  }
  const Rows in = conditioning_.in.as(tokens, c.image_dim, DType::f32);
  ops_->upload(in.data, features, 4 * tokens * c.image_dim);
  const Rows a = conditioning_.a.as(tokens, c.image_dim, activations);
  const Rows b = conditioning_.b.as(tokens, c.image_dim, activations);
  const Rows context = conditioning_.a.as(tokens, c.dim, activations);
  const Rows operand = operand_of(in, conditioning_.b);
  ops_->layer_norm(operand, w.image_in_norm.gain, w.image_in_norm.bias, kTorchEps, a);
  ops_->linear(a, w.image_in.weight, w.image_in.epilogue(), b);
  ops_->activate(b, Activation::gelu_erf, b);
  ops_->linear(b, w.image_out.weight, w.image_out.epilogue(), context);
  ops_->layer_norm(context, w.image_out_norm.gain, w.image_out_norm.bias, kTorchEps, context);
  project_context(context, conditioning_.b, true);
}

// Keys and values of every layer from a text or an image [tokens, D]. `spare` is memory for it in
// the format of the products.
void Rank::project_context(const Rows& context, const Rows& spare, bool image) {
  Rows operand = context;
  for (int64_t i = 0; i < config_.num_layers; ++i) {
    const DType format = precision_.layers[i].cross_kv;
    if (format != operand.dtype) {
      operand = format == context.dtype ? context : spare.as(context.rows, context.cols, format);
      if (format != context.dtype) ops_->quantize(context, operand);
    }
    const Layer& layer = weights_.layers[i];
    KvSegment& segment = image ? conditioning_.image_kv[i] : conditioning_.text_kv[i];
    segment.tokens = context.rows;
    if (image) {
      project_kv(operand, layer.image_k, layer.image_k_norm, layer.image_v, segment);
    } else {
      project_kv(operand, layer.text_k, layer.text_k_norm, layer.text_v, segment);
    }
    if (precision_.layers[i].cross_o == DType::f8) {
      const Rows v = scratch_.normed.as(context.rows, config_.dim, context.dtype);
      ops_->value_scale(v, config_.num_heads, segment.v_scale);
    }
  }
}

void Rank::project_kv(const Rows& context, const Linear& key, const Norm& key_norm,
                      const Linear& value, const KvSegment& segment) {
  const DType activations = precision_.activations;
  const int64_t dim = config_.dim;
  const Rows k = scratch_.wide.as(context.rows, dim, activations);
  const Rows v = scratch_.normed.as(context.rows, dim, activations);
  ops_->linear(context, key.weight, key.epilogue(), k);
  ops_->rms_norm(k, key_norm.gain, config_.eps, k);
  ops_->linear(context, value.weight, value.epilogue(), v);
  ops_->store_kv(k, v, segment);
}

// In block 0 latent frame 0 has no audio; its window would start 3 features earlier.
void Rank::set_audio(const float* features, int64_t feature_rows) {
  const int64_t frames = heard_.end - heard_.begin;
  const int64_t first_row = first_ ? 4 * (heard_.begin - 1) + 1 : 4 * heard_.begin;
  if (frames > 0) project_audio(features, feature_rows, first_row, frames, memory_.main);
}

void Rank::set_silence() {
  constexpr int64_t kRows = 4 + 4;  // of one latent frame
  const std::vector<float> silence(kRows * config_.audio_dim, 0.0f);
  project_audio(silence.data(), kRows, 0, 1, memory_.null);
}

// The features of latent frame j are kAudioWindow consecutive rows from first_row + 4 j on: a
// strided view, so nothing is gathered.
void Rank::project_audio(const float* features, int64_t feature_rows, int64_t first_row,
                         int64_t frames, Pass& pass) {
  static const RangeName name("conditioning");
  const Range range(name);
  const Weights& w = weights_;
  const ModelConfig& c = config_;
  const DType activations = precision_.activations;
  const Rows in = conditioning_.in.as(feature_rows, c.audio_dim, DType::f32);
  ops_->upload(in.data, features, 4 * feature_rows * c.audio_dim);
  const Rows rows = operand_of(in, conditioning_.a);
  Rows windows = rows.from(first_row).as(frames, kAudioWindow * c.audio_dim, activations);
  windows.stride = 4 * c.audio_dim;
  const Rows a = conditioning_.b.as(frames, c.intermediate_dim, activations);
  const Rows b = conditioning_.a.as(frames, c.intermediate_dim, activations);
  ops_->linear(windows, w.audio_window.weight, w.audio_window.epilogue(), a);
  ops_->activate(a, Activation::relu, a);
  ops_->linear(a, w.audio_hidden.weight, w.audio_hidden.epilogue(), b);
  ops_->activate(b, Activation::relu, b);
  const Rows projected = conditioning_.b.as(frames, c.context_tokens * c.output_dim, activations);
  ops_->linear(b, w.audio_out.weight, w.audio_out.epilogue(), projected);
  const Rows tokens = conditioning_.b.as(frames * c.context_tokens, c.output_dim, activations);
  ops_->layer_norm(tokens, w.audio_norm.gain, w.audio_norm.bias, kTorchEps, tokens);
  for (int64_t i = 0; i < c.num_layers; ++i) {
    const Linear& kv = w.layers[i].audio_kv;
    Rows target = pass.audio_kv[i];
    target.rows = tokens.rows;
    ops_->linear(tokens, kv.weight, kv.epilogue(), target);
    if (precision_.layers[i].audio_o == DType::f8) {
      ops_->value_scale(target.columns(c.dim, c.dim), c.num_heads, pass.audio_v_scale[i]);
    }
  }
}

}  // namespace liveact
