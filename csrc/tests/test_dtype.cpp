// The three number formats: every fp8 code, every rounding boundary, and the row contract.

#include <limits>

#include "core/host_rows.h"
#include "liveact/dtype.h"
#include "tests/check.h"

namespace liveact {

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// e4m3fn as its definition has it: sign, 4 exponent bits with bias 7, 3 mantissa bits.
double e4m3fn(int code) {
  const double sign = code >= 128 ? -1.0 : 1.0;
  const int exponent = code % 128 / 8;
  const double fraction = code % 8 / 8.0;
  if (exponent == 0) return sign * fraction * std::exp2(-6);
  return sign * (1.0 + fraction) * std::exp2(exponent - 7);
}

int f8(double value) { return f8_from_f32(static_cast<float>(value)); }

float bf16(float value) { return f32_from_bf16(bf16_from_f32(value)); }

}  // namespace

TEST(f8_decodes_every_code) {
  for (int code = 0; code < 256; ++code) {
    const float decoded = f32_from_f8(static_cast<uint8_t>(code));
    const float table = f8_values()[code];
    if (code % 128 == 127) {
      CHECK(std::isnan(decoded));
      CHECK(std::isnan(table));
      continue;
    }
    CHECK_EQ(static_cast<double>(decoded), e4m3fn(code));
    CHECK_EQ(table, decoded);
    CHECK_EQ(std::signbit(decoded), code >= 128);
    CHECK_EQ(f8(decoded), code);
  }
}

TEST(f8_rounds_to_nearest_even) {
  for (int code = 0; code < 0x7e; ++code) {
    const float midpoint = static_cast<float>((e4m3fn(code) + e4m3fn(code + 1)) / 2);
    const int even = code % 2 == 0 ? code : code + 1;
    for (const int sign : {0, 128}) {
      const float m = sign == 0 ? midpoint : -midpoint;
      CHECK_EQ(f8(m), even + sign);
      CHECK_EQ(f8(std::nextafter(m, 0.0f)), code + sign);
      CHECK_EQ(f8(std::nextafter(m, 2 * m)), code + 1 + sign);
    }
  }
}

TEST(f8_saturates) {
  for (const float value : {448.0f, 464.0f, 480.0f, 512.0f, 1e30f, 3.4e38f, kInf}) {
    CHECK_EQ(f8(value), 0x7e);
    CHECK_EQ(f8(-value), 0xfe);
  }
  CHECK_EQ(f8(kNan), 0x7f);
  CHECK_EQ(f8(-kNan), 0x7f);
}

TEST(f8_subnormals_and_zero) {
  for (int code = 0; code <= 8; ++code) {
    CHECK_EQ(f8(code * 0x1p-9), code);
    CHECK_EQ(f8(-(code * 0x1p-9)), code + 128);
  }
  CHECK_EQ(f8(0x1p-10), 0);  // a tie between 0 and 2^-9 goes to the even code
  CHECK_EQ(f8(3 * 0x1p-10), 2);
  CHECK_EQ(f8(std::nextafter(0x1p-10f, 1.0f)), 1);
  CHECK_EQ(f8(std::numeric_limits<float>::denorm_min()), 0);
  CHECK_EQ(f8(0.0f), 0x00);
  CHECK_EQ(f8(-0.0f), 0x80);
  CHECK_EQ(f8(-0x1p-30), 0x80);
}

TEST(bf16_rounds_to_nearest_even) {
  CHECK_EQ(bf16(1.0f), 1.0f);
  CHECK_EQ(bf16(1.0f + 0x1p-8f), 1.0f);                // tie, even below
  CHECK_EQ(bf16(1.0f + 3 * 0x1p-8f), 1.0f + 0x1p-6f);  // tie, even above
  CHECK_EQ(bf16(1.0f + 0x1p-8f + 0x1p-23f), 1.0f + 0x1p-7f);
  CHECK_EQ(bf16(1.0f + 3 * 0x1p-8f - 0x1p-23f), 1.0f + 0x1p-7f);
  CHECK_EQ(bf16(-1.0f - 0x1p-8f), -1.0f);
  CHECK_EQ(bf16(2.0f - 0x1p-9f), 2.0f);  // carries into the exponent
  CHECK_EQ(bf16(kInf), kInf);
  CHECK_EQ(bf16(-kInf), -kInf);
  CHECK_EQ(bf16(std::numeric_limits<float>::max()), kInf);
  CHECK_EQ(bf16(0x1.fep127f), 0x1.fep127f);  // the largest finite value
  CHECK(std::signbit(bf16(-0.0f)));
  CHECK(std::isnan(bf16(kNan)));
  // A NaN whose payload is in the low bits only must not become an infinity.
  CHECK(std::isnan(bf16(std::bit_cast<float>(0x7f800001u))));
  CHECK(std::isnan(bf16(std::bit_cast<float>(0x7fffffffu))));
  for (uint32_t code = 0; code < 65536; ++code) {
    const float decoded = f32_from_bf16(static_cast<uint16_t>(code));
    if (decoded != decoded) continue;
    CHECK_EQ(bf16_from_f32(decoded), code);
  }
}

TEST(f8_row_contract) {
  std::vector<std::vector<float>> rows = {
      {0.0f, 0.0f, 0.0f}, {-0.0f, 3e-13f, -1e-20f},  // amax below the floor
      {1e-12f, 5e-13f},   {3e38f, -1e37f, 1.0f},    {0.1f},
  };
  // Values around every rounding boundary, where x * (448 / amax) and x / scale differ.
  for (const float bound : {1.0f, 7.7f, 0.013f, 3.3e-5f, 191.9f, 1.9e7f}) {
    std::vector<float>& row = rows.emplace_back(1, -bound);
    for (int code = 0; code < 0x7e; ++code) {
      float x = static_cast<float>((e4m3fn(code) + e4m3fn(code + 1)) / 2 * bound / 448.0);
      for (int i = 0; i < 4; ++i) x = std::nextafter(x, 0.0f);
      for (int i = 0; i < 9; ++i) row.push_back(x = std::nextafter(x, bound));
    }
  }
  for (const std::vector<float>& row : rows) {
    float bound = 1e-12f;
    for (const float x : row) bound = x > bound ? x : -x > bound ? -x : bound;
    std::vector<uint8_t> codes(row.size());
    const float scale = quantize_f8(row.data(), std::ssize(row), codes.data());
    CHECK_EQ(scale, bound / 448.0f);
    for (size_t i = 0; i < row.size(); ++i) CHECK_EQ(+codes[i], f8(row[i] * (448.0f / bound)));
  }
  uint8_t code = 0;
  CHECK_EQ(quantize_f8(&kNan, 1, &code), 1e-12f / 448.0f);
  CHECK_EQ(+code, 0x7f);  // a NaN is not hidden
}

}  // namespace liveact
