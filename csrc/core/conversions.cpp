#include "core/conversions.h"

#include <algorithm>

#include "core/check.h"

namespace liveact {

std::shared_ptr<const Converted> Conversions::next(int device, const std::string& name,
                                                   const std::function<Converted()>& make) {
  std::unique_lock lock(mutex_);
  const int64_t index = taken_[device];
  changed_.wait(lock, [&] {
    const int64_t slowest = *std::min_element(taken_.begin(), taken_.end());
    return error_ != nullptr || index < made_ || (!making_ && slowest == index);
  });
  if (error_ != nullptr) throw Ended();
  if (index == made_) {
    making_ = true;
    last_ = nullptr;
    lock.unlock();
    auto converted = std::make_shared<const Converted>(make());
    lock.lock();
    making_ = false;
    ++made_;
    name_ = name;
    last_ = std::move(converted);
  }
  LIVEACT_CHECK(name == name_, "devices: expected the same weights in the same order, found ", name,
                " on one and ", name_, " on another");
  ++taken_[device];
  changed_.notify_all();
  return last_;
}

void Conversions::fail(const std::exception_ptr& error) {
  const std::lock_guard lock(mutex_);
  if (error_ == nullptr) error_ = error;
  changed_.notify_all();
}

void Conversions::check() const {
  if (error_ != nullptr) std::rethrow_exception(error_);
}

}  // namespace liveact
