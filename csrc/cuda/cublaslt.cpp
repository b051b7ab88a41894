#include "cuda/cublaslt.h"

#include <cmath>
#include <limits>

#include "core/check.h"
#include "cuda/trial.h"

namespace liveact::cuda {

namespace {

constexpr size_t kOldestVersion = 120900;  // outer vector scales
constexpr cublasStatus kNotSupported = 15;
constexpr int kCandidates = 8;  // algorithms tried for a shape

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
         " K=" + std::to_string(shape.k) + " " + name(shape.operands) +
         (shape.bias ? " + bias" : "") + (shape.accumulate ? " + out" : "");
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

GemmShape GemmShape::product() const {
  GemmShape result = *this;
  result.bias = result.accumulate = false;
  return result;
}

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
    plan->set(kDescFastAccum, static_cast<int8_t>(shape.fast_sums));
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

// Best first, as cuBLASLt believes; empty where it has none.
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
  if (status == kNotSupported) return {};
  lt_.check(status, ("cublasLtMatmulAlgoGetHeuristic for " + text(shape)).c_str());
  std::vector<MatmulAlgo> algorithms;
  for (int i = 0; i < found; ++i) {
    if (results[i].state == 0) algorithms.push_back(results[i].algo);
  }
  return algorithms;
}

// Keeps the plan, or that the shape has no algorithm; throws where nothing else would compute it.
bool GemmPlans::keep(const GemmShape& shape, std::unique_ptr<Plan> plan,
                     const std::optional<MatmulAlgo>& algorithm) {
  LIVEACT_DEVICE_CHECK(algorithm.has_value() || shape.separable(),
                       "gemm: expected cuBLASLt to have an algorithm for ", text(shape),
                       ", found none");
  if (algorithm.has_value()) {
    plan->algorithm = *algorithm;
  } else {
    plan = nullptr;
  }
  plans_[shape] = std::move(plan);
  return algorithm.has_value();
}

void GemmPlans::choose(CUstream stream) {
  const std::lock_guard lock(choices_.mutex);
  for (const auto& [shape, operands] : noted_) {
    if (choose(shape, operands, stream)) continue;
    GemmOperands product = operands;
    product.out = operands.scratch;
    choose(shape.product(), product, stream);
  }
  noted_.clear();
}

bool GemmPlans::choose(const GemmShape& shape, const GemmOperands& operands, CUstream stream) {
  if (const auto found = plans_.find(shape); found != plans_.end()) return found->second != nullptr;
  std::unique_ptr<Plan> plan = describe(shape, operands);
  auto known = choices_.algorithms.find(shape);
  if (known == choices_.algorithms.end()) {
    const std::optional<MatmulAlgo> algorithm = fastest(shape, *plan, operands, stream);
    known = choices_.algorithms.emplace(shape, algorithm).first;
  }
  return keep(shape, std::move(plan), known->second);
}

std::optional<MatmulAlgo> GemmPlans::fastest(const GemmShape& shape, Plan& plan,
                                             const GemmOperands& operands, CUstream stream) {
  const std::vector<MatmulAlgo> candidates = suggestions(shape, plan, kCandidates);
  std::string& said = choices_.said["product " + text(shape)];
  if (candidates.empty()) {
    said = "no algorithm: the product, then apply_epilogue";
    return std::nullopt;
  }
  said = "the only algorithm";
  if (candidates.size() == 1 && !shape.separable()) return candidates[0];
  const int64_t scales = shape.operands == DType::f8 ? shape.m : 0;
  fill_randomly(driver_, shape.operands, const_cast<void*>(operands.x), shape.m * shape.k,
                const_cast<float*>(operands.x_scale), scales, stream);
  const Stopwatch watch(driver_, stream);
  std::optional<size_t> best;
  float best_ms = std::numeric_limits<float>::infinity();
  cublasStatus status = 0;
  for (size_t i = 0; i < candidates.size(); ++i) {
    // The first run loads the kernel. One that cuBLASLt suggests and then refuses is no candidate.
    const auto run = [&] { status = multiply(shape, plan, candidates[i], operands, stream); };
    run();
    if (status != 0) continue;
    const float ms = candidates.size() == 1 ? 0.0f : watch.shortest(run);
    // The library's order decides where the clock cannot: runs agree to about one percent.
    if (status == 0 && ms < best_ms * kWorthwhile) {
      best = i;
      best_ms = ms;
    }
  }
  if (!best.has_value()) {
    if (!shape.separable()) lt_.check(status, "cublasLtMatmul");
    said = "all algorithms refused: the product, then apply_epilogue";
    return std::nullopt;
  }
  if (candidates.size() > 1) {
    said = std::to_string(best_ms) + " ms, algorithm " + std::to_string(*best + 1) + " of " +
           std::to_string(candidates.size());
  }
  return candidates[*best];
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

bool GemmPlans::run(const GemmShape& shape, const GemmOperands& operands, CUstream stream) {
  auto found = plans_.find(shape);
  if (found == plans_.end()) {
    std::unique_ptr<Plan> made = describe(shape, operands);
    const std::vector<MatmulAlgo> first = suggestions(shape, *made, 1);
    std::optional<MatmulAlgo> algorithm;
    if (!first.empty()) algorithm = first[0];
    keep(shape, std::move(made), algorithm);
    found = plans_.find(shape);
  }
  std::unique_ptr<Plan>& plan = found->second;
  if (plan == nullptr) return false;
  const cublasStatus status = multiply(shape, *plan, plan->algorithm, operands, stream);
  if (status == kNotSupported && shape.separable()) {
    plan = nullptr;
    return false;
  }
  if (status != 0) lt_.check(status, ("cublasLtMatmul of " + text(shape)).c_str());
  return true;
}

}  // namespace liveact::cuda
