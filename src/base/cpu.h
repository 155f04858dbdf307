// What this machine's processor can do, and how much of it this process may use.
#pragma once
#include <cstddef>
#include <string>

namespace moru {

// Levels of the instruction set that kernels are written for, each including those before it.
enum class Isa {
  scalar,
  avx2,    // AVX2, FMA, F16C
  avx512,  // AVX-512 F/BW/DQ/VL, VNNI, BF16 (Zen 4, Cooper Lake, Sapphire Rapids and later)
};

// The highest level of this processor and operating system, or the lower one that the environment
// variable MORU_ISA names (scalar, avx2, avx512). Read once. Error: usage, for another word.
Isa isa();
// The highest level whatever the environment says.
Isa processor_isa();
const char* name_of(Isa level);

// Processors that this process may keep busy: its affinity mask, cut to the cgroup's CPU quota,
// or MORU_THREADS where set. At least 1.
size_t usable_threads();

// "AMD EPYC 9R14, 2 threads, avx512", for reports.
std::string machine_name();

}  // namespace moru
