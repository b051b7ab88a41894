// A device whose ops are timed one by one, for the benchmarks: in front of any other device.
//
// Each op runs between two time marks of its queue, which are events on a GPU. Before the first one
// a buffer larger than the caches is written: that empties them, and keeps a GPU busy while the
// host issues the op, so that no launch is measured. What is recorded for replay elsewhere (CUDA
// graphs) runs op by op here.

#pragma once

#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "measure/proxy.h"

namespace liveact {

struct Timing {
  int64_t flush_floats;  // of each half of the buffer that empties the caches; 0: none
  int samples;           // how often each op runs and is timed
  bool warm;             // run once more after the caches were emptied, untimed
};

// (op, milliseconds) in the order of the calls, from all queues of a device.
class TimingLog {
 public:
  void add(const std::string& op, double ms) {
    const std::lock_guard lock(mutex_);
    entries_.emplace_back(op, ms);
  }
  std::vector<std::pair<std::string, double>> take() {
    const std::lock_guard lock(mutex_);
    return std::exchange(entries_, {});
  }

 private:
  std::mutex mutex_;
  std::vector<std::pair<std::string, double>> entries_;
};

class TimedDevice final : public ProxyDevice {
 public:
  TimedDevice(std::shared_ptr<Device> inner, const Timing& timing);

  std::unique_ptr<Ops> open_ops(const OpsLimits& limits) override;

  std::vector<std::pair<std::string, double>> take() { return log_.take(); }

 private:
  const Timing timing_;
  TimingLog log_;
};

}  // namespace liveact
