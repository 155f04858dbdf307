// Time: stopwatches and how long is left.
#pragma once
#include <chrono>
#include <cstddef>
#include <string>

namespace moru {

// Seconds since it was made.
class Stopwatch {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// The share of a machine that this process used since the watch was made: its processor time over
// `threads` (the whole machine), in seconds. On an idle machine that keeps all threads busy it is
// the wall time to a few per cent, for threads that wait for work spin (base/threads.h); beside
// busy neighbours it hardly changes, where wall time may double. So it is what costs are compared
// by. It is never more than the wall time.
class MachineTime {
 public:
  explicit MachineTime(size_t threads);  // 0: wall time, for what is computed elsewhere
  double seconds() const;

 private:
  size_t threads_;
  double cpu_start_;
  Stopwatch wall_;
};

// "4 s", "3 min 20 s", "2 h 05 min", "85 d 7 h".
std::string format_duration(double seconds);
// "2026-01-31T09:30:00Z", now.
std::string utc_now();

}  // namespace moru
