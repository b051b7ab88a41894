// Runs every registered case and counts what goes through operator new.

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>

#include "tests/check.h"

namespace {
struct Case {
  const char* name;
  void (*run)();
};

std::vector<Case>& cases() {
  static std::vector<Case> all;  // cases register before main, in any order of files
  return all;
}

std::atomic<int64_t> new_calls{0};
int failures_of_case = 0;

void* counted(void* pointer) {
  ++new_calls;
  if (pointer == nullptr) throw std::bad_alloc();
  return pointer;
}
}  // namespace

// The other forms of new and delete forward to these.
void* operator new(size_t size) { return counted(std::malloc(size == 0 ? 1 : size)); }
void* operator new(size_t size, std::align_val_t alignment) {
  const size_t unit = static_cast<size_t>(alignment);
  return counted(std::aligned_alloc(unit, (size + unit - 1) / unit * unit));
}
void operator delete(void* pointer) noexcept { std::free(pointer); }
void operator delete(void* pointer, size_t) noexcept { std::free(pointer); }
void operator delete(void* pointer, std::align_val_t) noexcept { std::free(pointer); }
void operator delete(void* pointer, size_t, std::align_val_t) noexcept { std::free(pointer); }

#if defined(__SANITIZE_ADDRESS__)
// A refused allocation is a tested error; without this it would end the run.
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
  return "allocator_may_return_null=1:detect_leaks=1:detect_stack_use_after_return=1";
}
#endif

namespace liveact::test {

bool add_case(const char* name, void (*run)()) {
  cases().push_back({name, run});
  return true;
}

int64_t new_count() { return new_calls; }

void fail(const std::string& message, Where where) {
  constexpr int kMostPrinted = 5;  // of one case
  if (++failures_of_case > kMostPrinted) return;
  std::printf("%s:%u: %s\n", where.file_name(), where.line(), message.c_str());
}

void check_near(double a, double b, double tolerance, const char* names, Where where) {
  if (std::abs(a - b) <= tolerance) return;
  fail(text("expected ", names, ", found ", a, " and ", b, ", tolerance ", tolerance), where);
}

}  // namespace liveact::test

int main() {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // what failed before a crash is seen
  int passed = 0;
  int failed = 0;
  for (const Case& test : cases()) {
    failures_of_case = 0;
    try {
      test.run();
    } catch (const std::exception& error) {
      liveact::test::fail(std::string("exception: ") + error.what());
    }
    if (failures_of_case == 0) {
      ++passed;
      continue;
    }
    ++failed;
    std::printf("FAILED %s (%d checks)\n", test.name, failures_of_case);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return passed > 0 && failed == 0 ? 0 : 1;
}
