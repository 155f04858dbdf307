#include "base/clock.h"

#include <fmt/chrono.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <ctime>

namespace moru {
namespace {

double process_seconds() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

}  // namespace

MachineTime::MachineTime(size_t threads) : threads_(threads), cpu_start_(process_seconds()) {}

double MachineTime::seconds() const {
  const double wall = wall_.seconds();
  if (threads_ == 0) return wall;
  return std::min(wall, (process_seconds() - cpu_start_) / static_cast<double>(threads_));
}

std::string format_duration(double seconds) {
  const auto s = static_cast<long>(std::llround(std::clamp(seconds, 0.0, 1e9)));
  if (s < 60) return fmt::format("{} s", s);
  if (s < 3600) return fmt::format("{} min {:02} s", s / 60, s % 60);
  if (s < 24 * 3600) return fmt::format("{} h {:02} min", s / 3600, s % 3600 / 60);
  return fmt::format("{} d {} h", s / (24 * 3600), s % (24 * 3600) / 3600);
}

std::string utc_now() {
  return fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr)));
}

}  // namespace moru
