// linear: every combination of formats, parts and epilogue against plain loops in fp64.

#include <numeric>

#include "tests/operands.h"

namespace liveact {

namespace {

using test::Expected;
using test::kUlp;
using test::Matrix;

test::Cpu linear_cpu(int64_t m, int64_t n, int64_t k) {
  return test::Cpu(
      {.max_cols = std::max(n, k), .max_operand = m * k, .max_keys = 1, .head_dim = 8});
}

struct LinearCase {
  std::string name;
  int64_t m, k;
  std::vector<int64_t> parts;  // output channels
  DType x = DType::f32, weight = DType::f32, out = DType::f32;
  bool scale = false, bias = false, accumulate = false;
};

// x may have overlapping rows. Checks out against
// (before) + sum(x * w) * row scale * channel scale + bias.
//
// fp32 bound: a dot product of k terms in any order is off by at most k·u·Σ|x·w|, every later
// operation by u of its result.
void check_linear(const test::Cpu& cpu, const Rows& x, const LinearCase& c, test::Random& random) {
  Weight weight{.parts = {}, .dtype = c.weight, .scale = nullptr, .n = 0, .k = c.k};
  std::vector<Matrix> parts;
  std::vector<float> scale;
  for (const int64_t n : c.parts) {
    parts.emplace_back(n, c.k, c.weight, random.normals(n * c.k));
    weight.parts[parts.size() - 1] = {parts.back().rows().data, n};
    weight.n += n;
    // Of fp8 weights the channel scale is part of the weight, a gate may be multiplied in.
    for (int64_t i = 0; i < n; ++i) {
      const float gate = c.scale ? random.normal() : 1.0f;
      scale.push_back(gate * (c.weight == DType::f8 ? parts.back().rows().scale[i] : 1.0f));
    }
  }
  const std::vector<float> bias = random.normals(weight.n);
  const bool has_scale = c.scale || c.weight == DType::f8;
  const Matrix out(c.m, weight.n, c.out, random.normals(c.m * weight.n));

  Expected expected;
  for (int64_t r = 0; r < c.m; ++r) {
    int64_t channel = 0;
    for (const Matrix& part : parts) {
      for (int64_t i = 0; i < part.rows().rows; ++i, ++channel) {
        double sum = 0.0;
        double magnitude = 0.0;
        for (int64_t j = 0; j < c.k; ++j) {
          const double product = test::value(x, r, j) *
                                 test::element(part.rows().data, c.weight, i * c.k + j) *
                                 scale[channel];
          sum += product;
          magnitude += std::abs(product);
        }
        const double b = c.bias ? bias[channel] : 0.0;
        const double before = c.accumulate ? out(r, channel) : 0.0;
        const double tolerance = (static_cast<double>(c.k) + 5) * kUlp * magnitude +
                                 3 * kUlp * (std::abs(b) + std::abs(before));
        expected.add(before + sum + b, tolerance);
      }
    }
  }
  cpu->linear(x, weight,
              {has_scale ? scale.data() : nullptr, c.bias ? bias.data() : nullptr, c.accumulate},
              out.rows());
  check_stored(out.rows(), expected, c.name);
}

void check_linear(const test::Cpu& cpu, const LinearCase& c) {
  test::Random random(17);
  const Matrix x(c.m, c.k, c.x, random.normals(c.m * c.k));
  check_linear(cpu, x.rows(), c, random);
}

}  // namespace

TEST(linear_formats_and_epilogues) {
  const test::Cpu cpu = linear_cpu(7, 64, 37);
  for (const DType x : test::kAllTypes) {
    for (const DType weight : test::kAllTypes) {
      for (const DType out : {DType::f32, DType::bf16}) {
        for (int flags = 0; flags < 8; ++flags) {
          check_linear(cpu, {.name = test::text(name(x), " x ", name(weight), " -> ", name(out),
                                                " epilogue ", flags),
                             .m = 7,
                             .k = 37,
                             .parts = {19, 5, 40},
                             .x = x,
                             .weight = weight,
                             .out = out,
                             .scale = (flags & 1) != 0,
                             .bias = (flags & 2) != 0,
                             .accumulate = (flags & 4) != 0});
        }
      }
    }
  }
}

TEST(linear_sizes) {
  const struct {
    int64_t m, k;
    std::vector<int64_t> parts;
  } sizes[] = {
      {1, 1, {1}},          // N below any thread count
      {1, 64, {33}},        // M = 1, N no multiple of 16
      {5, 1, {17}},         // K = 1
      {3, 8, {1, 1, 1}},    // three parts of one channel
      {2, 300, {2, 0, 3}},  // an empty part in the middle
      {1027, 3, {18}},      // more rows than one sgemm takes
      {5, 3, {4300}},       // more channels per thread than a panel holds, on two threads
      {2, 40000, {250}},    // panels cut short by their K
  };
  for (const auto& size : sizes) {
    const int64_t n = std::accumulate(size.parts.begin(), size.parts.end(), int64_t{0});
    const test::Cpu cpu = linear_cpu(size.m, n, size.k);
    for (const DType dtype : test::kAllTypes) {
      check_linear(cpu, {.name = test::text(size.m, "x", size.k, " ", name(dtype)),
                         .m = size.m,
                         .k = size.k,
                         .parts = size.parts,
                         .x = dtype,
                         .weight = dtype,
                         .bias = true});
    }
  }
}

// Windows of 24 elements, every 12 one, as the audio projection takes them; and rows with a gap.
TEST(linear_strided_rows) {
  const test::Cpu cpu = linear_cpu(6, 21, 24);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const int64_t stride : {12, 24, 31}) {
      test::Random random(5);
      const LinearCase c{.name = test::text("stride ", stride, " ", name(dtype)),
                         .m = 6,
                         .k = 24,
                         .parts = {21},
                         .x = dtype,
                         .bias = true};
      const Matrix memory(1, 5 * stride + 24, dtype, random.normals(5 * stride + 24));
      Rows x = memory.rows().as(c.m, c.k, dtype);
      x.stride = stride;
      check_linear(cpu, x, c, random);
    }
  }
}

TEST(linear_writes_strided_rows) {
  test::Random random(6);
  const Matrix x(4, 8, DType::f32, random.normals(32));
  const Matrix w(20, 8, DType::f32, random.normals(160));
  const test::Cpu cpu = linear_cpu(4, 20, 8);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const Matrix packed(4, 20, dtype);
    const Matrix strided(4, 20, dtype, 23);
    const Weight weight{
        .parts = {{w.rows().data, 20}}, .dtype = DType::f32, .scale = nullptr, .n = 20, .k = 8};
    cpu->linear(x.rows(), weight, {}, packed.rows());
    cpu->linear(x.rows(), weight, {}, strided.rows());
    for (int64_t r = 0; r < 4; ++r) {
      for (int64_t i = 0; i < 20; ++i) CHECK_EQ(strided(r, i), packed(r, i));
      for (int64_t i = 20; i < (r < 3 ? 23 : 20); ++i) CHECK(std::isnan(strided(r, i)));
    }
  }
}

}  // namespace liveact
