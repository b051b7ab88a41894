#include <algorithm>
#include <array>

#include "core/check.h"
#include "cuda/cuda_backend.h"
#include "cuda/cuda_ops.h"

namespace liveact::cuda {

namespace {

// The handle of GPU `index`, the same for all who ask while one of them has it. The context must be
// current, also where the last one lets it go.
std::shared_ptr<cublasLtContext> shared_handle(const CublasLt& lt, const std::string& library,
                                               int index) {
  static std::mutex mutex;
  static std::map<std::pair<std::string, int>, std::weak_ptr<cublasLtContext>> handles;
  const std::lock_guard lock(mutex);
  std::weak_ptr<cublasLtContext>& known = handles[{library, index}];
  std::shared_ptr<cublasLtContext> handle = known.lock();
  if (handle == nullptr) {
    CublasLtHandle created = nullptr;
    lt.check(lt.create(&created), "cublasLtCreate");
    handle = {created, lt.destroy};  // the function stays: libraries are never unloaded
    known = handle;
  }
  return handle;
}

std::string device_name(const Driver& driver, CUdevice device) {
  std::array<char, 256> name = {};
  LIVEACT_DRIVER(driver, device_name(name.data(), static_cast<int>(name.size()) - 1, device));
  return name.data();
}

// Why the first one cannot share an evaluation with the second one; empty where it can. Stores and
// atomics reach the other one's memory over NVLink; over PCIe they would take longer than they
// save.
std::string peer_obstacle(const Driver& driver, CUdevice first, CUdevice second) {
  if (first == second) return "two GPUs, found one twice";
  const std::string names[] = {device_name(driver, first), device_name(driver, second)};
  if (names[0] != names[1]) return "two GPUs alike, found " + names[0] + " and " + names[1];
  int able = 0;
  int atomics = 0;
  LIVEACT_DRIVER(driver, device_can_access_peer(&able, first, second));
  if (able == 0) return "access to the memory of one another, found none";
  LIVEACT_DRIVER(driver, device_peer_attribute(&atomics, kPeerNativeAtomics, first, second));
  return atomics == 0 ? "NVLink between them, found a link without native atomics" : "";
}

}  // namespace

CudaDevice::CudaDevice(int index, std::vector<KernelImage> images, const CudaLibraries& libraries)
    : driver_(libraries.driver), cublaslt_(libraries.cublaslt) {
  int count = 0;
  LIVEACT_DRIVER(driver_, device_count(&count));
  LIVEACT_DEVICE_CHECK(index >= 0 && index < count, "cuda: expected one of ", count,
                       " devices, found index ", index);
  LIVEACT_DRIVER(driver_, device_get(&device_, index));
  LIVEACT_DRIVER(driver_, context_retain(&context_, device_));
  try {
    const ContextScope scope(driver_, context_);
    LIVEACT_DRIVER(driver_, stream_create(&upload_stream_, kStreamNonBlocking, 0));
    kernels_ = std::make_unique<KernelTable>(driver_, std::move(images));
    cublaslt_handle_ = shared_handle(cublaslt_, libraries.cublaslt, index);
  } catch (...) {
    close();
    throw;
  }
  name_ = "cuda:" + std::to_string(index);
}

CudaDevice::~CudaDevice() { close(); }

std::recursive_mutex& submission() {
  static std::recursive_mutex mutex;
  return mutex;
}

void CudaDevice::close() {
  {
    const std::lock_guard turn(submission());  // modules are memory, too
    const ContextScope scope(driver_, context_, std::nothrow);
    cublaslt_handle_.reset();
    kernels_.reset();
    if (upload_stream_ != nullptr) driver_.stream_destroy(upload_stream_);
  }
  driver_.context_release(device_);
}

void* CudaDevice::allocate(int64_t bytes) {
  const ContextScope scope(driver_, context_);
  const auto size = static_cast<size_t>(std::max<int64_t>(bytes, 1));
  CUdeviceptr pointer = 0;
  const CUresult result = driver_.memory_allocate(&pointer, size);
  if (result == kOutOfMemory) {
    size_t free_bytes = 0;
    size_t total_bytes = 0;
    driver_.memory_info(&free_bytes, &total_bytes);
    detail::fail<DeviceError>(name_, ": expected ", bytes, " bytes of memory, found ", free_bytes,
                              " of ", total_bytes, " free");
  }
  driver_.check(result, "cuMemAlloc");
  void* address = reinterpret_cast<void*>(pointer);
  {
    const std::lock_guard lock(mutex_);
    sizes_[address] = bytes;
    allocated_bytes_ += bytes;
    ++allocation_count_;
  }
  try {
    driver_.check(driver_.memory_set(pointer, 0, size, upload_stream_), "cuMemsetD8Async");
    driver_.check(driver_.stream_synchronize(upload_stream_), "cuStreamSynchronize");
  } catch (...) {
    release(address);
    throw;
  }
  return address;
}

void CudaDevice::release(void* pointer) {
  const ContextScope scope(driver_, context_, std::nothrow);
  {
    const std::lock_guard turn(submission());
    driver_.memory_free(reinterpret_cast<CUdeviceptr>(pointer));
  }
  const std::lock_guard lock(mutex_);
  const auto found = sizes_.find(pointer);
  if (found == sizes_.end()) return;
  allocated_bytes_ -= found->second;
  sizes_.erase(found);
}

std::optional<int64_t> CudaDevice::free_bytes() const {
  const ContextScope scope(driver_, context_);
  size_t free_bytes = 0;
  size_t total_bytes = 0;
  LIVEACT_DRIVER(driver_, memory_info(&free_bytes, &total_bytes));
  return static_cast<int64_t>(free_bytes);
}

void CudaDevice::upload(void* target, const void* source, int64_t bytes) {
  copy(target, source, bytes);
}

void CudaDevice::download(void* host, const void* source, int64_t bytes) {
  copy(host, source, bytes);
}

// Addresses say which memory they are of (unified addressing), so the driver finds the way.
void CudaDevice::copy(const void* target, const void* source, int64_t bytes) {
  const ContextScope scope(driver_, context_);
  driver_.check(
      driver_.copy(reinterpret_cast<CUdeviceptr>(target), reinterpret_cast<CUdeviceptr>(source),
                   static_cast<size_t>(bytes), upload_stream_),
      "cuMemcpyAsync");
  driver_.check(driver_.stream_synchronize(upload_stream_), "cuStreamSynchronize");
}

bool CudaDevice::is_device_memory(const void* pointer) const {
  const ContextScope scope(driver_, context_);
  unsigned type = 0;
  // Fails for host memory that CUDA has never heard of, which is most.
  return driver_.pointer_attribute(&type, kPointerMemoryType,
                                   reinterpret_cast<CUdeviceptr>(pointer)) == kSuccess &&
         type == kMemoryTypeDevice;
}

// Memory that is allocated later is mapped as well.
void CudaDevice::connect(Device& other) {
  auto* peer = dynamic_cast<CudaDevice*>(&other);
  LIVEACT_DEVICE_CHECK(peer != nullptr, name_, ": expected another GPU beside it, found ",
                       other.name());
  const std::string obstacle = peer_obstacle(driver_, device_, peer->device_);
  LIVEACT_DEVICE_CHECK(obstacle.empty(), name_, " and ", peer->name_, ": expected ", obstacle);
  const ContextScope scope(driver_, context_);
  const CUresult result = driver_.context_enable_peer(peer->context_, 0);
  if (result != kPeerAlreadyEnabled) driver_.check(result, "cuCtxEnablePeerAccess");
}

std::unique_ptr<Ops> CudaDevice::open_ops(const OpsLimits& limits) {
  return std::make_unique<CudaOps>(*this, limits);
}

std::map<std::string, std::string> CudaDevice::choices() {
  std::map<std::string, std::string> result;
  {
    const std::lock_guard lock(gemm_choices_.mutex);
    result = gemm_choices_.said;
  }
  const std::lock_guard lock(attention_choices_.mutex);
  result.insert(attention_choices_.said.begin(), attention_choices_.said.end());
  return result;
}

int64_t CudaDevice::ops_bytes(const OpsLimits& limits) const { return CudaOps::bytes(limits); }

}  // namespace liveact::cuda

namespace liveact {

namespace {

std::string dotted(int major, int minor) {
  return std::to_string(major) + "." + std::to_string(minor);
}

}  // namespace

std::shared_ptr<Device> open_cuda(int index, std::vector<KernelImage> images,
                                  const CudaLibraries& libraries) {
  return std::make_shared<cuda::CudaDevice>(index, std::move(images), libraries);
}

int cuda_device_count(const CudaLibraries& libraries) {
  const cuda::Driver driver(libraries.driver);
  int count = 0;
  LIVEACT_DRIVER(driver, device_count(&count));
  return count;
}

std::string cuda_peer_obstacle(int first, int second, const CudaLibraries& libraries) {
  const cuda::Driver driver(libraries.driver);
  cuda::CUdevice devices[2] = {};
  LIVEACT_DRIVER(driver, device_get(&devices[0], first));
  LIVEACT_DRIVER(driver, device_get(&devices[1], second));
  const std::string obstacle = cuda::peer_obstacle(driver, devices[0], devices[1]);
  return obstacle.empty() ? cuda::peer_obstacle(driver, devices[1], devices[0]) : obstacle;
}

std::string cuda_architecture(int index, const CudaLibraries& libraries) {
  const cuda::Driver driver(libraries.driver);
  cuda::CUdevice device = 0;
  int major = 0;
  int minor = 0;
  LIVEACT_DRIVER(driver, device_get(&device, index));
  LIVEACT_DRIVER(driver, device_attribute(&major, cuda::kComputeCapabilityMajor, device));
  LIVEACT_DRIVER(driver, device_attribute(&minor, cuda::kComputeCapabilityMinor, device));
  // From Hopper on the instructions of one chip are not those of the next: the suffix says so.
  return "sm_" + std::to_string(major * 10 + minor) + (major >= 9 ? "a" : "");
}

CudaVersions cuda_versions(int index, const CudaLibraries& libraries) {
  const cuda::Driver driver(libraries.driver);
  const cuda::CublasLt cublaslt(libraries.cublaslt);
  cuda::CUdevice device = 0;
  int version = 0;
  LIVEACT_DRIVER(driver, device_get(&device, index));
  LIVEACT_DRIVER(driver, driver_version(&version));
  const auto lt = static_cast<int>(cublaslt.version());
  return {.device = cuda::device_name(driver, device),
          .driver = dotted(version / 1000, version % 1000 / 10),
          .cublaslt = dotted(lt / 10000, lt / 100 % 100) + "." + std::to_string(lt % 100)};
}

}  // namespace liveact
