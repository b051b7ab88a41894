// The CPU backend: the specification of every op in C++. Plain loops over rows on the threads of
// the device, and OpenBLAS (single-threaded calls inside them) for the matrix products.
//
// Results do not depend on what else runs in the process: each op splits its work into lanes by
// shape and thread count only.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <vector>

#include "core/buffer.h"
#include "core/ops.h"
#include "core/threads.h"
#include "liveact/device.h"

namespace liveact::cpu {

// Scratch of one lane, in floats.
int64_t panel_floats();                             // gemm.cpp
int64_t attention_floats(const OpsLimits& limits);  // attention.cpp

class CpuDevice final : public Device {
 public:
  CpuDevice();
  const char* name() const override { return "cpu"; }
  // V has the cuda backend's padding: what a session takes on a GPU is counted on this device.
  DeviceFormats formats() const override { return {.host_weights = true, .value_multiple = 128}; }
  int threads() const override { return threads_.lanes(); }
  void* allocate(int64_t bytes) override;
  void release(void* pointer) override;
  int64_t allocated_bytes() const override { return allocated_bytes_; }
  int64_t allocation_count() const override { return allocation_count_; }
  std::optional<int64_t> free_bytes() const override { return std::nullopt; }
  void upload(void* target, const void* host, int64_t bytes) override;
  void download(void* host, const void* source, int64_t bytes) override;
  bool is_device_memory(const void*) const override { return false; }
  void connect(Device& other) override;
  std::unique_ptr<Ops> open_ops(const OpsLimits& limits) override;
  int64_t ops_bytes(const OpsLimits& limits) const override;

  Threads& pool() { return threads_; }

 private:
  Threads threads_;
  std::atomic<int64_t> allocated_bytes_{0};
  std::atomic<int64_t> allocation_count_{0};
};

class CpuOps final : public Ops {
 public:
  CpuOps(CpuDevice& device, const OpsLimits& limits);

#define LIVEACT_OP(result, name, parameters, arguments) result name parameters override;
#define LIVEACT_QUEUE_CALL LIVEACT_OP
#include "core/op_list.h"

 private:
  float* row_scratch(int lane) const;  // [3, max_cols]

  Threads& threads_;
  std::array<std::chrono::steady_clock::time_point, kTimeMarks> marks_;
  OpsLimits limits_;
  int64_t attention_floats_;
  Buffer rows_;         // [lanes, 3, max_cols]
  Buffer activations_;  // [max_operand]: the input of a linear where it is not fp32
  Buffer panels_;       // per lane: an expanded weight panel and a tile of the product
  Buffer attention_;    // per lane: scores, accumulator, expanded keys and values
};

}  // namespace liveact::cpu
