// A model on two devices at once: what it holds, what is read and converted, how it fails.

#include <algorithm>
#include <array>
#include <atomic>
#include <functional>
#include <thread>

#include "core/conversions.h"
#include "measure/proxy.h"
#include "tests/session.h"

namespace liveact {

namespace {

using test::check_throws;
using test::Checkpoint;
using test::kConfig;
using test::options_with;
using test::same_bits;
using test::Session;

// Something may happen before memory is asked for or written.
class HookedDevice final : public ProxyDevice {
 public:
  HookedDevice() : ProxyDevice(std::make_shared<cpu::CpuDevice>()) {}
  void* allocate(int64_t bytes) override {
    before();
    return ProxyDevice::allocate(bytes);
  }
  void upload(void* target, const void* source, int64_t bytes) override {
    before();
    ProxyDevice::upload(target, source, bytes);
  }
  std::unique_ptr<Ops> open_ops(const OpsLimits& limits) override {
    return inner().open_ops(limits);
  }
  std::function<void()> before = [] {};
};

using Pair = std::array<std::shared_ptr<HookedDevice>, 2>;

std::vector<std::shared_ptr<const Model>> load(const Pair& devices, const Checkpoint& checkpoint,
                                               DType precision) {
  return load_models({devices[0], devices[1]}, kConfig, checkpoint.tensors,
                     Precision::uniform(precision, kConfig.num_layers));
}

Pair new_devices() { return {std::make_shared<HookedDevice>(), std::make_shared<HookedDevice>()}; }

}  // namespace

TEST(models_that_are_loaded_together_are_those_loaded_alone) {
  for (const DType stored : {DType::bf16, DType::f32}) {
    const Checkpoint checkpoint(stored);
    for (const DType precision : test::kAllTypes) {
      const Pair devices = new_devices();
      const auto models = load(devices, checkpoint, precision);
      const auto alone = std::make_shared<Model>(std::make_shared<cpu::CpuDevice>(), kConfig,
                                                 checkpoint.tensors, models[0]->precision());
      const std::vector<float> expected = Session(alone, options_with(1.5f), 3).run(2);
      for (const auto& model : models) {
        CHECK(same_bits(Session(model, options_with(1.5f), 3).run(2), expected));
        CHECK_EQ(model->device().allocated_bytes(), alone->device().allocated_bytes());
      }
    }
  }
}

// Whatever fails on a device, at whichever moment: its error comes out, the other one ends, and
// nothing is left of what both had loaded.
TEST(an_error_on_one_device_ends_the_loading_of_both) {
  const Checkpoint checkpoint(DType::bf16);
  const Pair devices = new_devices();
  for (const int broken : {0, 1}) {
    int64_t calls = 0;
    devices[broken]->before = [&] { ++calls; };
    load(devices, checkpoint, DType::f8);
    CHECK(calls > 100);
    for (int64_t failing = 0; failing < calls; ++failing) {
      devices[broken]->before = [left = failing]() mutable {
        if (left-- == 0) throw DeviceError("it broke");
      };
      check_throws<DeviceError>([&] { load(devices, checkpoint, DType::f8); }, "it broke");
      CHECK_EQ(devices[0]->allocated_bytes(), 0);
      CHECK_EQ(devices[1]->allocated_bytes(), 0);
    }
    devices[broken]->before = [] {};
  }
}

TEST(nothing_is_loaded_where_no_device_can) {
  const Checkpoint checkpoint(DType::bf16);
  const Precision precision = Precision::uniform(DType::f8, kConfig.num_layers);
  check_throws<Error>([&] { load_models({}, kConfig, checkpoint.tensors, precision); },
                      "load_models: expected a device, found none");
  HostTensors tensors = checkpoint.tensors;
  tensors.erase("head.head.weight");
  const Pair devices = new_devices();
  check_throws<Error>([&] { load_models({devices[0], devices[1]}, kConfig, tensors, precision); },
                      "expected tensor head.head.weight [16, 64], found none");
}

// Each device takes its weights at a pace of its own; the host makes each once and holds two.
TEST(a_weight_is_converted_once_for_all_devices) {
  constexpr int kDevices = 2, kWeights = 2000;
  Conversions conversions(kDevices);
  std::atomic<int> made = 0;
  std::array<std::atomic<int>, kDevices> taken = {};
  std::atomic<bool> right = true;
  const auto take = [&](int device) {
    test::Random random(device);
    for (int i = 0; i < kWeights; ++i) {
      const auto weight = conversions.next(device, std::to_string(i), [&] {
        // The other one has no more than the last one.
        for (const auto& other : taken) right = right && other >= i - 1;
        ++made;
        return Converted{{static_cast<uint8_t>(i)}, {}};
      });
      right = right && weight->rows[0] == static_cast<uint8_t>(i);
      ++taken[device];
      if (random.uniform() < 0.2f) std::this_thread::yield();
    }
  };
  std::thread other(take, 1);
  take(0);
  other.join();
  CHECK(right);
  CHECK_EQ(made.load(), kWeights);
}

TEST(devices_that_want_other_weights_are_refused) {
  Conversions conversions(2);
  conversions.next(0, "a", [] { return Converted{}; });
  check_throws<Error>(
      [&] { conversions.next(1, "b", [] { return Converted{}; }); },
      "expected the same weights in the same order, found b on one and a on another");
}

TEST(nobody_waits_for_a_device_that_failed) {
  Conversions conversions(2);
  conversions.next(0, "a", [] { return Converted{}; });
  bool ended = false;
  std::thread waiting([&] {  // for the other one to take the first weight
    try {
      conversions.next(0, "b", [] { return Converted{}; });
    } catch (const Conversions::Ended&) {
      ended = true;
    }
  });
  conversions.fail(std::make_exception_ptr(DeviceError("it broke")));
  conversions.fail(std::make_exception_ptr(DeviceError("and then this")));
  waiting.join();
  CHECK(ended);
  check_throws<DeviceError>([&] { conversions.check(); }, "it broke");
}

}  // namespace liveact
