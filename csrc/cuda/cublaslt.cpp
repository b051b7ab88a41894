#include "cuda/cublaslt.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "core/check.h"

namespace liveact::cuda {

namespace {

constexpr size_t kOldestVersion = 120900;  // outer vector scales
constexpr int kCandidates = 8;             // algorithms tried for a shape
constexpr int kTimedRuns = 5;              // of each, the shortest counts
constexpr float kWorthwhile = 0.98f;       // of the time so far: less gain is not told from noise

int cuda_type(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return kCudaR32F;
    case DType::bf16:
      return kCudaR16BF;
    case DType::f8:
      return kCudaR8FE4M3;
  }
  return -1;
}

std::string text(const GemmShape& shape) {
  return "M=" + std::to_string(shape.m) + " N=" + std::to_string(shape.n) +
         " K=" + std::to_string(shape.k) + " " + name(shape.operands);
}

// Time on the device between two points of a stream.
class Stopwatch {
 public:
  Stopwatch(const Driver& driver, CUstream stream) : driver_(driver), stream_(stream) {
    LIVEACT_DRIVER(driver_, event_create(&start_, 0));
    const CUresult result = driver_.event_create(&stop_, 0);
    if (result != kSuccess) driver_.event_destroy(start_);
    driver_.check(result, "cuEventCreate");
  }
  ~Stopwatch() {
    driver_.event_destroy(start_);
    driver_.event_destroy(stop_);
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

  template <typename Work>
  float time(const Work& work) const {
    LIVEACT_DRIVER(driver_, event_record(start_, stream_));
    work();
    LIVEACT_DRIVER(driver_, event_record(stop_, stream_));
    LIVEACT_DRIVER(driver_, stream_synchronize(stream_));
    float ms = 0.0f;
    LIVEACT_DRIVER(driver_, event_elapsed(&ms, start_, stop_));
    return ms;
  }

 private:
  const Driver& driver_;
  CUstream stream_;
  CUevent start_ = nullptr, stop_ = nullptr;
};

// x as activations are: a product of zeros draws less power, and so runs at a higher clock.
void fill_randomly(const Driver& driver, const GemmShape& shape, const GemmOperands& operands,
                   CUstream stream) {
  const int64_t bytes = shape.m * shape.k * size_bytes(shape.operands);
  std::minstd_rand random(1);
  std::normal_distribution<float> normal;
  std::vector<uint8_t> values(std::min<int64_t>(bytes, 1 << 20));
  for (size_t i = 0; i + size_bytes(shape.operands) <= values.size();
       i += size_bytes(shape.operands)) {
    if (shape.operands == DType::f8) {
      values[i] = f8_from_f32(normal(random) * (kF8Max / 4));  // a row's largest is at 4 sigma
    } else {
      const uint16_t value = bf16_from_f32(normal(random));
      std::memcpy(&values[i], &value, sizeof(value));
    }
  }
  const auto x = reinterpret_cast<CUdeviceptr>(operands.x);
  auto filled = static_cast<int64_t>(values.size());
  driver.check(driver.copy_to_device(x, values.data(), values.size(), stream), "cuMemcpyHtoDAsync");
  for (; filled < bytes; filled *= 2) {
    const auto more = static_cast<size_t>(std::min(filled, bytes - filled));
    driver.check(driver.copy_on_device(x + filled, x, more, stream), "cuMemcpyDtoDAsync");
  }
  const std::vector<float> scale(shape.operands == DType::f8 ? shape.m : 0, 4 / kF8Max);
  if (!scale.empty()) {
    const auto target = reinterpret_cast<CUdeviceptr>(operands.x_scale);
    driver.check(driver.copy_to_device(target, scale.data(), scale.size() * sizeof(float), stream),
                 "cuMemcpyHtoDAsync");
  }
  LIVEACT_DRIVER(driver, stream_synchronize(stream));
}

}  // namespace

CublasLt::CublasLt(const std::string& library) : library_(library) {
  const auto get_version = reinterpret_cast<size_t (*)()>(library_.symbol("cublasLtGetVersion"));
  version_ = get_version();
  LIVEACT_DEVICE_CHECK(version_ >= kOldestVersion, library,
                       ": expected cuBLASLt 12.9 or newer, found ", version_ / 10000, ".",
                       version_ / 100 % 100);
  status_string_ =
      reinterpret_cast<const char* (*)(cublasStatus)>(library_.symbol("cublasLtGetStatusString"));
#define LIVEACT_BIND(member, symbol_name, parameters) \
  member = reinterpret_cast<cublasStatus(*) parameters>(library_.symbol(symbol_name));
  LIVEACT_CUBLASLT_FUNCTIONS(LIVEACT_BIND)
#undef LIVEACT_BIND
}

CublasLt::~CublasLt() = default;

void CublasLt::check(cublasStatus status, const char* call) const {
  if (status == 0) return;
  const char* text = status_string_(status);
  detail::fail<DeviceError>(call, ": cuBLASLt status ", status, ": ", text ? text : "unknown");
}

struct GemmPlans::Plan {
  const CublasLt& lt;
  MatmulDesc desc = nullptr;
  MatrixLayout a = nullptr, b = nullptr, out = nullptr;
  MatmulAlgo algorithm = {};

  explicit Plan(const CublasLt& library) : lt(library) {}
  ~Plan() {
    for (MatrixLayout layout : {a, b, out}) {
      if (layout != nullptr) lt.layout_destroy(layout);
    }
    if (desc != nullptr) lt.desc_destroy(desc);
  }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  template <typename T>
  void set(int attribute, const T& value) {
    lt.check(lt.desc_set(desc, attribute, &value, sizeof(value)), "cublasLtMatmulDescSetAttribute");
  }

  void point(const GemmShape& shape, const GemmOperands& operands) {
    if (shape.operands == DType::f8) {
      set(kDescAScalePointer, operands.weight_scale);
      set(kDescBScalePointer, operands.x_scale);
    }
    if (shape.bias) set(kDescBiasPointer, operands.bias);
  }
};

GemmPlans::GemmPlans(const Driver& driver, const CublasLt& lt, CublasLtHandle handle,
                     void* workspace, int64_t workspace_bytes, GemmChoices& choices)
    : driver_(driver),
      lt_(lt),
      handle_(handle),
      workspace_(workspace),
      workspace_bytes_(workspace_bytes),
      choices_(choices) {}

GemmPlans::~GemmPlans() = default;

std::unique_ptr<GemmPlans::Plan> GemmPlans::describe(const GemmShape& shape,
                                                     const GemmOperands& operands) {
  auto plan = std::make_unique<Plan>(lt_);
  lt_.check(lt_.desc_create(&plan->desc, kCompute32F, kCudaR32F), "cublasLtMatmulDescCreate");
  plan->set(kDescTransA, kOpTranspose);
  if (shape.operands == DType::f8) {
    plan->set(kDescAScaleMode, kScaleOuterVector);
    plan->set(kDescBScaleMode, kScaleOuterVector);
  }
  plan->set(kDescEpilogue, shape.bias ? kEpilogueBias : kEpilogueDefault);
  if (shape.bias) plan->set(kDescBiasDataType, cuda_type(shape.out));
  // NOTE: without the scales cuBLASLt suggests nothing ("requires a custom pointer", status 7).
  plan->point(shape, operands);
  const int operand = cuda_type(shape.operands);
  const auto layout = [&](MatrixLayout* target, int format, int64_t rows, int64_t cols) {
    lt_.check(lt_.layout_create(target, format, rows, cols, rows), "cublasLtMatrixLayoutCreate");
  };
  layout(&plan->a, operand, shape.k, shape.n);  // weight [N, K] row-major = [K, N] column-major
  layout(&plan->b, operand, shape.k, shape.m);
  layout(&plan->out, cuda_type(shape.out), shape.n, shape.m);
  return plan;
}

// Best first, as cuBLASLt believes.
std::vector<MatmulAlgo> GemmPlans::suggestions(const GemmShape& shape, const Plan& plan,
                                               int at_most) {
  MatmulPreference preference = nullptr;
  lt_.check(lt_.preference_create(&preference), "cublasLtMatmulPreferenceCreate");
  const auto limit = static_cast<uint64_t>(workspace_bytes_);
  std::vector<MatmulHeuristic> results(at_most);
  int found = 0;
  cublasStatus status = lt_.preference_set(preference, kPreferenceWorkspace, &limit, sizeof(limit));
  if (status == 0) {
    status = lt_.heuristic(handle_, plan.desc, plan.a, plan.b, plan.out, plan.out, preference,
                           at_most, results.data(), &found);
  }
  lt_.preference_destroy(preference);
  lt_.check(status, ("cublasLtMatmulAlgoGetHeuristic for " + text(shape)).c_str());
  std::vector<MatmulAlgo> algorithms;
  for (int i = 0; i < found; ++i) {
    if (results[i].state == 0) algorithms.push_back(results[i].algo);
  }
  LIVEACT_DEVICE_CHECK(!algorithms.empty(), "gemm: expected cuBLASLt to have an algorithm for ",
                       text(shape), ", found none");
  return algorithms;
}

void GemmPlans::choose(CUstream stream) {
  const std::lock_guard lock(choices_.mutex);
  for (const auto& [shape, operands] : noted_) {
    if (plans_.contains(shape)) continue;
    std::unique_ptr<Plan> plan = describe(shape, operands);
    const auto known = choices_.algorithms.find(shape);
    plan->algorithm = known != choices_.algorithms.end() ? known->second
                                                         : fastest(shape, *plan, operands, stream);
    choices_.algorithms.emplace(shape, plan->algorithm);
    plans_.emplace(shape, std::move(plan));
  }
  noted_.clear();
}

MatmulAlgo GemmPlans::fastest(const GemmShape& shape, Plan& plan, const GemmOperands& operands,
                              CUstream stream) {
  const std::vector<MatmulAlgo> candidates = suggestions(shape, plan, kCandidates);
  if (candidates.size() == 1) return candidates[0];
  fill_randomly(driver_, shape, operands, stream);
  const Stopwatch watch(driver_, stream);
  size_t best = 0;
  float best_ms = std::numeric_limits<float>::infinity();
  for (size_t i = 0; i < candidates.size(); ++i) {
    float ms = std::numeric_limits<float>::infinity();
    // The first run loads the kernel. One that cuBLASLt suggests and then refuses is no candidate.
    cublasStatus status = multiply(shape, plan, candidates[i], operands, stream);
    for (int run = 0; run < kTimedRuns && status == 0; ++run) {
      ms = std::min(
          ms, watch.time([&] { status = multiply(shape, plan, candidates[i], operands, stream); }));
    }
    if (i + 1 == candidates.size() && !std::isfinite(best_ms)) lt_.check(status, "cublasLtMatmul");
    // The library's order decides where the clock cannot: runs agree to about one percent.
    if (status == 0 && ms < best_ms * kWorthwhile) {
      best = i;
      best_ms = ms;
    }
  }
  return candidates[best];
}

cublasStatus GemmPlans::multiply(const GemmShape& shape, Plan& plan, const MatmulAlgo& algorithm,
                                 const GemmOperands& operands, CUstream stream) {
  plan.point(shape, operands);
  const float alpha = 1.0f;
  const float beta = shape.accumulate ? 1.0f : 0.0f;
  return lt_.matmul(handle_, plan.desc, &alpha, operands.weight, plan.a, operands.x, plan.b, &beta,
                    operands.out, plan.out, operands.out, plan.out, &algorithm, workspace_,
                    static_cast<size_t>(workspace_bytes_), stream);
}

void GemmPlans::run(const GemmShape& shape, const GemmOperands& operands, CUstream stream) {
  std::unique_ptr<Plan>& plan = plans_[shape];
  if (plan == nullptr) {
    std::unique_ptr<Plan> made = describe(shape, operands);
    made->algorithm = suggestions(shape, *made, 1)[0];
    plan = std::move(made);
  }
  const cublasStatus status = multiply(shape, *plan, plan->algorithm, operands, stream);
  if (status != 0) lt_.check(status, ("cublasLtMatmul of " + text(shape)).c_str());
}

}  // namespace liveact::cuda
