// Compiles only where the declarations of csrc/cuda agree with the real headers: cuda.h and those
// of the nvidia-cublas package. Values are compared one by one, functions by the kind and size of
// every parameter.

#include <cublasLt.h>
#include <cuda.h>

#include <type_traits>

#include "cuda/cublaslt.h"
#include "cuda/driver.h"

namespace ours = liveact::cuda;

// Pointers stand for pointers (and opaque handles), enums for int.
template <typename A, typename B>
constexpr bool same_parameter =
    (std::is_pointer_v<A> && std::is_pointer_v<B>) ||
    (!std::is_pointer_v<A> && !std::is_pointer_v<B> && sizeof(A) == sizeof(B) &&
     std::is_floating_point_v<A> == std::is_floating_point_v<B>);

template <typename A, typename B>
struct SameFunction : std::false_type {};
template <typename R, typename S, typename... A, typename... B>
  requires(sizeof...(A) == sizeof...(B))
struct SameFunction<R (*)(A...), S (*)(B...)>
    : std::bool_constant<sizeof(R) == sizeof(S) && (same_parameter<A, B> && ...)> {};

#define CHECK_DRIVER(member, symbol) \
  static_assert(SameFunction<decltype(ours::Driver::member), decltype(&symbol)>::value, #symbol);
CHECK_DRIVER(init, cuInit)
CHECK_DRIVER(driver_version, cuDriverGetVersion)
CHECK_DRIVER(device_count, cuDeviceGetCount)
CHECK_DRIVER(device_get, cuDeviceGet)
CHECK_DRIVER(device_name, cuDeviceGetName)
CHECK_DRIVER(device_attribute, cuDeviceGetAttribute)
CHECK_DRIVER(device_can_access_peer, cuDeviceCanAccessPeer)
CHECK_DRIVER(device_peer_attribute, cuDeviceGetP2PAttribute)
CHECK_DRIVER(context_enable_peer, cuCtxEnablePeerAccess)
CHECK_DRIVER(context_retain, cuDevicePrimaryCtxRetain)
CHECK_DRIVER(context_release, cuDevicePrimaryCtxRelease)
CHECK_DRIVER(context_push, cuCtxPushCurrent)
CHECK_DRIVER(context_pop, cuCtxPopCurrent)
CHECK_DRIVER(memory_info, cuMemGetInfo)
CHECK_DRIVER(memory_allocate, cuMemAlloc)
CHECK_DRIVER(memory_free, cuMemFree)
CHECK_DRIVER(memory_set, cuMemsetD8Async)
CHECK_DRIVER(copy_to_device, cuMemcpyHtoDAsync)
CHECK_DRIVER(copy_to_host, cuMemcpyDtoHAsync)
CHECK_DRIVER(copy, cuMemcpyAsync)
CHECK_DRIVER(pointer_attribute, cuPointerGetAttribute)
CHECK_DRIVER(copy_on_device, cuMemcpyDtoDAsync)
CHECK_DRIVER(stream_create, cuStreamCreateWithPriority)
CHECK_DRIVER(stream_destroy, cuStreamDestroy)
CHECK_DRIVER(stream_synchronize, cuStreamSynchronize)
CHECK_DRIVER(stream_query, cuStreamQuery)
CHECK_DRIVER(event_create, cuEventCreate)
CHECK_DRIVER(event_destroy, cuEventDestroy)
CHECK_DRIVER(event_record, cuEventRecord)
CHECK_DRIVER(event_elapsed, cuEventElapsedTime)
CHECK_DRIVER(module_load, cuModuleLoadData)
CHECK_DRIVER(module_unload, cuModuleUnload)
CHECK_DRIVER(module_function, cuModuleGetFunction)
CHECK_DRIVER(function_set_attribute, cuFuncSetAttribute)
CHECK_DRIVER(launch_kernel, cuLaunchKernel)
CHECK_DRIVER(capture_begin, cuStreamBeginCapture)
CHECK_DRIVER(capture_end, cuStreamEndCapture)
CHECK_DRIVER(graph_instantiate, cuGraphInstantiateWithFlags)
CHECK_DRIVER(graph_launch, cuGraphLaunch)
CHECK_DRIVER(graph_exec_destroy, cuGraphExecDestroy)
CHECK_DRIVER(graph_destroy, cuGraphDestroy)
CHECK_DRIVER(error_name, cuGetErrorName)
CHECK_DRIVER(error_string, cuGetErrorString)

#define CHECK_CUBLASLT(member, symbol) \
  static_assert(SameFunction<decltype(ours::CublasLt::member), decltype(&symbol)>::value, #symbol);
CHECK_CUBLASLT(create, cublasLtCreate)
CHECK_CUBLASLT(destroy, cublasLtDestroy)
CHECK_CUBLASLT(desc_create, cublasLtMatmulDescCreate)
CHECK_CUBLASLT(desc_destroy, cublasLtMatmulDescDestroy)
CHECK_CUBLASLT(desc_set, cublasLtMatmulDescSetAttribute)
CHECK_CUBLASLT(layout_create, cublasLtMatrixLayoutCreate)
CHECK_CUBLASLT(layout_destroy, cublasLtMatrixLayoutDestroy)
CHECK_CUBLASLT(preference_create, cublasLtMatmulPreferenceCreate)
CHECK_CUBLASLT(preference_destroy, cublasLtMatmulPreferenceDestroy)
CHECK_CUBLASLT(preference_set, cublasLtMatmulPreferenceSetAttribute)
CHECK_CUBLASLT(heuristic, cublasLtMatmulAlgoGetHeuristic)
CHECK_CUBLASLT(matmul, cublasLtMatmul)

#define CHECK_VALUE(ours_value, real_value) \
  static_assert(static_cast<int>(real_value) == ours::ours_value, #real_value);
CHECK_VALUE(kSuccess, CUDA_SUCCESS)
CHECK_VALUE(kComputeCapabilityMajor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
CHECK_VALUE(kComputeCapabilityMinor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
CHECK_VALUE(kFunctionMaxDynamicShared, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
CHECK_VALUE(kPointerMemoryType, CU_POINTER_ATTRIBUTE_MEMORY_TYPE)
CHECK_VALUE(kMemoryTypeDevice, CU_MEMORYTYPE_DEVICE)
CHECK_VALUE(kPeerNativeAtomics, CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED)
CHECK_VALUE(kOutOfMemory, CUDA_ERROR_OUT_OF_MEMORY)
CHECK_VALUE(kNotReady, CUDA_ERROR_NOT_READY)
CHECK_VALUE(kPeerAlreadyEnabled, CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED)
CHECK_VALUE(kStreamNonBlocking, CU_STREAM_NON_BLOCKING)
CHECK_VALUE(kCaptureRelaxed, CU_STREAM_CAPTURE_MODE_RELAXED)
CHECK_VALUE(kCudaR32F, CUDA_R_32F)
CHECK_VALUE(kCudaR16BF, CUDA_R_16BF)
CHECK_VALUE(kCudaR8FE4M3, CUDA_R_8F_E4M3)
CHECK_VALUE(kCompute32F, CUBLAS_COMPUTE_32F)
CHECK_VALUE(kOpTranspose, CUBLAS_OP_T)
CHECK_VALUE(kDescTransA, CUBLASLT_MATMUL_DESC_TRANSA)
CHECK_VALUE(kDescEpilogue, CUBLASLT_MATMUL_DESC_EPILOGUE)
CHECK_VALUE(kDescBiasPointer, CUBLASLT_MATMUL_DESC_BIAS_POINTER)
CHECK_VALUE(kDescFastAccum, CUBLASLT_MATMUL_DESC_FAST_ACCUM)
CHECK_VALUE(kDescBiasDataType, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE)
CHECK_VALUE(kDescAScalePointer, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER)
CHECK_VALUE(kDescBScalePointer, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER)
CHECK_VALUE(kDescAScaleMode, CUBLASLT_MATMUL_DESC_A_SCALE_MODE)
CHECK_VALUE(kDescBScaleMode, CUBLASLT_MATMUL_DESC_B_SCALE_MODE)
CHECK_VALUE(kScaleOuterVector, CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F)
CHECK_VALUE(kEpilogueDefault, CUBLASLT_EPILOGUE_DEFAULT)
CHECK_VALUE(kEpilogueBias, CUBLASLT_EPILOGUE_BIAS)
CHECK_VALUE(kPreferenceWorkspace, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES)

static_assert(sizeof(ours::MatmulAlgo) == sizeof(cublasLtMatmulAlgo_t));
static_assert(sizeof(ours::MatmulHeuristic) == sizeof(cublasLtMatmulHeuristicResult_t));
static_assert(offsetof(ours::MatmulHeuristic, workspace_bytes) ==
              offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize));
static_assert(offsetof(ours::MatmulHeuristic, state) ==
              offsetof(cublasLtMatmulHeuristicResult_t, state));
