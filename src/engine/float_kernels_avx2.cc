// 16 lanes as two AVX2 registers. Built with -mavx2 -mfma -mf16c.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "engine/float_kernels.h"

namespace moru {
namespace {

struct Vec {
  __m256 lo, hi;
};
struct Mask {
  __m256 lo, hi;
};
// 12 accumulators, 2 registers of B, 2 of A: all 16.
constexpr size_t kTileRows = 6, kTileVecs = 1, kTallTileRows = 6, kTallTileVecs = 1;

inline Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Vec splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Vec v) {
  _mm256_storeu_ps(p, v.lo);
  _mm256_storeu_ps(p + 8, v.hi);
}

inline __m256 widen_8_bf16(const uint16_t* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
// To nearest, ties to even, in integers: as half.h does.
inline __m256i round_8_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v), high = _mm256_srli_epi32(bits, 16);
  const __m256i tie = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(
      _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), tie), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, quiet, nan);
}
inline Vec load_bf16(const uint16_t* p) { return {widen_8_bf16(p), widen_8_bf16(p + 8)}; }
inline void store_bf16(uint16_t* p, Vec v) {
  // packus works within 128-bit halves; the permutation puts the quarters in order.
  const __m256i packed = _mm256_packus_epi32(round_8_bf16(v.lo), round_8_bf16(v.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
inline Vec load_f16(const uint16_t* p) {
  const auto* halves = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}
inline Vec load_i8(const int8_t* p) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(codes, 8)))};
}
inline void store_f16(uint16_t* p, Vec v) {
  auto* halves = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(halves, _mm256_cvtps_ph(v.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(halves + 1, _mm256_cvtps_ph(v.hi, _MM_FROUND_TO_NEAREST_INT));
}

inline __m256i index_lo() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
inline __m256i index_hi() { return _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15); }
inline Mask lanes_between(int first, int end) {
  const __m256i before = _mm256_set1_epi32(first - 1), after = _mm256_set1_epi32(end);
  return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_cmpgt_epi32(index_lo(), before),
                                               _mm256_cmpgt_epi32(after, index_lo()))),
          _mm256_castsi256_ps(_mm256_and_si256(_mm256_cmpgt_epi32(index_hi(), before),
                                               _mm256_cmpgt_epi32(after, index_hi())))};
}
inline Vec load_part(const float* p, size_t n) {
  const Mask m = lanes_between(0, static_cast<int>(n));
  const __m256 lo = _mm256_maskload_ps(p, _mm256_castps_si256(m.lo));
  const __m256 hi =
      n > 8 ? _mm256_maskload_ps(p + 8, _mm256_castps_si256(m.hi)) : _mm256_setzero_ps();
  return {lo, hi};
}
inline void store_part(float* p, size_t n, Vec v) {
  const Mask m = lanes_between(0, static_cast<int>(n));
  _mm256_maskstore_ps(p, _mm256_castps_si256(m.lo), v.lo);
  if (n > 8) _mm256_maskstore_ps(p + 8, _mm256_castps_si256(m.hi), v.hi);
}

inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Vec root(Vec a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
inline Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline Vec fnma(Vec a, Vec b, Vec c) {
  return {_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)};
}
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline Vec magnitude(Vec a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
// `a` is not negative.
inline Vec with_sign(Vec a, Vec sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(a.lo, _mm256_and_ps(bit, sign.lo)),
          _mm256_or_ps(a.hi, _mm256_and_ps(bit, sign.hi))};
}
inline Mask less(Vec a, Vec b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)};
}
inline Vec select(Mask m, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, m.lo), _mm256_blendv_ps(no.hi, yes.hi, m.hi)};
}
inline Vec round_to_integer(Vec x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.lo, kNearest), _mm256_round_ps(x.hi, kNearest)};
}
inline __m256 power_of_two_8(__m256 n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
// x · 2^n for whole −126 ≤ n ≤ 127.
inline Vec times_power_of_two(Vec x, Vec n) {
  return mul(x, {power_of_two_8(n.lo), power_of_two_8(n.hi)});
}
inline float sum_lanes(Vec v) {
  const __m256 eight = _mm256_add_ps(v.lo, v.hi);
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float max_lanes(Vec v) {
  const __m256 eight = _mm256_max_ps(v.lo, v.hi);
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

// 16 words of 32 bits, each a whole number or a pair of 16-bit ones.
struct Words {
  __m256i lo, hi;
};
inline Words zero_words() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Words load_words(const int16_t* p) {
  const auto* halves = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
inline void store_words(int16_t* p, Words w) {
  auto* halves = reinterpret_cast<__m256i*>(p);
  _mm256_storeu_si256(halves, w.lo);
  _mm256_storeu_si256(halves + 1, w.hi);
}
inline Words splat_pair(const int16_t* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return {_mm256_set1_epi32(pair), _mm256_set1_epi32(pair)};
}
// acc + a₀b₀ + a₁b₁ in each word.
inline Words add_dots(Words acc, Words a, Words b) {
  return {_mm256_add_epi32(acc.lo, _mm256_madd_epi16(a.lo, b.lo)),
          _mm256_add_epi32(acc.hi, _mm256_madd_epi16(a.hi, b.hi))};
}
inline Words add_words(Words a, Words b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
inline int32_t sum_of_words(Words w) {
  const __m256i eight = _mm256_add_epi32(w.lo, w.hi);
  __m128i x = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}
inline Vec to_floats(Words w) { return {_mm256_cvtepi32_ps(w.lo), _mm256_cvtepi32_ps(w.hi)}; }
// To nearest, ties to even; NaN becomes some number.
inline Words to_words(Vec v) { return {_mm256_cvtps_epi32(v.lo), _mm256_cvtps_epi32(v.hi)}; }
// The low halves as pairs (a, b).
inline Words pair_up(Words a, Words b) {
  return {_mm256_blend_epi16(a.lo, _mm256_slli_epi32(b.lo, 16), 0xaa),
          _mm256_blend_epi16(a.hi, _mm256_slli_epi32(b.hi, 16), 0xaa)};
}
// Words that 16 bits hold.
inline void store_low_halves(int16_t* p, Words w) {
  // packs works within 128-bit halves; the permutation puts the quarters in order.
  const __m256i packed = _mm256_packs_epi32(w.lo, w.hi);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}

// Rows of 8 into columns of 8.
inline void transpose_8(const float* p, size_t ld, __m256 out[8]) {
  __m256 t[8], u[8];
  for (size_t i = 0; i < 8; i += 2) {
    const __m256 a = _mm256_loadu_ps(p + i * ld), b = _mm256_loadu_ps(p + (i + 1) * ld);
    t[i] = _mm256_unpacklo_ps(a, b);
    t[i + 1] = _mm256_unpackhi_ps(a, b);
  }
  for (size_t i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (size_t i = 0; i < 4; ++i) {
    out[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    out[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}
inline void transpose(const float* p, size_t ld, Vec out[16]) {
  for (size_t d = 0; d < 16; d += 8) {
    __m256 lo[8], hi[8];
    transpose_8(p + d, ld, lo);
    transpose_8(p + 8 * ld + d, ld, hi);
    for (size_t i = 0; i < 8; ++i) out[d + i] = {lo[i], hi[i]};
  }
}

#include "engine/float_kernels_body.h"

}  // namespace

constexpr FloatKernels kAvx2FloatKernels = make_table();

}  // namespace moru
