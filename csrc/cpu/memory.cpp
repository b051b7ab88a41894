// Heads, rotation and the ConvKV memory: split_qkv, store_kv, update_memory.

#include <omp.h>

#include <cstring>

#include "cpu/cpu_backend.h"
#include "cpu/rows.h"

namespace liveact::cpu {

namespace {

// cos/sin of one token, gathered from the three axes; direction -1 un-rotates.
void rotate(const Rope& rope, int64_t position, int64_t token_in_frame, float direction,
            const float* x, float* out) {
  const float* axes[3] = {rope.frame + position * rope.pairs_frame * 2,
                          rope.row + token_in_frame / rope.grid_cols * rope.pairs_row * 2,
                          rope.col + token_in_frame % rope.grid_cols * rope.pairs_col * 2};
  const int pairs[3] = {rope.pairs_frame, rope.pairs_row, rope.pairs_col};
  for (int axis = 0; axis < 3; ++axis) {
    const float* table = axes[axis];
    for (int j = 0; j < pairs[axis]; ++j, x += 2, out += 2) {
      const float c = table[2 * j];
      const float s = table[2 * j + 1] * direction;
      const float even = x[0];
      const float odd = x[1];
      out[0] = even * c - odd * s;
      out[1] = even * s + odd * c;
    }
  }
}

// Writes hd values of one head and token in the segment's format, fp8 with a scale of its own.
void store_head(const float* values, DType dtype, void* data, float* scales, int64_t token_index,
                int64_t head_dim) {
  const int64_t offset = token_index * head_dim;
  switch (dtype) {
    case DType::f32:
      std::memcpy(static_cast<float*>(data) + offset, values, sizeof(float) * head_dim);
      return;
    case DType::bf16:
      encode_bf16(values, head_dim, static_cast<uint16_t*>(data) + offset);
      return;
    case DType::f8:
      scales[token_index] = quantize_f8(values, head_dim, static_cast<uint8_t*>(data) + offset);
      return;
  }
}

// The same for a value: fp8 with the fixed scale of its head.
void store_value(const float* values, const KvSegment& segment, int64_t head, int64_t token_index) {
  if (segment.dtype == DType::f8) {
    encode_f8(values, segment.head_dim, 1.0f / segment.v_scale[head],
              static_cast<uint8_t*>(segment.v) + token_index * segment.head_dim);
  } else {
    store_head(values, segment.dtype, segment.v, nullptr, token_index, segment.head_dim);
  }
}

const float* load_key(const KvSegment& segment, int64_t token_index, float* scratch) {
  const float scale = segment.dtype == DType::f8 ? segment.k_scale[token_index] : 1.0f;
  return read_f32(segment.k, segment.dtype, token_index * segment.head_dim, segment.head_dim, scale,
                  scratch);
}

const float* load_value(const KvSegment& segment, int64_t head, int64_t token_index,
                        float* scratch) {
  const float scale = segment.dtype == DType::f8 ? segment.v_scale[head] : 1.0f;
  return read_f32(segment.v, segment.dtype, token_index * segment.head_dim, segment.head_dim, scale,
                  scratch);
}

}  // namespace

void CpuOps::value_scale(const Rows& qkv, int64_t heads, float* v_scale) {
  const int64_t width = qkv.cols / 3;
  const int64_t hd = width / heads;
#pragma omp parallel for schedule(static) num_threads(threads_)
  for (int64_t head = 0; head < heads; ++head) {
    float bound = kF8AmaxFloor;
    for (int64_t r = 0; r < qkv.rows; ++r) {
      const float* v = read_f32(qkv.data, qkv.dtype, r * qkv.row_stride() + 2 * width + head * hd,
                                hd, 1.0f, row_scratch(omp_get_thread_num()));
      bound = std::max(bound, amax(v, hd));
    }
    v_scale[head] = kValueHeadroom * bound / kF8Max;
  }
}

void CpuOps::split_qkv(const Rows& qkv, const float* q_gain, const float* k_gain, float eps,
                       const Rope& rope, int64_t first_position, const Heads& q,
                       const KvSegment& current) {
  const int64_t width = qkv.cols / 3;
  const int64_t hd = q.head_dim;
  const int64_t frame_tokens = rope.tokens_per_frame();
#pragma omp parallel for schedule(static) num_threads(threads_)
  for (int64_t t = 0; t < qkv.rows; ++t) {
    float* scratch = row_scratch(omp_get_thread_num());
    float* normed = scratch + qkv.cols;
    float* rotated = normed + width;
    const float* row = read_row(qkv, t, scratch);
    const int64_t position = first_position + t / frame_tokens;
    for (int part = 0; part < 2; ++part) {
      const float* x = row + part * width;
      const float* gain = part == 0 ? q_gain : k_gain;
      float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < width; ++i) squares += x[i] * x[i];
      const float inverse = 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) normed[i] = x[i] * inverse * gain[i];
      for (int64_t head = 0; head < q.heads; ++head) {
        rotate(rope, position, t % frame_tokens, 1.0f, normed + head * hd, rotated);
        const int64_t index = head * qkv.rows + t;
        if (part == 0) {
          store_head(rotated, q.dtype, q.data, q.scale, index, hd);
        } else {
          store_head(rotated, current.dtype, current.k, current.k_scale, index, hd);
        }
      }
    }
    for (int64_t head = 0; head < q.heads; ++head) {
      store_value(row + 2 * width + head * hd, current, head, head * qkv.rows + t);
    }
  }
}

void CpuOps::store_kv(const Rows& k, const Rows& v, const KvSegment& segment) {
  const int64_t hd = segment.head_dim;
#pragma omp parallel for schedule(static) num_threads(threads_)
  for (int64_t t = 0; t < k.rows; ++t) {
    float* scratch = row_scratch(omp_get_thread_num());
    const float* key = read_row(k, t, scratch);
    const float* value = read_row(v, t, scratch + k.cols);
    for (int64_t head = 0; head < segment.heads; ++head) {
      const int64_t index = head * segment.tokens + t;
      store_head(key + head * hd, segment.dtype, segment.k, segment.k_scale, index, hd);
      store_value(value + head * hd, segment, head, index);
    }
  }
}

void CpuOps::update_memory(std::span<const SlotUpdate> table, const CompressFilter& filter,
                           const Rope& rope, int64_t first_slot, const KvSegment& current,
                           const KvSegment& staging, const KvSegment& context) {
  const int64_t hd = context.head_dim;
  const int64_t frame_tokens = rope.tokens_per_frame();

  // One target token of one head, from sources read before anything is overwritten.
  const auto build = [&](const SlotUpdate& update, int64_t head, int64_t t, float* scratch) {
    float* decoded = scratch;
    float* unrotated = scratch + hd;
    float* key = scratch + 2 * hd;
    float* value = scratch + 3 * hd;
    std::fill_n(key, 2 * hd, 0.0f);
    for (int j = 0; j < update.num_sources; ++j) {
      const bool along_tokens = update.compresses() && filter.axis == CompressAxis::token;
      const int64_t at = along_tokens ? t * kCompressTaps + j : 0;
      const int slot = update.sources[along_tokens ? at / frame_tokens : j];
      const int64_t token = along_tokens ? at % frame_tokens : t;
      const KvSegment& source = slot >= first_slot ? current : context;
      const int64_t index = head * source.tokens +
                            (slot >= first_slot ? slot - first_slot : slot) * frame_tokens + token;
      const float mean = update.compresses() ? 1.0f / kCompressTaps : 1.0f;
      const auto accumulate = [&](const float* x, const float* taps, float* sum) {
        for (int64_t d = 0; d < hd; ++d) {
          const bool filtered = taps != nullptr && update.compresses();
          sum[d] += x[d] * (filtered ? taps[(head * hd + d) * kCompressTaps + j] : mean);
        }
      };
      rotate(rope, slot, token, -1.0f, load_key(source, index, decoded), unrotated);
      accumulate(unrotated, filter.key_taps, key);
      accumulate(load_value(source, head, index, decoded), filter.value_taps, value);
    }
    const int64_t target = head * staging.tokens + update.target * frame_tokens + t;
    rotate(rope, update.target, t, 1.0f, key, unrotated);
    store_head(unrotated, staging.dtype, staging.k, staging.k_scale, target, hd);
    store_value(value, staging, head, target);
  };

#pragma omp parallel num_threads(threads_)
  {
    float* scratch = row_scratch(omp_get_thread_num());
    for (const SlotUpdate& update : table) {
#pragma omp for schedule(static) nowait
      for (int64_t unit = 0; unit < context.heads * frame_tokens; ++unit) {
        build(update, unit / frame_tokens, unit % frame_tokens, scratch);
      }
    }
  }
  for (const SlotUpdate& update : table) {
#pragma omp parallel for schedule(static) num_threads(threads_)
    for (int64_t head = 0; head < context.heads; ++head) {
      const int64_t index = head * context.tokens + update.target * frame_tokens;
      const int64_t offset = index * hd * size_bytes(context.dtype);
      const int64_t bytes = frame_tokens * hd * size_bytes(context.dtype);
      std::memcpy(static_cast<char*>(context.k) + offset,
                  static_cast<const char*>(staging.k) + offset, bytes);
      std::memcpy(static_cast<char*>(context.v) + offset,
                  static_cast<const char*>(staging.v) + offset, bytes);
      if (context.dtype == DType::f8) {
        std::memcpy(context.k_scale + index, staging.k_scale + index, sizeof(float) * frame_tokens);
      }
    }
  }
}

void CpuOps::export_kv(const KvSegment& segment, const Rope& rope, int64_t first_position, float* k,
                       float* v) {
  const int64_t hd = segment.head_dim;
  const int64_t frame_tokens = rope.tokens_per_frame();
  float* scratch = row_scratch(0);
  for (int64_t t = 0; t < segment.tokens; ++t) {
    for (int64_t head = 0; head < segment.heads; ++head) {
      const int64_t index = head * segment.tokens + t;
      const int64_t out = (t * segment.heads + head) * hd;
      rotate(rope, first_position + t / frame_tokens, t % frame_tokens, -1.0f,
             load_key(segment, index, scratch), k + out);
      std::memcpy(v + out, load_value(segment, head, index, scratch), sizeof(float) * hd);
    }
  }
}

}  // namespace liveact::cpu
