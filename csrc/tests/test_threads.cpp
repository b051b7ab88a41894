// The pool of threads: who runs what, what reaches the caller, and that waiting costs nothing.

#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <ctime>
#include <numeric>
#include <set>

#include "core/threads.h"
#include "liveact/error.h"
#include "tests/check.h"

namespace liveact {

namespace {

using test::check_throws;

double process_cpu_ms() {
  timespec used;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used);
  return 1e3 * static_cast<double>(used.tv_sec) + 1e-6 * static_cast<double>(used.tv_nsec);
}

// OMP_NUM_THREADS for a scope; null: not set.
class ThreadsOf {
 public:
  explicit ThreadsOf(const char* value) {
    const char* before = std::getenv(kName);
    set_ = before != nullptr;
    if (set_) before_ = before;
    put(value);
  }
  ~ThreadsOf() { put(set_ ? before_.c_str() : nullptr); }

 private:
  static constexpr const char* kName = "OMP_NUM_THREADS";
  static void put(const char* value) {
    value == nullptr ? unsetenv(kName) : setenv(kName, value, 1);
  }
  std::string before_;
  bool set_ = false;
};

}  // namespace

TEST(shares_are_consecutive_and_the_first_are_longer) {
  for (int lanes = 1; lanes <= 5; ++lanes) {
    for (int64_t n = 0; n <= 12; ++n) {
      int64_t end = 0;
      for (int lane = 0; lane < lanes; ++lane) {
        const Share share(n, lane, lanes);
        CHECK_EQ(share.begin, end);
        CHECK_EQ(share.end - share.begin, n / lanes + (lane < n % lanes ? 1 : 0));
        end = share.end;
      }
      CHECK_EQ(end, n);
    }
  }
}

TEST(every_lane_of_thousands_of_regions_runs_once) {
  for (const int lanes : {1, 2, 3, 8}) {
    Threads threads(lanes);
    CHECK_EQ(threads.lanes(), lanes);
    std::vector<int> runs(lanes);  // each lane has its own: a second run at once is a race
    for (int region = 1; region <= 5000; ++region) {
      threads.run([&](int lane, int of) { runs[lane] += of == lanes ? 1 : 0; });
      if (runs != std::vector<int>(lanes, region)) {
        test::fail(test::text("expected every lane once in region ", region, " of ", lanes));
        break;
      }
    }
    std::vector<int> visits(1001);
    threads.each(1001, [&](int64_t i, int lane) { visits[i] += 1 + lane; });
    for (int lane = 0; lane < lanes; ++lane) {
      const Share share(1001, lane, lanes);
      CHECK(std::all_of(visits.begin() + share.begin, visits.begin() + share.end,
                        [&](int visit) { return visit == 1 + lane; }));
    }
  }
}

TEST(callers_at_once_share_the_threads) {
  Threads threads(3);
  std::vector<std::vector<int64_t>> sums(4, std::vector<int64_t>(3));
  std::vector<std::thread> callers;
  for (std::vector<int64_t>& sum : sums) {
    callers.emplace_back([&] {
      for (int region = 0; region < 3000; ++region) {
        threads.each(30, [&](int64_t i, int lane) { sum[lane] += i; });
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const std::vector<int64_t>& sum : sums) {
    CHECK_EQ(std::accumulate(sum.begin(), sum.end(), int64_t{0}), 3000 * 435);
  }
}

// A thread of the pool that has no core is not waited for: the caller runs its lane.
TEST(a_caller_runs_the_lanes_that_nobody_takes) {
  Threads threads(2);
  std::atomic<int> busy{0};
  std::atomic<bool> go{false};
  std::thread other([&] {
    threads.run([&](int, int) {  // the pool's only thread and this one
      ++busy;
      while (!go) std::this_thread::yield();
    });
  });
  while (busy < 2) std::this_thread::yield();
  std::set<std::thread::id> ran;
  threads.run([&](int, int) { ran.insert(std::this_thread::get_id()); });
  CHECK_EQ(ran.size(), size_t{1});
  CHECK(ran.contains(std::this_thread::get_id()));
  go = true;
  other.join();
}

TEST(a_lane_may_run_a_region) {
  Threads threads(3);
  for (int repeat = 0; repeat < 300; ++repeat) {
    std::atomic<int> runs{0};
    threads.run(
        [&](int, int) { threads.run([&](int, int) { threads.run([&](int, int) { ++runs; }); }); });
    CHECK_EQ(runs.load(), 27);
  }
}

TEST(what_a_lane_throws_reaches_the_caller) {
  Threads threads(3);
  for (int repeat = 0; repeat < 300; ++repeat) {
    const int bad = repeat % 3;
    std::atomic<int> runs{0};
    const auto region = [&](int lane, int) {
      ++runs;
      if (lane == bad) throw Error("lane " + std::to_string(lane));
    };
    check_throws<Error>([&] { threads.run(region); }, "lane " + std::to_string(bad));
    CHECK_EQ(runs.load(), 3);
  }
  check_throws<Error>([&] { threads.run([](int, int) { throw Error("all of them"); }); }, "all");
  threads.run([](int, int) {});
}

// 300 ms each: of a caller that waits for a lane, and of threads that wait for a region.
TEST(who_waits_sleeps) {
  Threads threads(3);
  const timespec moment = {0, 300'000'000};
  const double before = process_cpu_ms();
  std::atomic<bool> first{true};
  threads.run([&](int, int) {
    if (first.exchange(false)) return;
    nanosleep(&moment, nullptr);
  });
  nanosleep(&moment, nullptr);
  const double used = process_cpu_ms() - before;
  if (used > 100) test::fail(test::text("expected 600 ms asleep, found ", used, " ms used"));
}

TEST(a_fork_has_no_threads_and_says_so) {
  Threads threads(2);
  threads.run([](int, int) {});
  const pid_t child = fork();
  if (child == 0) {
    int code = 1;
    try {
      threads.run([](int, int) {});
    } catch (const DeviceError& error) {
      const std::string message = error.what();
      code = message.find("forked after the device was opened") == std::string::npos ? 2 : 0;
    }
    threads.~Threads();  // joins nothing
    _exit(code);
  }
  int status = -1;
  CHECK_EQ(waitpid(child, &status, 0), child);
  CHECK(WIFEXITED(status));
  CHECK_EQ(WEXITSTATUS(status), 0);
}

TEST(as_many_lanes_as_were_asked_for_else_cpus) {
  for (const char* value : {"3", "3,2"}) {
    const ThreadsOf environment(value);
    CHECK_EQ(default_lanes(), 3);
  }
  for (const std::string value : {"0", "-1", "many", "2x", "99999999999"}) {
    const ThreadsOf environment(value.c_str());
    check_throws<DeviceError>(
        default_lanes,
        "cpu: expected OMP_NUM_THREADS to be a number of threads, found '" + value + "'");
  }
  cpu_set_t allowed;
  CHECK_EQ(sched_getaffinity(0, sizeof(allowed), &allowed), 0);
  const ThreadsOf environment(nullptr);
  CHECK_EQ(default_lanes(), CPU_COUNT(&allowed));
  {
    const ThreadsOf empty("");
    CHECK_EQ(default_lanes(), CPU_COUNT(&allowed));
  }
  cpu_set_t one;
  CPU_ZERO(&one);
  for (int cpu = 0; CPU_COUNT(&one) == 0; ++cpu) {
    if (CPU_ISSET(cpu, &allowed)) CPU_SET(cpu, &one);
  }
  CHECK_EQ(sched_setaffinity(0, sizeof(one), &one), 0);
  CHECK_EQ(default_lanes(), 1);
  CHECK_EQ(sched_setaffinity(0, sizeof(allowed), &allowed), 0);
}

}  // namespace liveact
