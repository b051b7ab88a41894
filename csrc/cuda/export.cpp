// export_kv on the host: for inspection only, so it reads the segment back.

#include <algorithm>
#include <vector>

#include "core/host_kv.h"
#include "cuda/cuda_ops.h"

namespace liveact::cuda {

namespace {

// [H, hd, columns] -> [H, tokens, hd]
std::vector<char> transposed_values(const std::vector<char>& source, const KvSegment& segment) {
  const int64_t element = size_bytes(segment.dtype);
  const int64_t columns =
      segment.value_bytes(kValueStride) / (segment.heads * segment.head_dim * element);
  std::vector<char> result(segment.key_bytes());
  for (int64_t head = 0; head < segment.heads; ++head) {
    for (int64_t t = 0; t < segment.tokens; ++t) {
      for (int64_t d = 0; d < segment.head_dim; ++d) {
        const int64_t from = ((head * segment.head_dim + d) * columns + t) * element;
        const int64_t to = ((head * segment.tokens + t) * segment.head_dim + d) * element;
        std::copy_n(source.data() + from, element, result.data() + to);
      }
    }
  }
  return result;
}

}  // namespace

void CudaOps::export_kv(const KvSegment& segment, const Rope& rope, int64_t first_position,
                        float* k, float* v) {
  const auto read = [&](const void* source, int64_t bytes) {
    std::vector<char> host(bytes);
    if (source != nullptr) download(host.data(), source, bytes);
    return host;
  };
  const int64_t positions = first_position + segment.tokens / rope.tokens_per_frame();
  std::vector<char> frame = read(rope.frame, 8 * positions * rope.pairs_frame);
  std::vector<char> row = read(rope.row, int64_t{8} * rope.grid_rows * rope.pairs_row);
  std::vector<char> col = read(rope.col, int64_t{8} * rope.grid_cols * rope.pairs_col);
  std::vector<char> keys = read(segment.k, segment.key_bytes());
  std::vector<char> values =
      transposed_values(read(segment.v, segment.value_bytes(kValueStride)), segment);
  const bool f8 = segment.dtype == DType::f8;
  std::vector<char> k_scale = read(f8 ? segment.k_scale : nullptr, 4 * segment.heads);
  std::vector<char> v_scale = read(f8 ? segment.v_scale : nullptr, 4 * segment.heads);

  KvSegment host = segment;
  host.k = keys.data();
  host.v = values.data();
  host.k_scale = reinterpret_cast<float*>(k_scale.data());
  host.v_scale = reinterpret_cast<float*>(v_scale.data());
  Rope host_rope = rope;
  host_rope.frame = reinterpret_cast<const float*>(frame.data());
  host_rope.row = reinterpret_cast<const float*>(row.data());
  host_rope.col = reinterpret_cast<const float*>(col.data());
  export_host_kv(host, host_rope, first_position, k, v);
}

}  // namespace liveact::cuda
