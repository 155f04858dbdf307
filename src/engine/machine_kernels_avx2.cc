// GCC 12 takes the undefined vectors inside its own intrinsics for a mistake of ours.
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "engine/machine_kernels.h"

namespace moru {
namespace {

constexpr size_t kSums = 12;  // more than latency times rate; with an operand within 16 registers

// Adds to twelve sums `steps` times. x must look changed, or the compiler would multiply once.
template <typename Sum, typename Add>
inline void repeat(size_t steps, Sum (&sum)[kSums], Sum x, Add add) {
  for (size_t i = 0; i < steps; ++i) {
#pragma GCC unroll 12
    for (size_t j = 0; j < kSums; ++j) {
      sum[j] = add(sum[j], x);
      asm volatile("" : "+x"(x));
    }
  }
}

inline float first_of(const __m256i (&sum)[kSums]) {
  __m256i all = sum[0];
  for (size_t j = 1; j < kSums; ++j) all = _mm256_xor_si256(all, sum[j]);
  return static_cast<float>(_mm256_extract_epi32(all, 0));
}

float f32(size_t steps) noexcept {
  __m256 sum[kSums];
  for (__m256& s : sum) s = _mm256_setzero_ps();
  repeat(steps, sum, _mm256_set1_ps(0.5f),
         [](__m256 s, __m256 x) { return _mm256_fmadd_ps(s, x, x); });
  __m256 all = sum[0];
  for (size_t j = 1; j < kSums; ++j) all = _mm256_add_ps(all, sum[j]);
  return _mm256_cvtss_f32(all);
}

float int16(size_t steps) noexcept {
  __m256i sum[kSums];
  for (__m256i& s : sum) s = _mm256_setzero_si256();
  repeat(steps, sum, _mm256_set1_epi16(3),
         [](__m256i s, __m256i x) { return _mm256_add_epi32(s, _mm256_madd_epi16(x, x)); });
  return first_of(sum);
}

float int8(size_t steps) noexcept {
  __m256i sum[kSums];
  for (__m256i& s : sum) s = _mm256_setzero_si256();
  const __m256i ones = _mm256_set1_epi16(1);
  repeat(steps, sum, _mm256_set1_epi8(3), [ones](__m256i s, __m256i x) {
    return _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_maddubs_epi16(x, x), ones));
  });
  return first_of(sum);
}

float read(const void* data, size_t bytes) noexcept {
  const auto* at = static_cast<const __m256i*>(data);
  __m256i sum[4];
  for (__m256i& s : sum) s = _mm256_setzero_si256();
  for (const auto* end = at + bytes / 32; at != end; at += 16)
#pragma GCC unroll 16
    for (size_t i = 0; i < 16; ++i)
      sum[i % 4] = _mm256_xor_si256(sum[i % 4], _mm256_load_si256(at + i));
  const __m256i all =
      _mm256_xor_si256(_mm256_xor_si256(sum[0], sum[1]), _mm256_xor_si256(sum[2], sum[3]));
  return static_cast<float>(_mm256_extract_epi32(all, 0));
}

}  // namespace

// No dots of bf16 at this level.
constexpr MachineKernels kAvx2MachineKernels = {
    {f32, kSums * 16}, {nullptr, 0}, {int16, kSums * 32}, {int8, kSums * 64}, read};

}  // namespace moru
