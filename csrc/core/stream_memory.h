// Everything that a stream allocates on a device, made from sizes alone: when it opens, and only
// counted when somebody asks what it would take.
#pragma once

#include <vector>

#include "core/buffer.h"
#include "core/ops.h"
#include "core/threads.h"
#include "liveact/stream.h"

namespace liveact {

// Which of the devices of a stream this is. They share the latent frames of a block, and the heads.
struct Place {
  int index = 0;
  int count = 1;

  Share share(int64_t n) const { return {n, index, count}; }
};

// With guidance a second pass runs without audio, on contexts of its own.
struct Pass {
  std::vector<KvSegment> contexts;    // [kSteps * layers]; step 0 unused in the pass without audio
  std::vector<float*> value_scale;    // the same: [H], of V in fp8, also of heads elsewhere
  std::vector<float*> mixed_scale;    // the same: [H], of what self-attention writes in fp8
  std::vector<Rows> audio_kv;         // [layers]: [frames * tokens, 2D]
  std::vector<float*> audio_v_scale;  // [layers]: [H]
  int64_t audio_frames = 0;           // latent frames in audio_kv; 1 = the same for all
};

// Text and image, and scratch to project them and the audio with.
struct Conditioning {
  std::vector<KvSegment> text_kv, image_kv;  // [layers]
  float* y = nullptr;                        // [in_dim - out_dim, y_frames, h, w]
  int64_t y_frames = 0;
  Rows in, a, b;  // fp32, then in the format of the activations
};

// Of one evaluation. M = tokens of the block, m = those of them whose rows are this device's, H =
// heads that are this device's.
struct Scratch {
  Rows x;        // [m, D]: the residual stream
  Rows normed;   // [m, max(D, ffn)]: operand of the next product, in its format
  Rows wide;     // [m, max(3D, ffn)]: what the wide products write
  Rows mixed;    // [m, D]: what attention writes
  Rows patches;  // [m, 4 in_dim]
  Heads q;       // [H, M, hd]
  KvSegment current, staging;
  float* z = nullptr;      // [out_dim, n, h, w]
  float* noise = nullptr;  // [2, out_dim, n, h, w]
  float* v = nullptr;
  float* v_null = nullptr;
};

class StreamMemory {
 public:
  enum class Mode { count, allocate };

  StreamMemory(Device& device, const ModelConfig& config, const Precision& precision,
               const StreamOptions& options, const Place& place, Mode mode);

  Rope rope;
  Pass main, null;  // null: with guidance only
  Conditioning conditioning;
  Scratch scratch;
  Barrier barrier;  // where there are two devices
  // Whose latent frames' audio is projected here: in fp8 those of all devices, which share a scale;
  // to project them again costs less than to ask.
  Place audio_place;
  OpsLimits limits;
  int64_t latent_elements = 0;  // of the device's frames of the longest block
  // In all, and what of it are contexts, and text, image and audio.
  int64_t total_bytes = 0, context_bytes = 0, conditioning_bytes = 0;

 private:
  // The sizes that several parts share.
  struct Sizes {
    int64_t frames;        // the most latent frames of a block
    int64_t own_frames;    // the same of this device
    int64_t frame_tokens;  // F
    int64_t tokens;        // M
    int64_t own_tokens;    // m
    int64_t own_heads;     // H
    int64_t text_tokens;   // with the padding row
    int64_t audio_rows;
    int64_t conditioning;  // elements of the largest projection
  };

  void* allocate(int64_t bytes);
  float* floats(int64_t count) { return static_cast<float*>(allocate(4 * count)); }
  Rows rows(int64_t count, int64_t cols, DType dtype);
  KvSegment kv_segment(int64_t tokens, int64_t heads, DType dtype, float* v_scale);

  void make_rope();
  void make_pass(Pass& pass, int first_step, int64_t audio_frames);
  void make_barrier();
  void make_conditioning_kv();
  void make_scratch();
  void make_projections();
  OpsLimits ops_limits() const;

  Device* device_;
  const DeviceFormats formats_;
  const ModelConfig config_;
  const Precision precision_;
  const StreamOptions options_;
  const Place place_;
  const bool counting_;
  Sizes sizes_;
  int64_t own_bytes_ = 0;  // total_bytes without those of the op queue
  // One or the other, as the device wants it: DeviceFormats::one_allocation.
  Buffer arena_;
  std::vector<Buffer> buffers_;
};

}  // namespace liveact
