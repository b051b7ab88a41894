// What a choice by trial needs: a clock of the device, and operands that are not zero.
#pragma once

#include <algorithm>
#include <limits>

#include "cuda/driver.h"
#include "liveact/dtype.h"

namespace liveact::cuda {

constexpr int kTimedRuns = 5;         // of each candidate, the shortest counts
constexpr float kWorthwhile = 0.98f;  // of the time so far: less gain is not told from noise

// Time on the device between two points of a stream. Its context must be current.
class Stopwatch {
 public:
  Stopwatch(const Driver& driver, CUstream stream);
  ~Stopwatch();
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

  // Milliseconds; waits for the end.
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

  // The shortest of kTimedRuns.
  template <typename Work>
  float shortest(const Work& work) const {
    float ms = std::numeric_limits<float>::infinity();
    for (int run = 0; run < kTimedRuns; ++run) ms = std::min(ms, time(work));
    return ms;
  }

 private:
  const Driver& driver_;
  CUstream stream_;
  CUevent start_ = nullptr, stop_ = nullptr;
};

// data [count] as activations are, fp8 with codes of this sigma (a row's largest is at 4 sigma),
// and scale [scales] to match (null for none): work on zeros draws less power, and so runs at a
// higher clock. Waits.
void fill_randomly(const Driver& driver, DType dtype, void* data, int64_t count, float* scale,
                   int64_t scales, CUstream stream, float sigma = kF8Max / 4);

}  // namespace liveact::cuda
