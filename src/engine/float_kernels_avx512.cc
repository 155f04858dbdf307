// 16 lanes as one AVX-512 register.

// GCC 12 warns about the undefined operands inside its own intrinsics (PR 105593).
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "engine/float_kernels.h"

namespace moru {
namespace {

using Vec = __m512;
using Mask = __mmask16;
// 24 accumulators, 4 registers of B, 1 of A: 29 of 32. A smaller tile would wait for loads.
constexpr size_t kTileRows = 6, kTileVecs = 4;
constexpr size_t kTallTileRows = 8, kTallTileVecs = 2;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec splat(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec load_bf16(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
// In integers, as half.h does: the instruction for it would flush subnormal numbers.
inline void store_bf16(uint16_t* p, Vec v) {
  const __m512i bits = _mm512_castps_si512(v), high = _mm512_srli_epi32(bits, 16);
  const __m512i tie = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(
      _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), tie), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i word = _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(word));
}
inline Vec load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_f16(uint16_t* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline Vec load_i8(const int8_t* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Mask lanes_between(int first, int end) {
  const int a = first < 0 ? 0 : first > 16 ? 16 : first, b = end < a ? a : end > 16 ? 16 : end;
  return static_cast<Mask>((1u << b) - (1u << a));
}
inline Vec load_part(const float* p, size_t n) {
  return _mm512_maskz_loadu_ps(lanes_between(0, static_cast<int>(n)), p);
}
inline void store_part(float* p, size_t n, Vec v) {
  _mm512_mask_storeu_ps(p, lanes_between(0, static_cast<int>(n)), v);
}

inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec root(Vec a) { return _mm512_sqrt_ps(a); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec magnitude(Vec a) { return _mm512_abs_ps(a); }
// `a` is not negative.
inline Vec with_sign(Vec a, Vec sign) {
  return _mm512_or_ps(a, _mm512_and_ps(_mm512_set1_ps(-0.0f), sign));
}
inline Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Vec select(Mask m, Vec yes, Vec no) { return _mm512_mask_blend_ps(m, no, yes); }
inline Vec round_to_integer(Vec x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// x · 2^n for whole −126 ≤ n ≤ 127.
inline Vec times_power_of_two(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }
inline float sum_lanes(Vec v) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float max_lanes(Vec v) {
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

// 16 words of 32 bits, each a whole number or a pair of 16-bit ones. Not __m512i, whose lanes have
// 64 bits: GCC 12 would copy each accumulator at each step.
using Words [[gnu::vector_size(64), gnu::may_alias]] = int32_t;
inline Words words_of(__m512i bits) { return reinterpret_cast<Words>(bits); }
inline __m512i bits_of(Words w) { return reinterpret_cast<__m512i>(w); }
inline Words zero_words() { return words_of(_mm512_setzero_si512()); }
inline Words load_words(const int16_t* p) { return words_of(_mm512_loadu_si512(p)); }
inline void store_words(int16_t* p, Words w) { _mm512_storeu_si512(p, bits_of(w)); }
inline Words splat_pair(const int16_t* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return words_of(_mm512_set1_epi32(pair));
}
// acc + a₀b₀ + a₁b₁ in each word.
inline Words add_dots(Words acc, Words a, Words b) {
  return words_of(_mm512_dpwssd_epi32(bits_of(acc), bits_of(a), bits_of(b)));
}
inline Words add_words(Words a, Words b) { return a + b; }
inline int32_t sum_of_words(Words w) { return _mm512_reduce_add_epi32(bits_of(w)); }
inline Vec to_floats(Words w) { return _mm512_cvtepi32_ps(bits_of(w)); }
// To nearest, ties to even; NaN becomes some number.
inline Words to_words(Vec v) { return words_of(_mm512_cvtps_epi32(v)); }
// The low halves as pairs (a, b).
inline Words pair_up(Words a, Words b) {
  return words_of(
      _mm512_mask_blend_epi16(0xaaaaaaaa, bits_of(a), _mm512_slli_epi32(bits_of(b), 16)));
}
inline void store_low_halves(int16_t* p, Words w) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bits_of(w)));
}

// out[d] holds element d of the 16 rows.
inline void transpose(const float* p, size_t ld, Vec out[16]) {
  __m512 t[16];
  __m512d u[16];
  for (size_t i = 0; i < 16; i += 2) {
    const __m512 a = _mm512_loadu_ps(p + i * ld), b = _mm512_loadu_ps(p + (i + 1) * ld);
    t[i] = _mm512_unpacklo_ps(a, b);
    t[i + 1] = _mm512_unpackhi_ps(a, b);
  }
  for (size_t i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 2]);
    const __m512d c = _mm512_castps_pd(t[i + 1]), d = _mm512_castps_pd(t[i + 3]);
    u[i] = _mm512_unpacklo_pd(a, b);
    u[i + 1] = _mm512_unpackhi_pd(a, b);
    u[i + 2] = _mm512_unpacklo_pd(c, d);
    u[i + 3] = _mm512_unpackhi_pd(c, d);
  }
  // Quarter L of u[4i + j] is column 4L + j of rows 4i … 4i + 3.
  for (size_t j = 0; j < 4; ++j) {
    const __m512 u0 = _mm512_castpd_ps(u[j]), u1 = _mm512_castpd_ps(u[4 + j]);
    const __m512 u2 = _mm512_castpd_ps(u[8 + j]), u3 = _mm512_castpd_ps(u[12 + j]);
    const __m512 a = _mm512_shuffle_f32x4(u0, u1, 0x88), b = _mm512_shuffle_f32x4(u2, u3, 0x88);
    const __m512 c = _mm512_shuffle_f32x4(u0, u1, 0xdd), d = _mm512_shuffle_f32x4(u2, u3, 0xdd);
    out[j] = _mm512_shuffle_f32x4(a, b, 0x88);
    out[4 + j] = _mm512_shuffle_f32x4(c, d, 0x88);
    out[8 + j] = _mm512_shuffle_f32x4(a, b, 0xdd);
    out[12 + j] = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
}

#include "engine/float_kernels_body.h"

}  // namespace

constexpr FloatKernels kAvx512FloatKernels = make_table();

}  // namespace moru
