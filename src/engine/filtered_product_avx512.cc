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
// Bounds that are tried: the sum of magnitudes times 2⁻¹³, 2⁻¹⁴, …, four at a time and first those
// that most rows of a language model's softmax end at. f32 sums of a block lose at most the 2⁻¹⁵th
// part; blocks are added up in double.
constexpr int kBounds = 16, kFirstBound = 13, kAtOnce = 4, kLikely = 8;
constexpr size_t kSumBlock = 4096;
static_assert(kBounds % kAtOnce == 0 && kLikely % kAtOnce == 0);

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
  for (size_t at = 0; at < n; at += kSumBlock) {
    const size_t count = smaller(kSumBlock, n - at);
    __m512 sum[kAtOnce], bound[kAtOnce];
#pragma GCC unroll 4
    for (int b = 0; b < kAtOnce; ++b) {
      sum[b] = _mm512_setzero_ps();
      bound[b] = _mm512_set1_ps(bounds[b]);
    }
    for (size_t i = 0; i < count; i += kLanes) {
      const __m512 v = _mm512_abs_ps(_mm512_maskz_loadu_ps(first_lanes(count - i), x + at + i));
#pragma GCC unroll 4
      for (int b = 0; b < kAtOnce; ++b)
        sum[b] = _mm512_mask_add_ps(sum[b], _mm512_cmp_ps_mask(v, bound[b], _CMP_LT_OQ), sum[b], v);
    }
#pragma GCC unroll 4
    for (int b = 0; b < kAtOnce; ++b) sums[b] += double{_mm512_reduce_add_ps(sum[b])};
  }
}

inline void prefetch(const void* at) { _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T0); }

// kV vectors of 32 columns of y, the last of them under a mask.
template <int kV>
void multiply_kept(const uint32_t* list, size_t count, const uint16_t* w, size_t ldw,
                   __mmask32 last, float* y) {
  // Sums of columns 0-3, 8-11, 16-19, 24-27 of each vector, and of the rest.
  __m512 low[kV], high[kV];
#pragma GCC unroll 12
  for (int v = 0; v < kV; ++v) low[v] = high[v] = _mm512_setzero_ps();
  for (size_t i = 0; i < count; i += 2) {
    const uint32_t a = list[i], b = i + 1 < count ? list[i + 1] : a & 0xffff;
    const uint16_t *one = w + (a & 0xffff) * ldw, *two = w + (b & 0xffff) * ldw;
    const uint16_t *soon = w + (list[i + kFilterAhead - 2] % kFilterStripe) * ldw,
                   *then = w + (list[i + kFilterAhead - 1] % kFilterStripe) * ldw;
    const auto pair =
        reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>((a >> 16) | (b & ~0xffffu))));
#pragma GCC unroll 12
    for (int v = 0; v < kV; ++v) {
      const __mmask32 mask = v + 1 < kV ? ~__mmask32{0} : last;
      const size_t at = 2 * kLanes * static_cast<size_t>(v);
      prefetch(soon + at);
      prefetch(then + at);
      __m512i first = _mm512_maskz_loadu_epi16(mask, one + at),
              second = _mm512_maskz_loadu_epi16(mask, two + at);
      asm("" : "+v"(first), "+v"(second));  // or each is loaded twice
      low[v] = _mm512_dpbf16_ps(
          low[v], reinterpret_cast<__m512bh>(_mm512_unpacklo_epi16(first, second)), pair);
      high[v] = _mm512_dpbf16_ps(
          high[v], reinterpret_cast<__m512bh>(_mm512_unpackhi_epi16(first, second)), pair);
    }
  }
  const __m512i to_first =
      _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i to_second =
      _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  const auto put = [](float* to, __mmask16 lanes, __m512 sum) {
    _mm512_mask_storeu_ps(to, lanes, _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, to), sum));
  };
#pragma GCC unroll 12
  for (int v = 0; v < kV; ++v) {
    const __mmask32 mask = v + 1 < kV ? ~__mmask32{0} : last;
    float* to = y + 2 * kLanes * static_cast<size_t>(v);
    put(to, static_cast<__mmask16>(mask), _mm512_permutex2var_ps(low[v], to_first, high[v]));
    put(to + kLanes, static_cast<__mmask16>(mask >> kLanes),
        _mm512_permutex2var_ps(low[v], to_second, high[v]));
  }
}

using MultiplyKept = void (*)(const uint32_t*, size_t, const uint16_t*, size_t, __mmask32, float*);
constexpr MultiplyKept kMultiplyKept[] = {multiply_kept<1>,  multiply_kept<2>,  multiply_kept<3>,
                                          multiply_kept<4>,  multiply_kept<5>,  multiply_kept<6>,
                                          multiply_kept<7>,  multiply_kept<8>,  multiply_kept<9>,
                                          multiply_kept<10>, multiply_kept<11>, multiply_kept<12>};
static_assert(kFilterTile == 2 * kLanes * (sizeof kMultiplyKept / sizeof *kMultiplyKept));

}  // namespace

float negligible_avx512(const float* row, size_t n) noexcept {
  const double total = sum_of_magnitudes(row, n);
  if (total == 0) return 1;  // a token that weighs nothing
  float bounds[kBounds];
  for (int b = 0; b < kBounds; ++b)
    bounds[b] = static_cast<float>(total) / static_cast<float>(1u << (kFirstBound + b));
  // The first of a group below which there is little enough; sums fall with the bounds.
  const auto first_of = [&](int group) {
    double sums[kAtOnce] = {};
    sums_below(row, n, bounds + group, sums);
    for (int b = 0; b < kAtOnce; ++b)
      if (sums[b] <= double{kFilteredShare} * total) return group + b;
    return kBounds;
  };
  int group = kLikely, found = first_of(group);
  while (found == kBounds && group + kAtOnce < kBounds) found = first_of(group += kAtOnce);
  while (found == group && group > 0) {
    const int earlier = first_of(group -= kAtOnce);
    if (earlier != kBounds) found = earlier;
  }
  return found < kBounds ? bounds[found] : 0;
}

void list_kept_avx512(const float* row, size_t n, float negligible, uint32_t* list,
                      uint32_t* starts) noexcept {
  const __m512 bound = _mm512_set1_ps(negligible);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  uint32_t count = 0;
  for (size_t stripe = 0; stripe * kFilterStripe < n; ++stripe) {
    starts[stripe] = count;
    const float* x = row + stripe * kFilterStripe;
    const size_t columns = smaller(kFilterStripe, n - stripe * kFilterStripe);
    for (size_t i = 0; i < columns; i += kLanes) {
      const __mmask16 valid = first_lanes(columns - i);
      const __m512 v = _mm512_maskz_loadu_ps(valid, x + i);
      // Not below, so that NaN stays.
      const __mmask16 stays = _mm512_mask_cmp_ps_mask(valid, _mm512_abs_ps(v), bound, _CMP_NLT_UQ);
      if (stays == 0) continue;
      const __m512i value = _mm512_slli_epi32(
          _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v))), 16);
      const __m512i place = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(i)));
      _mm512_storeu_si512(list + count,
                          _mm512_maskz_compress_epi32(stays, _mm512_or_si512(value, place)));
      count += static_cast<uint32_t>(__builtin_popcount(stays));
    }
  }
  starts[filter_stripes(n)] = count;
}

void list_stripe_avx512(const uint16_t* row, size_t n, uint32_t* list) noexcept {
  for (size_t i = 0; i < n; ++i)
    list[i] = static_cast<uint32_t>(row[i]) << 16 | static_cast<uint32_t>(i);
}

void multiply_kept_avx512(const uint32_t* list, size_t count, const uint16_t* w, size_t ldw,
                          size_t cols, float* y) noexcept {
  const size_t vectors = (cols + 2 * kLanes - 1) / (2 * kLanes);
  const auto last =
      static_cast<__mmask32>((uint64_t{1} << (cols - 2 * kLanes * (vectors - 1))) - 1);
  kMultiplyKept[vectors - 1](list, count, w, ldw, last, y);
}

}  // namespace moru
