#include "cublaslt.h"

namespace liveact::cuda {

namespace {

constexpr size_t kOldestVersion = 120900;  // outer vector scales

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

}  // namespace

CublasLt::CublasLt(const std::string& library) : library_(library) {
  const auto get_version = reinterpret_cast<size_t (*)()>(library_.symbol("cublasLtGetVersion"));
  version_ = get_version();
  if (version_ < kOldestVersion) {
    detail::fail<DeviceError>(library, ": expected cuBLASLt 12.9 or newer, found ",
                              version_ / 10000, ".", version_ / 100 % 100);
  }
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
  MatmulHeuristic choice = {};

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
};

GemmPlans::GemmPlans(const CublasLt& lt, CublasLtHandle handle, void* workspace,
                     int64_t workspace_bytes)
    : lt_(lt), handle_(handle), workspace_(workspace), workspace_bytes_(workspace_bytes) {}

GemmPlans::~GemmPlans() = default;

GemmPlans::Plan& GemmPlans::plan(const GemmShape& shape) {
  std::unique_ptr<Plan>& slot = plans_[shape];
  if (slot != nullptr) return *slot;
  auto plan = std::make_unique<Plan>(lt_);
  lt_.check(lt_.desc_create(&plan->desc, kCompute32F, kCudaR32F), "cublasLtMatmulDescCreate");
  plan->set(kDescTransA, kOpTranspose);
  if (shape.operands == DType::f8) {
    plan->set(kDescAScaleMode, kScaleOuterVector);
    plan->set(kDescBScaleMode, kScaleOuterVector);
  }
  plan->set(kDescEpilogue, shape.bias ? kEpilogueBias : kEpilogueDefault);
  if (shape.bias) plan->set(kDescBiasDataType, cuda_type(shape.out));
  const int operands = cuda_type(shape.operands);
  const auto layout = [&](MatrixLayout* target, int type, int64_t rows, int64_t cols) {
    lt_.check(lt_.layout_create(target, type, rows, cols, rows), "cublasLtMatrixLayoutCreate");
  };
  layout(&plan->a, operands, shape.k, shape.n);  // weight [N, K] row-major = [K, N] column-major
  layout(&plan->b, operands, shape.k, shape.m);
  layout(&plan->out, cuda_type(shape.out), shape.n, shape.m);

  MatmulPreference preference = nullptr;
  lt_.check(lt_.preference_create(&preference), "cublasLtMatmulPreferenceCreate");
  const auto limit = static_cast<uint64_t>(workspace_bytes_);
  int found = 0;
  cublasStatus status = lt_.preference_set(preference, kPreferenceWorkspace, &limit, sizeof(limit));
  if (status == 0) {
    status = lt_.heuristic(handle_, plan->desc, plan->a, plan->b, plan->out, plan->out, preference,
                           1, &plan->choice, &found);
  }
  lt_.preference_destroy(preference);
  lt_.check(status, "cublasLtMatmulAlgoGetHeuristic");
  LIVEACT_CHECK(found == 1, "gemm: expected cuBLASLt to have an algorithm for M=", shape.m,
                " N=", shape.n, " K=", shape.k, " ", name(shape.operands), ", found none");
  slot = std::move(plan);
  return *slot;
}

void GemmPlans::run(const GemmShape& shape, const void* x, const float* x_scale, const void* weight,
                    const float* weight_scale, const void* bias, void* out, CUstream stream) {
  Plan& p = plan(shape);
  if (shape.operands == DType::f8) {
    p.set(kDescAScalePointer, weight_scale);
    p.set(kDescBScalePointer, x_scale);
  }
  if (shape.bias) p.set(kDescBiasPointer, bias);
  const float alpha = 1.0f;
  const float beta = shape.accumulate ? 1.0f : 0.0f;
  lt_.check(lt_.matmul(handle_, p.desc, &alpha, weight, p.a, x, p.b, &beta, out, p.out, out, p.out,
                       &p.choice.algo, workspace_, static_cast<size_t>(workspace_bytes_), stream),
            "cublasLtMatmul");
}

}  // namespace liveact::cuda
