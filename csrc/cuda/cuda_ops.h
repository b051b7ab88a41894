// The op list on a CUDA stream: every op is a launch, nothing waits but `download` and
// `all_finite`, nothing is allocated after the queue is open.
#pragma once

#include <array>
#include <map>
#include <string>

#include "cuda/attention_choice.h"
#include "cuda/cuda_backend.h"

namespace liveact::cuda {

class CudaOps final : public Ops {
 public:
  CudaOps(CudaDevice& device, const OpsLimits& limits);
  ~CudaOps() override;
  static int64_t bytes(const OpsLimits& limits);

#define LIVEACT_OP(result, name, parameters, arguments) result name parameters override;
#define LIVEACT_QUEUE_CALL LIVEACT_OP
#include "core/op_list.h"

 private:
  void close();  // what the constructor made so far
  // The data of x, copied to scratch where its rows overlap.
  const void* dense(const Rows& x);
  void abandon_recording();
  // One target of update_memory, into `target`.
  void build_slot(const SlotUpdate& update, const CompressFilter& filter, const Rope& rope,
                  int64_t first_slot, const KvSegment& current, const KvSegment& context,
                  const KvSegment& target) const;
  // Launches `op.variant` on this queue, or only checks the launch while planning.
  void launch(const std::string& name, std::initializer_list<Argument> arguments) const;

  CudaDevice& device_;
  const Driver& driver_;
  CUstream stream_ = nullptr;
  const OpsLimits limits_;
  Buffer workspace_;
  Buffer product_;    // bf16 [max_operand]: a product whose epilogue is a kernel of ours
  Buffer flag_;       // i32
  Buffer mean_taps_;  // f32 [max_cols, 5], all 1/5
  GemmPlans gemms_;
  AttentionKernels attention_;
  std::map<int, CUgraphExec> graphs_;
  std::array<CUevent, kTimeMarks> marks_ = {};
  int recording_ = -1;  // key, or -1
  bool planning_ = false;
};

}  // namespace liveact::cuda
