// The op list: everything a backend must do, each argument with its shape.
//
// M tokens of the current block · D model width · H heads · hd head dim · F tokens per latent frame
// The same names are used by triton_kernels/, the reference in tests/ and the benchmarks.
// Rows may be fp32, bf16 or fp8; an op computes in fp32, reads what it is given and writes the
// format of its output (fp8 output: one scale per row, see dtype.h). All pointers are device
// pointers of the Device that the Ops came from. Arguments are checked when a stream opens.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>

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
  // [n] or null for 0; in Device::bias_dtype(format of out), fp32 where an unquantised weight has
  // a scale (a gate)
  const void* bias = nullptr;
  bool accumulate = false;
};

// Queries, split in heads.
struct Heads {
  void* data = nullptr;  // [H, tokens, hd]
  DType dtype = DType::f32;
  int64_t heads = 0;
  int64_t tokens = 0;
  int64_t head_dim = 0;
  float* scale = nullptr;  // [H, tokens], fp8 only: per token and head
};

// The cuda backend keeps V of self-attention K-major, as its FP8 products need it: [H, hd, S] with
// S the tokens rounded up to this.
constexpr int64_t kValueStride = 128;

// Keys and values of consecutive tokens in the layout that the backend's attention wants; the
// shapes are those of the cpu backend.
struct KvSegment {
  void* k = nullptr;  // [H, tokens, hd], rotated for the slot it is in
  void* v = nullptr;  // [H, tokens, hd]; V is never rotated
  DType dtype = DType::f32;
  int64_t heads = 0;
  int64_t tokens = 0;
  int64_t head_dim = 0;
  float* k_scale = nullptr;  // [H, tokens], fp8 only: per token and head
  float* v_scale = nullptr;  // [H], fp8 only: shared by context and current block, see below

  int64_t key_bytes() const { return heads * tokens * head_dim * size_bytes(dtype); }
  // Room for the GPU's layout of V too: [H, hd, tokens rounded up to kValueStride].
  int64_t value_bytes() const {
    const int64_t columns = (tokens + kValueStride - 1) / kValueStride * kValueStride;
    return heads * head_dim * columns * size_bytes(dtype);
  }
};

// V in fp8 has one scale per (step, layer, head), set by block 0 and kept for the session:
// scale = kValueHeadroom * max(amax, 1e-12) / 448. e4m3 is a floating format with 15 binades of
// normal values, so a coarse scale costs no precision: with a headroom of 8 a value keeps its 3
// mantissa bits down to amax / 3584, and V may grow eightfold over block 0 before it saturates. In
// return V·scale leaves the inner loop of attention, and frames move between slots as bytes.
constexpr float kValueHeadroom = 8.0f;
// P in [0, 1] is multiplied by this before it is cast to fp8 (the sum of P stays fp32).
constexpr float kProbabilityScale = 256.0f;

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
  const float* key_taps = nullptr;    // [D, 5] ([5, D] where Device::tap_major) or null
  const float* value_taps = nullptr;  // the same
  CompressAxis axis = CompressAxis::token;
};

enum class Activation { gelu_tanh, gelu_erf, relu };

constexpr int kTimeMarks = 8;

class Ops {
 public:
  virtual ~Ops() = default;

  // Latent z [16, n, h, w] fp32 and conditioning y [c - 16, n, h, w] fp32 (frame stride given in
  // latent frames of y: y has y_frames of them, the block starts at y_first) -> tokens
  // [n * F, c * 4], channel-major patches (c, ph, pw).
  virtual void patchify(const float* z, const float* y, int64_t z_channels, int64_t y_channels,
                        int64_t y_frames, int64_t y_first, int64_t n, int64_t h, int64_t w,
                        const Rows& tokens) = 0;

  // tokens [n * F, 4 * channels] in (ph, pw, channel) order -> v [channels, n, h, w] fp32.
  virtual void unpatchify(const Rows& tokens, int64_t channels, int64_t n, int64_t h, int64_t w,
                          float* v) = 0;

  // out [M, N] = x [M, K] · weight [N, K]^T with the epilogue above.
  virtual void linear(const Rows& x, const Weight& weight, const Epilogue& epilogue,
                      const Rows& out) = 0;

  // out = LayerNorm(x) * gain + bias over the columns; modulate (gain = 1 + scale, bias = shift)
  // and affine are the same op. gain, bias [cols] fp32.
  virtual void layer_norm(const Rows& x, const float* gain, const float* bias, float eps,
                          const Rows& out) = 0;

  // out = x / rms(x) * gain over all columns. gain [cols] fp32.
  virtual void rms_norm(const Rows& x, const float* gain, float eps, const Rows& out) = 0;

  // out = activation(x), quantised where out is fp8.
  virtual void activate(const Rows& x, Activation activation, const Rows& out) = 0;

  // out = x in another format.
  virtual void quantize(const Rows& x, const Rows& out) = 0;

  // v_scale [heads] of the values in qkv [M, 3D], as described at kValueHeadroom.
  virtual void value_scale(const Rows& qkv, int64_t heads, float* v_scale) = 0;

  // From the fused product qkv [M, 3D]: RMS over all of D for q and k, rotation, split in heads,
  // quantisation. Query and key of token t sit at latent-frame position first_position + t / F.
  // Writes q [H, M, hd] and `current` (M tokens; its v_scale is read).
  virtual void split_qkv(const Rows& qkv, const float* q_gain, const float* k_gain, float eps,
                         const Rope& rope, int64_t first_position, const Heads& q,
                         const KvSegment& current) = 0;

  // RMS-normed keys and plain values of a text or an image, token-major k, v [tokens, D] ->
  // segment.
  virtual void store_kv(const Rows& k, const Rows& v, const KvSegment& segment) = 0;

  // out [M, D] = softmax(q · [context; current]^T / sqrt(hd)) · [context; current], no mask.
  // The context may have no tokens.
  virtual void self_attention(const Heads& q, const KvSegment& context, const KvSegment& current,
                              const Rows& out) = 0;

  // out [M, D] = Attn(q, text) + Attn(q, image): two softmaxes, one q [M, D]. The last text key
  // stands for `pad_count` identical padding rows: its logit has log(pad_count) added; with
  // pad_count 0 it is left out.
  virtual void cross_attention(const Rows& q, const KvSegment& text, int64_t pad_count,
                               const KvSegment& image, const Rows& out) = 0;

  // Per latent frame j of n: out rows j*F .. = Attn(q rows j*F .., keys of that frame). kv holds
  // kv_frames * T audio tokens [kv_frames * T, 2D] (k | v); kv_frames is n, or 1 for all alike.
  virtual void audio_attention(const Rows& q, const Rows& kv, int64_t n, int64_t kv_frames,
                               int64_t heads, const Rows& out) = 0;

  // context <- table applied to (context, current), `first_slot` being the slot (and position) of
  // current's first latent frame. Keys are un-rotated, filtered, rotated for their new slot and
  // quantised again. `staging` has the size of the context.
  virtual void update_memory(std::span<const SlotUpdate> table, const CompressFilter& filter,
                             const Rope& rope, int64_t first_slot, const KvSegment& current,
                             const KvSegment& staging, const KvSegment& context) = 0;

  // The keys of `segment` un-rotated, and its values, as fp32 [tokens, H, hd]; for inspection.
  virtual void export_kv(const KvSegment& segment, const Rope& rope, int64_t first_position,
                         float* k, float* v) = 0;

  // v <- v_null + guidance * (v - v_null), elementwise. v, v_null [size].
  virtual void guide(float* v, const float* v_null, float guidance, int64_t size) = 0;

  // x0 = z - sigma * v; z <- (1 - next_sigma) * x0 + next_sigma * noise. All [size] fp32; noise
  // may be null where next_sigma is 0.
  virtual void sampler_step(float* z, const float* v, const float* noise, float sigma,
                            float next_sigma, int64_t size) = 0;

  // Returns whether every value of x [size] is finite. Waits for the ops before it.
  virtual bool all_finite(const float* x, int64_t size) = 0;

  // Planning: from `begin_plan` to `end_plan` ops check their arguments and note their shapes, and
  // nothing runs; `end_plan` then chooses what is to be chosen for these shapes, by trial where
  // that is the way, which overwrites what the noted ops write. Nothing happens and false comes
  // back where there is nothing to choose.
  virtual bool begin_plan() = 0;
  virtual void end_plan() = 0;

  // Repeating the same ops on the same buffers: `replay(key)` runs what was recorded under `key`
  // and returns true, or returns false; then the ops between `begin_record` and `end_record` run
  // and, where the backend can (CUDA graphs), are kept under that key. `forget` drops all, one that
  // is being recorded too.
  virtual bool replay(int key) = 0;
  virtual void begin_record(int key) = 0;
  virtual void end_record() = 0;
  virtual void forget() = 0;

  // Time marks 0 to kTimeMarks - 1. `mark` notes when the ops before it are done, without waiting;
  // `marked_ms` is the time between two marks once a `download` after the later one has returned.
  virtual void mark(int index) = 0;
  virtual double marked_ms(int first, int second) = 0;

  // Host memory in and out; `download` waits for the ops before it.
  virtual void upload(void* target, const void* host, int64_t bytes) = 0;
  virtual void download(void* host, const void* source, int64_t bytes) = 0;
};

// The largest sizes that the ops of one stream will see; scratch is made for them once.
struct OpsLimits {
  int64_t max_cols = 0;     // of any row
  int64_t max_operand = 0;  // elements of the input of a linear
  int64_t max_keys = 0;     // context and current block, or text and image
  int64_t head_dim = 0;
};

// One device: memory, weights in the device's format, and op queues.
class Device {
 public:
  virtual ~Device() = default;
  virtual const char* name() const = 0;

  // Zero-filled, aligned to 64 bytes or more. Throws Error with the size when there is no room.
  virtual void* allocate(int64_t bytes) = 0;
  virtual void release(void* pointer) = 0;
  virtual int64_t allocated_bytes() const = 0;   // now
  virtual int64_t allocation_count() const = 0;  // ever

  // What is free now; nothing where the device cannot say (the system may still give more).
  virtual std::optional<int64_t> free_bytes() const = 0;

  // `source` is host memory or memory of this device that others (torch) allocated.
  virtual void upload(void* target, const void* source, int64_t bytes) = 0;
  virtual void download(void* host, const void* source, int64_t bytes) = 0;
  // Whether the host cannot read there.
  virtual bool is_device_memory(const void* pointer) const = 0;

  // The format in which this device wants the bias of a linear whose output has format `out`.
  virtual DType bias_dtype(DType out) const = 0;

  // Whether this device wants the taps of CompressFilter as [5, D]: adjacent channels then load
  // adjacent taps.
  virtual bool tap_major() const { return false; }

  // Whether a weight of this host format can be used where it lies (memory-mapped), so that the
  // model need not copy it.
  virtual bool uses_host_weights(DType dtype) const = 0;

  virtual std::unique_ptr<Ops> open_ops(const OpsLimits& limits) = 0;
  virtual int64_t ops_bytes(const OpsLimits& limits) const = 0;  // what open_ops allocates
};

// Owns one allocation of a device.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Device& device, int64_t bytes)
      : device_(&device), data_(device.allocate(bytes)), bytes_(bytes) {}
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (data_ != nullptr) device_->release(data_);
  }

  void* data() const { return data_; }
  float* f32() const { return static_cast<float*>(data_); }
  int64_t bytes() const { return bytes_; }

 private:
  Device* device_ = nullptr;
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace liveact
