// The queue itself: copies, graphs, products. The launches of kernels are in cuda_ops.cpp.

#include <utility>
#include <vector>

#include "core/check.h"
#include "cuda/cuda_ops.h"

namespace liveact::cuda {

namespace {

// Less goes first. The decode of the block before, on torch's stream of priority 0 on the same
// device, fills what the denoise leaves free; one of priority -2 goes before it (vae/queue.py).
constexpr int kPriority = -1;

constexpr int64_t kWorkspaceBytes = 64 << 20;  // what cuBLASLt wants on Hopper (32 MiB), doubled

int64_t tap_bytes(const OpsLimits& limits) {
  return limits.max_cols * kCompressTaps * static_cast<int64_t>(sizeof(float));
}

CUdeviceptr address(const void* pointer) { return reinterpret_cast<CUdeviceptr>(pointer); }

}  // namespace

int64_t CudaOps::bytes(const OpsLimits& limits) {
  return kWorkspaceBytes + limits.max_operand * size_bytes(DType::bf16) + 4 + tap_bytes(limits);
}

CudaOps::CudaOps(CudaDevice& device, const OpsLimits& limits)
    : device_(device),
      driver_(device.driver()),
      limits_(limits),
      workspace_(device, kWorkspaceBytes),
      product_(device, limits.max_operand * size_bytes(DType::bf16)),
      flag_(device, 4),
      mean_taps_(device, tap_bytes(limits)),
      gemms_(driver_, device.cublaslt(), device.cublaslt_handle(), workspace_.data(),
             kWorkspaceBytes, device.gemm_choices()),
      attention_(driver_, device.kernels(), device.attention_choices()) {
  const std::vector<float> mean(limits.max_cols * kCompressTaps, 1.0f / kCompressTaps);
  device_.upload(mean_taps_.data(), mean.data(), tap_bytes(limits));
  const ContextScope scope(driver_, device_.context());
  try {
    LIVEACT_DRIVER(driver_, stream_create(&stream_, kStreamNonBlocking, kPriority));
    for (CUevent& event : marks_) LIVEACT_DRIVER(driver_, event_create(&event, 0));
  } catch (...) {
    close();
    throw;
  }
}

CudaOps::~CudaOps() {
  const ContextScope scope(driver_, device_.context(), std::nothrow);
  close();
}

void CudaOps::close() {
  if (stream_ == nullptr) return;
  abandon_recording();
  driver_.stream_synchronize(stream_);
  for (const auto& [key, graph] : graphs_) {
    if (graph != nullptr) driver_.graph_exec_destroy(graph);
  }
  for (CUevent event : marks_) {
    if (event != nullptr) driver_.event_destroy(event);
  }
  driver_.stream_destroy(stream_);
}

void CudaOps::launch(const std::string& name, std::initializer_list<Argument> arguments) const {
  if (planning_) {
    device_.kernels().check(name, arguments);
    return;
  }
  const ContextScope scope(driver_, device_.context());
  device_.kernels().launch(name, stream_, arguments);
}

void CudaOps::signal(const Barrier& barrier) {
  launch("barrier.signal", {barrier.counts, barrier.peer_arrived});
}

void CudaOps::wait(const Barrier& barrier) {
  launch("barrier.wait", {barrier.counts, barrier.arrived});
}

bool CudaOps::idle() {
  if (planning_) return true;
  const ContextScope scope(driver_, device_.context());
  const CUresult result = driver_.stream_query(stream_);
  if (result != kNotReady) driver_.check(result, "cuStreamQuery");
  return result != kNotReady;
}

std::recursive_mutex* CudaOps::turn() { return &submission(); }

bool CudaOps::begin_plan() { return planning_ = true; }

void CudaOps::end_plan() {
  planning_ = false;
  const ContextScope scope(driver_, device_.context());
  gemms_.choose(stream_);
  attention_.choose(stream_);
}

const void* CudaOps::dense(const Rows& x) {
  if (x.row_stride() == x.cols) return x.data;
  LIVEACT_CHECK(x.size() <= limits_.max_operand, "cuda linear: expected at most ",
                limits_.max_operand, " elements of overlapping rows, found ", x.size());
  const int64_t row_bytes = x.cols * size_bytes(x.dtype);
  for (int64_t row = 0; row < (planning_ ? 0 : x.rows); ++row) {
    const auto* source =
        static_cast<const char*>(x.data) + row * x.row_stride() * size_bytes(x.dtype);
    driver_.check(driver_.copy_on_device(address(product_.data()) + row * row_bytes,
                                         address(source), static_cast<size_t>(row_bytes), stream_),
                  "cuMemcpyDtoDAsync");
  }
  return product_.data();
}

// fp8: the gate rides in the scale of the weight, the residual in beta = 1. bf16 products have no
// scale per channel, so a gated one takes an extra pass; so does an fp8 product with bias and sum
// where cuBLASLt has no algorithm for both.
void CudaOps::linear(const Rows& x, const Weight& weight, const Epilogue& epilogue,
                     const Rows& out) {
  LIVEACT_CHECK(x.dtype == weight.dtype && x.dtype != DType::f32, "cuda linear: expected x and ",
                "weight both fp8 or both bf16, found ", liveact::name(x.dtype), " and ",
                liveact::name(weight.dtype));
  const bool gated = x.dtype == DType::bf16 && epilogue.scale != nullptr;
  const GemmShape whole{.m = x.rows,
                        .n = weight.n,
                        .k = weight.k,
                        .operands = x.dtype,
                        .out = out.dtype,
                        .bias = epilogue.bias != nullptr,
                        .accumulate = epilogue.accumulate,
                        .fast_sums = x.dtype == DType::f8 && !limits_.full_sums};
  if (gated || whole.separable()) {
    LIVEACT_CHECK(x.rows * weight.n <= limits_.max_operand, "cuda linear: expected at most ",
                  limits_.max_operand, " elements of a product before its epilogue, found ", x.rows,
                  " x ", weight.n);
    LIVEACT_CHECK(
        x.row_stride() == x.cols && out.dtype == DType::bf16,
        "cuda linear: expected rows side by side and a result in bf16, found a stride of ",
        x.row_stride(), " and ", liveact::name(out.dtype));
  }
  const ContextScope scope(driver_, device_.context());
  GemmOperands operands{.x = dense(x),
                        .x_scale = x.scale,
                        .weight = weight.parts[0].data,
                        .weight_scale = epilogue.scale,
                        .bias = epilogue.bias,
                        .out = out.data,
                        .scratch = product_.data()};
  if (planning_) {
    if (gated) operands.out = product_.data();
    gemms_.note(gated ? whole.product() : whole, operands);
  } else {
    if (!gated && gemms_.run(whole, operands, stream_)) return;
    operands.out = product_.data();
    gemms_.run(whole.product(), operands, stream_);
  }
  if (gated) {
    launch("apply_epilogue.bf16",
           {product_.data(), epilogue.scale, epilogue.bias, out.data, x.rows, weight.n});
  } else if (whole.separable()) {
    launch("apply_epilogue.residual",
           {product_.data(), nullptr, epilogue.bias, out.data, x.rows, weight.n});
  }
}

bool CudaOps::replay(int key) {
  if (planning_) return false;
  const auto found = graphs_.find(key);
  if (found == graphs_.end() || found->second == nullptr) return false;
  const ContextScope scope(driver_, device_.context());
  LIVEACT_DRIVER(driver_, graph_launch(found->second, stream_));
  return true;
}

// The first time a key comes its ops run as they are: cuBLASLt loads its kernels then, which it may
// not do while a stream is captured. The second time they are captured, and run when replayed.
void CudaOps::begin_record(int key) {
  if (planning_) return;
  if (graphs_.emplace(key, nullptr).second) return;
  const ContextScope scope(driver_, device_.context());
  // Relaxed: nothing here is unsafe to capture, and only such a capture may be ended by the thread
  // that closes a queue whose recording was cancelled.
  LIVEACT_DRIVER(driver_, capture_begin(stream_, kCaptureRelaxed));
  recording_ = key;
}

void CudaOps::end_record() {
  if (recording_ < 0) return;
  const ContextScope scope(driver_, device_.context());
  CUgraph graph = nullptr;
  const int key = std::exchange(recording_, -1);
  LIVEACT_DRIVER(driver_, capture_end(stream_, &graph));
  CUgraphExec executable = nullptr;
  const CUresult result = driver_.graph_instantiate(&executable, graph, 0);
  driver_.graph_destroy(graph);
  driver_.check(result, "cuGraphInstantiate");
  graphs_[key] = executable;
}

// An op failed while it was recorded. An open capture would fail every wait for the device.
void CudaOps::abandon_recording() {
  if (std::exchange(recording_, -1) < 0) return;
  CUgraph graph = nullptr;
  if (driver_.capture_end(stream_, &graph) == kSuccess) driver_.graph_destroy(graph);
}

void CudaOps::forget() {
  if (graphs_.empty()) return;
  const ContextScope scope(driver_, device_.context());
  abandon_recording();
  LIVEACT_DRIVER(driver_, stream_synchronize(stream_));
  for (auto& [key, graph] : graphs_) {
    if (graph != nullptr) driver_.graph_exec_destroy(graph);
    graph = nullptr;  // the key stays known: its kernels are loaded
  }
}

void CudaOps::mark(int index) {
  if (planning_) return;
  const ContextScope scope(driver_, device_.context());
  LIVEACT_DRIVER(driver_, event_record(marks_[index], stream_));
}

double CudaOps::marked_ms(int first, int second) {
  if (planning_) return 0.0;
  const ContextScope scope(driver_, device_.context());
  float ms = 0.0f;
  LIVEACT_DRIVER(driver_, event_elapsed(&ms, marks_[first], marks_[second]));
  return ms;
}

void CudaOps::upload(void* target, const void* host, int64_t bytes) {
  if (planning_) return;
  const ContextScope scope(driver_, device_.context());
  driver_.check(driver_.copy_to_device(address(target), host, static_cast<size_t>(bytes), stream_),
                "cuMemcpyHtoDAsync");
  // The host memory is the caller's and may go away.
  LIVEACT_DRIVER(driver_, stream_synchronize(stream_));
}

void CudaOps::download(void* host, const void* source, int64_t bytes) {
  if (planning_) return;
  const ContextScope scope(driver_, device_.context());
  driver_.check(driver_.copy_to_host(host, address(source), static_cast<size_t>(bytes), stream_),
                "cuMemcpyDtoHAsync");
  LIVEACT_DRIVER(driver_, stream_synchronize(stream_));
}

}  // namespace liveact::cuda
