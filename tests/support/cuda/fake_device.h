// What the stand-in for a GPU keeps: its log, memory, streams, captures and clock. Part of
// fake_cuda.cpp and in one translation unit with it, so that every copy of the library has its own.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
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

struct Graph {
  std::vector<std::function<void()>> work;
};

std::recursive_mutex mutex;
std::string log_text;
std::map<std::string, int> failures;          // call (and its first arguments) -> code, once
std::map<std::string, std::string> declared;  // kernel -> 'p', 'i' or 'f' per parameter
std::map<uintptr_t, std::string> modules;     // CUmodule -> image
std::map<uintptr_t, std::string> functions;   // CUfunction -> image of its module
uintptr_t next_handle = 0x1000;
std::map<unsigned long long, size_t> allocations;
std::map<unsigned long long, size_t> sealed;  // memory that only copies may read, as on a device
size_t free_memory = size_t{1} << 40;         // as cuMemGetInfo says; nothing is subtracted from it
std::map<void*, Graph*> captures;             // CUstream -> what is being captured
std::set<void*> dead_captures;                // CUstream whose capture was broken
std::set<void*> busy;                         // CUstream with work that nobody has waited for
long busy_frees = 0;
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
constexpr int kNotSupported = 15;     // CUBLAS_STATUS_NOT_SUPPORTED
constexpr int kExecutionFailed = 13;  // CUBLAS_STATUS_EXECUTION_FAILED

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

template <typename... Parts>
int record(const char* call, const Parts&... parts) {
  const std::lock_guard lock(mutex);
  std::ostringstream line;
  line << call;
  ((line << ' ' << parts), ...);
  log_text += line.str() + "\n";
  const std::string called = line.str() + ' ';
  const auto interruption =
      std::find_if(interruptions.begin(), interruptions.end(),
                   [&](const auto& entry) { return called.starts_with(entry.first + ' '); });
  if (interruption != interruptions.end()) {
    const Interruption interrupt = interruption->second;
    interruptions.erase(interruption);
    interrupt();
  }
  const auto failure = std::find_if(failures.begin(), failures.end(), [&](const auto& entry) {
    return called.starts_with(entry.first + ' ');
  });
  if (failure == failures.end()) return 0;
  const int code = failure->second;
  failures.erase(failure);
  return code;
}

template <typename T>
void give(T* target, uintptr_t handle) {
  std::memcpy(target, &handle, sizeof(handle));
}

// Now, or when the graph being captured is launched.
void run(void* stream, std::function<void()> work) {
  const auto found = captures.find(stream);
  if (found != captures.end()) {
    found->second->work.push_back(std::move(work));
  } else {
    busy.insert(stream);
    work();
  }
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
    }
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

}  // namespace
