// Number formats of the runtime: fp32, bf16 and fp8 e4m3fn, and the exact conversions between them.
//
// The fp8 contract (the same on every backend, bit for bit):
//   scale = max(amax, 1e-12) / 448,  code = RNE(saturate(x * (448 / max(amax, 1e-12)))).
// e4m3fn has no infinity; codes 0x7f and 0xff are NaN; the largest finite value is 448, the
// smallest subnormal 2^-9.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace liveact {

enum class DType : uint8_t { f32, bf16, f8 };

constexpr int64_t size_bytes(DType dtype) {
  return dtype == DType::f32 ? 4 : dtype == DType::bf16 ? 2 : 1;
}
constexpr const char* name(DType dtype) {
  return dtype == DType::f32 ? "fp32" : dtype == DType::bf16 ? "bf16" : "fp8";
}

constexpr float kF8Max = 448.0f;
constexpr float kF8AmaxFloor = 1e-12f;

inline float f32_from_bf16(uint16_t value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value) << 16);
}

// Round to nearest, ties to even. NaN stays NaN.
inline uint16_t bf16_from_f32(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

// Round to nearest even, saturating at ±448. NaN gives 0x7f. Branch-free so that it vectorises.
inline uint8_t f8_from_f32(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 24) & 0x80u;
  const float magnitude = std::fabs(value);
  const float clamped =
      magnitude < kF8Max ? magnitude : kF8Max;  // NaN compares false: handled last
  const uint32_t u = std::bit_cast<uint32_t>(clamped);
  // Normal: drop 20 mantissa bits with RNE and rebias the exponent from 127 to 7.
  const uint32_t normal = ((u + 0x7ffffu + ((u >> 20) & 1u)) >> 20) - (120u << 3);
  // Subnormal: multiples of 2^-9. Adding 1.5*2^23 rounds to an integer, ties to even.
  const float shifted = clamped * 512.0f + 12582912.0f;
  const uint32_t subnormal = std::bit_cast<uint32_t>(shifted) & 0xffu;
  const uint32_t code = clamped < 0.015625f ? subnormal : normal;
  return static_cast<uint8_t>(value != value ? 0x7fu : (code | sign));
}

inline float f32_from_f8(uint8_t code) {
  const int exponent = (code >> 3) & 15;
  const int mantissa = code & 7;
  float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                  : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  if (exponent == 15 && mantissa == 7) magnitude = std::nanf("");
  return code & 0x80 ? -magnitude : magnitude;
}

}  // namespace liveact
