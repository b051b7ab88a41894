// The ops that walk rows: norms, activations, format changes, patches, guidance, the sampler.

#include <limits>

#include "tests/operands.h"

namespace liveact {

namespace {

using test::Expected;
using test::kUlp;
using test::Matrix;

constexpr float kEps = 1e-6f;

test::Cpu rows_cpu(int64_t cols) {
  return test::Cpu({.max_cols = cols, .max_operand = 1, .max_keys = 1, .head_dim = 8});
}

// Sums of n terms in any order are off by at most n·u·Σ|term|.
Expected layer_norm_reference(const Matrix& x, const std::vector<float>& gain,
                              const std::vector<float>& bias) {
  Expected expected;
  const int64_t n = x.rows().cols;
  const double count = static_cast<double>(n);
  for (int64_t r = 0; r < x.rows().rows; ++r) {
    double mean = 0.0;
    double magnitude = 0.0;
    double deviation = 0.0;
    double variance = 0.0;
    for (int64_t i = 0; i < n; ++i) mean += x(r, i) / count;
    for (int64_t i = 0; i < n; ++i) magnitude += std::abs(x(r, i)) / count;
    for (int64_t i = 0; i < n; ++i) deviation += std::abs(x(r, i) - mean) / count;
    for (int64_t i = 0; i < n; ++i) variance += (x(r, i) - mean) * (x(r, i) - mean) / count;
    const double mean_error = (count + 1) * kUlp * magnitude;
    const double variance_error =
        (count + 5) * kUlp * variance + mean_error * mean_error + 2 * mean_error * deviation;
    const double inverse = 1.0 / std::sqrt(variance + kEps);
    const double inverse_error = 0.5 * variance_error / (variance + kEps) + 3 * kUlp;
    for (int64_t i = 0; i < n; ++i) {
      const double d = x(r, i) - mean;
      const double value = d * inverse * gain[i] + bias[i];
      const double relative = inverse_error + 4 * kUlp;
      expected.add(value, std::abs(gain[i]) * inverse * (std::abs(d) * relative + mean_error) +
                              kUlp * (std::abs(bias[i]) + std::abs(value)));
    }
  }
  return expected;
}

Expected rms_norm_reference(const Matrix& x, const std::vector<float>& gain) {
  Expected expected;
  const int64_t n = x.rows().cols;
  const double count = static_cast<double>(n);
  for (int64_t r = 0; r < x.rows().rows; ++r) {
    double squares = 0.0;
    for (int64_t i = 0; i < n; ++i) squares += x(r, i) * x(r, i);
    const double inverse = 1.0 / std::sqrt(squares / count + kEps);
    for (int64_t i = 0; i < n; ++i) {
      const double value = x(r, i) * inverse * gain[i];
      expected.add(value, (0.5 * (count + 5) + 5) * kUlp * std::abs(value));
    }
  }
  return expected;
}

double activation_reference(Activation activation, double x) {
  switch (activation) {
    case Activation::gelu_tanh:
      return 0.5 * x * (1.0 + std::tanh(0.79788456080286536 * (x + 0.044715 * x * x * x)));
    case Activation::gelu_erf:
      return 0.5 * x * std::erfc(-x * 0.70710678118654752);
    case Activation::relu:
      return x > 0.0 ? x : 0.0;
  }
  return 0.0;
}

const Activation kActivations[] = {Activation::gelu_tanh, Activation::gelu_erf, Activation::relu};

}  // namespace

TEST(norms) {
  for (const int64_t cols : {1, 8, 37, 300}) {
    const test::Cpu cpu = rows_cpu(cols);
    for (const DType in : test::kAllTypes) {
      for (const DType out : test::kAllTypes) {
        test::Random random(cols);
        std::vector<float> values = random.normals(5 * cols);
        for (int64_t i = 0; i < cols; ++i) values[i] += 1000.0f;       // far from the origin
        for (int64_t i = 0; i < cols; ++i) values[cols + i] *= 1e-4f;  // eps matters
        for (int64_t i = 0; i < cols; ++i) values[2 * cols + i] *= 1e4f;
        for (int64_t i = 0; i < cols; ++i) values[3 * cols + i] = 0.0f;
        const Matrix x(5, cols, in, values);
        const std::vector<float> gain = random.normals(cols);
        const std::vector<float> bias = random.normals(cols);
        const std::string what = test::text(name(in), " -> ", name(out), " ", cols, " columns");
        const Matrix normed(5, cols, out);
        cpu->layer_norm(x.rows(), gain.data(), bias.data(), kEps, normed.rows());
        check_stored(normed.rows(), layer_norm_reference(x, gain, bias), "layer_norm " + what);
        const Matrix scaled(5, cols, out);
        cpu->rms_norm(x.rows(), gain.data(), kEps, scaled.rows());
        check_stored(scaled.rows(), rms_norm_reference(x, gain), "rms_norm " + what);
      }
    }
  }
}

TEST(norms_in_place) {
  const test::Cpu cpu = rows_cpu(64);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    test::Random random(1);
    const std::vector<float> values = random.normals(3 * 64);
    const std::vector<float> gain = random.normals(64);
    const Matrix x(3, 64, dtype, values);
    const Matrix y(3, 64, dtype, values);
    const Matrix apart(3, 64, dtype);
    cpu->layer_norm(x.rows(), gain.data(), gain.data(), kEps, apart.rows());
    cpu->layer_norm(x.rows(), gain.data(), gain.data(), kEps, x.rows());
    CHECK(x.same_bytes(apart));
    cpu->rms_norm(y.rows(), gain.data(), kEps, apart.rows());
    cpu->rms_norm(y.rows(), gain.data(), kEps, y.rows());
    CHECK(y.same_bytes(apart));
  }
}

// Over -30..30 every activation stays within 1e-6 of the formula, relative above 1.
TEST(activations_match_their_formula) {
  std::vector<float> values;
  for (int i = -30000; i <= 30000; ++i) values.push_back(static_cast<float>(i) / 1000.0f);
  const int64_t n = std::ssize(values);
  const test::Cpu cpu = rows_cpu(n);
  const Matrix x(1, n, DType::f32, values);
  const Matrix out(1, n, DType::f32);
  for (const Activation activation : kActivations) {
    cpu->activate(x.rows(), activation, out.rows());
    for (int64_t i = 0; i < n; ++i) {
      const double expected = activation_reference(activation, values[i]);
      CHECK_NEAR(out(0, i), expected, 1e-6 * std::max(1.0, std::abs(expected)));
    }
  }
}

TEST(activations_far_out) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const std::vector<float> values = {1e4f, -1e4f, 3e38f, -3e38f, 0.0f, kInf, -kInf, NAN};
  const int64_t n = std::ssize(values);
  const test::Cpu cpu = rows_cpu(n);
  const Matrix x(1, n, DType::f32, values);
  const Matrix out(1, n, DType::f32);
  for (const Activation activation : kActivations) {
    cpu->activate(x.rows(), activation, out.rows());
    CHECK_EQ(out(0, 0), 1e4);
    CHECK_NEAR(out(0, 1), 0.0, 1e-30);
    CHECK_EQ(out(0, 2), 3e38f);
    CHECK_EQ(out(0, 4), 0.0);
    CHECK_EQ(out(0, 5), kInf);
    CHECK(std::isnan(out(0, 7)));  // a NaN is not hidden
  }
  // gelu_tanh divides by at most 2^126, so the largest negative values leave a small remainder,
  // and -inf stays infinite: a value that cannot be right is passed on and found at the end.
  cpu->activate(x.rows(), Activation::gelu_tanh, out.rows());
  CHECK_NEAR(out(0, 3), 0.0, 3e38 * 0x1p-126 * (1 + 4 * kUlp));
  CHECK_EQ(out(0, 6), -kInf);
}

TEST(activations_formats) {
  const test::Cpu cpu = rows_cpu(45);
  test::Random random(2);
  const std::vector<float> values = random.normals(3 * 45, 2.0f);
  for (const Activation activation : kActivations) {
    for (const DType in : test::kAllTypes) {
      for (const DType out : test::kAllTypes) {
        const Matrix x(3, 45, in, values);
        const Matrix y(3, 45, out);
        cpu->activate(x.rows(), activation, y.rows());
        Expected expected;
        for (int64_t r = 0; r < 3; ++r) {
          for (int64_t i = 0; i < 45; ++i) {
            const double value = activation_reference(activation, x(r, i));
            expected.add(value, 1e-6 * std::max(1.0, std::abs(value)));
          }
        }
        check_stored(y.rows(), expected, test::text("activation ", static_cast<int>(activation)));
      }
    }
  }
}

TEST(quantize_is_the_contract) {
  const test::Cpu cpu = rows_cpu(70);
  test::Random random(3);
  std::vector<float> values = random.normals(4 * 70, 3.0f);
  std::fill_n(values.begin(), 70, 0.0f);
  for (const DType in : {DType::f32, DType::bf16}) {
    for (const DType out : test::kAllTypes) {
      const Matrix x(4, 70, in, values);
      std::vector<float> seen;
      for (int64_t i = 0; i < 4 * 70; ++i) seen.push_back(static_cast<float>(x(i / 70, i % 70)));
      const Matrix expected(4, 70, out, seen);
      const Matrix found(4, 70, out);
      cpu->quantize(x.rows(), found.rows());
      CHECK(found.same_bytes(expected));
      if (out != DType::f8) continue;
      for (int64_t r = 0; r < 4; ++r) CHECK_EQ(found.rows().scale[r], expected.rows().scale[r]);
    }
  }
}

// Channel-major patches in, (ph, pw, channel) patches out: exchanging the two orders in between
// must give every latent value back where it was.
TEST(patches_round_trip) {
  constexpr int64_t kChannels = 5, kFrames = 3, kHeight = 4, kWidth = 6;
  constexpr int64_t kTokens = kFrames * kHeight * kWidth / 4;
  const test::Cpu cpu = rows_cpu(4 * (kChannels + 2));
  std::vector<float> z(kChannels * kFrames * kHeight * kWidth);
  for (size_t i = 0; i < z.size(); ++i) z[i] = static_cast<float>(i);
  // Conditioning of two channels with nine frames, of which 4, 5, 6 are this block's.
  std::vector<float> y(2 * 9 * kHeight * kWidth);
  for (size_t i = 0; i < y.size(); ++i) y[i] = -static_cast<float>(i);

  const Matrix in(kTokens, 4 * (kChannels + 2), DType::f32);
  cpu->patchify(z.data(), y.data(), kChannels, 2, 9, 4, kFrames, kHeight, kWidth, in.rows());
  const Matrix out(kTokens, 4 * kChannels, DType::f32);
  for (int64_t t = 0; t < kTokens; ++t) {
    const int64_t frame = t / 6, row = t / 3 % 2, col = t % 3;
    for (int64_t p = 0; p < 4; ++p) {
      const int64_t pixel = (2 * row + p / 2) * kWidth + 2 * col + p % 2;
      for (int64_t c = 0; c < 2; ++c) {
        CHECK_EQ(in(t, (kChannels + c) * 4 + p), y[(c * 9 + 4 + frame) * kHeight * kWidth + pixel]);
      }
      for (int64_t c = 0; c < kChannels; ++c) {
        test::set_element(out.rows().data, DType::f32, t * 4 * kChannels + p * kChannels + c,
                          static_cast<float>(in(t, c * 4 + p)));
      }
    }
  }
  std::vector<float> back(z.size(), -1.0f);
  cpu->unpatchify(out.rows(), kChannels, kFrames, kHeight, kWidth, back.data());
  CHECK(back == z);
}

TEST(guide_and_sampler) {
  test::Random random(4);
  constexpr int64_t kSize = 1000;
  const std::vector<float> a = random.normals(kSize);
  const std::vector<float> b = random.normals(kSize);
  const std::vector<float> noise = random.normals(kSize);
  const test::Cpu cpu = rows_cpu(8);

  std::vector<float> v = a;
  cpu->guide(v.data(), b.data(), 1.7f, kSize);
  for (int64_t i = 0; i < kSize; ++i) {
    const double difference = static_cast<double>(a[i]) - b[i];
    const double step = static_cast<double>(1.7f) * difference;
    CHECK_NEAR(v[i], b[i] + step, kUlp * (3 * std::abs(step) + std::abs(b[i])));
  }

  const struct {
    float sigma, next_sigma;
    bool last;
  } steps[] = {{1.0f, 0.9375f, false}, {0.9375f, 0.83333333f, false}, {0.83333333f, 0.0f, true}};
  for (const auto& step : steps) {
    std::vector<float> z = a;
    cpu->sampler_step(z.data(), b.data(), step.last ? nullptr : noise.data(), step.sigma,
                      step.next_sigma, kSize);
    for (int64_t i = 0; i < kSize; ++i) {
      const double moved = static_cast<double>(step.sigma) * b[i];
      const double next = step.next_sigma;
      const double fresh = step.last ? 0.0 : next * noise[i];
      const double magnitude = std::abs(a[i]) + std::abs(moved) + std::abs(fresh);
      CHECK_NEAR(z[i], (1.0 - next) * (a[i] - moved) + fresh, 5 * kUlp * magnitude);
    }
  }
}

TEST(all_finite) {
  const test::Cpu cpu = rows_cpu(8);
  std::vector<float> x(1001, 1.0f);
  CHECK(cpu->all_finite(x.data(), 1001));
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    for (const int64_t at : {0, 500, 1000}) {
      x[at] = bad;
      CHECK(!cpu->all_finite(x.data(), 1001));
      x[at] = 3e38f;
    }
  }
  CHECK(cpu->all_finite(x.data(), 1001));
}

TEST(device_memory) {
  cpu::CpuDevice device;
  test::check_throws<DeviceError>([&] { device.allocate(int64_t{1} << 60); },
                                  "cpu: expected 1152921504606846976 bytes of memory");
  CHECK_EQ(device.allocated_bytes(), 0);
  {
    const Buffer buffer(device, 100);
    CHECK_EQ(device.allocated_bytes(), 100);
    CHECK_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % 64, uintptr_t{0});
    for (int i = 0; i < 100; ++i) CHECK_EQ(+static_cast<const uint8_t*>(buffer.data())[i], 0);
  }
  CHECK_EQ(device.allocated_bytes(), 0);
  CHECK_EQ(device.allocation_count(), 1);
}

}  // namespace liveact
