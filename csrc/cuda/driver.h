// libcuda through a typed table, opened at run time: the build needs no CUDA header, the installed
// engine no CUDA toolkit, and a machine without a driver gets one clear line.
//
// The declarations are the few of cuda.h that the runtime uses; tests/cuda compiles them against
// the real header.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <string>

namespace liveact::cuda {

using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUcontext = struct CUctx_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUstream = struct CUstream_st*;
using CUevent = struct CUevent_st*;
using CUgraph = struct CUgraph_st*;
using CUgraphExec = struct CUgraphExec_st*;

constexpr CUresult kSuccess = 0;
constexpr CUresult kOutOfMemory = 2;
constexpr int kComputeCapabilityMajor = 75;
constexpr int kComputeCapabilityMinor = 76;
constexpr int kFunctionMaxDynamicShared = 8;
constexpr int kPointerMemoryType = 2;
constexpr unsigned kMemoryTypeDevice = 2;
constexpr int kPeerNativeAtomics = 3;
constexpr CUresult kNotReady = 600;
constexpr CUresult kPeerAlreadyEnabled = 704;
constexpr unsigned kStreamNonBlocking = 1;
constexpr int kCaptureRelaxed = 2;

// X(member, symbol in libcuda, parameters): every function the runtime calls.
#define LIVEACT_DRIVER_FUNCTIONS(X)                                                                \
  X(init, "cuInit", (unsigned))                                                                    \
  X(driver_version, "cuDriverGetVersion", (int*))                                                  \
  X(device_count, "cuDeviceGetCount", (int*))                                                      \
  X(device_get, "cuDeviceGet", (CUdevice*, int))                                                   \
  X(device_name, "cuDeviceGetName", (char*, int, CUdevice))                                        \
  X(device_attribute, "cuDeviceGetAttribute", (int*, int, CUdevice))                               \
  X(device_can_access_peer, "cuDeviceCanAccessPeer", (int*, CUdevice, CUdevice))                   \
  X(device_peer_attribute, "cuDeviceGetP2PAttribute", (int*, int, CUdevice, CUdevice))             \
  X(context_enable_peer, "cuCtxEnablePeerAccess", (CUcontext, unsigned))                           \
  X(context_retain, "cuDevicePrimaryCtxRetain", (CUcontext*, CUdevice))                            \
  X(context_release, "cuDevicePrimaryCtxRelease_v2", (CUdevice))                                   \
  X(context_push, "cuCtxPushCurrent_v2", (CUcontext))                                              \
  X(context_pop, "cuCtxPopCurrent_v2", (CUcontext*))                                               \
  X(memory_info, "cuMemGetInfo_v2", (size_t*, size_t*))                                            \
  X(memory_allocate, "cuMemAlloc_v2", (CUdeviceptr*, size_t))                                      \
  X(memory_free, "cuMemFree_v2", (CUdeviceptr))                                                    \
  X(memory_set, "cuMemsetD8Async", (CUdeviceptr, unsigned char, size_t, CUstream))                 \
  X(copy_to_device, "cuMemcpyHtoDAsync_v2", (CUdeviceptr, const void*, size_t, CUstream))          \
  X(copy_to_host, "cuMemcpyDtoHAsync_v2", (void*, CUdeviceptr, size_t, CUstream))                  \
  X(copy, "cuMemcpyAsync", (CUdeviceptr, CUdeviceptr, size_t, CUstream))                           \
  X(pointer_attribute, "cuPointerGetAttribute", (void*, int, CUdeviceptr))                         \
  X(copy_on_device, "cuMemcpyDtoDAsync_v2", (CUdeviceptr, CUdeviceptr, size_t, CUstream))          \
  X(stream_create, "cuStreamCreateWithPriority", (CUstream*, unsigned, int))                       \
  X(stream_destroy, "cuStreamDestroy_v2", (CUstream))                                              \
  X(stream_synchronize, "cuStreamSynchronize", (CUstream))                                         \
  X(stream_query, "cuStreamQuery", (CUstream))                                                     \
  X(event_create, "cuEventCreate", (CUevent*, unsigned))                                           \
  X(event_destroy, "cuEventDestroy_v2", (CUevent))                                                 \
  X(event_record, "cuEventRecord", (CUevent, CUstream))                                            \
  X(event_elapsed, "cuEventElapsedTime", (float*, CUevent, CUevent))                               \
  X(module_load, "cuModuleLoadData", (CUmodule*, const void*))                                     \
  X(module_unload, "cuModuleUnload", (CUmodule))                                                   \
  X(module_function, "cuModuleGetFunction", (CUfunction*, CUmodule, const char*))                  \
  X(function_set_attribute, "cuFuncSetAttribute", (CUfunction, int, int))                          \
  X(launch_kernel, "cuLaunchKernel",                                                               \
    (CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream,   \
     void**, void**))                                                                              \
  X(capture_begin, "cuStreamBeginCapture_v2", (CUstream, int))                                     \
  X(capture_end, "cuStreamEndCapture", (CUstream, CUgraph*))                                       \
  X(graph_instantiate, "cuGraphInstantiateWithFlags", (CUgraphExec*, CUgraph, unsigned long long)) \
  X(graph_launch, "cuGraphLaunch", (CUgraphExec, CUstream))                                        \
  X(graph_exec_destroy, "cuGraphExecDestroy", (CUgraphExec))                                       \
  X(graph_destroy, "cuGraphDestroy", (CUgraph))                                                    \
  X(error_name, "cuGetErrorName", (CUresult, const char**))                                        \
  X(error_string, "cuGetErrorString", (CUresult, const char**))

// A shared library that stays open as long as this lives. Throws DeviceError naming what is
// missing.
class DynamicLibrary {
 public:
  explicit DynamicLibrary(const std::string& name);
  ~DynamicLibrary();
  DynamicLibrary(const DynamicLibrary&) = delete;
  DynamicLibrary& operator=(const DynamicLibrary&) = delete;

  void* symbol(const char* symbol) const;  // throws DeviceError

 private:
  std::string name_;
  void* handle_;
};

class Driver {
 public:
  // Opens the library and initialises it. Throws DeviceError where there is no usable driver.
  explicit Driver(const std::string& library);

#define LIVEACT_DECLARE(member, symbol, parameters) CUresult(*member) parameters = nullptr;
  LIVEACT_DRIVER_FUNCTIONS(LIVEACT_DECLARE)
#undef LIVEACT_DECLARE

  // Throws DeviceError "<call>: CUDA_ERROR_… (code): <description>" unless result is success.
  void check(CUresult result, const char* call) const;

 private:
  DynamicLibrary library_;
};

// Makes a context current for a scope; contexts of the caller (torch, another device) come back.
class ContextScope {
 public:
  ContextScope(const Driver& driver, CUcontext context) : driver_(driver), pushed_(true) {
    driver_.check(driver_.context_push(context), "cuCtxPushCurrent");
  }
  // For destructors. NOTE: to push fails too on a device that was lost, or while the process exits;
  // what is called without a context then fails, and nothing is left to be freed.
  ContextScope(const Driver& driver, CUcontext context, std::nothrow_t)
      : driver_(driver), pushed_(driver.context_push(context) == kSuccess) {}
  ~ContextScope() {
    CUcontext popped = nullptr;
    if (pushed_) driver_.context_pop(&popped);
  }
  ContextScope(const ContextScope&) = delete;
  ContextScope& operator=(const ContextScope&) = delete;

 private:
  const Driver& driver_;
  const bool pushed_;
};

}  // namespace liveact::cuda

// LIVEACT_DRIVER(driver, stream_synchronize(stream));
#define LIVEACT_DRIVER(driver, call) (driver).check((driver).call, #call)
