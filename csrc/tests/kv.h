// Key/value segments with memory of their own, and the rotary tables, for the attention and
// memory tests.
#pragma once

#include "tests/operands.h"

namespace liveact::test {

// [H, tokens, hd] keys and values. In fp8 both have one scale per head, as in a stream; that of
// keys is twice the one given for values.
class Segment {
 public:
  // Every byte 0xff, as in Matrix.
  Segment(int64_t heads, int64_t tokens, int64_t head_dim, DType dtype,
          const std::vector<float>& v_scale)
      : k_(heads * tokens, head_dim, dtype),
        v_(heads * tokens, head_dim, dtype),
        v_scale_(v_scale) {
    set_view(heads);
  }
  Segment(int64_t heads, int64_t tokens, int64_t head_dim, DType dtype, Random& random,
          float v_scale = 0.01f)
      : k_(heads * tokens, head_dim, dtype, random.normals(heads * tokens * head_dim)),
        v_(heads * tokens, head_dim, dtype, random.normals(heads * tokens * head_dim)) {
    for (int64_t h = 0; h < heads; ++h) v_scale_.push_back(v_scale * static_cast<float>(h + 1));
    set_view(heads);
  }
  Segment(Segment&&) = default;

  const KvSegment& view() const { return view_; }
  double key(int64_t head, int64_t token, int64_t d) const {
    return k_(head * view_.tokens + token, d);
  }
  double value(int64_t head, int64_t token, int64_t d) const {
    const double scale = view_.dtype == DType::f8 ? v_scale_[head] : 1.0;
    return scale *
           element(view_.v, view_.dtype, (head * view_.tokens + token) * view_.head_dim + d);
  }
  const Rows& key_rows() const { return k_.rows(); }
  // As key_rows: [H * tokens, hd] with the scale of each head repeated.
  const Rows& value_rows() const { return v_.rows(); }
  bool same_bytes(const Segment& other) const {
    return k_.same_bytes(other.k_) && v_.same_bytes(other.v_);
  }

 private:
  void set_view(int64_t heads) {
    const int64_t tokens = k_.rows().rows / heads;
    for (const float scale : v_scale_) k_scale_.push_back(2 * scale);
    view_ = {.k = k_.rows().data,
             .v = v_.rows().data,
             .dtype = k_.rows().dtype,
             .heads = heads,
             .tokens = tokens,
             .head_dim = k_.rows().cols,
             .k_scale = k_scale_.data(),
             .v_scale = v_scale_.data()};
    for (int64_t i = 0; i < heads * tokens; ++i) {
      k_.rows().scale[i] = k_scale_[i / tokens];
      v_.rows().scale[i] = v_scale_[i / tokens];
    }
  }

  Matrix k_, v_;
  std::vector<float> k_scale_, v_scale_;
  KvSegment view_;
};

// The tables of a grid, and the same rotation in fp64.
class RopeTables {
 public:
  RopeTables(int64_t positions, int grid_rows, int grid_cols, int64_t head_dim) {
    const int pairs = static_cast<int>(head_dim / 2);
    rope_.pairs_row = rope_.pairs_col = pairs / 3;
    rope_.pairs_frame = pairs - 2 * (pairs / 3);
    rope_.grid_rows = grid_rows;
    rope_.grid_cols = grid_cols;
    fill(frame_, positions, rope_.pairs_frame);
    fill(row_, grid_rows, rope_.pairs_row);
    fill(col_, grid_cols, rope_.pairs_col);
    rope_.frame = frame_.data();
    rope_.row = row_.data();
    rope_.col = col_.data();
  }
  const Rope& view() const { return rope_; }
  int64_t frame_tokens() const { return rope_.tokens_per_frame(); }

  // x [hd] rotated in place for a position and a token of the latent frame; -1 un-rotates.
  void rotate(int64_t position, int64_t token, double direction, double* x) const {
    const int pairs[3] = {rope_.pairs_frame, rope_.pairs_row, rope_.pairs_col};
    const int64_t at[3] = {position, token / rope_.grid_cols, token % rope_.grid_cols};
    for (int axis = 0; axis < 3; ++axis) {
      for (int j = 0; j < pairs[axis]; ++j, x += 2) {
        const double angle = direction * static_cast<double>(at[axis]) *
                             std::pow(10000.0, -static_cast<double>(j) / pairs[axis]);
        const double even = x[0];
        x[0] = even * std::cos(angle) - x[1] * std::sin(angle);
        x[1] = even * std::sin(angle) + x[1] * std::cos(angle);
      }
    }
  }

 private:
  static void fill(std::vector<float>& table, int64_t positions, int pairs) {
    for (int64_t p = 0; p < positions; ++p) {
      for (int j = 0; j < pairs; ++j) {
        const double angle =
            static_cast<double>(p) * std::pow(10000.0, -static_cast<double>(j) / pairs);
        table.push_back(static_cast<float>(std::cos(angle)));
        table.push_back(static_cast<float>(std::sin(angle)));
      }
    }
  }

  std::vector<float> frame_, row_, col_;
  Rope rope_;
};

}  // namespace liveact::test
