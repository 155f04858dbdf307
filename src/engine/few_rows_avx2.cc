// Rows of bf16 weights times a few tokens in f32: a word of two bf16 is two floats after a shift
// or a mask, so even and odd columns have sums of their own.
#include <immintrin.h>

#include <cstring>

#include "engine/few_rows_kernels.h"

namespace moru {
namespace {

struct Pair {
  __m256 even, odd;
};
inline Pair widen(__m256i words) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(words, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(-65536)))};
}
inline Pair load(const uint16_t* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Pair load_part(const uint16_t* p, size_t n) {
  alignas(32) uint16_t words[16] = {};
  std::memcpy(words, p, n * sizeof *p);
  return load(words);
}

inline float sum_lanes(__m256 v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

template <int kTokens, int kRows>
inline void tile(const uint16_t* x, const uint16_t* w, size_t k, float* y, size_t ldy, bool add) {
  __m256 sum[kRows][kTokens];
  for (auto& row : sum)
    for (__m256& s : row) s = _mm256_setzero_ps();
  const auto step = [&](auto get, size_t i) {
    Pair tokens[kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) tokens[t] = get(x + static_cast<size_t>(t) * k + i);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Pair row = get(w + static_cast<size_t>(r) * k + i);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t)
        sum[r][t] = _mm256_fmadd_ps(row.odd, tokens[t].odd,
                                    _mm256_fmadd_ps(row.even, tokens[t].even, sum[r][t]));
    }
  };
  size_t i = 0;
  for (; i + 16 <= k; i += 16) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
      _mm_prefetch(
          reinterpret_cast<const char*>(w + static_cast<size_t>(r) * k + i + kFewRowsAhead),
          _MM_HINT_T1);
    step([](const uint16_t* p) { return load(p); }, i);
  }
  if (i < k) step([n = k - i](const uint16_t* p) { return load_part(p, n); }, i);
  for (int t = 0; t < kTokens; ++t)
    for (int r = 0; r < kRows; ++r) {
      float& out = y[static_cast<size_t>(t) * ldy + static_cast<size_t>(r)];
      const float total = sum_lanes(sum[r][t]);
      out = add ? out + total : total;
    }
}

// Up to two tokens at a time: more would not fit 16 registers.
template <int kTokens>
void rows_of(const uint16_t* x, const uint16_t* w, size_t rows, size_t k, float* y, size_t ldy,
             bool add) {
  constexpr int kRows = kTokens == 1 ? 4 : 2;
  size_t r = 0;
  for (; r + kRows <= rows; r += kRows) tile<kTokens, kRows>(x, w + r * k, k, y + r, ldy, add);
  for (; r < rows; ++r) tile<kTokens, 1>(x, w + r * k, k, y + r, ldy, add);
}

}  // namespace

void few_rows_avx2(const uint16_t* x, size_t m, const uint16_t* w, size_t rows, size_t k, float* y,
                   size_t ldy, bool add) noexcept {
  size_t t = 0;
  for (; t + 2 <= m; t += 2) rows_of<2>(x + t * k, w, rows, k, y + t * ldy, ldy, add);
  if (t < m) rows_of<1>(x + t * k, w, rows, k, y + t * ldy, ldy, add);
}

}  // namespace moru
