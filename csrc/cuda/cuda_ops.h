// The op list on a CUDA stream: every op is a launch, nothing waits but `download` and
// `all_finite`, nothing is allocated after the queue is open.
#pragma once

#include <array>
#include <map>
#include <string>

#include "cuda/cuda_backend.h"

namespace liveact::cuda {

class CudaOps final : public Ops {
 public:
  CudaOps(CudaDevice& device, const OpsLimits& limits);
  ~CudaOps() override;
  static int64_t bytes(const OpsLimits& limits);

  void patchify(const float* z, const float* y, int64_t z_channels, int64_t y_channels,
                int64_t y_frames, int64_t y_first, int64_t n, int64_t h, int64_t w,
                const Rows& tokens) override;
  void unpatchify(const Rows& tokens, int64_t channels, int64_t n, int64_t h, int64_t w,
                  float* v) override;
  void linear(const Rows& x, const Weight& weight, const Epilogue& epilogue,
              const Rows& out) override;
  void layer_norm(const Rows& x, const float* gain, const float* bias, float eps,
                  const Rows& out) override;
  void rms_norm(const Rows& x, const float* gain, float eps, const Rows& out) override;
  void activate(const Rows& x, Activation activation, const Rows& out) override;
  void quantize(const Rows& x, const Rows& out) override;
  void value_scale(const Rows& qkv, int64_t heads, float* v_scale) override;
  void split_qkv(const Rows& qkv, const float* q_gain, const float* k_gain, float eps,
                 const Rope& rope, int64_t first_position, const Heads& q,
                 const KvSegment& current) override;
  void store_kv(const Rows& k, const Rows& v, const KvSegment& segment) override;
  void self_attention(const Heads& q, const KvSegment& context, const KvSegment& current,
                      const Rows& out) override;
  void cross_attention(const Rows& q, const KvSegment& text, int64_t pad_count,
                       const KvSegment& image, const Rows& out) override;
  void audio_attention(const Rows& q, const Rows& kv, int64_t n, int64_t kv_frames, int64_t heads,
                       const Rows& out) override;
  void update_memory(std::span<const SlotUpdate> table, const CompressFilter& filter,
                     const Rope& rope, int64_t first_slot, const KvSegment& current,
                     const KvSegment& staging, const KvSegment& context) override;
  void export_kv(const KvSegment& segment, const Rope& rope, int64_t first_position, float* k,
                 float* v) override;
  void guide(float* v, const float* v_null, float guidance, int64_t size) override;
  void sampler_step(float* z, const float* v, const float* noise, float sigma, float next_sigma,
                    int64_t size) override;
  bool all_finite(const float* x, int64_t size) override;
  bool begin_plan() override;
  void end_plan() override;
  bool replay(int key) override;
  void begin_record(int key) override;
  void end_record() override;
  void forget() override;
  void mark(int index) override;
  double marked_ms(int first, int second) override;
  void upload(void* target, const void* host, int64_t bytes) override;
  void download(void* host, const void* source, int64_t bytes) override;

 private:
  void close();  // what the constructor made so far
  void abandon_recording();
  // Launches `op.variant` on this queue, or only checks the launch while planning.
  void launch(const std::string& name, std::initializer_list<Argument> arguments) const;

  CudaDevice& device_;
  const Driver& driver_;
  CUstream stream_ = nullptr;
  CublasLtHandle cublaslt_ = nullptr;
  Buffer workspace_;
  Buffer product_;    // bf16 [max_operand]: a product whose gate cannot ride in the scales
  Buffer flag_;       // i32
  Buffer mean_taps_;  // f32 [max_cols, 5], all 1/5
  std::unique_ptr<GemmPlans> gemms_;
  std::map<int, CUgraphExec> graphs_;
  std::array<CUevent, kTimeMarks> marks_ = {};
  int recording_ = -1;  // key, or -1
  bool planning_ = false;
};

}  // namespace liveact::cuda
