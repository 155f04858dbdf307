#include "base/cpu.h"

#include <fmt/format.h>
#include <sched.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <string_view>

#include "base/error.h"

namespace moru {
namespace {

Isa detect() {
  __builtin_cpu_init();
  // Every processor with AVX2 has F16C too, which Clang's builtin cannot ask for.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
                      __builtin_cpu_supports("avx512bf16");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::scalar;
}

Isa choose() {
  const Isa best = processor_isa();
  const char* forced = std::getenv("MORU_ISA");
  if (forced == nullptr || *forced == '\0') return best;
  for (const Isa level : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    if (std::string_view(forced) == name_of(level)) return std::min(level, best);
  }
  throw Error(ErrorKind::usage, {.where = "MORU_ISA",
                                 .what = fmt::format("there is no level '{}'", forced),
                                 .cure = "use scalar, avx2 or avx512"});
}

// The cgroup v2 quota in processors; infinity where there is none.
double cgroup_quota() {
  std::ifstream in("/sys/fs/cgroup/cpu.max");
  std::string quota;
  double period = 0;
  if (!(in >> quota >> period) || quota == "max" || period <= 0) return HUGE_VAL;
  return std::strtod(quota.c_str(), nullptr) / period;
}

size_t count_threads() {
  if (const char* forced = std::getenv("MORU_THREADS")) {
    size_t n = 0;
    const std::string_view text(forced);
    const auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), n);
    if (code != std::errc() || end != text.data() + text.size() || n == 0 || n > 1024)
      throw Error(ErrorKind::usage, {.where = "MORU_THREADS",
                                     .what = fmt::format("'{}' is not a number of threads", text),
                                     .cure = "use 1 to 1024"});
    return n;
  }
  cpu_set_t set;
  CPU_ZERO(&set);
  const size_t allowed =
      sched_getaffinity(0, sizeof set, &set) == 0 ? static_cast<size_t>(CPU_COUNT(&set)) : 1;
  const double quota = std::max(1.0, std::floor(cgroup_quota()));
  return std::max<size_t>(
      1, quota < static_cast<double>(allowed) ? static_cast<size_t>(quota) : allowed);
}

}  // namespace

Isa isa() {
  static const Isa level = choose();
  return level;
}

Isa processor_isa() {
  static const Isa level = detect();
  return level;
}

const char* name_of(Isa level) {
  switch (level) {
    case Isa::scalar:
      return "scalar";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
  }
  return "?";
}

size_t usable_threads() {
  static const size_t n = count_threads();
  return n;
}

std::string machine_name() {
  std::ifstream in("/proc/cpuinfo");
  std::string line, model = "unknown processor";
  while (std::getline(in, line)) {
    if (!line.starts_with("model name")) continue;
    const size_t colon = line.find(": ");
    if (colon != std::string::npos) model = line.substr(colon + 2);
    break;
  }
  return fmt::format("{}, {} threads, {}", model, usable_threads(), name_of(isa()));
}

}  // namespace moru
