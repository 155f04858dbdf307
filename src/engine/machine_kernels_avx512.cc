// GCC 12 takes the undefined vectors inside its own intrinsics for a mistake of ours.
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "engine/machine_kernels.h"

namespace moru {
namespace {

constexpr size_t kSums = 16;  // more than latency times rate on any core we know

// Adds to sixteen sums `steps` times. x must look changed, or the compiler would multiply once.
template <typename Sum, typename X, typename Add>
inline void repeat(size_t steps, Sum (&sum)[kSums], X x, Add add) {
  for (size_t i = 0; i < steps; ++i) {
#pragma GCC unroll 16
    for (size_t j = 0; j < kSums; ++j) {
      sum[j] = add(sum[j], x);
      asm volatile("" : "+v"(x));
    }
  }
}

inline float first_of(const __m512 (&sum)[kSums]) {
  __m512 all = sum[0];
  for (size_t j = 1; j < kSums; ++j) all = _mm512_add_ps(all, sum[j]);
  return _mm512_cvtss_f32(all);
}
inline float first_of(const __m512i (&sum)[kSums]) {
  __m512i all = sum[0];
  for (size_t j = 1; j < kSums; ++j) all = _mm512_xor_si512(all, sum[j]);
  return static_cast<float>(_mm_cvtsi128_si32(_mm512_castsi512_si128(all)));
}

float f32(size_t steps) noexcept {
  __m512 sum[kSums];
  for (__m512& s : sum) s = _mm512_setzero_ps();
  repeat(steps, sum, _mm512_set1_ps(0.5f),
         [](__m512 s, __m512 x) { return _mm512_fmadd_ps(s, x, x); });
  return first_of(sum);
}

float bf16(size_t steps) noexcept {
  __m512 sum[kSums];
  for (__m512& s : sum) s = _mm512_setzero_ps();
  repeat(steps, sum, _mm512_set1_epi16(0x3f00), [](__m512 s, __m512i x) {
    const auto pairs = reinterpret_cast<__m512bh>(x);
    return _mm512_dpbf16_ps(s, pairs, pairs);
  });
  return first_of(sum);
}

float int16(size_t steps) noexcept {
  __m512i sum[kSums];
  for (__m512i& s : sum) s = _mm512_setzero_si512();
  repeat(steps, sum, _mm512_set1_epi16(3),
         [](__m512i s, __m512i x) { return _mm512_dpwssd_epi32(s, x, x); });
  return first_of(sum);
}

float int8(size_t steps) noexcept {
  __m512i sum[kSums];
  for (__m512i& s : sum) s = _mm512_setzero_si512();
  repeat(steps, sum, _mm512_set1_epi8(3),
         [](__m512i s, __m512i x) { return _mm512_dpbusd_epi32(s, x, x); });
  return first_of(sum);
}

float read(const void* data, size_t bytes) noexcept {
  const auto* at = static_cast<const __m512i*>(data);
  __m512i sum[4];
  for (__m512i& s : sum) s = _mm512_setzero_si512();
  for (const auto* end = at + bytes / 64; at != end; at += 16)
#pragma GCC unroll 16
    for (size_t i = 0; i < 16; ++i)
      sum[i % 4] = _mm512_xor_si512(sum[i % 4], _mm512_load_si512(at + i));
  const __m512i all =
      _mm512_xor_si512(_mm512_xor_si512(sum[0], sum[1]), _mm512_xor_si512(sum[2], sum[3]));
  return static_cast<float>(_mm_cvtsi128_si32(_mm512_castsi512_si128(all)));
}

}  // namespace

constexpr MachineKernels kAvx512MachineKernels = {
    {f32, kSums * 32}, {bf16, kSums * 64}, {int16, kSums * 64}, {int8, kSums * 128}, read};

}  // namespace moru
