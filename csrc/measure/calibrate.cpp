#include "measure/calibrate.h"

#include <algorithm>

#include "core/buffer.h"
#include "core/check.h"
#include "core/host_rows.h"
#include "core/threads.h"
#include "core/weights.h"

namespace liveact {

namespace {

// Device memory that grows to the largest size asked for; growing loses its contents.
class Scratch {
 public:
  explicit Scratch(Device& device) : device_(device) {}
  void* memory(int64_t bytes) {
    if (buffer_.data() == nullptr || buffer_.bytes() < bytes) buffer_ = Buffer(device_, bytes);
    return buffer_.data();
  }

 private:
  Device& device_;
  Buffer buffer_;
};

class ScratchRows {
 public:
  explicit ScratchRows(Device& device) : data_(device), scale_(device) {}
  Rows memory(int64_t rows, int64_t cols, DType dtype) {
    return {.data = data_.memory(rows * cols * size_bytes(dtype)),
            .dtype = dtype,
            .rows = rows,
            .cols = cols,
            .scale = static_cast<float*>(scale_.memory(4 * rows))};
  }

 private:
  Scratch data_, scale_;
};

// A segment in fp8 beside one in another format.
class ShadowSegment {
 public:
  explicit ShadowSegment(Device& device)
      : value_multiple_(device.formats().value_multiple), k_(device), v_(device) {}
  KvSegment memory(const KvSegment& like, float* v_scale) {
    KvSegment segment = like;
    segment.dtype = DType::f8;
    segment.k = k_.memory(segment.key_bytes());
    segment.v = v_.memory(segment.value_bytes(value_multiple_));
    segment.v_scale = v_scale;
    return segment;
  }

 private:
  int64_t value_multiple_;
  Scratch k_, v_;
};

// The context of one (step, layer) in fp8.
struct ShadowContext {
  explicit ShadowContext(Device& device, int64_t heads)
      : v_scale(device, 4 * heads), segment(device) {}
  Buffer v_scale;
  ShadowSegment segment;
};

class CalibrationOps final : public ProxyOps {
 public:
  CalibrationOps(Device& device, std::unique_ptr<Ops> inner,
                 std::shared_ptr<CalibrationLedger> ledger)
      : ProxyOps(std::move(inner)), device_(device), ledger_(std::move(ledger)) {}
  ~CalibrationOps() override { close(); }
  CalibrationOps(const CalibrationOps&) = delete;
  CalibrationOps& operator=(const CalibrationOps&) = delete;

  void linear(const Rows& x, const Weight& weight, const Epilogue& epilogue,
              const Rows& out) override;
  void split_qkv(const Rows& qkv, const float* q_gain, const float* k_gain, float eps,
                 const Rope& rope, int64_t first_position, int64_t first_token, const Heads& q,
                 const KvSegment& current) override {
    inner().split_qkv(qkv, q_gain, k_gain, eps, rope, first_position, first_token, q, current);
    split_ = {qkv, q_gain, k_gain, eps, rope, first_position};
  }
  void self_attention(const Heads& q, const KvSegment& context, const KvSegment& current,
                      const float* out_scale, const Rows& out, const Rows& rest) override;
  void update_memory(std::span<const SlotUpdate> table, const CompressFilter& filter,
                     const Rope& rope, int64_t first_slot, const KvSegment& current,
                     const KvSegment& staging, const KvSegment& context) override;

 private:
  // The arguments of the last split_qkv: its q, k, v are needed once more, in fp8.
  struct Split {
    Rows qkv;
    const float* q_gain;
    const float* k_gain;
    float eps;
    Rope rope;
    int64_t first_position;
  };

  // Where the errors of a product go; null for what is not measured, such as a plan.
  SquaredError* watched(const void* key) const {
    if (planning()) return nullptr;
    const auto found = ledger_->watched.find(key);
    return found == ledger_->watched.end() ? nullptr : found->second;
  }
  void compare(const Rows& wide, const Rows& narrow, SquaredError& error);

  Device& device_;
  std::shared_ptr<CalibrationLedger> ledger_;
  ScratchRows operand_{device_}, weight_{device_}, wide_{device_}, narrow_{device_};
  std::vector<char> host_wide_, host_narrow_;
  Threads threads_;  // compare on the host, whatever the device

  Split split_{};
  Scratch q_{device_}, q_scale_{device_};
  ShadowSegment current_{device_}, staging_{device_};
  KvSegment narrow_current_;                       // of the layer that runs
  std::map<const void*, ShadowContext> contexts_;  // by the keys of the wide context
};

// Adds the difference of two results in one format, row by row in fp64.
void CalibrationOps::compare(const Rows& wide, const Rows& narrow, SquaredError& error) {
  const int64_t bytes = wide.size() * size_bytes(wide.dtype);
  host_wide_.resize(bytes);
  host_narrow_.resize(bytes);
  inner().download(host_wide_.data(), wide.data, bytes);
  inner().download(host_narrow_.data(), narrow.data, bytes);
  std::vector<SquaredError> errors(threads_.lanes());  // added in order: the same sums every time
  threads_.run([&](int lane, int lanes) {
    double difference = 0;
    double reference = 0;
    std::vector<float> scratch(2 * wide.cols);
    const Share share(wide.rows, lane, lanes);
    for (int64_t row = share.begin; row < share.end; ++row) {
      const int64_t at = row * wide.cols;
      const float* a = read_f32(host_wide_.data(), wide.dtype, at, wide.cols, 1.0f, scratch.data());
      const float* b = read_f32(host_narrow_.data(), wide.dtype, at, wide.cols, 1.0f,
                                scratch.data() + wide.cols);
      for (int64_t i = 0; i < wide.cols; ++i) {
        const double delta = static_cast<double>(b[i]) - a[i];
        difference += delta * delta;
        reference += static_cast<double>(a[i]) * a[i];
      }
    }
    errors[lane] = {difference, reference};
  });
  for (const SquaredError& of_lane : errors) {
    error.difference += of_lane.difference;
    error.reference += of_lane.reference;
  }
}

void CalibrationOps::linear(const Rows& x, const Weight& weight, const Epilogue& epilogue,
                            const Rows& out) {
  inner().linear(x, weight, epilogue, out);  // `out` is never x: x is as it was
  SquaredError* error = watched(weight.parts[0].data);
  if (error == nullptr) return;
  const Rows operand = operand_.memory(x.rows, x.cols, DType::f8);
  inner().quantize(x, operand);
  const Rows codes = weight_.memory(weight.n, weight.k, DType::f8);
  int64_t first_row = 0;
  for (const Weight::Part& part : weight.parts) {
    if (part.n == 0) continue;
    const Rows given{.data = const_cast<void*>(part.data),
                     .dtype = weight.dtype,
                     .rows = part.n,
                     .cols = weight.k};
    Rows target = codes.from(first_row);
    target.rows = part.n;
    inner().quantize(given, target);
    first_row += part.n;
  }
  const Weight quantized{.parts = {{codes.data, weight.n}},
                         .dtype = DType::f8,
                         .scale = codes.scale,
                         .n = weight.n,
                         .k = weight.k};
  const Rows wide = wide_.memory(x.rows, weight.n, x.dtype);
  const Rows narrow = narrow_.memory(x.rows, weight.n, x.dtype);
  inner().linear(x, weight, {}, wide);
  inner().linear(operand, quantized, {.scale = codes.scale}, narrow);
  compare(wide, narrow, *error);
}

void CalibrationOps::self_attention(const Heads& q, const KvSegment& context,
                                    const KvSegment& current, const float* out_scale,
                                    const Rows& out, const Rows& rest) {
  inner().self_attention(q, context, current, out_scale, out, rest);
  SquaredError* error = watched(split_.q_gain);
  if (error == nullptr) return;
  const auto [found, added] = contexts_.try_emplace(context.k, device_, q.heads);
  ShadowContext& shadow = found->second;
  auto* v_scale = static_cast<float*>(shadow.v_scale.data());
  if (added) {  // block 0 sets it, as in a stream
    const int64_t dim = split_.qkv.cols / 3;
    inner().value_scale(split_.qkv.columns(2 * dim, dim), q.heads, v_scale);
  }
  Heads narrow_q = q;
  narrow_q.dtype = DType::f8;
  narrow_q.data = q_.memory(q.heads * q.tokens * q.head_dim);
  narrow_q.scale = static_cast<float*>(q_scale_.memory(4 * q.heads * q.tokens));
  narrow_current_ = current_.memory(current, v_scale);
  inner().split_qkv(split_.qkv, split_.q_gain, split_.k_gain, split_.eps, split_.rope,
                    split_.first_position, 0, narrow_q, narrow_current_);
  const Rows narrow = narrow_.memory(out.rows, out.cols, out.dtype);
  inner().self_attention(narrow_q, shadow.segment.memory(context, v_scale), narrow_current_,
                         nullptr, narrow, {});
  compare(out, narrow, *error);
}

void CalibrationOps::update_memory(std::span<const SlotUpdate> table, const CompressFilter& filter,
                                   const Rope& rope, int64_t first_slot, const KvSegment& current,
                                   const KvSegment& staging, const KvSegment& context) {
  inner().update_memory(table, filter, rope, first_slot, current, staging, context);
  const auto found = contexts_.find(context.k);
  if (found == contexts_.end()) return;
  ShadowContext& shadow = found->second;
  auto* v_scale = static_cast<float*>(shadow.v_scale.data());
  inner().update_memory(table, filter, rope, first_slot, narrow_current_,
                        staging_.memory(staging, v_scale), shadow.segment.memory(context, v_scale));
}

// The linears that have the format of a product; attention has none.
struct ProductLinears {
  DType LayerPrecision::* format;
  std::array<Linear Layer::*, 4> linears;  // null after the last
};
using P = LayerPrecision;
constexpr ProductLinears kProductLinears[] = {
    {&P::self_qkv, {&Layer::self_qkv}},
    {&P::self_o, {&Layer::self_o}},
    {&P::cross_q, {&Layer::cross_q}},
    {&P::cross_kv, {&Layer::text_k, &Layer::text_v, &Layer::image_k, &Layer::image_v}},
    {&P::cross_o, {&Layer::cross_o}},
    {&P::audio_q, {&Layer::audio_q}},
    {&P::audio_o, {&Layer::audio_o}},
    {&P::ffn_up, {&Layer::ffn_up}},
    {&P::ffn_down, {&Layer::ffn_down}},
};
static_assert(std::size(kProductLinears) == kProducts.size() - 1);

// By what its ops recognise a product: the first part of each weight; attention by the gain of q.
std::vector<const void*> keys_of(const Product& product, const Layer& layer) {
  std::vector<const void*> keys;
  for (const auto& [format, linears] : kProductLinears) {
    if (format != product.format) continue;
    for (Linear Layer::* linear : linears) {
      if (linear != nullptr) keys.push_back((layer.*linear).weight.parts[0].data);
    }
  }
  if (keys.empty()) keys.push_back(layer.self_q_norm.gain);
  return keys;
}

}  // namespace

void CalibrationDevice::watch(const Model& model) {
  ledger_->watched.clear();
  ledger_->errors.assign(model.weights().layers.size(), {});
  for (size_t i = 0; i < model.weights().layers.size(); ++i) {
    const Layer& layer = model.weights().layers[i];
    for (size_t p = 0; p < kProducts.size(); ++p) {
      const Product& product = kProducts[p];
      LIVEACT_CHECK(model.precision().layers[i].*product.format != DType::f8,
                    "calibrate: expected a model in bf16 or fp32, found ", product.name,
                    " of layer ", i, " in fp8");
      const std::vector<const void*> keys = keys_of(product, layer);
      std::vector<SquaredError>& errors = ledger_->errors[i][p];
      errors.resize(keys.size());
      for (size_t k = 0; k < keys.size(); ++k) ledger_->watched[keys[k]] = &errors[k];
    }
  }
}

std::unique_ptr<Ops> CalibrationDevice::open_ops(const OpsLimits& limits) {
  return std::make_unique<CalibrationOps>(inner(), inner().open_ops(limits), ledger_);
}

}  // namespace liveact
