// Puts tensors of a checkpoint on a device, one linear or norm at a time, in the format that is
// asked for.
#pragma once

#include <string>
#include <vector>

#include "core/conversions.h"
#include "core/host_tensors.h"
#include "core/weights.h"

namespace liveact {

// A linear on the device, with its scales and bias as the host has them.
struct LoadedLinear {
  Linear linear;
  std::vector<float> scale;  // [n], empty where the weight is not fp8
  std::vector<float> bias;   // [n]
  DType out;                 // what it writes
};

class Loader {
 public:
  // Memory is kept by `buffers`. `index` is that of the device for `conversions`. Throws Error for
  // a tensor that is missing or of another shape.
  Loader(Device& device, const ModelConfig& config, const HostTensors& tensors,
         std::vector<Buffer>& buffers, Conversions& conversions, int index);

  DType stored(const std::string& name) const { return tensors_.at(name).dtype; }
  // A tensor in bf16 or fp32 wherever it lies, as fp32 on the host.
  std::vector<float> host(const std::string& name) const;
  // x · weight^T + bias on the host, for each row x of `rows`: the weights are read once.
  void host_linear(const std::string& name, std::vector<std::vector<float>>& rows) const;

  const float* upload(const std::vector<float>& values);
  const float* vector(const std::string& name) { return upload(host(name)); }
  // The filter [D, 1, 5] in the order that the device wants.
  const float* taps(const std::string& name);
  Norm norm(const std::string& name) { return {vector(name + ".weight"), vector(name + ".bias")}; }
  Norm gain(const std::string& name) { return {vector(name + ".weight"), nullptr}; }

  // One linear, or several with the same input fused along the output channels. `precision` is that
  // of its operands, `out` the format that it writes.
  LoadedLinear loaded_linear(const std::vector<std::string>& names, DType precision, DType out);
  Linear linear(const std::string& name, DType precision, DType out) {
    return loaded_linear({name}, precision, out).linear;
  }

  // The epilogue of a linear with a gate [n] folded in.
  Epilogue gated(const LoadedLinear& loaded, const std::vector<float>& gate);

 private:
  struct Readable;

  const HostTensor& weight_of(const std::string& name) const {
    return tensors_.at(name + ".weight");
  }
  Readable readable(const std::string& name) const;
  Readable wide(const std::string& name) const;  // refuses fp8
  DType weight_format(const std::vector<std::string>& names, DType precision) const;
  void place(const std::vector<std::string>& names, LoadedLinear& loaded);
  const char* convert(const std::vector<std::string>& names, LoadedLinear& loaded);
  Converted converted(const std::string& name, const Weight& weight) const;
  void read_scale(const std::string& name, float* scale) const;
  const void* upload_bias(const std::vector<float>& bias, DType out);
  const void* store(const void* host, int64_t bytes);

  Device& device_;
  Conversions& conversions_;
  const int index_;
  const DeviceFormats formats_;
  const HostTensors& tensors_;
  std::vector<Buffer>& buffers_;
};

}  // namespace liveact
