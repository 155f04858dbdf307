// What this machine can do, measured: the limits that a speed is a share of.
#pragma once
#include <algorithm>
#include <cstddef>

#include "base/clock.h"
#include "base/threads.h"

namespace moru {

// Of all threads of a pool together. Operations a second, two for each multiply-add; 0 where the
// level of the instruction set in use has no such instruction.
struct MachineRates {
  size_t threads = 0;
  double read = 0;  // bytes a second from memory
  double f32 = 0, bf16 = 0, int16 = 0, int8 = 0;
  double phase_seconds = 0;  // to open a parallel phase, meet in it and join
};

// Takes about a second and 256 MiB. Error: no_space.
MachineRates measure_machine(Pool& pool);

// The shortest of several runs within about `total` seconds, in seconds: a busy neighbour makes
// some of them slow, nothing makes one fast.
template <typename Run>
double best_seconds(double total, Run&& run) {
  run();
  double best = 1e9;
  const Stopwatch whole;
  do {
    const Stopwatch one;
    run();
    best = std::min(best, one.seconds());
  } while (whole.seconds() < total);
  return best;
}

}  // namespace moru
