// cuBLASLt through a typed table, opened at run time, and plans for the products of one stream.
//
// out [M, N] = x [M, K] · weight [N, K]ᵀ is computed as the column-major outᵀ [N, M], which is the
// TN form that FP8 needs: A = weight, B = x. In FP8 both carry one scale per row in memory (outer
// vector scaling, cuBLASLt >= 12.9, sm_90), so `alpha` stays 1 and the gate of a projection sits in
// the scale of the weight.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "core/ops.h"
#include "cuda/driver.h"

namespace liveact::cuda {

using cublasStatus = int;
using CublasLtHandle = struct cublasLtContext*;
using MatmulDesc = struct MatmulDescOpaque*;
using MatrixLayout = struct MatrixLayoutOpaque*;
using MatmulPreference = struct MatmulPreferenceOpaque*;

struct MatmulAlgo {
  uint64_t data[8];
};
struct MatmulHeuristic {
  MatmulAlgo algo;
  size_t workspace_bytes;
  cublasStatus state;
  float waves;
  int reserved[4];
};

// Values of cublasLt.h, cublas_api.h and library_types.h; checked against them in tests/cuda.
constexpr int kCudaR32F = 0;
constexpr int kCudaR16BF = 14;
constexpr int kCudaR8FE4M3 = 28;
constexpr int kCompute32F = 68;
constexpr int kOpTranspose = 1;
constexpr int kDescTransA = 3;
constexpr int kDescEpilogue = 7;
constexpr int kDescBiasPointer = 8;
constexpr int kDescAScalePointer = 17;
constexpr int kDescBScalePointer = 18;
constexpr int kDescFastAccum = 25;
constexpr int kDescBiasDataType = 26;
constexpr int kDescAScaleMode = 31;
constexpr int kDescBScaleMode = 32;
constexpr int kScaleOuterVector = 3;
constexpr int kEpilogueDefault = 1;
constexpr int kEpilogueBias = 4;
constexpr int kPreferenceWorkspace = 1;

#define LIVEACT_CUBLASLT_FUNCTIONS(X)                                                              \
  X(create, "cublasLtCreate", (CublasLtHandle*))                                                   \
  X(destroy, "cublasLtDestroy", (CublasLtHandle))                                                  \
  X(desc_create, "cublasLtMatmulDescCreate", (MatmulDesc*, int, int))                              \
  X(desc_destroy, "cublasLtMatmulDescDestroy", (MatmulDesc))                                       \
  X(desc_set, "cublasLtMatmulDescSetAttribute", (MatmulDesc, int, const void*, size_t))            \
  X(layout_create, "cublasLtMatrixLayoutCreate",                                                   \
    (MatrixLayout*, int, uint64_t, uint64_t, int64_t))                                             \
  X(layout_destroy, "cublasLtMatrixLayoutDestroy", (MatrixLayout))                                 \
  X(preference_create, "cublasLtMatmulPreferenceCreate", (MatmulPreference*))                      \
  X(preference_destroy, "cublasLtMatmulPreferenceDestroy", (MatmulPreference))                     \
  X(preference_set, "cublasLtMatmulPreferenceSetAttribute",                                        \
    (MatmulPreference, int, const void*, size_t))                                                  \
  X(heuristic, "cublasLtMatmulAlgoGetHeuristic",                                                   \
    (CublasLtHandle, MatmulDesc, MatrixLayout, MatrixLayout, MatrixLayout, MatrixLayout,           \
     MatmulPreference, int, MatmulHeuristic*, int*))                                               \
  X(matmul, "cublasLtMatmul",                                                                      \
    (CublasLtHandle, MatmulDesc, const void*, const void*, MatrixLayout, const void*,              \
     MatrixLayout, const void*, const void*, MatrixLayout, void*, MatrixLayout, const MatmulAlgo*, \
     void*, size_t, CUstream))

class CublasLt {
 public:
  // Throws DeviceError where the library is missing or too old for FP8 with outer vector scales.
  explicit CublasLt(const std::string& library);
  ~CublasLt();

#define LIVEACT_DECLARE(member, symbol, parameters) cublasStatus(*member) parameters = nullptr;
  LIVEACT_CUBLASLT_FUNCTIONS(LIVEACT_DECLARE)
#undef LIVEACT_DECLARE

  void check(cublasStatus status, const char* call) const;
  size_t version() const { return version_; }  // 130000 is 13.0.0

 private:
  DynamicLibrary library_;
  const char* (*status_string_)(cublasStatus) = nullptr;
  size_t version_ = 0;
};

// What one product is, apart from its pointers.
struct GemmShape {
  int64_t m, n, k;
  DType operands;  // f8 or bf16, of x and weight alike
  DType out;       // bf16 or f32
  bool bias;
  bool accumulate;         // beta = 1
  bool fast_sums = false;  // f8 only: sums stay in the tensor core, see docs/precision.md

  auto operator<=>(const GemmShape&) const = default;

  // Whether it may be computed in two calls. cuBLASLt documents row scales, a bias and beta = 1
  // each, not all of them together.
  bool separable() const { return operands == DType::f8 && bias && accumulate; }
  GemmShape product() const;  // the first of the two: without bias and sum
};

// Device pointers of one product.
struct GemmOperands {
  const void* x;              // [m, k]
  const float* x_scale;       // [m], f8 only
  const void* weight;         // [n, k]
  const float* weight_scale;  // [n], f8 only
  const void* bias;           // [n] in the format of `out`, where the shape has one
  void* out;                  // [m, n]
  void* scratch = nullptr;    // [m, n] in the format of `out`, of a separable product
};

// The algorithm of every shape that was chosen on one device, for all its queues; none where
// cuBLASLt has none.
struct GemmChoices {
  std::mutex mutex;  // held while measuring: two at once would disturb each other
  std::map<GemmShape, std::optional<MatmulAlgo>> algorithms;
  std::map<std::string, std::string> said;  // product -> what was chosen, for people
};

// Plans of one op queue: descriptors, layouts and the algorithm of every shape it has seen. The
// shapes of a block are noted and chosen when its stream opens. Others (a prompt's and an image's,
// whose row counts are the user's) get cuBLASLt's first suggestion when they come. One thread at a
// time, the context current.
class GemmPlans {
 public:
  // The handle is the device's: destroying one waits for the device.
  GemmPlans(const Driver& driver, const CublasLt& lt, CublasLtHandle handle, void* workspace,
            int64_t workspace_bytes, GemmChoices& choices);
  ~GemmPlans();
  GemmPlans(const GemmPlans&) = delete;
  GemmPlans& operator=(const GemmPlans&) = delete;

  void note(const GemmShape& shape, const GemmOperands& operands) {
    noted_.emplace(shape, operands);
  }
  // For every noted shape that this device has not met: times what cuBLASLt suggests and keeps the
  // fastest. The operands are those noted: their x and out are overwritten.
  void choose(CUstream stream);

  // False where cuBLASLt does not compute this in one call and the shape is separable: nothing has
  // run then. Throws DeviceError where it is not.
  bool run(const GemmShape& shape, const GemmOperands& operands, CUstream stream);

 private:
  struct Plan;
  std::unique_ptr<Plan> describe(const GemmShape& shape, const GemmOperands& operands);
  std::vector<MatmulAlgo> suggestions(const GemmShape& shape, const Plan& plan, int at_most);
  bool keep(const GemmShape& shape, std::unique_ptr<Plan> plan,
            const std::optional<MatmulAlgo>& algorithm);
  bool choose(const GemmShape& shape, const GemmOperands& operands, CUstream stream);
  std::optional<MatmulAlgo> fastest(const GemmShape& shape, Plan& plan,
                                    const GemmOperands& operands, CUstream stream);
  cublasStatus multiply(const GemmShape& shape, Plan& plan, const MatmulAlgo& algorithm,
                        const GemmOperands& operands, CUstream stream);

  const Driver& driver_;
  const CublasLt& lt_;
  CublasLtHandle handle_;
  void* workspace_;
  int64_t workspace_bytes_;
  GemmChoices& choices_;
  std::map<GemmShape, GemmOperands> noted_;
  std::map<GemmShape, std::unique_ptr<Plan>> plans_;  // null: not in one call
};

}  // namespace liveact::cuda
