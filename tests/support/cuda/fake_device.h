// What the stand-in for a GPU keeps: its log, memory, streams, captures and clock. Part of
// fake_cuda.cpp and in one translation unit with it, so that every copy of the library has its own.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "liveact/dtype.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// kernel name, addresses of the parameters, grid
using Hook = void (*)(const char*, void**, unsigned, unsigned, unsigned);

// What a queue has to do. A kernel that waits is not begun before what it waits for is there.
struct Work {
  std::function<void()> run;
  std::string name{};                     // of a kernel with its arguments, or `product`
  std::function<bool()> ready = nullptr;  // null: at once
};
struct Graph {
  std::vector<Work> work;
};

std::recursive_mutex mutex;
std::string log_text;
bool brief = false;                                   // no log and no trace
bool multiplies = true;                               // or products leave their result as it is
std::vector<std::pair<const char*, size_t>> digests;  // every call since then: of all up to it
long calls_left = -1;                                 // until late_event comes
std::function<int()> late_event;                      // what the call returns
std::map<std::string, int> failures;          // call (and its first arguments) -> code, once
std::map<std::string, std::string> declared;  // kernel -> 'p', 'i' or 'f' per parameter
std::map<uintptr_t, std::string> modules;     // CUmodule -> image
std::map<uintptr_t, std::string> functions;   // CUfunction -> image of its module
uintptr_t next_handle = 0x1000;
std::map<unsigned long long, size_t> allocations;
std::map<unsigned long long, int> homes;           // allocation -> its device
std::map<std::string, long> live;                  // kind of thing -> how many there are
std::map<unsigned long long, size_t> births;       // allocation -> how many came before it
size_t all_allocations = 0, first_allocation = 0;  // ever; when `digests` began
std::map<void*, int> stream_devices;               // CUstream -> its device
thread_local std::vector<int> contexts;            // devices of the contexts that were pushed
std::set<std::pair<int, int>> peers;               // (device, other one whose memory it may use)
std::array<std::string, 2> device_names = {"Fake H200", "Fake H200"};
int peer_access = 1, peer_atomics = 1;  // what cuDeviceCanAccessPeer and the P2P attribute say
std::string fault;                      // the first access that a device could not have made
std::map<unsigned long long, size_t> sealed;  // memory that only copies may read, as on a device
size_t free_memory = size_t{1} << 40;         // as cuMemGetInfo says; nothing is subtracted from it
std::map<void*, Graph*> captures;             // CUstream -> what is being captured
std::set<void*> dead_captures;                // CUstream whose capture was broken
std::set<void*> busy;                         // CUstream with work that nobody has waited for
long busy_frees = 0;
std::set<int> lost;  // devices on which nothing runs and every call fails
long hung = 0;       // waits that would never have ended
Hook hook = nullptr;
double clock_ms = 0;
constexpr double kKernelMs = 0.25;        // sums of it are exact
std::map<std::string, double> kernel_ms;  // of kernels that take another time
bool separate_residuals = false;          // cuBLASLt refuses a bias together with beta = 1
using Interruption = void (*)();
std::map<std::string, Interruption> interruptions;  // call (and its first arguments), once
// What the algorithms that the heuristic suggests take, in ms; see product_ms.
std::vector<double> algorithms = {0.0};

struct Event {
  double ms = -1;  // when the work before it was done; negative until then
  void* stream = nullptr;
  bool waited_for = false;
};
std::set<Event*> events;

constexpr int kCaptureInvalidated = 901;
constexpr int kLaunchFailed = 719;
constexpr int kNotSupported = 15;                  // CUBLAS_STATUS_NOT_SUPPORTED
constexpr int kExecutionFailed = 13;               // CUBLAS_STATUS_EXECUTION_FAILED
constexpr const char* kMatmul = "cublasLtMatmul";  // the only call of cuBLASLt that needs a device

// Everything on the device has come to its end, which no capture can.
void wait_for_device() {
  for (const auto& [stream, graph] : captures) dead_captures.insert(stream);
  busy.clear();
}

bool is_inside(const void* pointer, size_t bytes) {
  const auto start = reinterpret_cast<unsigned long long>(pointer);
  auto block = allocations.upper_bound(start);
  return block != allocations.begin() && start + bytes <= (--block)->first + block->second;
}

int current_device() { return contexts.empty() ? 0 : contexts.back(); }

// An address as (device, allocation, offset): the same for streams that do the same.
size_t place_of(unsigned long long address) {
  auto block = allocations.upper_bound(address);
  if (block == allocations.begin() || address >= (--block)->first + block->second) return 0;
  const size_t birth = births[block->first];
  const bool older = birth < first_allocation;
  const size_t number = older ? 2 * birth : 2 * (birth - first_allocation) + 1;
  return (2 * number + homes[block->first]) << 40 | (address - block->first);
}

size_t digest_of(const char* text) { return std::hash<std::string_view>()(text); }
template <typename T>
size_t digest_of(const T& value) {
  if constexpr (requires { value.digest(); }) {
    return value.digest();
  } else {
    return std::hash<T>()(value);
  }
}

size_t mixed(size_t digest, size_t value) {
  return (digest ^ value) * 0x9e3779b97f4a7c15 + (digest >> 29);
}

template <typename... Parts>
std::string text_of(const char* call, const Parts&... parts) {
  std::ostringstream line;
  line << call;
  ((line << ' ' << parts), ...);
  return line.str();
}

// The entry for this call, removed; others stay. Its key is the call and its first arguments.
template <typename T>
std::optional<T> take(std::map<std::string, T>& entries, const std::string& called) {
  const auto found = std::find_if(entries.begin(), entries.end(), [&](const auto& entry) {
    return called.starts_with(entry.first + ' ');
  });
  if (found == entries.end()) return std::nullopt;
  const T value = found->second;
  entries.erase(found);
  return value;
}

bool is_lost(const char* call) {
  const bool of_host = std::string_view(call).starts_with("cublasLt") && call != kMatmul;
  return !of_host && lost.contains(current_device());
}

template <typename... Parts>
int record(const char* call, const Parts&... parts) {
  std::unique_lock lock(mutex);
  if (brief) {
    size_t digest = mixed(digests.empty() ? 0 : digests.back().second, digest_of(call));
    ((digest = mixed(digest, digest_of(parts))), ...);
    digests.emplace_back(call, digest);
  } else {
    log_text += text_of(call, parts...) + "\n";
  }
  if (!interruptions.empty() || !failures.empty()) {
    const std::string called = text_of(call, parts...) + ' ';
    if (const auto interrupt = take(interruptions, called)) {
      lock.unlock();  // other threads may call meanwhile, where the call itself does not lock
      (*interrupt)();
      lock.lock();
    }
    if (const auto failure = take(failures, called)) return *failure;
  }
  if (calls_left >= 0 && calls_left-- == 0) {
    if (const int code = late_event()) return code;
  }
  return is_lost(call) ? kLaunchFailed : 0;
}

template <typename T>
void give(T* target, uintptr_t handle) {
  std::memcpy(target, &handle, sizeof(handle));
}

// The queues. Work runs as soon as it can; or, with a seed, only while somebody waits, one piece at
// a time of a queue that is drawn.
std::map<void*, std::deque<Work>> queues;
std::optional<std::minstd_rand> drawing;
std::vector<std::string> trace;  // "device name" of kernels and products, as they ran
constexpr int kPatience = 8;
int fruitless_queries = 0;           // since work ran
long work_left = -1;                 // until its device is lost
constexpr int kNothingCanRun = 702;  // CUDA_ERROR_LAUNCH_TIMEOUT: all queues wait for one another

// From now on: the rest of its work never runs.
void lose(int device) {
  lost.insert(device);
  for (auto& [stream, queue] : queues) {
    if (stream_devices[stream] != device) continue;
    queue.clear();
    busy.erase(stream);
  }
}

bool can_run(const std::deque<Work>& queue) {
  return !queue.empty() && (queue.front().ready == nullptr || queue.front().ready());
}

void run_first(void* stream) {
  const Work work = std::move(queues[stream].front());
  queues[stream].pop_front();
  const int device = stream_devices[stream];
  if (!brief && !work.name.empty()) trace.push_back(std::to_string(device) + " " + work.name);
  work.run();
  if (work_left >= 0 && work_left-- == 0) lose(device);
}

// One piece of work, of any queue that has some; false where none can run.
bool progress() {
  std::vector<void*> able;
  for (const auto& [stream, queue] : queues) {
    if (can_run(queue)) able.push_back(stream);
  }
  if (able.empty()) return false;
  fruitless_queries = 0;
  run_first(able[drawing ? (*drawing)() % able.size() : 0]);
  return true;
}

bool is_idle(void* stream) { return queues[stream].empty(); }

// Until everything on this queue is done; 0, or an error where that would never be.
int drain(void* stream) {
  while (!is_idle(stream)) {
    if (!progress()) return ++hung, kNothingCanRun;
  }
  return 0;
}

// Now, or when the graph being captured is launched.
void run(void* stream, Work work) {
  const std::lock_guard lock(mutex);
  const auto found = captures.find(stream);
  if (found != captures.end()) {
    found->second->work.push_back(std::move(work));
    return;
  }
  busy.insert(stream);
  queues[stream].push_back(std::move(work));
  while (!drawing && progress()) {
  }
}

// Whether work of this device may use an address: its own memory, a peer's that it has access to,
// or null. What lies nowhere is host memory, which kernels of a test may use.
bool is_reachable(int device, unsigned long long address) {
  auto block = allocations.upper_bound(address);
  if (block == allocations.begin() || address >= (--block)->first + block->second) return true;
  const int home = homes[block->first];
  return home == device || peers.contains({device, home});
}

int home_of(unsigned long long address) {
  auto block = allocations.upper_bound(address);
  if (block == allocations.begin() || address >= (--block)->first + block->second) return -1;
  return homes[block->first];
}

// The parameters of a launch, copied: the caller's go away.
struct Launch {
  std::string name;
  unsigned grid[3];
  std::vector<uint64_t> values;

  Launch(std::string kernel, unsigned x, unsigned y, unsigned z, void** parameters)
      : name(std::move(kernel)), grid{x, y, z} {
    for (const char type : declared[name]) {
      uint64_t value = 0;
      std::memcpy(&value, parameters[values.size()], type == 'p' ? 8 : 4);
      values.push_back(value);
    }
  }

  void operator()() {
    const auto known = kernel_ms.find(name);
    clock_ms += known == kernel_ms.end() ? kKernelMs : known->second;
    if (hook != nullptr) {
      std::vector<void*> addresses;
      for (uint64_t& value : values) addresses.push_back(&value);
      hook(name.c_str(), addresses.data(), grid[0], grid[1], grid[2]);
    } else if (name == "all_finite") {  // the one kernel whose result the runtime waits for
      *reinterpret_cast<int32_t*>(values.at(1)) = 1;
    } else if (!is_barrier()) {
      return;
    } else if (name == "barrier.signal") {
      const int64_t count = ++counts()[0];
      *count_at(1) = std::max(*count_at(1), count);
    } else {
      ++counts()[1];
    }
  }

  // One on memory of the device: a test may launch any kernel with addresses that are none.
  bool is_barrier() const { return name.starts_with("barrier.") && home_of(values.at(0)) >= 0; }
  // Of a barrier: [signals, waits] of the queue, and the count that is raised or waited for.
  int64_t* counts() const { return count_at(0); }
  int64_t* count_at(size_t i) const { return reinterpret_cast<int64_t*>(values.at(i)); }
  bool is_ready() const {
    return name != "barrier.wait" || !is_barrier() || *count_at(1) > counts()[1];
  }

  // Its name, and for every parameter the device whose memory it points to, or -.
  std::string homes_text() const {
    std::string text = name;
    const std::string& types = declared[name];
    for (size_t i = 0; i < values.size(); ++i) {
      const int home = types[i] == 'p' ? home_of(values[i]) : -1;
      text += home < 0 ? " -" : " " + std::to_string(home);
    }
    return text;
  }

  size_t digest() const {
    size_t all = digest_of(name);
    for (size_t i = 0; i < values.size(); ++i) {
      all = mixed(all, declared[name][i] == 'p' ? place_of(values[i]) : values[i]);
    }
    return all;
  }

  std::string text() const {
    std::ostringstream line;
    const std::string& types = declared[name];
    for (size_t i = 0; i < values.size(); ++i) {
      float number = 0;
      std::memcpy(&number, &values[i], 4);
      line << ' ';
      if (types[i] == 'p') line << reinterpret_cast<void*>(values[i]);
      if (types[i] == 'i') line << static_cast<int32_t>(values[i]);
      if (types[i] == 'f') line << number;
    }
    return line.str();
  }
};

std::ostream& operator<<(std::ostream& out, const Launch& launch) {
  return out << '|' << launch.text();
}

}  // namespace
