// A device whose ops are timed one by one, for the benchmarks: in front of any other device.
//
// Each op runs between two time marks of its queue, which are events on a GPU. Before the first one
// a buffer larger than the caches is written: that empties them, and keeps a GPU busy while the
// host issues the op, so that no launch is measured. What is recorded for replay elsewhere (CUDA
// graphs) runs op by op here.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

#include "../bindings/bind_ops.h"
#include "liveact/error.h"
#include "measure/proxy.h"

namespace py = pybind11;

namespace liveact {

namespace {

constexpr int kStart = kTimeMarks - 2;  // a stream uses the marks before these
constexpr int kStop = kTimeMarks - 1;

struct Timing {
  int64_t flush_floats;  // of each half of the buffer that empties the caches; 0: none
  int samples;           // how often each op runs and is timed
  bool warm;             // run once more after the caches were emptied, untimed
};

// (op, milliseconds) in the order of the calls, from all queues of a device.
class Log {
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

class TimedOps final : public ProxyOps {
 public:
  TimedOps(Device& device, std::unique_ptr<Ops> inner, const Timing& timing, Log& log)
      : ProxyOps(std::move(inner)),
        timing_(timing),
        log_(log),
        flush_(device, std::max<int64_t>(8 * timing.flush_floats, 4)) {}

  void around(const std::string& name, const std::function<void()>& op) override {
    if (planning()) return op();
    if (!planned_ && begin_plan()) {  // an op outside of a stream, whose product nobody planned
      op();
      end_plan();
    }
    planned_ = true;
    for (int sample = 0; sample < timing_.samples; ++sample) {
      if (timing_.flush_floats > 0) {
        inner().guide(flush_.f32(), flush_.f32() + timing_.flush_floats, 1.0f,
                      timing_.flush_floats);
      }
      if (timing_.warm) op();
      inner().mark(kStart);
      op();
      inner().mark(kStop);
      float waited = 0.0f;
      inner().download(&waited, flush_.data(), sizeof waited);
      log_.add(name, inner().marked_ms(kStart, kStop));
    }
  }

  bool begin_plan() override {
    planned_ = true;
    return ProxyOps::begin_plan();
  }

 private:
  const Timing timing_;
  Log& log_;
  Buffer flush_;
  bool planned_ = false;
};

class TimedDevice final : public ProxyDevice {
 public:
  TimedDevice(std::shared_ptr<Device> inner, const Timing& timing)
      : ProxyDevice(std::move(inner)), timing_(timing) {
    LIVEACT_CHECK(timing.samples > 0 && timing.flush_floats >= 0 && timing.flush_floats % 64 == 0,
                  "timed device: expected samples >= 1 and a multiple of 512 bytes, got ",
                  timing.samples, " and ", 8 * timing.flush_floats);
  }

  std::unique_ptr<Ops> open_ops(const OpsLimits& limits) override {
    return std::make_unique<TimedOps>(inner(), inner().open_ops(limits), timing_, log_);
  }

  std::vector<std::pair<std::string, double>> take() { return log_.take(); }

 private:
  const Timing timing_;
  Log log_;
};

}  // namespace

void bind_timed_device(py::module_& m) {
  py::class_<TimedDevice, Device, std::shared_ptr<TimedDevice>>(
      m, "TimedDevice", "A device whose ops are timed one by one, for benchmarks.")
      .def(
          py::init([](std::shared_ptr<Device> device, int64_t flush_bytes, int samples, bool warm) {
            return std::make_shared<TimedDevice>(std::move(device),
                                                 Timing{flush_bytes / 8, samples, warm});
          }),
          py::arg("device"), py::arg("flush_bytes"), py::arg("samples") = 1,
          py::arg("warm") = false)
      .def("take", &TimedDevice::take, "(op, milliseconds) of the ops since the last call.");
}

}  // namespace liveact
