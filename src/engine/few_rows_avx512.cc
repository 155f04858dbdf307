// Rows of bf16 weights times a few tokens with vdpbf16ps: every vector of weights is loaded once
// for all tokens.
// GCC 12 takes the undefined vectors inside its own intrinsics for a mistake of ours.
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "engine/few_rows_kernels.h"

namespace moru {
namespace {

inline __m512bh load(const uint16_t* p) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
}
inline __m512bh load_part(const uint16_t* p, __mmask32 lanes) {
  return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(lanes, p));
}

inline float sum_lanes(__m512 v) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

template <int kTokens, int kRows>
inline void tile(const uint16_t* x, const uint16_t* w, size_t k, float* y, size_t ldy, bool add) {
  __m512 sum[kRows][kTokens];
  for (auto& row : sum)
    for (__m512& s : row) s = _mm512_setzero_ps();
  size_t i = 0;
  for (; i + 32 <= k; i += 32) {
    __m512bh rows[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const uint16_t* at = w + static_cast<size_t>(r) * k + i;
      _mm_prefetch(reinterpret_cast<const char*>(at + kFewRowsAhead), _MM_HINT_T1);
      rows[r] = load(at);
    }
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const __m512bh token = load(x + static_cast<size_t>(t) * k + i);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[r][t] = _mm512_dpbf16_ps(sum[r][t], rows[r], token);
    }
  }
  if (i < k) {
    const auto lanes = static_cast<__mmask32>((uint64_t{1} << (k - i)) - 1);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
        sum[r][t] =
            _mm512_dpbf16_ps(sum[r][t], load_part(w + static_cast<size_t>(r) * k + i, lanes),
                             load_part(x + static_cast<size_t>(t) * k + i, lanes));
  }
  for (int t = 0; t < kTokens; ++t)
    for (int r = 0; r < kRows; ++r) {
      float& out = y[static_cast<size_t>(t) * ldy + static_cast<size_t>(r)];
      const float total = sum_lanes(sum[r][t]);
      out = add ? out + total : total;
    }
}

// At most 16 sums beside the weights, a token and what is to be prefetched.
template <int kTokens>
void rows_of(const uint16_t* x, const uint16_t* w, size_t rows, size_t k, float* y, size_t ldy,
             bool add) {
  constexpr int kRows = kTokens <= 4 ? 4 : 2;
  size_t r = 0;
  for (; r + kRows <= rows; r += kRows) tile<kTokens, kRows>(x, w + r * k, k, y + r, ldy, add);
  for (; r < rows; ++r) tile<kTokens, 1>(x, w + r * k, k, y + r, ldy, add);
}

}  // namespace

void few_rows_avx512(const uint16_t* x, size_t m, const uint16_t* w, size_t rows, size_t k,
                     float* y, size_t ldy, bool add) noexcept {
  switch (m) {
    case 1:
      return rows_of<1>(x, w, rows, k, y, ldy, add);
    case 2:
      return rows_of<2>(x, w, rows, k, y, ldy, add);
    case 3:
      return rows_of<3>(x, w, rows, k, y, ldy, add);
    case 4:
      return rows_of<4>(x, w, rows, k, y, ldy, add);
    case 5:
      return rows_of<5>(x, w, rows, k, y, ldy, add);
    case 6:
      return rows_of<6>(x, w, rows, k, y, ldy, add);
    case 7:
      return rows_of<7>(x, w, rows, k, y, ldy, add);
    default:
      return rows_of<8>(x, w, rows, k, y, ldy, add);
  }
}

}  // namespace moru
