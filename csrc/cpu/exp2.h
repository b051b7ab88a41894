// The exponential of the CPU's softmax and activations.
#pragma once

#include <bit>
#include <cstdint>

namespace liveact::cpu {

// 2^x for x <= 0 and moderate x > 0; relative error below 2e-7. Values under 2^-126 give 2^-126,
// NaN gives NaN.
inline float exp2_approx(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = x < -126.0f ? -126.0f : x;         // this way round a NaN stays one
  const float rounded = x + kMagic;
  const float f = x - (rounded - kMagic);  // [-0.5, 0.5]
  float p = 1.540353039e-4f;               // ln(2)^k / k!
  p = p * f + 1.333355815e-3f;
  p = p * f + 9.618129108e-3f;
  p = p * f + 5.550410866e-2f;
  p = p * f + 2.402265070e-1f;
  p = p * f + 6.931471806e-1f;
  p = p * f + 1.0f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(p) +
                              (std::bit_cast<uint32_t>(rounded) << 23));
}

constexpr float kLog2E = 1.44269504088896340736f;

}  // namespace liveact::cpu
