// Heads, rotation and the ConvKV memory: split_qkv, store_kv, update_memory.

#include <cstring>

#include "core/host_kv.h"
#include "cpu/cpu_backend.h"

namespace liveact::cpu {

namespace {

// Writes hd values of one head and token as row `index` of [.., hd] data, fp8 with the scale of the
// head.
void store_head(const float* values, DType dtype, const float* scales, int64_t head, void* data,
                int64_t index, int64_t head_dim) {
  const int64_t offset = index * head_dim;
  switch (dtype) {
    case DType::f32:
      std::memcpy(static_cast<float*>(data) + offset, values, sizeof(float) * head_dim);
      return;
    case DType::bf16:
      encode_bf16(values, head_dim, static_cast<uint16_t*>(data) + offset);
      return;
    case DType::f8:
      encode_f8(values, head_dim, 1.0f / scales[head], static_cast<uint8_t*>(data) + offset);
      return;
  }
}

void store_key(const float* values, const KvSegment& segment, int64_t head, int64_t index) {
  store_head(values, segment.dtype, segment.k_scale, head, segment.k, index, segment.head_dim);
}

void store_value(const float* values, const KvSegment& segment, int64_t head, int64_t index) {
  store_head(values, segment.dtype, segment.v_scale, head, segment.v, index, segment.head_dim);
}

// fp8 with a scale of its own.
void store_query(const float* values, const Heads& q, int64_t index) {
  if (q.dtype == DType::f8) {
    auto* codes = static_cast<uint8_t*>(q.data) + index * q.head_dim;
    q.scale[index] = quantize_f8(values, q.head_dim, codes);
  } else {
    store_head(values, q.dtype, nullptr, 0, q.data, index, q.head_dim);
  }
}

}  // namespace

void CpuOps::value_scale(const Rows& values, int64_t heads, float* scale) {
  const int64_t hd = values.cols / heads;
  threads_.each(heads, [&](int64_t head, int lane) {
    float bound = kF8AmaxFloor;
    for (int64_t r = 0; r < values.rows; ++r) {
      const float* v = read_f32(values.data, values.dtype, r * values.row_stride() + head * hd, hd,
                                1.0f, row_scratch(lane));
      bound = std::max(bound, amax(v, hd));
    }
    scale[head] = kValueHeadroom * bound / kF8Max;
  });
}

void CpuOps::split_qkv(const Rows& qkv, const float* q_gain, const float* k_gain, float eps,
                       const Rope& rope, int64_t first_position, int64_t first_token,
                       const Heads& q, const KvSegment& current) {
  const int64_t width = qkv.cols / 3;
  const int64_t hd = q.head_dim;
  const int64_t frame_tokens = rope.tokens_per_frame();
  const int64_t lower = q.lower_heads();
  Heads upper_q = q;
  upper_q.data = q.upper;
  upper_q.scale = q.upper_scale;
  KvSegment upper = current;
  upper.k = current.upper_k;
  upper.v = current.upper_v;
  threads_.each(qkv.rows, [&](int64_t t, int lane) {
    float* scratch = row_scratch(lane);
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
        const int64_t index = head % lower * q.tokens + first_token + t;
        if (part == 0) {
          store_query(rotated, head < lower ? q : upper_q, index);
        } else {
          store_key(rotated, head < lower ? current : upper, head, index);
        }
      }
    }
    for (int64_t head = 0; head < q.heads; ++head) {
      store_value(row + 2 * width + head * hd, head < lower ? current : upper, head,
                  head % lower * current.tokens + first_token + t);
    }
  });
}

void CpuOps::store_kv(const Rows& k, const Rows& v, const KvSegment& segment) {
  const int64_t hd = segment.head_dim;
  threads_.each(k.rows, [&](int64_t t, int lane) {
    float* scratch = row_scratch(lane);
    const float* key = read_row(k, t, scratch);
    const float* value = read_row(v, t, scratch + k.cols);
    for (int64_t head = 0; head < segment.heads; ++head) {
      const int64_t index = head * segment.tokens + t;
      store_key(key + head * hd, segment, head, index);
      store_value(value + head * hd, segment, head, index);
    }
  });
}

namespace {

struct MemoryUpdate {
  const CompressFilter& filter;
  const Rope& rope;
  int64_t first_slot;
  const KvSegment& current;
  const KvSegment& staging;
  const KvSegment& context;
};

// sum += x filtered by tap j of the channels of this head, or times `mean` without a filter.
void accumulate(const float* x, const float* taps, int j, float mean, int64_t head_dim,
                float* sum) {
  for (int64_t d = 0; d < head_dim; ++d) {
    sum[d] += x[d] * (taps != nullptr ? taps[d * kCompressTaps + j] : mean);
  }
}

// One target token of one head into staging, from sources read before anything is overwritten.
// scratch [4, hd].
void build_token(const MemoryUpdate& m, const SlotUpdate& update, int64_t head, int64_t t,
                 float* scratch) {
  const int64_t hd = m.context.head_dim;
  const int64_t frame_tokens = m.rope.tokens_per_frame();
  float* decoded = scratch;
  float* unrotated = scratch + hd;
  float* key = scratch + 2 * hd;
  float* value = scratch + 3 * hd;
  std::fill_n(key, 2 * hd, 0.0f);
  const float mean = update.compresses() ? 1.0f / kCompressTaps : 1.0f;
  const auto taps_of_head = [&](const float* taps) {
    const bool filtered = taps != nullptr && update.compresses();
    return filtered ? taps + head * hd * kCompressTaps : nullptr;
  };
  for (int j = 0; j < update.num_sources; ++j) {
    const bool along_tokens = update.compresses() && m.filter.axis == CompressAxis::token;
    const int64_t at = along_tokens ? t * kCompressTaps + j : 0;
    const int slot = update.sources[along_tokens ? at / frame_tokens : j];
    const int64_t token = along_tokens ? at % frame_tokens : t;
    const bool in_current = slot >= m.first_slot;
    const KvSegment& source = in_current ? m.current : m.context;
    const int64_t index =
        head * source.tokens + (in_current ? slot - m.first_slot : slot) * frame_tokens + token;
    rotate(m.rope, slot, token, -1.0f, load_key(source, head, index, decoded), unrotated);
    accumulate(unrotated, taps_of_head(m.filter.key_taps), j, mean, hd, key);
    accumulate(load_value(source, head, index, decoded), taps_of_head(m.filter.value_taps), j, mean,
               hd, value);
  }
  const int64_t target = head * m.staging.tokens + update.target * frame_tokens + t;
  rotate(m.rope, update.target, t, 1.0f, key, unrotated);
  store_key(unrotated, m.staging, head, target);
  store_value(value, m.staging, head, target);
}

// The slot of one head from staging to the context.
void copy_slot(const MemoryUpdate& m, int slot, int64_t head) {
  const int64_t frame_tokens = m.rope.tokens_per_frame();
  const int64_t index = head * m.context.tokens + slot * frame_tokens;
  const int64_t token_bytes = m.context.head_dim * size_bytes(m.context.dtype);
  const auto copy = [&](const void* from, void* to) {
    std::memcpy(static_cast<char*>(to) + index * token_bytes,
                static_cast<const char*>(from) + index * token_bytes, frame_tokens * token_bytes);
  };
  copy(m.staging.k, m.context.k);
  copy(m.staging.v, m.context.v);
}

}  // namespace

void CpuOps::update_memory(std::span<const SlotUpdate> table, const CompressFilter& filter,
                           const Rope& rope, int64_t first_slot, const KvSegment& current,
                           const KvSegment& staging, const KvSegment& context) {
  const MemoryUpdate update{filter, rope, first_slot, current, staging, context};
  const int64_t frame_tokens = rope.tokens_per_frame();
  threads_.run([&](int lane, int lanes) {
    const Share share(context.heads * frame_tokens, lane, lanes);
    for (const SlotUpdate& slot : table) {
      for (int64_t unit = share.begin; unit < share.end; ++unit) {
        build_token(update, slot, unit / frame_tokens, unit % frame_tokens, row_scratch(lane));
      }
    }
  });
  threads_.each(context.heads, [&](int64_t head, int) {
    for (const SlotUpdate& slot : table) copy_slot(update, slot.target, head);
  });
}

void CpuOps::export_kv(const KvSegment& segment, const Rope& rope, int64_t first_position, float* k,
                       float* v) {
  export_host_kv(segment, rope, first_position, k, v);
}

}  // namespace liveact::cpu
