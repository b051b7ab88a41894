#include "tests/operands.h"

namespace liveact::test {

namespace {

// Rounds as the format does.
double rounded(double v, DType dtype) {
  const float narrow = static_cast<float>(v);
  if (dtype == DType::bf16) return f32_from_bf16(bf16_from_f32(narrow));
  return dtype == DType::f8 ? f32_from_f8(f8_from_f32(narrow)) : v;
}

}  // namespace

void check_stored(const Rows& out, const Expected& expected, const std::string& what,
                  bool own_scales, Where where) {
  for (int64_t r = 0; r < out.rows; ++r) {
    const double* wanted = expected.value.data() + r * out.cols;
    const double* tolerance = expected.tolerance.data() + r * out.cols;
    const bool f8 = out.dtype == DType::f8;
    const double scale = f8 ? out.scale[r] : 1.0;
    if (f8 && own_scales) {
      double amax = kF8AmaxFloor;
      for (int64_t c = 0; c < out.cols; ++c) amax = std::max(amax, std::abs(wanted[c]));
      const double most = *std::max_element(tolerance, tolerance + out.cols) + 4 * kUlp * amax;
      if (!(std::abs(scale * kF8Max - amax) <= most)) {
        fail(text(what, ": row ", r, ": expected the scale ", amax / kF8Max, ", found ", scale),
             where);
      }
    }
    for (int64_t c = 0; c < out.cols; ++c) {
      // The scale and its use are fp32 too.
      const double slack = tolerance[c] / scale + (f8 ? 6 * kUlp * std::abs(wanted[c] / scale) : 0);
      const double low = rounded(wanted[c] / scale - slack, out.dtype);
      const double high = rounded(wanted[c] / scale + slack, out.dtype);
      const double found = element(out.data, out.dtype, r * out.row_stride() + c);
      if (low <= found && found <= high) continue;
      fail(text(what, ": [", r, ", ", c, "]: expected ", low * scale, " to ", high * scale,
                ", found ", found * scale),
           where);
    }
  }
}

}  // namespace liveact::test
