// Rows in host memory: reading and writing one of any format. The core converts weights with it,
// the CPU backend is built on it. Everything is inline: these are the inner loops of the CPU's ops.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "core/ops.h"
#include "liveact/dtype.h"

namespace liveact {

inline const std::array<float, 256>& f8_values() {
  static const std::array<float, 256> values = [] {
    std::array<float, 256> table{};
    for (int code = 0; code < 256; ++code) table[code] = f32_from_f8(static_cast<uint8_t>(code));
    return table;
  }();
  return values;
}

inline float amax(const float* x, int64_t n) {
  float result = 0.0f;
#pragma omp simd reduction(max : result)
  for (int64_t i = 0; i < n; ++i) result = std::max(result, std::fabs(x[i]));
  return result;
}

inline void encode_f8(const float* x, int64_t n, float inverse_scale, uint8_t* codes) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) codes[i] = f8_from_f32(x[i] * inverse_scale);
}

// Quantises n values with the scale of their own amax, and returns that scale.
inline float quantize_f8(const float* x, int64_t n, uint8_t* codes) {
  const float bound = std::max(amax(x, n), kF8AmaxFloor);
  encode_f8(x, n, kF8Max / bound, codes);
  return bound / kF8Max;
}

inline void decode_f8(const uint8_t* codes, int64_t n, float scale, float* x) {
  const float* values = f8_values().data();
  for (int64_t i = 0; i < n; ++i) x[i] = values[codes[i]] * scale;
}

inline void decode_bf16(const uint16_t* source, int64_t n, float* x) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] = f32_from_bf16(source[i]);
}

inline void encode_bf16(const float* x, int64_t n, uint16_t* target) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) target[i] = bf16_from_f32(x[i]);
}

// Elements [offset, offset + n) of a matrix of any format as fp32: in place where it is fp32
// already, else decoded (times scale, fp8 only) into scratch [n].
inline const float* read_f32(const void* data, DType dtype, int64_t offset, int64_t n, float scale,
                             float* scratch) {
  switch (dtype) {
    case DType::f32:
      return static_cast<const float*>(data) + offset;
    case DType::bf16:
      decode_bf16(static_cast<const uint16_t*>(data) + offset, n, scratch);
      return scratch;
    case DType::f8:
      decode_f8(static_cast<const uint8_t*>(data) + offset, n, scale, scratch);
      return scratch;
  }
  return scratch;
}

inline const float* read_row(const Rows& x, int64_t row, float* scratch) {
  const float scale = x.dtype == DType::f8 ? x.scale[row] : 1.0f;
  return read_f32(x.data, x.dtype, row * x.row_stride(), x.cols, scale, scratch);
}

// Where the caller may build an fp32 row: the row itself, or scratch that write_row then converts.
inline float* row_target(const Rows& out, int64_t row, float* scratch) {
  return out.dtype == DType::f32 ? static_cast<float*>(out.data) + row * out.row_stride() : scratch;
}

inline void write_row(const Rows& out, int64_t row, const float* values) {
  const int64_t offset = row * out.row_stride();
  switch (out.dtype) {
    case DType::f32: {
      float* target = static_cast<float*>(out.data) + offset;
      if (target != values) std::memcpy(target, values, sizeof(float) * out.cols);
      return;
    }
    case DType::bf16:
      encode_bf16(values, out.cols, static_cast<uint16_t*>(out.data) + offset);
      return;
    case DType::f8:
      out.scale[row] = quantize_f8(values, out.cols, static_cast<uint8_t*>(out.data) + offset);
      return;
  }
}

}  // namespace liveact
