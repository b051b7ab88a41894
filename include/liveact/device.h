// A device and how it is opened: memory, the formats it wants, and queues of ops.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "liveact/api.h"
#include "liveact/dtype.h"
#include "liveact/kernel_image.h"

namespace liveact {

class Ops;         // what a stream asks of a device: csrc/core/ops.h, private
struct OpsLimits;  // the same

// How a device wants what it is given.
struct DeviceFormats {
  // The bias of a linear has the format of the linear's output; else it is fp32.
  bool bias_as_output = false;
  // The taps of the filters of the memory are [5, D], so that adjacent channels load adjacent taps;
  // else [D, 5], as in a checkpoint.
  bool tap_major = false;
  // Weights are used where they lie in (memory-mapped) host memory, so a model need not copy them.
  bool host_weights = false;
  // Memory of V is made for tokens rounded up to a multiple of this.
  int64_t value_multiple = 1;
  // The memory of a stream is one allocation: to free one waits for the whole device. Elsewhere
  // each buffer is one, whose bounds a sanitizer sees.
  bool one_allocation = false;

  DType bias(DType out) const { return bias_as_output ? out : DType::f32; }
};

class LIVEACT_API Device {
 public:
  virtual ~Device() = default;
  virtual const char* name() const = 0;
  virtual DeviceFormats formats() const = 0;

  // Of this process, that compute the ops; none of a GPU.
  virtual int threads() const = 0;

  // Zero-filled, aligned to 64 bytes or more. Throws DeviceError with the size when there is too
  // little memory.
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

  // From now on ops of this device may write into memory of `other`, which has to be another one of
  // its kind. Throws DeviceError where they cannot.
  virtual void connect(Device& other) = 0;

  virtual std::unique_ptr<Ops> open_ops(const OpsLimits& limits) = 0;
  virtual int64_t ops_bytes(const OpsLimits& limits) const = 0;  // what open_ops allocates

  // What was chosen by trial since the device was opened, for people: call -> choice.
  virtual std::map<std::string, std::string> choices() { return {}; }
};

// The processor. The device has threads of its own until it is destroyed: as many as
// OMP_NUM_THREADS says where that is set, by convention, else one for each CPU that this process
// may use. They sleep while they wait, share themselves out between streams that run at the same
// time, and are not inherited by fork. Throws DeviceError for a processor without AVX2 and FMA, and
// for a number of threads that is not one.
LIVEACT_API std::shared_ptr<Device> open_cpu();

// Opened by name when they are needed: the runtime itself is built without CUDA.
struct CudaLibraries {
  std::string driver = "libcuda.so.1";
  std::string cublaslt = "libcublasLt.so.13";
};

// GPU `index`; `images` are the kernels compiled for its architecture. This and the next two throw
// DeviceError where the driver, the GPU or cuBLASLt is missing.
LIVEACT_API std::shared_ptr<Device> open_cuda(int index, std::vector<KernelImage> images,
                                              const CudaLibraries& libraries = {});

// "sm_90a" for compute capability 9.0: the architecture whose kernels GPU `index` takes.
LIVEACT_API std::string cuda_architecture(int index, const CudaLibraries& libraries = {});

// "cpu", "cuda" (the first GPU) or "cuda:N", with the kernels in `kernels`, by default those that
// came with the runtime. Throws Error for another name, DeviceError where it is not usable.
LIVEACT_API std::shared_ptr<Device> open_device(const std::string& name,
                                                const std::filesystem::path& kernels = {},
                                                const CudaLibraries& libraries = {});

int cuda_device_count(const CudaLibraries& libraries = {});

// Why these two GPUs cannot share the evaluations of a stream, in a few words that follow
// "expected"; empty where they can.
std::string cuda_peer_obstacle(int first, int second, const CudaLibraries& libraries = {});

struct CudaVersions {
  std::string device;    // "NVIDIA H100 80GB HBM3"
  std::string driver;    // the newest CUDA that the driver supports: "13.0"
  std::string cublaslt;  // "13.0.2"
};
LIVEACT_API CudaVersions cuda_versions(int index, const CudaLibraries& libraries = {});

}  // namespace liveact
