// Random operands in every format, and the comparison of what an op stored with what it should be.
//
// References are computed in fp64 from the stored values of the operands, that is after their
// quantisation, together with a bound on the rounding error of the same maths in fp32. An fp8 or
// bf16 output must lie between the roundings of (reference - bound) and (reference + bound):
// rounding is monotonic, so this allows no more than the bound itself.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>

#include "cpu/cpu_backend.h"
#include "liveact/error.h"
#include "tests/check.h"

namespace liveact::test {

constexpr double kUlp = 1.0 / (1 << 24);  // unit roundoff of fp32: half an ulp of 1
constexpr DType kAllTypes[] = {DType::f32, DType::bf16, DType::f8};

// The same numbers on every platform, unlike the distributions of the standard library.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  double uniform() {  // [0, 1)
    state_ += 0x9e3779b97f4a7c15u;
    uint64_t x = state_;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return static_cast<double>((x ^ (x >> 31)) >> 11) * 0x1p-53;
  }
  // Mean 0, variance 1: the sum of four uniforms.
  float normal() {
    const double sum = uniform() + uniform() + uniform() + uniform();
    return static_cast<float>((sum - 2.0) * 1.7320508075688772);
  }
  std::vector<float> normals(int64_t n, float scale = 1.0f) {
    std::vector<float> values(n);
    for (float& value : values) value = normal() * scale;
    return values;
  }

 private:
  uint64_t state_;
};

inline double element(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::f32:
      return static_cast<const float*>(data)[index];
    case DType::bf16:
      return f32_from_bf16(static_cast<const uint16_t*>(data)[index]);
    case DType::f8:
      return f32_from_f8(static_cast<const uint8_t*>(data)[index]);
  }
  return 0.0;
}

inline void set_element(void* data, DType dtype, int64_t index, float value) {
  switch (dtype) {
    case DType::f32:
      static_cast<float*>(data)[index] = value;
      return;
    case DType::bf16:
      static_cast<uint16_t*>(data)[index] = bf16_from_f32(value);
      return;
    case DType::f8:
      static_cast<uint8_t*>(data)[index] = f8_from_f32(value);
      return;
  }
}

inline double value(const Rows& m, int64_t row, int64_t col) {
  const double scale = m.dtype == DType::f8 ? m.scale[row] : 1.0;
  return scale * element(m.data, m.dtype, row * m.row_stride() + col);
}

// Rows with memory of their own.
class Matrix {
 public:
  // Every byte 0xff, a NaN in every format, so that what an op leaves out shows.
  Matrix(int64_t rows, int64_t cols, DType dtype, int64_t stride = 0)
      : memory_(rows * std::max(stride, cols) * size_bytes(dtype), 0xff), scales_(rows, NAN) {
    view_ = {memory_.data(), dtype, rows, cols, scales_.data(), stride};
  }
  // Quantised by the contract of dtype.h.
  Matrix(int64_t rows, int64_t cols, DType dtype, const std::vector<float>& values)
      : Matrix(rows, cols, dtype) {
    for (int64_t r = 0; r < rows; ++r) {
      float bound = kF8AmaxFloor;
      for (int64_t c = 0; c < cols; ++c) bound = std::max(bound, std::abs(values[r * cols + c]));
      const float inverse = dtype == DType::f8 ? kF8Max / bound : 1.0f;
      scales_[r] = bound / kF8Max;
      for (int64_t c = 0; c < cols; ++c) {
        set_element(memory_.data(), dtype, r * cols + c, values[r * cols + c] * inverse);
      }
    }
  }
  Matrix(Matrix&&) = default;

  const Rows& rows() const { return view_; }
  double operator()(int64_t row, int64_t col) const { return value(view_, row, col); }
  bool same_bytes(const Matrix& other) const { return memory_ == other.memory_; }

 private:
  std::vector<uint8_t> memory_;
  std::vector<float> scales_;
  Rows view_;
};

// What an op should store, row-major without gaps, and how far fp32 may be from it.
struct Expected {
  std::vector<double> value;
  std::vector<double> tolerance;

  void add(double v, double t) {
    value.push_back(v);
    tolerance.push_back(t);
  }
};

// `own_scales`: fp8 rows must have the scale of their own largest value.
void check_stored(const Rows& out, const Expected& expected, const std::string& what,
                  bool own_scales = true, Where where = Where::current());

// The ops of a CPU device with scratch for just these sizes, so that a sanitizer sees an overrun.
class Cpu {
 public:
  explicit Cpu(const OpsLimits& limits) : ops_(device_.open_ops(limits)) {}
  Ops* operator->() const { return ops_.get(); }

 private:
  cpu::CpuDevice device_;
  std::unique_ptr<Ops> ops_;
};

}  // namespace liveact::test
