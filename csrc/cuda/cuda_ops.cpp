// The ops as launches. What a kernel is called, and the order of its arguments, is that of its spec
// in triton_kernels/; the launcher checks number, types and promises against the manifest.

#include "cuda/cuda_ops.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/check.h"

namespace liveact::cuda {

namespace {

constexpr int64_t kMaxHeads = 64;  // MAX_HEADS in triton_kernels/common.py

std::string variant(DType dtype) {
  return dtype == DType::f8 ? "f8" : dtype == DType::bf16 ? "bf16" : "f32";
}

// Columns of V. The kernels address a segment with 32 bits, which no promise of a parameter says.
int64_t v_stride(const KvSegment& segment) {
  const int64_t columns = (segment.tokens + kValueStride - 1) / kValueStride * kValueStride;
  LIVEACT_CHECK(segment.heads * segment.head_dim * columns <= std::numeric_limits<int32_t>::max(),
                "cuda: expected fewer than 2^31 keys x width in a segment, found ", segment.heads,
                " x ", segment.head_dim, " x ", columns);
  return columns;
}

// What a kernel of attention that writes fp8 has behind its name.
std::string written(const Rows& out) { return out.dtype == DType::f8 ? ".to_f8" : ""; }

void check_heads(int64_t heads) {
  LIVEACT_CHECK(heads <= kMaxHeads, "cuda attention: expected at most ", kMaxHeads,
                " heads, found ", heads);
}

}  // namespace

void CudaOps::patchify(const float* z, const float* y, int64_t z_channels, int64_t y_channels,
                       int64_t y_frames, int64_t y_first, int64_t n, int64_t h, int64_t w,
                       const Rows& tokens) {
  launch("patchify",
         {z, y, tokens.data, z_channels, y_channels, y_frames, y_first, n, h, w, tokens.size()});
}

void CudaOps::unpatchify(const Rows& tokens, int64_t channels, int64_t n, int64_t h, int64_t w,
                         float* v) {
  LIVEACT_CHECK(tokens.dtype == DType::f32, "cuda unpatchify: expected tokens in fp32, found ",
                liveact::name(tokens.dtype));
  launch("unpatchify", {tokens.data, v, channels, n, h, w, tokens.size()});
}

void CudaOps::layer_norm(const Rows& x, const float* gain, const float* bias, float eps,
                         const Rows& out) {
  const std::string fixed = "layer_norm." + std::to_string(x.cols) + "." + variant(out.dtype);
  if (device_.kernels().has(fixed)) {
    launch(fixed, {x.data, gain, bias, out.data, out.scale, x.rows, eps});
  } else {  // widths of the image and audio features, once per session or block
    launch("layer_norm.conditioning." + variant(x.dtype),
           {x.data, gain, bias, out.data, x.rows, x.cols, eps});
  }
}

void CudaOps::rms_norm(const Rows& x, const float* gain, float eps, const Rows& out) {
  launch("rms_norm." + std::to_string(x.cols) + ".bf16", {x.data, gain, out.data, x.rows, eps});
}

void CudaOps::activate(const Rows& x, Activation activation, const Rows& out) {
  const char* names[] = {"gelu_tanh", "gelu_erf", "relu"};
  const std::string name = std::string("activate.") + names[static_cast<int>(activation)];
  if (out.dtype == DType::f8) {
    launch(name + "." + std::to_string(x.cols) + ".f8", {x.data, out.data, out.scale, x.rows});
  } else {
    launch(name + ".bf16", {x.data, out.data, x.size()});
  }
}

void CudaOps::quantize(const Rows& x, const Rows& out) {
  if (out.dtype == DType::f8) {
    launch("quantize." + std::to_string(x.cols) + "." + variant(x.dtype) + ".f8",
           {x.data, out.data, out.scale, x.rows});
  } else {
    launch("quantize." + variant(x.dtype) + ".bf16", {x.data, out.data, x.size()});
  }
}

void CudaOps::value_scale(const Rows& values, int64_t heads, float* scale) {
  launch("value_scale", {values.data, scale, values.rows, heads, values.row_stride()});
}

void CudaOps::split_qkv(const Rows& qkv, const float* q_gain, const float* k_gain, float eps,
                        const Rope& rope, int64_t first_position, int64_t first_token,
                        const Heads& q, const KvSegment& current) {
  launch("split_qkv.qk." + std::to_string(qkv.cols / 3) + "." + variant(q.dtype),
         {qkv.data,
          q_gain,
          k_gain,
          q.data,
          q.scale,
          q.upper,
          q.upper_scale,
          current.k,
          current.k_scale,
          current.upper_k,
          rope.frame,
          rope.row,
          rope.col,
          qkv.rows,
          q.tokens,
          first_token,
          q.lower_heads(),
          rope.tokens_per_frame(),
          static_cast<int64_t>(rope.grid_cols),
          first_position,
          eps});
  const int64_t stride = v_stride(current);
  const int64_t end = first_token + qkv.rows;
  launch("split_qkv.v." + variant(current.dtype),
         {qkv.data, current.v, current.upper_v, current.v_scale, qkv.rows, first_token,
          end == current.tokens ? stride : end, q.heads, current.lower_heads(), stride});
}

void CudaOps::store_kv(const Rows& k, const Rows& v, const KvSegment& segment) {
  launch("store_kv.bf16", {k.data, v.data, segment.k, segment.v, segment.tokens, segment.heads});
}

void CudaOps::self_attention(const Heads& q, const KvSegment& context, const KvSegment& current,
                             const float* out_scale, const Rows& out, const Rows& rest) {
  check_heads(q.heads);
  // clang-format off
  const Argument arguments[] = {
      q.data, q.scale, context.k, context.v, current.k, current.v, current.k_scale,
      current.v_scale, out.data, out.scale, rest.data, rest.scale, out_scale, q.tokens, out.rows,
      q.heads, out.row_stride() / q.head_dim, context.tokens, current.tokens, v_stride(context),
      v_stride(current)};
  // clang-format on
  const AttentionCall call{q, context, current, out.dtype, out.row_stride()};
  if (planning_) {
    attention_.note(call, arguments);
    return;
  }
  const ContextScope scope(driver_, device_.context());
  device_.kernels().launch(attention_.name(call), stream_, KernelTable::Arguments(arguments));
}

void CudaOps::cross_attention(const Rows& q, const KvSegment& text, int64_t pad_count,
                              const KvSegment& image, const Rows& out) {
  const float pad_bias = pad_count > 0 ? std::log(static_cast<float>(pad_count)) : 0.0f;
  const int64_t text_keys = pad_count > 0 ? text.tokens : text.tokens - 1;
  check_heads(text.heads);
  launch("cross_attention" + written(out),
         {q.data, text.k, text.v, image.k, image.v, out.data, out.scale, text.v_scale,
          image.v_scale, q.rows, text.heads, text.tokens, text_keys, image.tokens, pad_bias});
}

void CudaOps::audio_attention(const Rows& q, const Rows& kv, int64_t n, int64_t kv_frames,
                              int64_t heads, const float* v_scale, const Rows& out) {
  check_heads(heads);
  launch("audio_attention" + written(out), {q.data, kv.data, out.data, out.scale, v_scale,
                                            q.rows / n, n, heads, kv_frames, kv.rows / kv_frames});
}

void CudaOps::build_slot(const SlotUpdate& update, const CompressFilter& filter, const Rope& rope,
                         int64_t first_slot, const KvSegment& current, const KvSegment& context,
                         const KvSegment& target) const {
  const std::string variant_name =
      (update.compresses() ? "compress." : "move.") + variant(context.dtype);
  const bool along_tokens = update.compresses() && filter.axis == CompressAxis::token;
  const int64_t frame_tokens = rope.tokens_per_frame();
  const int64_t token_stride = along_tokens ? kCompressTaps : 1;
  const int64_t tap_stride = along_tokens ? 1 : update.compresses() ? frame_tokens : 0;
  const auto taps = [&](const float* given) { return given == nullptr ? mean_taps_.f32() : given; };
  const auto& s = update.sources;
  const int64_t grid_cols = rope.grid_cols;
  // clang-format off
  launch("update_memory.key." + variant_name,
         {context.k, current.k, target.k,
          taps(filter.key_taps), rope.frame, rope.row, rope.col, filter.channels, context.heads,
          frame_tokens, grid_cols, context.tokens, current.tokens, first_slot, s[0], s[1], s[2],
          s[3], s[4], update.target, token_stride, tap_stride});
  // clang-format on
  launch("update_memory.value." + variant_name,
         {context.v, current.v, target.v, taps(filter.value_taps), filter.channels, context.heads,
          frame_tokens, v_stride(context), v_stride(current), first_slot, s[0], s[1], s[2], s[3],
          s[4], update.target, token_stride, tap_stride});
}

// In place: targets that read the context go through staging, then come those that read the current
// block only, then the staged slots are copied.
void CudaOps::update_memory(std::span<const SlotUpdate> table, const CompressFilter& filter,
                            const Rope& rope, int64_t first_slot, const KvSegment& current,
                            const KvSegment& staging, const KvSegment& context) {
  const auto reads_context = [&](const SlotUpdate& update) {
    return std::any_of(update.sources.begin(), update.sources.begin() + update.num_sources,
                       [&](int slot) { return slot < first_slot; });
  };
  for (const bool staged : {true, false}) {
    for (const SlotUpdate& update : table) {
      if (reads_context(update) != staged) continue;
      build_slot(update, filter, rope, first_slot, current, context, staged ? staging : context);
    }
  }
  for (const SlotUpdate& update : table) {
    if (!reads_context(update)) continue;
    launch("update_memory.copy." + variant(context.dtype),
           {staging.k, staging.v, context.k, context.v, context.heads, rope.tokens_per_frame(),
            context.tokens, v_stride(context), update.target});
  }
}

void CudaOps::guide(float* v, const float* v_null, float guidance, int64_t size) {
  launch("guide", {v, v_null, guidance, size});
}

void CudaOps::sampler_step(float* z, const float* v, const float* noise, float sigma,
                           float next_sigma, int64_t size) {
  launch(noise == nullptr ? "sampler_step.last" : "sampler_step.renoise",
         {z, v, noise, sigma, next_sigma, size});
}

bool CudaOps::all_finite(const float* x, int64_t size) {
  int32_t finite = 1;
  launch("all_finite", {x, flag_.data(), size});
  download(&finite, flag_.data(), sizeof(finite));
  return finite != 0;
}

}  // namespace liveact::cuda
