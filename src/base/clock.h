// Time: stopwatches and how long is left.
#pragma once
#include <chrono>
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

// "4 s", "3 min 20 s", "2 h 05 min".
std::string format_duration(double seconds);
// "2026-01-31T09:30:00Z", now.
std::string utc_now();

}  // namespace moru
