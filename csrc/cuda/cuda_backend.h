// The CUDA backend: AOT kernels through the driver API, products through cuBLASLt.
//
// Formats: bf16 between the sub-layers, fp8 (or bf16) operands; fp32 weights or activations are not
// supported here. V of self-attention is K-major, see ops.h.
#pragma once

#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "core/ops.h"
#include "cuda/cublaslt.h"
#include "cuda/driver.h"
#include "cuda/kernel.h"

namespace liveact::cuda {

struct CudaLibraries {
  std::string driver = "libcuda.so.1";
  std::string cublaslt = "libcublasLt.so.13";
};

// One GPU: its primary context (shared with torch), its kernels, its memory.
class CudaDevice final : public Device {
 public:
  // Throws Error where the driver, the device or cuBLASLt is missing. `images` are the kernels
  // compiled for this device's architecture.
  CudaDevice(int index, std::vector<KernelImage> images, const CudaLibraries& libraries);
  ~CudaDevice() override;

  // "sm_90a" for compute capability 9.0: the architecture whose kernels the device takes.
  static std::string architecture(int index, const std::string& driver_library);

  const char* name() const override { return name_.c_str(); }
  void* allocate(int64_t bytes) override;
  void release(void* pointer) override;
  int64_t allocated_bytes() const override { return allocated_bytes_; }
  int64_t allocation_count() const override { return allocation_count_; }
  std::optional<int64_t> free_bytes() const override;
  void upload(void* target, const void* source, int64_t bytes) override;
  void download(void* host, const void* source, int64_t bytes) override;
  bool is_device_memory(const void* pointer) const override;
  DType bias_dtype(DType out) const override { return out; }
  bool tap_major() const override { return true; }
  bool uses_host_weights(DType) const override { return false; }
  std::unique_ptr<Ops> open_ops(const OpsLimits& limits) override;
  int64_t ops_bytes(const OpsLimits& limits) const override;

  const Driver& driver() const { return driver_; }
  const CublasLt& cublaslt() const { return cublaslt_; }
  const KernelTable& kernels() const { return *kernels_; }
  CUcontext context() const { return context_; }
  GemmChoices& gemm_choices() { return gemm_choices_; }

 private:
  void copy(const void* target, const void* source, int64_t bytes);

  Driver driver_;
  CublasLt cublaslt_;
  CUdevice device_ = 0;
  CUcontext context_ = nullptr;
  CUstream upload_stream_ = nullptr;
  std::string name_;
  std::unique_ptr<KernelTable> kernels_;
  GemmChoices gemm_choices_;
  std::map<void*, int64_t> sizes_;
  std::mutex mutex_;  // guards sizes_ and uploads
  std::atomic<int64_t> allocated_bytes_{0};
  std::atomic<int64_t> allocation_count_{0};
};

}  // namespace liveact::cuda
