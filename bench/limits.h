// What this machine can do, measured in the same run as what is compared with it.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

#include "base/clock.h"
#include "base/cpu.h"
#include "base/memory.h"
#include "base/threads.h"

namespace moru::bench {

// The shortest of several runs within about `total` seconds, in seconds.
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

// Bytes a second that all threads together read from memory.
inline double read_bandwidth(Pool& pool) {
  constexpr size_t kBytes = size_t{384} << 20;  // well past any last-level cache
  PageBuffer memory(kBytes);
  std::memset(memory.data(), 1, kBytes);
  std::vector<int> sums(pool.size() * 16);
  const double seconds = best_seconds(0.5, [&] {
    pool.each(pool.size(), [&](size_t thread) {
      const size_t vectors = kBytes / 256;
      const auto* base = reinterpret_cast<const __m128i*>(memory.data());
      __m128i sum[4] = {};
      for (size_t v = vectors * thread / pool.size(); v < vectors * (thread + 1) / pool.size(); ++v)
        for (size_t i = 0; i < 16; ++i)
          sum[i % 4] = _mm_add_epi32(sum[i % 4], _mm_load_si128(base + 16 * v + i));
      sums[thread * 16] = _mm_cvtsi128_si32(
          _mm_add_epi32(_mm_add_epi32(sum[0], sum[1]), _mm_add_epi32(sum[2], sum[3])));
    });
  });
  return static_cast<double>(kBytes) / seconds;
}

inline constexpr size_t kFmaSteps = 1'000'000;
// GCC 12 takes the undefined vectors inside its own intrinsics for a mistake of ours.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
__attribute__((target("avx512f"))) inline float fmas_avx512() {
  __m512 sum[16], x = _mm512_set1_ps(0.5f);
  for (__m512& s : sum) s = _mm512_setzero_ps();
  for (size_t i = 0; i < kFmaSteps; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) sum[j] = _mm512_fmadd_ps(sum[j], x, x);
    asm volatile("" : "+v"(x));
  }
  float out = 0;
  for (const __m512& s : sum) out += _mm512_cvtss_f32(s);
  return out;
}
__attribute__((target("avx2,fma"))) inline float fmas_avx2() {
  __m256 sum[12], x = _mm256_set1_ps(0.5f);
  for (__m256& s : sum) s = _mm256_setzero_ps();
  for (size_t i = 0; i < kFmaSteps; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < 12; ++j) sum[j] = _mm256_fmadd_ps(sum[j], x, x);
    asm volatile("" : "+x"(x));
  }
  float out = 0;
  for (const __m256& s : sum) out += _mm256_cvtss_f32(s);
  return out;
}
#pragma GCC diagnostic pop

// f32 operations a second, two a multiply-add, of all threads together; 0 for the scalar level.
inline double fma_rate(Pool& pool) {
  if (isa() == Isa::scalar) return 0;
  const bool wide = isa() == Isa::avx512;
  std::vector<float> sink(pool.size() * 16);
  const double seconds = best_seconds(0.3, [&] {
    pool.each(pool.size(),
              [&](size_t thread) { sink[thread * 16] = wide ? fmas_avx512() : fmas_avx2(); });
  });
  return static_cast<double>(pool.size() * kFmaSteps) * (wide ? 16 * 32 : 12 * 16) / seconds;
}

}  // namespace moru::bench
