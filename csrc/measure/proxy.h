// An op queue and a device in front of another one: every op goes through `around`, which a
// decorator overrides to time, count or compare what passes. What is not overridden changes
// nothing, but nothing is recorded for replay: each op has to pass each time.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>

#include "core/check.h"
#include "core/ops.h"
#include "liveact/device.h"

namespace liveact {

class ProxyOps : public Ops {
 public:
  explicit ProxyOps(std::unique_ptr<Ops> inner) : inner_(std::move(inner)) {}

  // `name` is the op's, for a product with its size: "linear 15360x5120".
  virtual void around(const std::string& name, const std::function<void()>& op) {
    (void)name;
    op();
  }

#define LIVEACT_UNPACK(...) __VA_ARGS__
#define LIVEACT_OP(result, name, parameters, arguments)          \
  result name parameters override {                              \
    return pass<result>(label(#name, LIVEACT_UNPACK arguments),  \
                        [&] { return inner_->name arguments; }); \
  }
#include "core/op_list.h"
#undef LIVEACT_UNPACK

  void export_kv(const KvSegment& segment, const Rope& rope, int64_t first_position, float* k,
                 float* v) override {
    inner_->export_kv(segment, rope, first_position, k, v);
  }
  void signal(const Barrier& barrier) override { inner_->signal(barrier); }
  void wait(const Barrier& barrier) override { inner_->wait(barrier); }
  bool idle() override { return inner_->idle(); }
  std::recursive_mutex* turn() override { return inner_->turn(); }
  bool begin_plan() override { return planning_ = inner_->begin_plan(); }
  void end_plan() override {
    planning_ = false;
    inner_->end_plan();
  }
  bool replay(int) override { return false; }
  void begin_record(int) override {}
  void end_record() override {}
  void forget() override { inner_->forget(); }
  void mark(int index) override { inner_->mark(index); }
  double marked_ms(int first, int second) override { return inner_->marked_ms(first, second); }
  void upload(void* target, const void* host, int64_t bytes) override {
    inner_->upload(target, host, bytes);
  }
  void download(void* host, const void* source, int64_t bytes) override {
    inner_->download(host, source, bytes);
  }

 protected:
  // Waits for the ops. For the destructor of a class with memory of its own that they may use.
  void close() { inner_.reset(); }
  Ops& inner() const { return *inner_; }
  bool planning() const { return planning_; }

 private:
  template <typename Result, typename Op>
  Result pass(const std::string& name, const Op& op) {
    if constexpr (std::is_void_v<Result>) {
      around(name, op);
    } else {
      Result result{};
      around(name, [&] { result = op(); });
      return result;
    }
  }

  template <typename... Arguments>
  static std::string label(const char* name, const Arguments&...) {
    return name;
  }
  static std::string label(const char* name, const Rows&, const Weight& weight, const Epilogue&,
                           const Rows&) {
    return std::string(name) + " " + std::to_string(weight.n) + "x" + std::to_string(weight.k);
  }

  std::unique_ptr<Ops> inner_;
  bool planning_ = false;
};

class ProxyDevice : public Device {
 public:
  explicit ProxyDevice(std::shared_ptr<Device> inner) : inner_(std::move(inner)) {}

  const char* name() const override { return inner_->name(); }
  DeviceFormats formats() const override { return inner_->formats(); }
  int threads() const override { return inner_->threads(); }
  void* allocate(int64_t bytes) override { return inner_->allocate(bytes); }
  void release(void* pointer) override { inner_->release(pointer); }
  int64_t allocated_bytes() const override { return inner_->allocated_bytes(); }
  int64_t allocation_count() const override { return inner_->allocation_count(); }
  std::optional<int64_t> free_bytes() const override { return inner_->free_bytes(); }
  void upload(void* target, const void* source, int64_t bytes) override {
    inner_->upload(target, source, bytes);
  }
  void download(void* host, const void* source, int64_t bytes) override {
    inner_->download(host, source, bytes);
  }
  bool is_device_memory(const void* pointer) const override {
    return inner_->is_device_memory(pointer);
  }
  std::map<std::string, std::string> choices() override { return inner_->choices(); }
  void connect(Device& other) override {
    detail::fail<DeviceError>("two devices: expected none that is timed or measured, found ",
                              inner_->name(), " and ", other.name());
  }
  // Without what the decorator's own ops allocate.
  int64_t ops_bytes(const OpsLimits& limits) const override { return inner_->ops_bytes(limits); }

 protected:
  Device& inner() const { return *inner_; }

 private:
  std::shared_ptr<Device> inner_;
};

}  // namespace liveact
