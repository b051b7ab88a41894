// The CPU backend: the specification of every op in C++. Plain loops over rows with OpenMP, and
// OpenBLAS (single-threaded calls inside our own threads) for the matrix products.
//
// Results do not depend on what else runs in the process: each op splits its work by shape and
// thread count only.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <vector>

#include "core/ops.h"

namespace liveact::cpu {

// Scratch of one thread, in floats.
int64_t panel_floats();                             // gemm.cpp
int64_t attention_floats(const OpsLimits& limits);  // attention.cpp

class CpuDevice final : public Device {
 public:
  CpuDevice();
  const char* name() const override { return "cpu"; }
  void* allocate(int64_t bytes) override;
  void release(void* pointer) override;
  int64_t allocated_bytes() const override { return allocated_bytes_; }
  int64_t allocation_count() const override { return allocation_count_; }
  std::optional<int64_t> free_bytes() const override { return std::nullopt; }
  void upload(void* target, const void* host, int64_t bytes) override;
  void download(void* host, const void* source, int64_t bytes) override;
  bool is_device_memory(const void*) const override { return false; }
  DType bias_dtype(DType) const override { return DType::f32; }
  bool uses_host_weights(DType) const override { return true; }
  std::unique_ptr<Ops> open_ops(const OpsLimits& limits) override;
  int64_t ops_bytes(const OpsLimits& limits) const override;

  // Fixed when the device is opened: OpenMP's own setting differs from thread to thread, and with
  // it the last bits of a result would.
  int threads() const { return threads_; }

 private:
  int threads_;
  std::atomic<int64_t> allocated_bytes_{0};
  std::atomic<int64_t> allocation_count_{0};
};

class CpuOps final : public Ops {
 public:
  CpuOps(CpuDevice& device, const OpsLimits& limits);

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
  bool begin_plan() override { return false; }
  void end_plan() override {}
  bool replay(int) override { return false; }  // nothing is gained by recording here
  void begin_record(int) override {}
  void end_record() override {}
  void forget() override {}
  void mark(int index) override { marks_[index] = std::chrono::steady_clock::now(); }
  double marked_ms(int first, int second) override {
    return std::chrono::duration<double, std::milli>(marks_[second] - marks_[first]).count();
  }
  void upload(void* target, const void* host, int64_t bytes) override;
  void download(void* host, const void* source, int64_t bytes) override;

 private:
  float* row_scratch(int lane) const;  // [3, max_cols], one per thread

  int threads_;
  std::array<std::chrono::steady_clock::time_point, kTimeMarks> marks_;
  OpsLimits limits_;
  int64_t attention_floats_;
  Buffer rows_;         // [threads, 3, max_cols]
  Buffer activations_;  // [max_operand]: the input of a linear where it is not fp32
  Buffer panels_;       // per thread: an expanded weight panel and a tile of the product
  Buffer attention_;    // per thread: scores, accumulator, expanded keys and values
};

}  // namespace liveact::cpu
