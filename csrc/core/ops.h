// What the ops work on, and their interface. The ops themselves are in op_list.h.
#pragma once

#include <cstdint>
#include <mutex>
#include <span>

#include "liveact/dtype.h"
#include "liveact/kv_layout.h"

namespace liveact {

// Activations, one row per token.
struct Rows {
  void* data = nullptr;  // [rows, cols], row-major
  DType dtype = DType::f32;
  int64_t rows = 0;
  int64_t cols = 0;
  float* scale = nullptr;  // [rows], fp8 only
  int64_t stride = 0;      // elements from row to row; 0 means cols

  int64_t row_stride() const { return stride == 0 ? cols : stride; }
  int64_t size() const { return rows * cols; }

  // The same memory as a matrix of another shape and format.
  Rows as(int64_t new_rows, int64_t new_cols, DType new_dtype) const {
    return {data, new_dtype, new_rows, new_cols, scale, 0};
  }
  // `count` columns from `first` on.
  Rows columns(int64_t first, int64_t count) const {
    return {static_cast<char*>(data) + first * size_bytes(dtype),
            dtype,
            rows,
            count,
            scale,
            row_stride()};
  }
  // All rows from `first` on.
  Rows from(int64_t first) const {
    Rows result = *this;
    result.data = static_cast<char*>(data) + first * row_stride() * size_bytes(dtype);
    result.rows = rows - first;
    if (scale != nullptr) result.scale = scale + first;
    return result;
  }
};

// The weight of a linear layer, in up to three row blocks (fused QKV where the file keeps three).
struct Weight {
  struct Part {
    const void* data = nullptr;  // [n, k], row-major
    int64_t n = 0;
  };
  Part parts[3];
  DType dtype = DType::f32;
  const float* scale = nullptr;  // [n], fp8 only: one scale per output channel
  int64_t n = 0;
  int64_t k = 0;
};

// out = (accumulate ? out : 0) + acc * row_scale * scale + bias. A gate is folded in scale and
// bias.
struct Epilogue {
  const float* scale = nullptr;  // [n] or null for 1
  // [n] or null for 0; in DeviceFormats::bias(format of out), fp32 where an unquantised weight has
  // a scale (a gate)
  const void* bias = nullptr;
  bool accumulate = false;
};

// Queries, split in heads. Two devices that share an evaluation have half of the heads each; then
// split_qkv, which fills both halves, finds the second one at `upper`, on the other device or here.
struct Heads {
  void* data = nullptr;  // [H, tokens, hd], or [H / 2, tokens, hd] of the lower half
  DType dtype = DType::f32;
  int64_t heads = 0;
  int64_t tokens = 0;
  int64_t head_dim = 0;
  float* scale = nullptr;  // [H, tokens], fp8 only: per token and head
  void* upper = nullptr;   // [H / 2, tokens, hd] or null
  float* upper_scale = nullptr;

  // Heads from here on are at `upper`.
  int64_t lower_heads() const { return upper == nullptr ? heads : heads / 2; }
};

// Keys and values of consecutive tokens in the layout that the backend's attention wants; the
// shapes are those of the cpu backend.
struct KvSegment {
  void* k = nullptr;  // [H, tokens, hd], rotated for the slot it is in
  void* v = nullptr;  // [H, tokens, hd]; V is never rotated
  DType dtype = DType::f32;
  int64_t heads = 0;
  int64_t tokens = 0;
  int64_t head_dim = 0;
  const float* k_scale = nullptr;  // [H], fp8 only: fixed by the weights, see below
  // [H]. fp8: shared by context and current block, see below. Text and image: of the values as they
  // are, for what attention writes in fp8.
  float* v_scale = nullptr;
  // The second half of the heads, as in Heads; the scales are those of all.
  void* upper_k = nullptr;
  void* upper_v = nullptr;

  int64_t lower_heads() const { return upper_k == nullptr ? heads : heads / 2; }
  int64_t key_bytes() const { return heads * tokens * head_dim * size_bytes(dtype); }
  // `multiple` is DeviceFormats::value_multiple.
  int64_t value_bytes(int64_t multiple) const {
    const int64_t columns = (tokens + multiple - 1) / multiple * multiple;
    return heads * head_dim * columns * size_bytes(dtype);
  }
};

// V in fp8 has one scale per (step, layer, head), set by block 0 and kept for the session:
// scale = kValueHeadroom * max(amax, 1e-12) / 448. e4m3 is a floating format with 15 binades of
// normal values, so a coarse scale costs no precision: with a headroom of 8 a value keeps its 3
// mantissa bits down to amax / 3584, and V may grow eightfold over block 0 before it saturates. In
// return V·scale leaves the inner loop of attention, and frames move between slots as bytes.
constexpr float kValueHeadroom = 8.0f;
// K in fp8 has one scale per (layer, head), fixed when a model is loaded. After the RMS norm over D
// channels a pair of them is at most sqrt(D) times the largest gain of its head, and no rotation
// changes that: scale = sqrt(D) * max(|gain|, 1e-12) / 448. A key as large as its gain then has a
// code of 448 / sqrt(D), 6.3 at D = 5120, and keeps its 3 mantissa bits down to 1/400 of that. Only
// what the filters of the memory let grow beyond the bound saturates.
// P in [0, 1] is multiplied by this before it is cast to fp8 (the sum of P stays fp32).
constexpr float kProbabilityScale = 256.0f;
// What attention writes in fp8 has one scale for all rows, so that no program has to know the
// largest value of a row: the largest of [H] scales as value_scale makes them. It goes into the
// scale of every row, and codes are those of value * (1 / scale). The values of self-attention are
// many and average out, so there these are the scales of its own result in block 0: as with V, it
// may grow eightfold before it saturates. For cross- and audio attention they are the scales of the
// values that are averaged, divided by kValueHeadroom: the result cannot exceed the largest value.

// cos, sin of the 3D rotary embedding: pairs of a head rotate by latent frame, then row, then
// column; pair j of an axis with m pairs has the frequency 10000^(-j/m). Angles are float64,
// stored as fp32.
struct Rope {
  const float* frame = nullptr;  // [positions, pairs_frame, 2]
  const float* row = nullptr;    // [grid_rows, pairs_row, 2]
  const float* col = nullptr;    // [grid_cols, pairs_col, 2]
  int pairs_frame = 0, pairs_row = 0, pairs_col = 0;
  int grid_rows = 0, grid_cols = 0;  // tokens of a latent frame: F = grid_rows * grid_cols

  int64_t tokens_per_frame() const { return static_cast<int64_t>(grid_rows) * grid_cols; }
};

// Depthwise 5-tap filters that compress keys and values; null taps mean the plain average.
struct CompressFilter {
  const float* key_taps = nullptr;    // [D, 5] ([5, D] where DeviceFormats::tap_major) or null
  const float* value_taps = nullptr;  // the same
  CompressAxis axis = CompressAxis::token;
  int64_t channels = 0;  // D, also where the taps are those of some heads only

  // From this channel on.
  CompressFilter from(int64_t channel, bool tap_major) const {
    const int64_t offset = channel * (tap_major ? 1 : kCompressTaps);
    CompressFilter result = *this;
    if (key_taps != nullptr) result.key_taps += offset;
    if (value_taps != nullptr) result.value_taps += offset;
    return result;
  }
};

// Where the queues of two devices meet. Each counts for itself, in memory of its device, so that
// what is recorded for replay counts on.
struct Barrier {
  int64_t* counts = nullptr;   // [2], here: how often this queue signalled, and how often it waited
  int64_t* arrived = nullptr;  // here: how often the other one has signalled, which writes it
  int64_t* peer_arrived = nullptr;  // `arrived` of the other one
};
constexpr int64_t kBarrierOpen = int64_t{1} << 62;  // in `arrived`: nobody waits any more

enum class Activation { gelu_tanh, gelu_erf, relu };

constexpr int kTimeMarks = 8;

// The ops of a backend, on a queue: op_list.h says what each one does.
class Ops {
 public:
  virtual ~Ops() = default;

#define LIVEACT_OP(result, name, parameters, arguments) virtual result name parameters = 0;
#define LIVEACT_QUEUE_CALL LIVEACT_OP
#include "core/op_list.h"
};

// The largest sizes that the ops of one stream will see, for which scratch is made once, and what
// else a queue must know when it opens.
struct OpsLimits {
  int64_t max_cols = 0;     // of any row
  int64_t max_operand = 0;  // elements of the input of a linear, and of a result it adds to `out`
  int64_t max_keys = 0;     // context and current block, or text and image
  int64_t head_dim = 0;
  bool full_sums = false;  // Precision::full_sums
};

}  // namespace liveact
