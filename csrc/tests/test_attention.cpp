// The three attentions against a plain softmax in fp64 over the same stored operands.

#include "tests/kv.h"

namespace liveact {

namespace {

using test::Expected;
using test::kUlp;
using test::Matrix;
using test::Segment;

constexpr int64_t kKeyTile = 512;    // of the CPU backend; sizes below cross it
constexpr double kExp2Error = 2e-7;  // of exp2_approx, relative

// Keys and values of one head in fp64, and what is added to each logit.
struct Keys {
  std::vector<double> k, v, bias;
  int64_t tokens() const { return std::ssize(bias); }
};

void append(Keys& keys, const Segment& segment, int64_t head, int64_t tokens, double bias = 0.0) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t d = 0; d < segment.view().head_dim; ++d) {
      keys.k.push_back(segment.key(head, t, d));
      keys.v.push_back(segment.value(head, t, d));
    }
    keys.bias.push_back(bias);
  }
}

// Adds hd outputs to `expected`: softmax(q·kᵀ/√hd + bias)·v of one query.
//
// The fp32 bound: a logit (in units of log 2) is off by (hd + 5)·u·Σ|q·k|/√hd·log2(e) and by its
// own roundings, so p_j is off relatively by e_j, and the output by Σ w_j·e_j·|v_j − out| to first
// order; summing n terms adds n·u·Σ w|v|. fp8: P is rounded to e4m3 at 256 times its value, by at
// most d_j = p_j/16 + 2^-18; n independent roundings stay below six standard deviations of a sum of
// uniform errors, or their sum where that is less.
void attend(const double* q, const Keys& keys, int64_t hd, bool f8, Expected& expected) {
  const int64_t n = keys.tokens();
  const double scale = 1.0 / std::sqrt(static_cast<double>(hd));
  std::vector<double> p(n), error(n);
  double maximum = -INFINITY;
  for (int64_t j = 0; j < n; ++j) {
    double dot = 0.0;
    double magnitude = 0.0;
    for (int64_t d = 0; d < hd; ++d) dot += q[d] * keys.k[j * hd + d];
    for (int64_t d = 0; d < hd; ++d) magnitude += std::abs(q[d] * keys.k[j * hd + d]);
    p[j] = dot * scale + keys.bias[j];
    error[j] = (static_cast<double>(hd) + 5) * kUlp * magnitude * scale;
    maximum = std::max(maximum, p[j]);
  }
  const double tiles = static_cast<double>(n) / kKeyTile + 2;
  double sum = 0.0;
  double most_error = 0.0;
  for (int64_t j = 0; j < n; ++j) {
    error[j] += 2 * kUlp * (std::abs(p[j]) + std::abs(maximum)) + (tiles + 1) * kExp2Error;
    most_error = std::max(most_error, error[j]);
    p[j] = std::exp(p[j] - maximum);
    sum += p[j];
  }
  for (int64_t d = 0; d < hd; ++d) {
    double out = 0.0;
    double magnitude = 0.0;
    for (int64_t j = 0; j < n; ++j) out += p[j] * keys.v[j * hd + d] / sum;
    for (int64_t j = 0; j < n; ++j) magnitude += p[j] * std::abs(keys.v[j * hd + d]) / sum;
    double tolerance = 0.0;
    double p_sum = 0.0;
    double p_squares = 0.0;
    for (int64_t j = 0; j < n; ++j) {
      tolerance += p[j] / sum * error[j] * std::abs(keys.v[j * hd + d] - out);
      const double rounding = (p[j] / 16 + 0x1p-18) / sum * std::abs(keys.v[j * hd + d]);
      p_sum += rounding;
      p_squares += rounding * rounding / 3;
    }
    tolerance *= 1 + 4 * most_error;  // the second order
    tolerance += (static_cast<double>(n) + 2 * tiles + 6) * kUlp * (magnitude + std::abs(out));
    if (f8) tolerance += std::min(p_sum, 6 * std::sqrt(p_squares));
    expected.add(out, tolerance);
  }
}

// Rows of all heads next to each other, from references made head by head.
Expected interleave(const std::vector<Expected>& heads, int64_t rows, int64_t hd) {
  Expected all;
  for (int64_t r = 0; r < rows; ++r) {
    for (const Expected& head : heads) {
      for (int64_t d = 0; d < hd; ++d) all.add(head.value[r * hd + d], head.tolerance[r * hd + d]);
    }
  }
  return all;
}

struct Queries {
  Queries(int64_t heads, int64_t tokens, int64_t hd, DType dtype, const std::vector<float>& values)
      : matrix(heads * tokens, hd, dtype, values),
        view{matrix.rows().data, dtype, heads, tokens, hd, matrix.rows().scale} {}
  Matrix matrix;
  Heads view;
};

test::Cpu attention_cpu(int64_t keys, int64_t hd) {
  return test::Cpu({.max_cols = 8, .max_operand = 1, .max_keys = keys, .head_dim = hd});
}

void check_self_attention(const test::Cpu& cpu, const Queries& q, const Segment& context,
                          int64_t context_tokens, const Segment& current, DType out_dtype,
                          const std::string& what) {
  const int64_t hd = q.view.head_dim;
  const int64_t heads = q.view.heads;
  std::vector<Expected> expected(heads);
  for (int64_t head = 0; head < heads; ++head) {
    Keys keys;
    append(keys, context, head, context_tokens);
    append(keys, current, head, current.view().tokens);
    for (int64_t t = 0; t < q.view.tokens; ++t) {
      std::vector<double> query(hd);
      for (int64_t d = 0; d < hd; ++d) query[d] = q.matrix(head * q.view.tokens + t, d);
      attend(query.data(), keys, hd, current.view().dtype == DType::f8, expected[head]);
    }
  }
  KvSegment attended = context.view();
  attended.tokens = context_tokens;
  const Matrix out(q.view.tokens, heads * hd, out_dtype);
  cpu->self_attention(q.view, attended, current.view(), nullptr, out.rows(), {});
  check_stored(out.rows(), interleave(expected, q.view.tokens, hd), what);
}

}  // namespace

TEST(self_attention_sizes_and_formats) {
  const struct {
    int64_t heads, queries, context, current, hd;
  } sizes[] = {
      {1, 1, 0, 1, 8},       // one key: the output is its value
      {3, 7, 0, 7, 12},      // no context
      {2, 129, 5, 129, 16},  // one query over a query tile
      {2, 9, 513, 511, 8},   // one key over a key tile, one under
      {1, 130, 37, 1100, 10},
  };
  for (const auto& size : sizes) {
    const test::Cpu cpu = attention_cpu(size.context + size.current, size.hd);
    for (const DType dtype : test::kAllTypes) {
      for (const DType out : {DType::f32, DType::bf16}) {
        test::Random random(size.current);
        const Queries q(size.heads, size.queries, size.hd, dtype,
                        random.normals(size.heads * size.queries * size.hd, 2.0f));
        // A context with no tokens still has memory, as in block 0.
        const Segment context(size.heads, std::max<int64_t>(size.context, 1), size.hd, dtype,
                              random);
        const Segment current(size.heads, size.current, size.hd, dtype, random);
        check_self_attention(cpu, q, context, size.context, current, out,
                             test::text("self_attention ", name(dtype), " -> ", name(out), " ",
                                        size.context, "+", size.current));
      }
    }
  }
}

TEST(self_attention_extreme_logits) {
  constexpr int64_t kHeadDim = 16;
  const test::Cpu cpu = attention_cpu(670, kHeadDim);
  for (const DType dtype : test::kAllTypes) {
    test::Random random(8);
    const Segment context(2, 600, kHeadDim, dtype, random);
    const Segment current(2, 70, kHeadDim, dtype, random);
    // Logits in the tens of thousands: one key takes it all.
    const Queries huge(2, 70, kHeadDim, dtype, random.normals(2 * 70 * kHeadDim, 1e4f));
    check_self_attention(cpu, huge, context, 600, current, DType::f32,
                         test::text("huge logits ", name(dtype)));
    // All keys count the same.
    const Queries zero(2, 70, kHeadDim, dtype, std::vector<float>(2 * 70 * kHeadDim, 0.0f));
    check_self_attention(cpu, zero, context, 600, current, DType::f32,
                         test::text("equal logits ", name(dtype)));
  }
}

TEST(self_attention_of_equal_values_is_that_value) {
  constexpr int64_t kHeadDim = 8, kTokens = 700;
  test::Random random(9);
  const Segment context(1, kTokens, kHeadDim, DType::f32, random);
  std::fill_n(static_cast<float*>(context.view().v), kTokens * kHeadDim, 1.0f);
  const Queries q(1, 50, kHeadDim, DType::f32, random.normals(50 * kHeadDim, 3.0f));
  const Matrix out(50, kHeadDim, DType::f32);
  KvSegment none = context.view();
  none.tokens = 0;
  const test::Cpu cpu = attention_cpu(kTokens, kHeadDim);
  cpu->self_attention(q.view, none, context.view(), nullptr, out.rows(), {});
  for (int64_t t = 0; t < 50; ++t) {
    for (int64_t d = 0; d < kHeadDim; ++d) CHECK_NEAR(out(t, d), 1.0, kTokens * kUlp);
  }
}

// A NaN in a query spoils its row, one in a key or a value every row.
TEST(self_attention_does_not_hide_nan) {
  constexpr int64_t kHeadDim = 8, kTokens = 5;
  const test::Cpu cpu = attention_cpu(kTokens, kHeadDim);
  for (const DType dtype : test::kAllTypes) {
    for (int place = 0; place < 3; ++place) {
      test::Random random(19);
      const Queries q(1, kTokens, kHeadDim, dtype, random.normals(kTokens * kHeadDim));
      const Segment current(1, kTokens, kHeadDim, dtype, random);
      void* const data[] = {q.view.data, current.view().k, current.view().v};
      test::set_element(data[place], dtype, 2 * kHeadDim, NAN);
      KvSegment none = current.view();
      none.tokens = 0;
      const Matrix out(kTokens, kHeadDim, DType::f32);
      cpu->self_attention(q.view, none, current.view(), nullptr, out.rows(), {});
      for (int64_t t = 0; t < kTokens; ++t) {
        CHECK_EQ(std::isnan(out(t, 0)), place > 0 || t == 2);
      }
    }
  }
}

// P is rounded to fp8 at 256 times its value, its sum is not. Key 0 has logit 0 and value 0, a
// hundred others have logit log(p) and value 1.
TEST(self_attention_rounds_probabilities_but_not_their_sum) {
  constexpr int64_t kHeadDim = 8, kOthers = 100;
  const struct {
    double p, rounded;
  } cases[] = {
      {0.065, 16.0 / 256},    // 256 p = 16.64
      {0.0015, 0.375 / 256},  // 256 p = 0.384; p itself would be subnormal
  };
  const test::Cpu cpu = attention_cpu(kOthers + 1, kHeadDim);
  for (const auto& [p, rounded] : cases) {
    const Segment current(1, kOthers + 1, kHeadDim, DType::f8, {1.0f});
    std::memset(current.view().k, 0, (kOthers + 1) * kHeadDim);
    std::memset(current.view().v, 0, (kOthers + 1) * kHeadDim);
    const Queries q(1, 1, kHeadDim, DType::f8, std::vector<float>(kHeadDim, 1.0f));
    q.view.scale[0] = static_cast<float>(-std::log(p) * std::sqrt(8.0) / 448.0);  // codes are 448
    for (int64_t t = 1; t <= kOthers; ++t) {
      test::set_element(current.view().k, DType::f8, t * kHeadDim, -0.5f);  // times 2
      test::set_element(current.view().v, DType::f8, t * kHeadDim, 1.0f);
    }
    KvSegment none = current.view();
    none.tokens = 0;
    const Matrix out(1, kHeadDim, DType::f32);
    cpu->self_attention(q.view, none, current.view(), nullptr, out.rows(), {});
    // The sum of p in fp32, whose logits of up to 10 are off by a few u each.
    const double expected = kOthers * rounded / (1 + kOthers * p);
    CHECK_NEAR(out(0, 0), expected, (kOthers + 100) * kUlp * expected);
  }
}

namespace {

// Attn(q, text) + Attn(q, image); the last text key counts `pad_count` times.
Expected cross_reference(const Matrix& q, const Segment& text, int64_t pad_count,
                         const Segment& image) {
  const int64_t hd = text.view().head_dim;
  std::vector<Expected> heads(text.view().heads);
  for (int64_t head = 0; head < text.view().heads; ++head) {
    Keys text_keys, image_keys;
    append(text_keys, text, head, text.view().tokens - (pad_count == 0 ? 1 : 0));
    if (pad_count > 0) text_keys.bias.back() = std::log(static_cast<double>(pad_count));
    append(image_keys, image, head, image.view().tokens);
    for (int64_t r = 0; r < q.rows().rows; ++r) {
      std::vector<double> query(hd);
      for (int64_t d = 0; d < hd; ++d) query[d] = q(r, head * hd + d);
      Expected a, b;
      attend(query.data(), text_keys, hd, false, a);
      attend(query.data(), image_keys, hd, false, b);
      for (int64_t d = 0; d < hd; ++d) {
        const double value = a.value[d] + b.value[d];
        heads[head].add(value, a.tolerance[d] + b.tolerance[d] + kUlp * std::abs(value));
      }
    }
  }
  return interleave(heads, q.rows().rows, hd);
}

}  // namespace

TEST(cross_attention) {
  constexpr int64_t kHeads = 2, kHeadDim = 10;
  const struct {
    int64_t queries, text, pad_count, image;
  } sizes[] = {
      {9, 21, 0, 5},     // no padding: the last text key is left out
      {9, 21, 1, 5},     // one padding row, no bias
      {9, 21, 492, 5},   // as released: 20 tokens of 512
      {1, 2, 511, 257},  // a single token
      {130, 513, 7, 1},  // the padding key alone in its tile
  };
  for (const auto& size : sizes) {
    const test::Cpu cpu = attention_cpu(size.text + size.image, kHeadDim);
    for (const DType dtype : {DType::f32, DType::bf16}) {
      test::Random random(size.pad_count);
      const Matrix q(size.queries, kHeads * kHeadDim, dtype,
                     random.normals(size.queries * kHeads * kHeadDim, 2.0f));
      const Segment text(kHeads, size.text, kHeadDim, dtype, random);
      const Segment image(kHeads, size.image, kHeadDim, dtype, random);
      const Matrix out(size.queries, kHeads * kHeadDim, dtype);
      cpu->cross_attention(q.rows(), text.view(), size.pad_count, image.view(), out.rows());
      check_stored(out.rows(), cross_reference(q, text, size.pad_count, image),
                   test::text("cross_attention ", name(dtype), " ", size.text, " text, ",
                              size.pad_count, " padding"));
    }
  }
}

// The one biased key against the padding rows written out.
TEST(cross_attention_padding_is_repetition) {
  constexpr int64_t kHeads = 2, kHeadDim = 8, kText = 12, kPad = 500, kQueries = 33;
  test::Random random(10);
  const Matrix q(kQueries, kHeads * kHeadDim, DType::f32,
                 random.normals(kQueries * kHeads * kHeadDim, 3.0f));
  const Segment text(kHeads, kText + 1, kHeadDim, DType::f32, random);
  const Segment image(kHeads, 3, kHeadDim, DType::f32, random);
  const Segment literal(kHeads, kText + kPad, kHeadDim, DType::f32, random);
  for (int64_t head = 0; head < kHeads; ++head) {
    for (int64_t t = 0; t < kText + kPad; ++t) {
      for (int64_t d = 0; d < kHeadDim; ++d) {
        const int64_t at = (head * (kText + kPad) + t) * kHeadDim + d;
        const int64_t source = std::min(t, kText);
        static_cast<float*>(literal.view().k)[at] = static_cast<float>(text.key(head, source, d));
        static_cast<float*>(literal.view().v)[at] = static_cast<float>(text.value(head, source, d));
      }
    }
  }
  const test::Cpu cpu = attention_cpu(kText + kPad + 3, kHeadDim);
  const Matrix biased(kQueries, kHeads * kHeadDim, DType::f32);
  const Matrix repeated(kQueries, kHeads * kHeadDim, DType::f32);
  cpu->cross_attention(q.rows(), text.view(), kPad, image.view(), biased.rows());
  cpu->cross_attention(q.rows(), literal.view(), 1, image.view(), repeated.rows());
  const Expected expected = cross_reference(q, literal, 1, image);
  check_stored(repeated.rows(), expected, "padding written out");
  check_stored(biased.rows(), expected, "one biased key");
}

TEST(audio_attention) {
  const struct {
    int64_t frames, kv_frames, frame_tokens, audio_tokens, heads, hd;
  } sizes[] = {
      {3, 3, 5, 4, 2, 8},
      {3, 1, 5, 4, 2, 8},
      {1, 1, 130, 32, 1, 16},
      {2, 2, 1, 1, 3, 10},
  };
  for (const auto& size : sizes) {
    const test::Cpu cpu = attention_cpu(size.audio_tokens, size.hd);
    for (const DType dtype : {DType::f32, DType::bf16}) {
      test::Random random(11);
      const int64_t width = size.heads * size.hd;
      const int64_t rows = size.frames * size.frame_tokens;
      const int64_t kv_rows = size.kv_frames * size.audio_tokens;
      const Matrix q(rows, width, dtype, random.normals(rows * width, 2.0f));
      const Matrix kv(kv_rows, 2 * width, dtype, random.normals(kv_rows * 2 * width));
      std::vector<Expected> heads(size.heads);
      for (int64_t head = 0; head < size.heads; ++head) {
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t frame = size.kv_frames == 1 ? 0 : r / size.frame_tokens;
          Keys keys;
          for (int64_t t = 0; t < size.audio_tokens; ++t) {
            for (int64_t d = 0; d < size.hd; ++d) {
              const int64_t row = frame * size.audio_tokens + t;
              keys.k.push_back(kv(row, head * size.hd + d));
              keys.v.push_back(kv(row, width + head * size.hd + d));
            }
            keys.bias.push_back(0.0);
          }
          std::vector<double> query(size.hd);
          for (int64_t d = 0; d < size.hd; ++d) query[d] = q(r, head * size.hd + d);
          attend(query.data(), keys, size.hd, false, heads[head]);
        }
      }
      const Matrix out(rows, width, dtype);
      cpu->audio_attention(q.rows(), kv.rows(), size.frames, size.kv_frames, size.heads, nullptr,
                           out.rows());
      check_stored(out.rows(), interleave(heads, rows, size.hd),
                   test::text("audio_attention ", name(dtype), " ", size.frames,
                              " frames, keys of ", size.kv_frames));
    }
  }
}

}  // namespace liveact
