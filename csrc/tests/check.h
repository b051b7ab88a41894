// The test harness: TEST registers a case, a failed CHECK is printed and the case goes on.
// Checks are for the thread that runs the case.
#pragma once

#include <cmath>
#include <cstdint>
#include <source_location>
#include <sstream>
#include <string>
#include <vector>

namespace liveact::test {

bool add_case(const char* name, void (*run)());
int64_t new_count();  // calls of operator new so far, by all threads

using Where = std::source_location;
void fail(const std::string& message, Where where = Where::current());  // of the running case

template <typename... Parts>
[[gnu::noinline]] std::string text(const Parts&... parts) {
  std::ostringstream out;
  out.precision(9);
  (out << ... << parts);
  return out.str();
}

// Runs f, which is to throw an E whose message contains `expected`.
template <typename E, typename F>
void check_throws(F&& f, const std::string& expected, Where where = Where::current()) {
  try {
    f();
    fail("expected an exception with '" + expected + "', found none", where);
  } catch (const E& error) {
    if (std::string(error.what()).find(expected) != std::string::npos) return;
    fail("expected a message with '" + expected + "', found '" + error.what() + "'", where);
  } catch (const std::exception& error) {
    fail(std::string("expected another type of exception, found '") + error.what() + "'", where);
  }
}

template <typename A, typename B>
[[gnu::noinline]] void check_equal(const A& a, const B& b, const char* names,
                                   Where where = Where::current()) {
  if (!(a == b)) fail(text("expected ", names, ", found ", a, " and ", b), where);
}

void check_near(double a, double b, double tolerance, const char* names,
                Where where = Where::current());

}  // namespace liveact::test

#define TEST(name)                                                   \
  static void name();                                                \
  static const bool name##_registered = test::add_case(#name, name); \
  static void name()
#define CHECK(condition) \
  if (!(condition)) ::liveact::test::fail("expected " #condition)
#define CHECK_EQ(a, b) ::liveact::test::check_equal(a, b, #a " == " #b)
#define CHECK_NEAR(a, b, tolerance) ::liveact::test::check_near(a, b, tolerance, #a " near " #b)
