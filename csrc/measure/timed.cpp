#include "measure/timed.h"

#include <algorithm>

#include "core/buffer.h"
#include "core/check.h"

namespace liveact {

namespace {

constexpr int kStart = kTimeMarks - 2;  // a stream uses the marks before these
constexpr int kStop = kTimeMarks - 1;

class TimedOps final : public ProxyOps {
 public:
  TimedOps(Device& device, std::unique_ptr<Ops> inner, const Timing& timing, TimingLog& log)
      : ProxyOps(std::move(inner)),
        timing_(timing),
        log_(log),
        flush_(device, std::max<int64_t>(8 * timing.flush_floats, 4)) {}
  ~TimedOps() override { close(); }
  TimedOps(const TimedOps&) = delete;
  TimedOps& operator=(const TimedOps&) = delete;

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
  TimingLog& log_;
  Buffer flush_;
  bool planned_ = false;
};

}  // namespace

TimedDevice::TimedDevice(std::shared_ptr<Device> inner, const Timing& timing)
    : ProxyDevice(std::move(inner)), timing_(timing) {
  LIVEACT_CHECK(timing.samples > 0 && timing.flush_floats >= 0 && timing.flush_floats % 64 == 0,
                "timed device: expected samples >= 1 and a multiple of 512 bytes, found ",
                timing.samples, " and ", 8 * timing.flush_floats);
}

std::unique_ptr<Ops> TimedDevice::open_ops(const OpsLimits& limits) {
  return std::make_unique<TimedOps>(inner(), inner().open_ops(limits), timing_, log_);
}

}  // namespace liveact
