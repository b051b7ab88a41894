// Keys and values of a segment in host memory, in the layout of the cpu backend: [H, tokens, hd].
#pragma once

#include "core/host_rows.h"

namespace liveact {

// cos/sin of one token, gathered from the three axes; direction -1 un-rotates.
inline void rotate(const Rope& rope, int64_t position, int64_t token_in_frame, float direction,
                   const float* x, float* out) {
  const float* axes[3] = {rope.frame + position * rope.pairs_frame * 2,
                          rope.row + token_in_frame / rope.grid_cols * rope.pairs_row * 2,
                          rope.col + token_in_frame % rope.grid_cols * rope.pairs_col * 2};
  const int pairs[3] = {rope.pairs_frame, rope.pairs_row, rope.pairs_col};
  for (int axis = 0; axis < 3; ++axis) {
    const float* table = axes[axis];
    for (int j = 0; j < pairs[axis]; ++j, x += 2, out += 2) {
      const float c = table[2 * j];
      const float s = table[2 * j + 1] * direction;
      const float even = x[0];
      const float odd = x[1];
      out[0] = even * c - odd * s;
      out[1] = even * s + odd * c;
    }
  }
}

inline const float* load_key(const KvSegment& segment, int64_t head, int64_t token_index,
                             float* scratch) {
  const float scale = segment.dtype == DType::f8 ? segment.k_scale[head] : 1.0f;
  return read_f32(segment.k, segment.dtype, token_index * segment.head_dim, segment.head_dim, scale,
                  scratch);
}

inline const float* load_value(const KvSegment& segment, int64_t head, int64_t token_index,
                               float* scratch) {
  const float scale = segment.dtype == DType::f8 ? segment.v_scale[head] : 1.0f;
  return read_f32(segment.v, segment.dtype, token_index * segment.head_dim, segment.head_dim, scale,
                  scratch);
}

// The keys un-rotated and the values as fp32 [tokens, H, hd]: Ops::export_kv where everything that
// `segment` and `rope` point to is host memory.
void export_host_kv(const KvSegment& segment, const Rope& rope, int64_t first_position, float* k,
                    float* v);

}  // namespace liveact
