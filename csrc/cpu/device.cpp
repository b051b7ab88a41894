#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "cblas.h"
#include "core/check.h"
#include "cpu/cpu_backend.h"

namespace liveact::cpu {

namespace {
constexpr int64_t kAlignment = 64;  // a cache line; the size is kept in front of the allocation
}

CpuDevice::CpuDevice() {
#if defined(__x86_64__)
  LIVEACT_DEVICE_CHECK(
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"),
      "cpu: expected a processor with AVX2 and FMA (x86-64-v3), found one without");
#endif
  // Every op brings its own threads; a second pool inside OpenBLAS would fight with them.
  scipy_openblas_set_num_threads(1);
}

void* CpuDevice::allocate(int64_t bytes) {
  const int64_t padded = (bytes + kAlignment - 1) / kAlignment * kAlignment + kAlignment;
  char* base = static_cast<char*>(std::aligned_alloc(kAlignment, padded));
  LIVEACT_DEVICE_CHECK(base != nullptr, "cpu: expected ", bytes,
                       " bytes of memory, found too little");
  std::memcpy(base, &bytes, sizeof(bytes));
  std::memset(base + kAlignment, 0, padded - kAlignment);
  allocated_bytes_ += bytes;
  ++allocation_count_;
  return base + kAlignment;
}

void CpuDevice::release(void* pointer) {
  char* base = static_cast<char*>(pointer) - kAlignment;
  int64_t bytes = 0;
  std::memcpy(&bytes, base, sizeof(bytes));
  allocated_bytes_ -= bytes;
  std::free(base);
}

void CpuDevice::upload(void* target, const void* host, int64_t bytes) {
  std::memcpy(target, host, bytes);
}

void CpuDevice::download(void* host, const void* source, int64_t bytes) {
  std::memcpy(host, source, bytes);
}

void CpuDevice::connect(Device& other) {
  LIVEACT_DEVICE_CHECK(dynamic_cast<CpuDevice*>(&other) != nullptr,
                       "cpu: expected another cpu beside it, found ", other.name());
}

std::unique_ptr<Ops> CpuDevice::open_ops(const OpsLimits& limits) {
  return std::make_unique<CpuOps>(*this, limits);
}

// An op is done when it returns, so there is nobody to wait for. But it is checked that a GPU would
// not have to wait for ever.
void CpuOps::signal(const Barrier& barrier) {
  *barrier.peer_arrived = std::max(*barrier.peer_arrived, ++barrier.counts[0]);
}

void CpuOps::wait(const Barrier& barrier) {
  const int64_t expected = ++barrier.counts[1];
  LIVEACT_DEVICE_CHECK(*barrier.arrived >= expected, "cpu: expected ", expected,
                       " signals of the other device before this wait, found ", *barrier.arrived);
}

bool CpuOps::idle() { return true; }
std::recursive_mutex* CpuOps::turn() { return nullptr; }

// Nothing is chosen, and nothing is gained by recording.
bool CpuOps::begin_plan() { return false; }
void CpuOps::end_plan() {}
bool CpuOps::replay(int) { return false; }
void CpuOps::begin_record(int) {}
void CpuOps::end_record() {}
void CpuOps::forget() {}

void CpuOps::mark(int index) { marks_[index] = std::chrono::steady_clock::now(); }

double CpuOps::marked_ms(int first, int second) {
  return std::chrono::duration<double, std::milli>(marks_[second] - marks_[first]).count();
}

void CpuOps::upload(void* target, const void* host, int64_t bytes) {
  std::memcpy(target, host, bytes);
}

void CpuOps::download(void* host, const void* source, int64_t bytes) {
  std::memcpy(host, source, bytes);
}

}  // namespace liveact::cpu

namespace liveact {

std::shared_ptr<Device> open_cpu() { return std::make_shared<cpu::CpuDevice>(); }

}  // namespace liveact
