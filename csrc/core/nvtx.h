// Named ranges around what a thread does, for profilers (NVTX, domain "liveact"; the names are in
// docs/profiling.md). When no profiler listens a range costs the load of one null pointer.
#pragma once

#include <cstdint>
#include <string>

namespace liveact {

// Text that the profiler knows already: a range with it passes a handle.
class RangeName {
 public:
  RangeName() = default;
  explicit RangeName(const std::string& text);

 private:
  friend class Range;
  void* handle_ = nullptr;
};

// From here to the end of the scope, on this thread.
class Range {
 public:
  explicit Range(const RangeName& name);
  Range(const char* name, int64_t number);  // "name number", for numbers without an end
  ~Range();
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;
};

}  // namespace liveact
