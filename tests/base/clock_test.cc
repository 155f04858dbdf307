#include "base/clock.h"

#include <doctest/doctest.h>

#include <chrono>
#include <thread>

using namespace moru;

namespace {

void compute_for(double seconds) {
  const MachineTime own(1);
  volatile double sink = 0;
  while (own.seconds() < seconds)
    for (int i = 0; i < 1000; ++i) sink = sink + i;
}

}  // namespace

TEST_CASE("the machine's time leaves out waiting and counts a thread as its share of the machine") {
  const MachineTime one(1), four(4), elsewhere(0);
  compute_for(0.2);
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  CHECK(one.seconds() >= 0.2);
  CHECK(four.seconds() == doctest::Approx(one.seconds() / 4).epsilon(0.05));
  CHECK(elsewhere.seconds() >= one.seconds() + 0.19);  // slept through
}

TEST_CASE("the machine's time is never more than the wall time, however many threads compute") {
  const Stopwatch wall;
  const MachineTime one(1);
  std::thread other([] { compute_for(0.1); });
  compute_for(0.1);
  other.join();
  CHECK(one.seconds() <= wall.seconds());
}

TEST_CASE("durations are words that people use") {
  CHECK(format_duration(4.4) == "4 s");
  CHECK(format_duration(200) == "3 min 20 s");
  CHECK(format_duration(2 * 3600 + 5 * 60) == "2 h 05 min");
  CHECK(format_duration(24 * 3600 - 60) == "23 h 59 min");
  CHECK(format_duration(24 * 3600) == "1 d 0 h");
  CHECK(format_duration(2047 * 3600 + 25 * 60) == "85 d 7 h");
}
