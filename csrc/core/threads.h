// The threads that compute on the host: a region is a function of a lane, run once for each lane.
//
// A lane is a share of the work, not a thread. Who runs it is open: the caller runs the first one,
// then those that nobody has taken, while the pool's threads take what they get. So a region never
// waits for a thread that has no core, and results follow from shapes and the number of lanes only.
// Threads that wait sleep: what they would burn, a neighbour on the machine or the very thread that
// they wait for may need. NOTE: OpenMP's spin. Beside one busy process on one of two cores a block
// of the demo's model at 64x64 took 1300 ms with them in place of 17; with these it takes 30.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace liveact {

// How many: OMP_NUM_THREADS where it is set, by convention, else the CPUs that this process may
// use. Throws DeviceError where it is set to something else.
int default_lanes();

// The indices of [0, n) of one lane: consecutive, one more for the first n % lanes lanes.
struct Share {
  Share(int64_t n, int lane, int lanes)
      : begin(n / lanes * lane + (lane < n % lanes ? lane : n % lanes)),
        end(begin + n / lanes + (lane < n % lanes ? 1 : 0)) {}
  int64_t begin, end;
};

class Threads {
 public:
  explicit Threads(int lanes = default_lanes());  // the caller's and lanes - 1 threads
  ~Threads();
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

  int lanes() const { return lanes_; }

  // f(lane, lanes) for every lane; returns when all have ended, and throws what the first of them
  // threw. Any thread may call it at any time, also from within a lane. Throws DeviceError in a
  // process that was forked from the one that made the threads: it has none of them.
  template <typename F>
  void run(const F& f) {
    Region region{.f = &f, .open = lanes_};
    region.call = [](const void* given, int lane, int lanes) {
      (*static_cast<const F*>(given))(lane, lanes);
    };
    run_region(region);
  }

  // f(i, lane) for every i of [0, n), shared out as Share says.
  template <typename F>
  void each(int64_t n, const F& f) {
    run([&](int lane, int lanes) {
      const Share share(n, lane, lanes);
      for (int64_t i = share.begin; i < share.end; ++i) f(i, lane);
    });
  }

 private:
  struct Region {
    void (*call)(const void* f, int lane, int lanes) = nullptr;
    const void* f = nullptr;
    Region* after = nullptr;     // in the queue
    int next = 0;                // lane that is taken next
    std::exception_ptr error{};  // of the lane that failed first
    std::atomic<int> open;       // lanes that have not ended
  };

  void run_region(Region& region);
  bool run_lane(Region* region);  // of the first in the queue where it is null; false: none left
  void work();
  void close();

  const int lanes_;
  const int64_t process_;
  std::mutex mutex_;         // guards the queue, and next and error of the regions
  Region* first_ = nullptr;  // regions with lanes that nobody has taken, oldest first
  std::atomic<bool> closing_{false};
  std::atomic<uint32_t> posted_{0};  // counts regions, for threads that wait for one
  std::atomic<uint32_t> ended_{0};   // the same of those that ended, for their callers
  std::vector<std::thread> workers_;
};

}  // namespace liveact
