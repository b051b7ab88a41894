// An op queue and a device in front of another one: every op goes through `around`, which a
// decorator overrides to time, count or compare what passes. What is not overridden changes
// nothing, but nothing is recorded for replay: each op has to pass each time.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "core/ops.h"

namespace liveact {

class ProxyOps : public Ops {
 public:
  explicit ProxyOps(std::unique_ptr<Ops> inner) : inner_(std::move(inner)) {}

  // `name` is the op's, for a product with its size: "linear 15360x5120".
  virtual void around(const std::string& name, const std::function<void()>& op) {
    (void)name;
    op();
  }

  void patchify(const float* z, const float* y, int64_t z_channels, int64_t y_channels,
                int64_t y_frames, int64_t y_first, int64_t n, int64_t h, int64_t w,
                const Rows& tokens) override {
    around("patchify", [&] {
      inner_->patchify(z, y, z_channels, y_channels, y_frames, y_first, n, h, w, tokens);
    });
  }
  void unpatchify(const Rows& tokens, int64_t channels, int64_t n, int64_t h, int64_t w,
                  float* v) override {
    around("unpatchify", [&] { inner_->unpatchify(tokens, channels, n, h, w, v); });
  }
  void linear(const Rows& x, const Weight& weight, const Epilogue& epilogue,
              const Rows& out) override {
    around("linear " + std::to_string(weight.n) + "x" + std::to_string(weight.k),
           [&] { inner_->linear(x, weight, epilogue, out); });
  }
  void layer_norm(const Rows& x, const float* gain, const float* bias, float eps,
                  const Rows& out) override {
    around("layer_norm", [&] { inner_->layer_norm(x, gain, bias, eps, out); });
  }
  void rms_norm(const Rows& x, const float* gain, float eps, const Rows& out) override {
    around("rms_norm", [&] { inner_->rms_norm(x, gain, eps, out); });
  }
  void activate(const Rows& x, Activation activation, const Rows& out) override {
    around("activate", [&] { inner_->activate(x, activation, out); });
  }
  void quantize(const Rows& x, const Rows& out) override {
    around("quantize", [&] { inner_->quantize(x, out); });
  }
  void value_scale(const Rows& qkv, int64_t heads, float* v_scale) override {
    around("value_scale", [&] { inner_->value_scale(qkv, heads, v_scale); });
  }
  void split_qkv(const Rows& qkv, const float* q_gain, const float* k_gain, float eps,
                 const Rope& rope, int64_t first_position, const Heads& q,
                 const KvSegment& current) override {
    around("split_qkv",
           [&] { inner_->split_qkv(qkv, q_gain, k_gain, eps, rope, first_position, q, current); });
  }
  void store_kv(const Rows& k, const Rows& v, const KvSegment& segment) override {
    around("store_kv", [&] { inner_->store_kv(k, v, segment); });
  }
  void self_attention(const Heads& q, const KvSegment& context, const KvSegment& current,
                      const Rows& out) override {
    around("self_attention", [&] { inner_->self_attention(q, context, current, out); });
  }
  void cross_attention(const Rows& q, const KvSegment& text, int64_t pad_count,
                       const KvSegment& image, const Rows& out) override {
    around("cross_attention", [&] { inner_->cross_attention(q, text, pad_count, image, out); });
  }
  void audio_attention(const Rows& q, const Rows& kv, int64_t n, int64_t kv_frames, int64_t heads,
                       const Rows& out) override {
    around("audio_attention", [&] { inner_->audio_attention(q, kv, n, kv_frames, heads, out); });
  }
  void update_memory(std::span<const SlotUpdate> table, const CompressFilter& filter,
                     const Rope& rope, int64_t first_slot, const KvSegment& current,
                     const KvSegment& staging, const KvSegment& context) override {
    around("update_memory", [&] {
      inner_->update_memory(table, filter, rope, first_slot, current, staging, context);
    });
  }
  void guide(float* v, const float* v_null, float guidance, int64_t size) override {
    around("guide", [&] { inner_->guide(v, v_null, guidance, size); });
  }
  void sampler_step(float* z, const float* v, const float* noise, float sigma, float next_sigma,
                    int64_t size) override {
    around("sampler_step", [&] { inner_->sampler_step(z, v, noise, sigma, next_sigma, size); });
  }
  bool all_finite(const float* x, int64_t size) override {
    bool finite = false;
    around("all_finite", [&] { finite = inner_->all_finite(x, size); });
    return finite;
  }

  void export_kv(const KvSegment& segment, const Rope& rope, int64_t first_position, float* k,
                 float* v) override {
    inner_->export_kv(segment, rope, first_position, k, v);
  }
  bool begin_plan() override { return planning_ = inner_->begin_plan(); }
  void end_plan() override {
    planning_ = false;
    inner_->end_plan();
  }
  bool replay(int) override { return false; }
  void begin_record(int) override {}
  void end_record() override {}
  void forget() override { inner_->forget(); }
  void mark(int index) override { inner_->mark(index); }
  double marked_ms(int first, int second) override { return inner_->marked_ms(first, second); }
  void upload(void* target, const void* host, int64_t bytes) override {
    inner_->upload(target, host, bytes);
  }
  void download(void* host, const void* source, int64_t bytes) override {
    inner_->download(host, source, bytes);
  }

 protected:
  Ops& inner() const { return *inner_; }
  bool planning() const { return planning_; }

 private:
  std::unique_ptr<Ops> inner_;
  bool planning_ = false;
};

class ProxyDevice : public Device {
 public:
  explicit ProxyDevice(std::shared_ptr<Device> inner) : inner_(std::move(inner)) {}

  const char* name() const override { return inner_->name(); }
  void* allocate(int64_t bytes) override { return inner_->allocate(bytes); }
  void release(void* pointer) override { inner_->release(pointer); }
  int64_t allocated_bytes() const override { return inner_->allocated_bytes(); }
  int64_t allocation_count() const override { return inner_->allocation_count(); }
  std::optional<int64_t> free_bytes() const override { return inner_->free_bytes(); }
  void upload(void* target, const void* source, int64_t bytes) override {
    inner_->upload(target, source, bytes);
  }
  void download(void* host, const void* source, int64_t bytes) override {
    inner_->download(host, source, bytes);
  }
  bool is_device_memory(const void* pointer) const override {
    return inner_->is_device_memory(pointer);
  }
  DType bias_dtype(DType out) const override { return inner_->bias_dtype(out); }
  bool tap_major() const override { return inner_->tap_major(); }
  bool uses_host_weights(DType dtype) const override { return inner_->uses_host_weights(dtype); }
  // Without what the decorator's own ops allocate.
  int64_t ops_bytes(const OpsLimits& limits) const override { return inner_->ops_bytes(limits); }

 protected:
  Device& inner() const { return *inner_; }

 private:
  std::shared_ptr<Device> inner_;
};

}  // namespace liveact
