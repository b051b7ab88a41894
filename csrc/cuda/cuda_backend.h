// The CUDA backend: AOT kernels through the driver API, products through cuBLASLt.
//
// Formats: bf16 between the sub-layers, fp8 (or bf16) operands; fp32 weights or activations are not
// supported here.
#pragma once

#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "core/buffer.h"
#include "core/ops.h"
#include "cuda/attention_choice.h"
#include "cuda/cublaslt.h"
#include "cuda/driver.h"
#include "cuda/kernel.h"
#include "liveact/device.h"

namespace liveact::cuda {

// V of self-attention is K-major, as its FP8 products need it: [H, hd, S] with S the tokens rounded
// up to this.
constexpr int64_t kValueStride = 128;

// See `turn` in core/op_list.h. One for all GPUs of the process: the driver frees memory only when
// the device and its peers are idle, and holds up launches on others until then.
std::recursive_mutex& submission();

// One GPU: its primary context (shared with torch), its kernels, its memory.
class CudaDevice final : public Device {
 public:
  // Throws DeviceError where the driver, the device or cuBLASLt is missing. `images` are the
  // kernels compiled for this device's architecture.
  CudaDevice(int index, std::vector<KernelImage> images, const CudaLibraries& libraries);
  ~CudaDevice() override;

  const char* name() const override { return name_.c_str(); }
  DeviceFormats formats() const override {
    return {.bias_as_output = true,
            .tap_major = true,
            .value_multiple = kValueStride,
            .one_allocation = true};
  }
  int threads() const override { return 0; }
  void* allocate(int64_t bytes) override;
  void release(void* pointer) override;
  int64_t allocated_bytes() const override { return allocated_bytes_; }
  int64_t allocation_count() const override { return allocation_count_; }
  std::optional<int64_t> free_bytes() const override;
  void upload(void* target, const void* source, int64_t bytes) override;
  void download(void* host, const void* source, int64_t bytes) override;
  bool is_device_memory(const void* pointer) const override;
  void connect(Device& other) override;
  std::unique_ptr<Ops> open_ops(const OpsLimits& limits) override;
  int64_t ops_bytes(const OpsLimits& limits) const override;
  std::map<std::string, std::string> choices() override;

  const Driver& driver() const { return driver_; }
  const CublasLt& cublaslt() const { return cublaslt_; }
  CublasLtHandle cublaslt_handle() const { return cublaslt_handle_.get(); }
  const KernelTable& kernels() const { return *kernels_; }
  CUcontext context() const { return context_; }
  GemmChoices& gemm_choices() { return gemm_choices_; }
  AttentionChoices& attention_choices() { return attention_choices_; }

 private:
  void close();  // what the constructor made so far
  void copy(const void* target, const void* source, int64_t bytes);

  Driver driver_;
  CublasLt cublaslt_;
  CUdevice device_ = 0;
  CUcontext context_ = nullptr;
  CUstream upload_stream_ = nullptr;
  std::string name_;
  std::unique_ptr<KernelTable> kernels_;
  // One for everything that this process has open on the GPU: to destroy one waits for the device,
  // which breaks every capture on it. So a stream that closes leaves it alone.
  std::shared_ptr<cublasLtContext> cublaslt_handle_;
  GemmChoices gemm_choices_;
  AttentionChoices attention_choices_;
  std::map<void*, int64_t> sizes_;
  std::mutex mutex_;  // guards sizes_ and uploads
  std::atomic<int64_t> allocated_bytes_{0};
  std::atomic<int64_t> allocation_count_{0};
};

}  // namespace liveact::cuda
