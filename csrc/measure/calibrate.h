// What FP8 would cost each product and each self-attention of a model, measured on the activations
// of a stream that runs in bf16 (or fp32).
//
// CalibrationDevice stands in front of another device. Its ops pass every call on, so a stream on
// it computes what it would without, and do some of them once more in FP8, through the quantize,
// split_qkv and update_memory ops of that device, so it works with any backend:
// - a product of a layer: x and the weight quantised as the fp8 contract says; compared is x · W^T
//   alone, because the bias and the gate after it are exact in both;
// - self-attention: q, k, v from the same product split into FP8, against a context of its own that
//   is kept in FP8 from block to block (scale of V from block 0 included), as it would be in use.
// The input of everything is that of the stream in the wide format, so errors do not pile up: what
// is measured is what one choice of format costs where it is made.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <vector>

#include "liveact/model.h"
#include "measure/proxy.h"

namespace liveact {

// Sums over everything measured: |fp8 - wide|^2 and |wide|^2.
struct SquaredError {
  double difference = 0;
  double reference = 0;
};
// In the order of kProducts: of each of a product's linears (cross_kv has four), or of attention.
using LayerErrors = std::array<std::vector<SquaredError>, kProducts.size()>;

// What is measured, shared by the op queues of one CalibrationDevice.
struct CalibrationLedger {
  std::vector<LayerErrors> errors;  // [layers]
  // By what an op recognises them: the first part of a weight; attention by the gain of q.
  std::map<const void*, SquaredError*> watched;
};

class CalibrationDevice final : public ProxyDevice {
 public:
  using ProxyDevice::ProxyDevice;

  // From now on the products of `model` are measured, which was loaded on this device. Throws
  // Error where a format of it is fp8 already. One model and one stream at a time.
  void watch(const Model& model);
  const std::vector<LayerErrors>& errors() const { return ledger_->errors; }

  std::unique_ptr<Ops> open_ops(const OpsLimits& limits) override;

 private:
  std::shared_ptr<CalibrationLedger> ledger_ = std::make_shared<CalibrationLedger>();
};

}  // namespace liveact
