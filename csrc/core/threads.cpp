#include "core/threads.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <string_view>
#include <system_error>

#include "core/check.h"

namespace liveact {

namespace {

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Until `value` is no longer `seen`: first awake, since the next region mostly comes at once, then
// asleep. NOTE: a block of the demo's model at 64x64 takes 14.3 ms on two idle cores when threads
// sleep at once and 12.6 ms so; beside a busy neighbour 23 to 25 ms either way.
void wait_while(const std::atomic<uint32_t>& value, uint32_t seen) {
  constexpr std::chrono::microseconds kAwake(50);
  const auto begin = std::chrono::steady_clock::now();
  while (value.load(std::memory_order_acquire) == seen) {
    pause();
    if (std::chrono::steady_clock::now() - begin < kAwake) continue;
    value.wait(seen, std::memory_order_acquire);
  }
}

}  // namespace

int default_lanes() {
  constexpr long kMost = 8192;  // CPUs that Linux can have
  if (const char* given = std::getenv("OMP_NUM_THREADS"); given != nullptr && *given != '\0') {
    char* end = nullptr;
    const long count = std::strtol(given, &end, 10);
    LIVEACT_DEVICE_CHECK(count > 0 && count <= kMost && (*end == '\0' || *end == ','),
                         "cpu: expected OMP_NUM_THREADS to be a number of threads, found '", given,
                         "'");
    return static_cast<int>(count);
  }
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) return CPU_COUNT(&allowed);
#endif
  return std::max(1u, std::thread::hardware_concurrency());  // more CPUs than such a set can name
}

Threads::Threads(int lanes) : lanes_(lanes), process_(getpid()) {
  workers_.reserve(lanes - 1);
  try {
    while (std::ssize(workers_) < lanes - 1) workers_.emplace_back(&Threads::work, this);
  } catch (const std::system_error& error) {
    const auto started = workers_.size();
    close();
    detail::fail<DeviceError>("cpu: expected to start ", lanes - 1, " threads, found room for ",
                              started, " (", error.what(), ")");
  }
}

Threads::~Threads() { close(); }

void Threads::close() {
  if (process_ != getpid()) {
    // Of a fork: there is nothing to join (glibc would return, POSIX does not promise it), and a
    // handle that is destroyed without it ends the process.
    new std::vector<std::thread>(std::move(workers_));
    return;
  }
  closing_ = true;
  ++posted_;
  posted_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Threads::run_region(Region& region) {
  LIVEACT_DEVICE_CHECK(process_ == getpid(),
                       "cpu: expected the threads of the device, found none: this process was "
                       "forked after the device was opened; use the spawn start method");
  {
    const std::lock_guard lock(mutex_);
    Region** last = &first_;
    while (*last != nullptr) last = &(*last)->after;
    *last = &region;
  }
  ++posted_;
  posted_.notify_all();
  while (run_lane(&region)) {
  }
  for (;;) {
    const uint32_t seen = ended_;
    if (region.open == 0) break;
    wait_while(ended_, seen);
  }
  if (region.error) std::rethrow_exception(region.error);
}

bool Threads::run_lane(Region* region) {
  int lane = 0;
  {
    const std::lock_guard lock(mutex_);
    if (region == nullptr) region = first_;
    if (region == nullptr || region->next == lanes_) return false;
    lane = region->next++;
    if (region->next == lanes_) {
      Region** place = &first_;
      while (*place != region) place = &(*place)->after;
      *place = region->after;
    }
  }
  try {
    region->call(region->f, lane, lanes_);
  } catch (...) {
    const std::lock_guard lock(mutex_);
    if (!region->error) region->error = std::current_exception();
  }
  if (--region->open == 0) {  // from here on the caller may return, and the region be gone
    ++ended_;
    ended_.notify_all();
  }
  return true;
}

void Threads::work() {
  for (;;) {
    const uint32_t seen = posted_;
    if (closing_) return;
    while (run_lane(nullptr)) {
    }
    wait_while(posted_, seen);
  }
}

}  // namespace liveact
