#include "engine/machine.h"

#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "base/cpu.h"
#include "base/memory.h"
#include "engine/machine_kernels.h"

namespace moru {
namespace {

float read_words(const void* data, size_t bytes) noexcept {
  const auto* at = static_cast<const uint64_t*>(data);
  uint64_t sum[8] = {};
  for (const auto* end = at + bytes / 8; at != end; at += 8)
    for (size_t i = 0; i < 8; ++i) sum[i] ^= at[i];
  uint64_t all = 0;
  for (const uint64_t s : sum) all ^= s;
  return static_cast<float>(all);
}

const MachineKernels& kernels() {
  switch (isa()) {
    case Isa::scalar:
      return kScalarMachineKernels;
    case Isa::avx2:
      return kAvx2MachineKernels;
    case Isa::avx512:
      return kAvx512MachineKernels;
  }
  return kScalarMachineKernels;
}

// What the loops return goes here, so that they are not left out.
std::atomic<float> sink;

double rate(Pool& pool, const RateKernel& kernel) {
  if (kernel.run == nullptr) return 0;
  constexpr size_t kSteps = 400'000;  // some milliseconds: the phase itself does not count
  const double seconds = best_seconds(
      0.12, [&] { pool.each(pool.size(), [&](size_t) { sink = kernel.run(kSteps); }); });
  return static_cast<double>(pool.size() * kSteps * kernel.operations) / seconds;
}

double read_rate(Pool& pool) {
  constexpr size_t kBytes = size_t{256} << 20;  // well past any last-level cache
  PageBuffer memory(kBytes);
  std::memset(memory.data(), 1, kBytes);
  const auto* data = static_cast<const std::byte*>(memory.data());
  const size_t part = kBytes / pool.size() / 1024 * 1024;
  const double seconds = best_seconds(0.3, [&] {
    pool.each(pool.size(),
              [&](size_t thread) { sink = kernels().read(data + thread * part, part); });
  });
  return static_cast<double>(pool.size() * part) / seconds;
}

// Each thread's item waits for those of all others: without, the caller would do all of them before
// another thread had noticed.
double phase_seconds(Pool& pool) {
  constexpr size_t kPhases = 200;
  std::atomic<size_t> begun{0};
  const double seconds = best_seconds(0.05, [&] {
    for (size_t i = 0; i < kPhases; ++i) {
      begun = 0;
      pool.each(pool.size(), [&](size_t) {
        begun.fetch_add(1);
        while (begun.load() < pool.size()) {
        }
      });
    }
  });
  return seconds / kPhases;
}

}  // namespace

constexpr MachineKernels kScalarMachineKernels = {
    {nullptr, 0}, {nullptr, 0}, {nullptr, 0}, {nullptr, 0}, read_words};

MachineRates measure_machine(Pool& pool) {
  const MachineKernels& k = kernels();
  MachineRates rates;
  rates.threads = pool.size();
  rates.read = read_rate(pool);
  rates.f32 = rate(pool, k.f32);
  rates.bf16 = rate(pool, k.bf16);
  rates.int16 = rate(pool, k.int16);
  rates.int8 = rate(pool, k.int8);
  rates.phase_seconds = phase_seconds(pool);
  return rates;
}

}  // namespace moru
