#include "core/host_kv.h"

#include <vector>

namespace liveact {

void export_host_kv(const KvSegment& segment, const Rope& rope, int64_t first_position, float* k,
                    float* v) {
  const int64_t hd = segment.head_dim;
  const int64_t frame_tokens = rope.tokens_per_frame();
  std::vector<float> scratch(hd);
  for (int64_t t = 0; t < segment.tokens; ++t) {
    for (int64_t head = 0; head < segment.heads; ++head) {
      const int64_t index = head * segment.tokens + t;
      const int64_t out = (t * segment.heads + head) * hd;
      rotate(rope, first_position + t / frame_tokens, t % frame_tokens, -1.0f,
             load_key(segment, head, index, scratch.data()), k + out);
      std::memcpy(v + out, load_value(segment, head, index, scratch.data()), sizeof(float) * hd);
    }
  }
}

}  // namespace liveact
