// Weights in the format of a product, on their way to the devices of a model.
#pragma once

#include <condition_variable>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/threads.h"

namespace liveact {

// A weight [n, k] on the host.
struct Converted {
  std::vector<uint8_t> rows;
  std::vector<float> scale;  // [n], fp8 only
};

// What devices share that load the same tensors at once, each in a thread of its own and all in the
// same order. Each weight is read and converted once. No device is more than one weight ahead, so
// the host holds two at most, and the second device finds what the first one read from the disk in
// the memory of the system.
class Conversions {
 public:
  explicit Conversions(int devices) : taken_(devices, 0) {}

  Threads& threads() { return threads_; }

  // What `make` returns for the device that asks first for its next weight. Throws what `make`
  // threw, and Ended after `fail`.
  std::shared_ptr<const Converted> next(int device, const std::string& name,
                                        const std::function<Converted()>& make);

  // No device gets anything more. The first error stays.
  void fail(const std::exception_ptr& error);
  // Throws it.
  void check() const;

  struct Ended {};  // another device failed

 private:
  Threads threads_;  // convert weights
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<int64_t> taken_;  // weights, by each device
  int64_t made_ = 0;
  bool making_ = false;
  std::string name_;  // of the last one made
  std::shared_ptr<const Converted> last_;
  std::exception_ptr error_;
};

}  // namespace liveact
