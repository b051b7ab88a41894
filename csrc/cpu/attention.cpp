// The three attentions. One routine walks key tiles with a running maximum (online softmax), so
// the scores of a query tile never leave the L2 cache; products are single-threaded sgemm calls.
//
// fp8: q, k, v are used as dequantised; P is cast to fp8 after multiplication by
// kProbabilityScale, its row sum stays fp32. This is the rounding of the GPU kernel.

#include "cblas.h"
#include "core/host_rows.h"
#include "cpu/cpu_backend.h"
#include "cpu/exp2.h"

namespace liveact::cpu {

namespace {

constexpr int64_t kQueryTile = 128;
constexpr int64_t kKeyTile = 512;

// Keys and values of one head as fp32, consecutive tokens.
struct Keys {
  const float* k = nullptr;  // [tokens, stride], first hd of each row
  const float* v = nullptr;
  int64_t tokens = 0;
  int64_t stride = 0;
  float last_bias = 0.0f;  // added to the logit of the last key
};

struct Tile {
  float* scores;  // [kQueryTile, kKeyTile]
  float* acc;     // [kQueryTile, hd]
  float maximum[kQueryTile];
  float sum[kQueryTile];
};

int sgemm_int(int64_t value) { return static_cast<int>(value); }

// One key tile: scores, running maximum, probabilities, accumulation.
void attend_tile(const float* q, int64_t q_stride, int64_t queries, const Keys& keys, int64_t key0,
                 int64_t n, int64_t head_dim, float scale_log2, bool f8, Tile& tile) {
  scipy_cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, sgemm_int(queries), sgemm_int(n),
                    sgemm_int(head_dim), scale_log2, q, sgemm_int(q_stride),
                    keys.k + key0 * keys.stride, sgemm_int(keys.stride), 0.0f, tile.scores,
                    sgemm_int(n));
  const bool biased = keys.last_bias != 0.0f && key0 + n == keys.tokens;
  for (int64_t i = 0; i < queries; ++i) {
    float* s = tile.scores + i * n;
    if (biased) s[n - 1] += keys.last_bias * kLog2E;
    float maximum = tile.maximum[i];
#pragma omp simd reduction(max : maximum)
    for (int64_t j = 0; j < n; ++j) maximum = std::max(maximum, s[j]);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) {
      s[j] = exp2_approx(s[j] - maximum);
      sum += s[j];
    }
    if (f8) {
      const float* values = f8_values().data();
      for (int64_t j = 0; j < n; ++j) {
        s[j] = values[f8_from_f32(s[j] * kProbabilityScale)] * (1.0f / kProbabilityScale);
      }
    }
    const float correction = exp2_approx(tile.maximum[i] - maximum);
    tile.maximum[i] = maximum;
    tile.sum[i] = tile.sum[i] * correction + sum;
    float* acc = tile.acc + i * head_dim;
    if (correction != 1.0f) {
#pragma omp simd
      for (int64_t d = 0; d < head_dim; ++d) acc[d] *= correction;
    }
  }
  scipy_cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, sgemm_int(queries),
                    sgemm_int(head_dim), sgemm_int(n), 1.0f, tile.scores, sgemm_int(n),
                    keys.v + key0 * keys.stride, sgemm_int(keys.stride), 1.0f, tile.acc,
                    sgemm_int(head_dim));
}

// out rows [queries, hd] (+)= softmax(q · keysᵀ / √hd) · values over the given key sets.
void attend(const float* q, int64_t q_stride, int64_t queries, std::span<const Keys> key_sets,
            int64_t head_dim, bool f8, bool accumulate, float* out, int64_t out_stride,
            Tile& tile) {
  const float scale_log2 = kLog2E / std::sqrt(static_cast<float>(head_dim));
  std::fill_n(tile.acc, queries * head_dim, 0.0f);
  std::fill_n(tile.maximum, queries, -1e30f);
  std::fill_n(tile.sum, queries, 0.0f);
  for (const Keys& keys : key_sets) {
    for (int64_t key0 = 0; key0 < keys.tokens; key0 += kKeyTile) {
      const int64_t n = std::min(kKeyTile, keys.tokens - key0);
      attend_tile(q, q_stride, queries, keys, key0, n, head_dim, scale_log2, f8, tile);
    }
  }
  for (int64_t i = 0; i < queries; ++i) {
    const float inverse = 1.0f / tile.sum[i];
    const float* acc = tile.acc + i * head_dim;
    float* target = out + i * out_stride;
    for (int64_t d = 0; d < head_dim; ++d) {
      target[d] = (accumulate ? target[d] : 0.0f) + acc[d] * inverse;
    }
  }
}

// One head of a segment as fp32: in place, or decoded into `scratch`, which is advanced.
Keys head_keys(const KvSegment& segment, int64_t head, int64_t tokens, float*& scratch) {
  const int64_t size = segment.tokens * segment.head_dim;
  const int64_t offset = head * size;
  Keys keys{.tokens = tokens, .stride = segment.head_dim};
  if (segment.dtype == DType::f32) {
    keys.k = static_cast<const float*>(segment.k) + offset;
    keys.v = static_cast<const float*>(segment.v) + offset;
    return keys;
  }
  float* k = scratch;
  float* v = scratch + size;
  scratch += 2 * size;
  const bool f8 = segment.dtype == DType::f8;
  const int64_t count = tokens * segment.head_dim;
  read_f32(segment.k, segment.dtype, offset, count, f8 ? segment.k_scale[head] : 1.0f, k);
  read_f32(segment.v, segment.dtype, offset, count, f8 ? segment.v_scale[head] : 1.0f, v);
  keys.k = k;
  keys.v = v;
  return keys;
}

float largest(const float* scales, int64_t heads) {
  return *std::max_element(scales, scales + heads);
}

// The scale of averages of values that have these scales, which cannot grow over them.
float tight(const float* v_scales, int64_t heads) {
  return largest(v_scales, heads) / kValueHeadroom;
}

// Head `head` of row `row` of a result, [hd]. fp8: `scale` is that of all rows.
void write_head(const Rows& out, int64_t row, int64_t head, int64_t hd, const float* values,
                float scale) {
  const int64_t offset = row * out.row_stride() + head * hd;
  switch (out.dtype) {
    case DType::f32:
      std::memcpy(static_cast<float*>(out.data) + offset, values, sizeof(float) * hd);
      return;
    case DType::bf16:
      encode_bf16(values, hd, static_cast<uint16_t*>(out.data) + offset);
      return;
    case DType::f8:
      encode_f8(values, hd, 1.0f / scale, static_cast<uint8_t*>(out.data) + offset);
      if (head == 0) out.scale[row] = scale;
      return;
  }
}

}  // namespace

int64_t attention_floats(const OpsLimits& limits) {
  return kQueryTile * kKeyTile + 3 * kQueryTile * limits.head_dim +
         2 * limits.max_keys * limits.head_dim;
}

void CpuOps::self_attention(const Heads& q, const KvSegment& context, const KvSegment& current,
                            const float* out_scale, const Rows& out, const Rows& rest) {
  const int64_t all_heads = out.row_stride() / q.head_dim;
  const float scale = out.dtype == DType::f8 ? largest(out_scale, all_heads) : 1.0f;
  // fp32 keys lie ready, so (head, query tile) pairs are shared out; other formats are decoded by
  // whichever thread has the head, so heads are.
  const bool ready = current.dtype == DType::f32;
  const int64_t tiles = (q.tokens + kQueryTile - 1) / kQueryTile;
  const int64_t units = ready ? q.heads * tiles : q.heads;
  const int64_t hd = q.head_dim;
  threads_.run([&](int lane, int lanes) {
    float* base = attention_.f32() + lane * attention_floats_;
    Tile tile{.scores = base, .acc = base + kQueryTile * kKeyTile, .maximum = {}, .sum = {}};
    float* queries = tile.acc + kQueryTile * hd;
    float* result = queries + kQueryTile * hd;
    const Share share(units, lane, lanes);
    for (int64_t unit = share.begin; unit < share.end; ++unit) {
      const int64_t head = ready ? unit / tiles : unit;
      float* scratch = result + kQueryTile * hd;
      const Keys key_sets[] = {head_keys(context, head, context.tokens, scratch),
                               head_keys(current, head, current.tokens, scratch)};
      for (int64_t i = ready ? unit % tiles : 0; i < (ready ? unit % tiles + 1 : tiles); ++i) {
        const int64_t row0 = i * kQueryTile;
        const int64_t rows = std::min(kQueryTile, q.tokens - row0);
        const float* tile_q = queries;
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t token = head * q.tokens + row0 + r;
          const float scale = q.dtype == DType::f8 ? q.scale[token] : 1.0f;
          const float* row = read_f32(q.data, q.dtype, token * hd, hd, scale, queries + r * hd);
          if (q.dtype == DType::f32 && r == 0) tile_q = row;
        }
        const int64_t column = head * hd;
        if (out.dtype == DType::f32 && row0 + rows <= out.rows) {
          float* target = static_cast<float*>(out.data) + row0 * out.row_stride() + column;
          attend(tile_q, hd, rows, key_sets, hd, current.dtype == DType::f8, false, target,
                 out.row_stride(), tile);
          continue;
        }
        attend(tile_q, hd, rows, key_sets, hd, current.dtype == DType::f8, false, result, hd, tile);
        for (int64_t r = row0; r < row0 + rows; ++r) {
          const bool here = r < out.rows;
          write_head(here ? out : rest, here ? r : r - out.rows, head, hd, result + (r - row0) * hd,
                     scale);
        }
      }
    }
  });
}

namespace {

// Attention of token-major rows q over per-head keys. `out_scale`: of an out in fp8.
void attend_rows(const Rows& q, int64_t row0, int64_t rows, int64_t head, int64_t hd,
                 std::span<const Keys> first, std::span<const Keys> second, float out_scale,
                 const Rows& out, float* queries, float* result, Tile& tile) {
  const int64_t column = head * hd;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t offset = (row0 + r) * q.row_stride() + column;
    const float scale = q.dtype == DType::f8 ? q.scale[row0 + r] : 1.0f;
    const float* row = read_f32(q.data, q.dtype, offset, hd, scale, queries + r * hd);
    if (row != queries + r * hd) std::memcpy(queries + r * hd, row, sizeof(float) * hd);
  }
  attend(queries, hd, rows, first, hd, false, false, result, hd, tile);
  if (!second.empty()) attend(queries, hd, rows, second, hd, false, true, result, hd, tile);
  for (int64_t r = 0; r < rows; ++r) {
    write_head(out, row0 + r, head, hd, result + r * hd, out_scale);
  }
}

}  // namespace

void CpuOps::cross_attention(const Rows& q, const KvSegment& text, int64_t pad_count,
                             const KvSegment& image, const Rows& out) {
  const int64_t hd = text.head_dim;
  const int64_t text_tokens = pad_count > 0 ? text.tokens : text.tokens - 1;
  const float scale = out.dtype == DType::f8
                          ? tight(text.v_scale, text.heads) + tight(image.v_scale, image.heads)
                          : 1.0f;
  const int64_t tiles = (q.rows + kQueryTile - 1) / kQueryTile;
  threads_.run([&](int lane, int lanes) {
    float* base = attention_.f32() + lane * attention_floats_;
    Tile tile{.scores = base, .acc = base + kQueryTile * kKeyTile, .maximum = {}, .sum = {}};
    float* queries = tile.acc + kQueryTile * hd;
    float* result = queries + kQueryTile * hd;
    const Share share(text.heads * tiles, lane, lanes);
    for (int64_t unit = share.begin; unit < share.end; ++unit) {
      const int64_t head = unit / tiles;
      const int64_t row0 = unit % tiles * kQueryTile;
      float* scratch = result + kQueryTile * hd;
      Keys text_keys = head_keys(text, head, text_tokens, scratch);
      if (pad_count > 0) text_keys.last_bias = std::log(static_cast<float>(pad_count));
      const Keys image_keys = head_keys(image, head, image.tokens, scratch);
      attend_rows(q, row0, std::min(kQueryTile, q.rows - row0), head, hd, {&text_keys, 1},
                  {&image_keys, 1}, scale, out, queries, result, tile);
    }
  });
}

void CpuOps::audio_attention(const Rows& q, const Rows& kv, int64_t n, int64_t kv_frames,
                             int64_t heads, const float* v_scale, const Rows& out) {
  const float scale = out.dtype == DType::f8 ? tight(v_scale, heads) : 1.0f;
  const int64_t width = q.cols;
  const int64_t hd = width / heads;
  const int64_t frame_rows = q.rows / n;
  const int64_t tokens = kv.rows / kv_frames;
  const int64_t tiles = (frame_rows + kQueryTile - 1) / kQueryTile;
  threads_.run([&](int lane, int lanes) {
    float* base = attention_.f32() + lane * attention_floats_;
    Tile tile{.scores = base, .acc = base + kQueryTile * kKeyTile, .maximum = {}, .sum = {}};
    float* queries = tile.acc + kQueryTile * hd;
    float* result = queries + kQueryTile * hd;
    float* k = result + kQueryTile * hd;
    float* v = k + tokens * hd;
    const Share share(n * heads * tiles, lane, lanes);
    for (int64_t unit = share.begin; unit < share.end; ++unit) {
      const int64_t frame = unit / (heads * tiles);
      const int64_t head = unit / tiles % heads;
      const int64_t row0 = frame * frame_rows + unit % tiles * kQueryTile;
      const int64_t rows = std::min(kQueryTile, (frame + 1) * frame_rows - row0);
      const int64_t kv_row0 = (kv_frames == 1 ? 0 : frame) * tokens;
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t offset = (kv_row0 + t) * kv.row_stride() + head * hd;
        const float* key = read_f32(kv.data, kv.dtype, offset, hd, 1.0f, k + t * hd);
        if (key != k + t * hd) std::memcpy(k + t * hd, key, sizeof(float) * hd);
        const float* value = read_f32(kv.data, kv.dtype, offset + width, hd, 1.0f, v + t * hd);
        if (value != v + t * hd) std::memcpy(v + t * hd, value, sizeof(float) * hd);
      }
      const Keys keys{.k = k, .v = v, .tokens = tokens, .stride = hd};
      attend_rows(q, row0, rows, head, hd, {&keys, 1}, {}, scale, out, queries, result, tile);
    }
  });
}

}  // namespace liveact::cpu
