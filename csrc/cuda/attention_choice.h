// Which of two kernels with the same arguments self-attention in fp8 uses: the faster one of the
// two that are packaged, measured when a stream opens. docs/attention.md describes both.
#pragma once

#include <array>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "core/ops.h"
#include "cuda/kernel.h"

namespace liveact::cuda {

// The operands of a call, and the format of its result.
struct AttentionCall {
  Heads q;
  KvSegment context, current;
  DType out;
  int64_t width;  // D, of all heads
};

// {tokens, heads, context tokens, current tokens, format of the result} of a call.
using AttentionShape = std::array<int64_t, 5>;

// What was chosen on one device, for all its queues.
struct AttentionChoices {
  std::mutex mutex;  // held while measuring: two at once would disturb each other
  std::map<AttentionShape, std::string> kernels;
  std::map<std::string, std::string> said;  // call -> what was chosen, for people
};

// The choice of one op queue. One thread at a time, the context current.
class AttentionKernels {
 public:
  AttentionKernels(const Driver& driver, const KernelTable& table, AttentionChoices& choices)
      : driver_(driver), table_(table), choices_(choices) {}

  // A call that comes: q and `current` may be overwritten until `choose` returns. Checks the launch
  // of every kernel that may be chosen.
  void note(const AttentionCall& call, KernelTable::Arguments arguments);
  // For every noted call whose shape this device has not met: times both and keeps the faster.
  void choose(CUstream stream);
  // The kernel of a call; the readable one where nothing was chosen.
  const std::string& name(const AttentionCall& call) const;

 private:
  struct Noted {
    AttentionCall call;
    std::vector<Argument> arguments;
  };

  const std::string& fastest(const Noted& noted, CUstream stream);

  const Driver& driver_;
  const KernelTable& table_;
  AttentionChoices& choices_;
  std::map<AttentionShape, Noted> noted_;
  std::map<AttentionShape, std::string> chosen_;
};

}  // namespace liveact::cuda
