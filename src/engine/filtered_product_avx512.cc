// The products of filtered_product.h with vdpbf16ps.
// GCC 12 takes the undefined vectors inside its own intrinsics for a mistake of ours.
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "engine/filtered_product.h"

namespace moru {
namespace {

constexpr size_t kLanes = 16;
// Bounds that are tried: the sum of magnitudes times 2⁻¹², 2⁻¹³, …. f32 sums of a block lose at
// most the 2⁻¹⁵th part; blocks are added up in double.
constexpr int kBounds = 16, kFirstBound = 12, kAtOnce = 8;
constexpr size_t kSumBlock = 4096;
// Pairs whose rows of W are asked for ahead.
constexpr size_t kPairsAhead = 24;
static_assert(kFilterColumns + 2 * kPairsAhead + 2 <= kKeptStride);

constexpr size_t smaller(size_t a, size_t b) { return a < b ? a : b; }
__mmask16 first_lanes(size_t count) {
  return static_cast<__mmask16>((uint32_t{1} << smaller(count, kLanes)) - 1);
}

// Σ |x|, and those below each of kAtOnce bounds.
double sum_of_magnitudes(const float* x, size_t n) {
  double total = 0;
  for (size_t at = 0; at < n; at += kSumBlock) {
    __m512 sum[4] = {};
    const size_t count = smaller(kSumBlock, n - at);
    for (size_t i = 0; i < count; i += kLanes) {
      const __m512 v = _mm512_maskz_loadu_ps(first_lanes(count - i), x + at + i);
      sum[i / kLanes % 4] = _mm512_add_ps(sum[i / kLanes % 4], _mm512_abs_ps(v));
    }
    total += double{_mm512_reduce_add_ps(
        _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])))};
  }
  return total;
}
void sums_below(const float* x, size_t n, const float* bounds, double* sums) {
  __m512 sum[kAtOnce], bound[kAtOnce];
#pragma GCC unroll 8
  for (int b = 0; b < kAtOnce; ++b) {
    sum[b] = _mm512_setzero_ps();
    bound[b] = _mm512_set1_ps(bounds[b]);
  }
  for (size_t i = 0; i < n; i += kLanes) {
    const __m512 v = _mm512_abs_ps(_mm512_maskz_loadu_ps(first_lanes(n - i), x + i));
#pragma GCC unroll 8
    for (int b = 0; b < kAtOnce; ++b)
      sum[b] = _mm512_mask_add_ps(sum[b], _mm512_cmp_ps_mask(v, bound[b], _CMP_LT_OQ), sum[b], v);
  }
#pragma GCC unroll 8
  for (int b = 0; b < kAtOnce; ++b) sums[b] += double{_mm512_reduce_add_ps(sum[b])};
}

// One or two cache lines of a row of W: 32 columns from anywhere.
inline __m512i columns_of(const uint16_t* row, __mmask32 mask) {
  return _mm512_maskz_loadu_epi16(mask, row);
}
inline void prefetch(const void* at) { _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T0); }
inline __m512bh pair_of(const uint16_t* at) {
  int32_t pair;
  __builtin_memcpy(&pair, at, sizeof pair);
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
}

}  // namespace

float negligible_avx512(const float* row, size_t n) noexcept {
  const double total = sum_of_magnitudes(row, n);
  if (total == 0) return 1;  // a token that weighs nothing
  float bounds[kBounds];
  double sums[kBounds] = {};
  for (int b = 0; b < kBounds; ++b)
    bounds[b] = static_cast<float>(total) / static_cast<float>(1u << (kFirstBound + b));
  for (size_t at = 0; at < n; at += kSumBlock)
    for (int b = 0; b < kBounds; b += kAtOnce)
      sums_below(row + at, smaller(kSumBlock, n - at), bounds + b, sums + b);
  for (int b = 0; b < kBounds; ++b)
    if (sums[b] <= double{kFilteredShare} * total) return bounds[b];
  return 0;
}

size_t pick_avx512(const float* dy, size_t ld, size_t rows, size_t n, const float* negligible,
                   size_t ldw, uint16_t* kept, uint32_t* places) noexcept {
  size_t count = 0;
  const __m512i step =
      _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                         _mm512_set1_epi32(static_cast<int>(ldw)));
  for (size_t i = 0; i < n; i += kLanes) {
    const __mmask16 lanes = first_lanes(n - i);
    __mmask16 stays = 0;
    for (size_t r = 0; r < rows; ++r) {
      const __m512 v = _mm512_abs_ps(_mm512_maskz_loadu_ps(lanes, dy + r * ld + i));
      // Not below, so that NaN stays.
      const __mmask16 big =
          _mm512_mask_cmp_ps_mask(lanes, v, _mm512_set1_ps(negligible[r]), _CMP_NLT_UQ);
      stays = static_cast<__mmask16>(stays | big);
    }
    if (stays == 0) continue;
    const __m512i place = _mm512_add_epi32(step, _mm512_set1_epi32(static_cast<int>(i * ldw)));
    _mm512_storeu_si512(places + count, _mm512_maskz_compress_epi32(stays, place));
    for (size_t r = 0; r < rows; ++r) {
      const __m512 v =
          _mm512_maskz_compress_ps(stays, _mm512_maskz_loadu_ps(stays, dy + r * ld + i));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(kept + r * kKeptStride + count),
                          reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
    }
    count += static_cast<size_t>(__builtin_popcount(stays));
  }
  // A column for the pair's sake, and for those that are asked for ahead.
  for (size_t r = 0; r < rows; ++r) kept[r * kKeptStride + count] = 0;
  const uint32_t last = count == 0 ? 0 : places[count - 1];
  for (size_t i = 0; i < 2 * kPairsAhead + 2; ++i) places[count + i] = last;
  return count;
}

void multiply_picked_avx512(const uint16_t* kept, const uint32_t* places, size_t count,
                            const uint16_t* w, size_t rows, size_t cols, float* y,
                            size_t ldy) noexcept {
  constexpr int kR = kFilterRows;
  const auto mask = static_cast<__mmask32>((uint64_t{1} << cols) - 1);
  __m512 low[kR], high[kR];
#pragma GCC unroll 12
  for (int r = 0; r < kR; ++r) low[r] = high[r] = _mm512_setzero_ps();
  const uint16_t* base[4];
#pragma GCC unroll 4
  for (size_t i = 0; i < 4; ++i) base[i] = kept + 3 * i * kKeptStride;
  for (size_t pair = 0; pair < (count + 1) / 2; ++pair) {
    const uint32_t* place = places + 2 * pair;
    prefetch(w + place[2 * kPairsAhead]);
    prefetch(w + place[2 * kPairsAhead + 1]);
    const __m512i one = columns_of(w + place[0], mask), two = columns_of(w + place[1], mask);
    // Columns 0-3, 8-11, 16-19, 24-27 and the rest, as pairs.
    const auto pairs_low = reinterpret_cast<__m512bh>(_mm512_unpacklo_epi16(one, two));
    const auto pairs_high = reinterpret_cast<__m512bh>(_mm512_unpackhi_epi16(one, two));
#pragma GCC unroll 12
    for (int r = 0; r < kR; ++r) {
      const __m512bh a = pair_of(base[r / 3] + static_cast<size_t>(r % 3) * kKeptStride);
      low[r] = _mm512_dpbf16_ps(low[r], pairs_low, a);
      high[r] = _mm512_dpbf16_ps(high[r], pairs_high, a);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) base[i] += 2;
  }
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second =
      _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  const auto put = [](float* to, __mmask16 lanes, __m512 sum) {
    _mm512_mask_storeu_ps(to, lanes, _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, to), sum));
  };
#pragma GCC unroll 12
  for (size_t r = 0; r < kR; ++r) {
    if (r >= rows) break;
    put(y + r * ldy, static_cast<__mmask16>(mask), _mm512_permutex2var_ps(low[r], first, high[r]));
    put(y + r * ldy + kLanes, static_cast<__mmask16>(mask >> kLanes),
        _mm512_permutex2var_ps(low[r], second, high[r]));
  }
}

}  // namespace moru
