// The text that the files of bf16 products share: rows of one operand against packed columns of the
// other. Included by files ending in _avx512.cc, once each, inside no namespace; everything is
// theirs alone (float_kernels.h says why).
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "engine/bf16_product.h"

namespace moru {
namespace {

constexpr size_t kLanes = kBf16Lanes, kCols = 2 * kLanes;

constexpr size_t smaller(size_t a, size_t b) { return a < b ? a : b; }
constexpr size_t divide_up(size_t n, size_t by) { return (n + by - 1) / by; }
void prefetch(const void* at, size_t bytes = 0) {
  _mm_prefetch(static_cast<const char*>(at) + bytes, _MM_HINT_T0);
}

// A stretch of k of one term for some rows: where the pairs of the first row begin, and elements
// from row to row and from pair to pair.
struct Piece {
  const uint16_t* a;
  size_t row, step, pairs;
};

// What becomes of sums: y = scale · sum + add.
struct Sink {
  const float* add;  // null: nothing
  size_t ld_add;
  void* y;
  size_t ldy;
  bool bf16;
  float scale;
  __mmask16 lanes[2];
};

inline __m512i pair_of(const uint16_t* at) {
  int32_t pair;
  __builtin_memcpy(&pair, at, sizeof pair);
  return _mm512_set1_epi32(pair);
}

template <int kR, int kC>
void multiply_rows(const Piece* pieces, size_t count, const uint16_t* b, const Sink& sink) {
  // Rows are reached from every third: a base and one or two strides.
  constexpr int kBases = (kR + 2) / 3;
  __m512 sum[kR][kC];
#pragma GCC unroll 12
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < kC; ++c) sum[r][c] = _mm512_setzero_ps();
  const size_t size = sink.bf16 ? 2 : 4;
  for (size_t r = 0; r < kR; ++r) {
    const char* y = static_cast<const char*>(sink.y) + r * sink.ldy * size;
    prefetch(y);
    prefetch(y, kC * kLanes * size - 1);
  }
  for (const Piece* piece = pieces; piece != pieces + count; ++piece) {
    const size_t row = piece->row, step = piece->step;
    const uint16_t* base[kBases];
#pragma GCC unroll 4
    for (int i = 0; i < kBases; ++i) base[i] = piece->a + 3 * static_cast<size_t>(i) * row;
    for (size_t left = piece->pairs; left != 0; --left) {
      __m512bh columns[kC];
#pragma GCC unroll 2
      for (int c = 0; c < kC; ++c)
        columns[c] =
            reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + 2 * kLanes * static_cast<size_t>(c)));
      b += 2 * kLanes * static_cast<size_t>(kC);
#pragma GCC unroll 12
      for (int r = 0; r < kR; ++r) {
        const auto pair =
            reinterpret_cast<__m512bh>(pair_of(base[r / 3] + static_cast<size_t>(r % 3) * row));
#pragma GCC unroll 2
        for (int c = 0; c < kC; ++c) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], columns[c], pair);
      }
#pragma GCC unroll 4
      for (int i = 0; i < kBases; ++i) base[i] += step;
    }
  }
  const __m512 scale = _mm512_set1_ps(sink.scale);
#pragma GCC unroll 12
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < kC; ++c) {
      const size_t at = static_cast<size_t>(c) * kLanes;
      const __mmask16 lanes = sink.lanes[c];
      __m512 value = _mm512_setzero_ps();
      if (sink.add != nullptr)
        value = _mm512_maskz_loadu_ps(lanes, sink.add + static_cast<size_t>(r) * sink.ld_add + at);
      value = _mm512_fmadd_ps(sum[r][c], scale, value);
      const size_t to = static_cast<size_t>(r) * sink.ldy + at;
      if (sink.bf16)
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(sink.y) + to, lanes,
                                 reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
      else
        _mm512_mask_storeu_ps(static_cast<float*>(sink.y) + to, lanes, value);
    }
}

using MultiplyRows = void (*)(const Piece*, size_t, const uint16_t*, const Sink&);
constexpr MultiplyRows kMultiplyRows[2][kBf16Rows] = {
    {multiply_rows<1, 1>, multiply_rows<2, 1>, multiply_rows<3, 1>, multiply_rows<4, 1>,
     multiply_rows<5, 1>, multiply_rows<6, 1>, multiply_rows<7, 1>, multiply_rows<8, 1>,
     multiply_rows<9, 1>, multiply_rows<10, 1>, multiply_rows<11, 1>, multiply_rows<12, 1>},
    {multiply_rows<1, 2>, multiply_rows<2, 2>, multiply_rows<3, 2>, multiply_rows<4, 2>,
     multiply_rows<5, 2>, multiply_rows<6, 2>, multiply_rows<7, 2>, multiply_rows<8, 2>,
     multiply_rows<9, 2>, multiply_rows<10, 2>, multiply_rows<11, 2>, multiply_rows<12, 2>}};

}  // namespace
}  // namespace moru
