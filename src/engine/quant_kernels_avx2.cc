// The exact product with AVX2. This file alone is built with these instructions, so it shares no
// inline function with the rest of the program and instantiates no std template.
//
// A word is taken as two halves of eight rows. vpmaddubsw would saturate on eight-bit codes, so
// codes are widened to int16 and multiplied by vpmaddwd, whose sums of two products always fit:
// 2 · 128 · 32,639 < 2^31.
#include <immintrin.h>

#include <cstring>

#include "engine/quant_kernels.h"

namespace moru {
namespace {

#define MORU_INLINE [[gnu::always_inline, maybe_unused]] static inline

using Half = __m256i;  // of a word: eight rows

MORU_INLINE Half load_half(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
MORU_INLINE void store_half(void* p, Half v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

// Two neighbouring codes of a token, or a sum of codes, for every row.
MORU_INLINE Half broadcast(const void* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return _mm256_set1_epi32(four);
}

// Bits of a where the mask has ones, else of b.
MORU_INLINE Half select(Half mask, Half a, Half b) {
  return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
}

// The compiler otherwise reorders integer sums for parallelism and runs out of 16 registers.
MORU_INLINE void keep_order(Half& sum) { asm("" : "+x"(sum)); }

// Shifts right by kBits, or left where it is negative; bits that cross bytes are masked by callers.
template <int kBits>
MORU_INLINE Half shifted(Half v) {
  if constexpr (kBits > 0)
    return _mm256_srli_epi16(v, kBits);
  else if constexpr (kBits < 0)
    return _mm256_slli_epi16(v, -kBits);
  else
    return v;
}

// ---- code records: quad<q> gives half a word of quad q's codes; weight = code − 2^kOffsetBits.
// `unit` is the record, or 32 bytes further for rows 8 … 15. ----

constexpr int kNoOffset = -1;

template <int q>
MORU_INLINE Half nibble(const uint8_t* unit) {
  return _mm256_and_si256(shifted<4 * (q % 2)>(load_half(unit + 64 * (q / 2))),
                          _mm256_set1_epi8(15));
}

template <int kOffset>
struct Nibbles {
  static constexpr size_t kUnitBytes = 256;
  static constexpr int kOffsetBits = kOffset;
  template <int q>
  MORU_INLINE Half quad(const uint8_t* unit) {
    return nibble<q>(unit);
  }
};

// The table of a format whose weights are not evenly spaced, plus its offset.
struct Iq4Table {  // + 128
  static constexpr int kOffsetBits = 7;
  static constexpr uint8_t kValues[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                          129, 141, 153, 166, 181, 197, 217, 241};
};
struct Mxfp4Table {  // + 16
  static constexpr int kOffsetBits = 4;
  static constexpr uint8_t kValues[16] = {16, 17, 18, 19, 20, 22, 24, 28,
                                          16, 15, 14, 13, 12, 10, 8,  4};
};
template <typename Table>
struct TableNibbles {
  static constexpr size_t kUnitBytes = 256;
  static constexpr int kOffsetBits = Table::kOffsetBits;
  template <int q>
  MORU_INLINE Half quad(const uint8_t* unit) {
    const Half table = _mm256_broadcastsi128_si256(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(Table::kValues)));
    return _mm256_shuffle_epi8(table, nibble<q>(unit));
  }
};

template <int kOffset>
struct FiveBits {
  static constexpr size_t kUnitBytes = 320;
  static constexpr int kOffsetBits = kOffset;
  template <int q>
  MORU_INLINE Half quad(const uint8_t* unit) {
    const Half high =
        shifted < q < 4 ? q : q - 8 > (load_half(unit + 256));  // bit (4 + q) & 7 to 4
    return _mm256_or_si256(nibble<q>(unit), _mm256_and_si256(high, _mm256_set1_epi8(16)));
  }
};

struct SixBits {
  static constexpr size_t kUnitBytes = 384;
  static constexpr int kOffsetBits = 5;
  template <int q>
  MORU_INLINE Half quad(const uint8_t* unit) {
    constexpr int c = q % 4, kShift = c < 2 ? 2 * c : 2 * c - 8;  // bit (4 + 2c) & 7 to 4
    const Half high = shifted<kShift>(load_half(unit + 256 + 64 * (q / 4)));
    return _mm256_or_si256(nibble<q>(unit), _mm256_and_si256(high, _mm256_set1_epi8(48)));
  }
};

struct TwoBits {
  static constexpr size_t kUnitBytes = 128;
  static constexpr int kOffsetBits = kNoOffset;
  template <int q>
  MORU_INLINE Half quad(const uint8_t* unit) {
    return _mm256_and_si256(shifted<2 * (q % 4)>(load_half(unit + 64 * (q / 4))),
                            _mm256_set1_epi8(3));
  }
};

struct ThreeBits {
  static constexpr size_t kUnitBytes = 192;
  static constexpr int kOffsetBits = 2;
  template <int q>
  MORU_INLINE Half quad(const uint8_t* unit) {
    const Half high =
        shifted < q < 6 ? q : q - 8 > (load_half(unit + 128));  // bit (2 + q) & 7 to 2
    return _mm256_or_si256(TwoBits::quad<q>(unit), _mm256_and_si256(high, _mm256_set1_epi8(4)));
  }
};

struct Bytes {
  static constexpr size_t kUnitBytes = 512;
  static constexpr int kOffsetBits = 7;
  template <int q>
  MORU_INLINE Half quad(const uint8_t* unit) {
    return load_half(unit + 64 * q);
  }
};

// ---- scale records: decode() gives scale and minimum of each block, of rows 8h … 8h + 7 ----

MORU_INLINE __m128i load_8x2(const uint8_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
MORU_INLINE __m128i load_8x1(const uint8_t* p) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
}
MORU_INLINE __m256 halves(const uint8_t* p, size_t h) {
  return _mm256_cvtph_ps(load_8x2(p + 16 * h));
}
MORU_INLINE __m256 negative(__m256 v) { return _mm256_xor_ps(v, _mm256_set1_ps(-0.0f)); }
MORU_INLINE __m256 times(__m256 d, Half n) { return _mm256_mul_ps(d, _mm256_cvtepi32_ps(n)); }

struct HalfScale {
  static constexpr size_t kBlock = 32, kBlocks = 1, kBytes = 32;
  static constexpr bool kMin = false;
  MORU_INLINE void decode(const uint8_t* p, size_t h, __m256* scale, __m256*) {
    scale[0] = halves(p, h);
  }
};
struct HalfScaleMin {
  static constexpr size_t kBlock = 32, kBlocks = 1, kBytes = 64;
  static constexpr bool kMin = true;
  MORU_INLINE void decode(const uint8_t* p, size_t h, __m256* scale, __m256* min) {
    scale[0] = halves(p, h);
    min[0] = halves(p + 32, h);
  }
};
struct PowerScale {
  static constexpr size_t kBlock = 32, kBlocks = 1, kBytes = 16;
  static constexpr bool kMin = false;
  MORU_INLINE void decode(const uint8_t* p, size_t h, __m256* scale, __m256*) {
    const Half e = _mm256_cvtepu8_epi32(load_8x1(p + 8 * h));
    const Half normal = _mm256_slli_epi32(_mm256_sub_epi32(e, _mm256_set1_epi32(1)), 23);
    const Half subnormal = _mm256_sllv_epi32(_mm256_set1_epi32(0x00200000), e);
    const Half tiny = _mm256_cmpgt_epi32(_mm256_set1_epi32(2), e);
    scale[0] = _mm256_castsi256_ps(_mm256_blendv_epi8(normal, subnormal, tiny));
  }
};

// The sixteen 6-bit values of six().
MORU_INLINE void six_bits(const uint8_t* p, size_t h, Half (&v)[16]) {
  const Half six = _mm256_set1_epi32(63);
  Half rest[3];
  for (int i = 0; i < 3; ++i) {
    const Half word = load_half(p + 64 * i + 32 * h);
    for (int j = 0; j < 5; ++j)
      v[5 * i + j] = _mm256_and_si256(_mm256_srli_epi32(word, 6 * j), six);
    rest[i] = _mm256_srli_epi32(word, 30);
  }
  v[15] = _mm256_or_si256(
      rest[0], _mm256_or_si256(_mm256_slli_epi32(rest[1], 2), _mm256_slli_epi32(rest[2], 4)));
}

struct SixScaleMin {  // Q4_K, Q5_K
  static constexpr size_t kBlock = 32, kBlocks = 8, kBytes = 256;
  static constexpr bool kMin = true;
  MORU_INLINE void decode(const uint8_t* p, size_t h, __m256* scale, __m256* min) {
    const __m256 d = halves(p, h), minus_dmin = negative(halves(p + 32, h));
    Half v[16];
    six_bits(p + 64, h, v);
    for (int b = 0; b < 8; ++b) {
      scale[b] = times(d, v[b]);
      min[b] = times(minus_dmin, v[8 + b]);
    }
  }
};
struct SixScale {  // Q3_K
  static constexpr size_t kBlock = 16, kBlocks = 16, kBytes = 224;
  static constexpr bool kMin = false;
  MORU_INLINE void decode(const uint8_t* p, size_t h, __m256* scale, __m256*) {
    const __m256 d = halves(p, h);
    Half v[16];
    six_bits(p + 32, h, v);
    for (int b = 0; b < 16; ++b) scale[b] = times(d, _mm256_sub_epi32(v[b], _mm256_set1_epi32(32)));
  }
};
struct FourScaleMin {  // Q2_K
  static constexpr size_t kBlock = 16, kBlocks = 16, kBytes = 320;
  static constexpr bool kMin = true;
  MORU_INLINE void decode(const uint8_t* p, size_t h, __m256* scale, __m256* min) {
    const __m256 d = halves(p, h), minus_dmin = negative(halves(p + 32, h));
    for (int b = 0; b < 16; ++b) {
      const Half both = _mm256_cvtepu8_epi32(load_8x1(p + 64 + 16 * b + 8 * h));
      scale[b] = times(d, _mm256_and_si256(both, _mm256_set1_epi32(15)));
      min[b] = times(minus_dmin, _mm256_srli_epi32(both, 4));
    }
  }
};
struct ByteScale {  // Q6_K
  static constexpr size_t kBlock = 16, kBlocks = 16, kBytes = 288;
  static constexpr bool kMin = false;
  MORU_INLINE void decode(const uint8_t* p, size_t h, __m256* scale, __m256*) {
    const __m256 d = halves(p, h);
    for (int b = 0; b < 16; ++b)
      scale[b] = times(d, _mm256_cvtepi8_epi32(load_8x1(p + 32 + 16 * b + 8 * h)));
  }
};
struct SplitScale {  // IQ4_XS
  static constexpr size_t kBlock = 32, kBlocks = 8, kBytes = 128;
  static constexpr bool kMin = false;
  MORU_INLINE void decode(const uint8_t* p, size_t h, __m256* scale, __m256*) {
    const __m256 d = halves(p, h);
    const Half low = load_half(p + 32 + 32 * h);
    const Half high = _mm256_cvtepu16_epi32(load_8x2(p + 96 + 16 * h));
    for (int b = 0; b < 8; ++b) {
      const Half l = _mm256_and_si256(_mm256_srli_epi32(low, 4 * b), _mm256_set1_epi32(15));
      const Half two = _mm256_and_si256(_mm256_srli_epi32(high, 2 * b), _mm256_set1_epi32(3));
      const Half both = _mm256_or_si256(l, _mm256_slli_epi32(two, 4));
      scale[b] = times(d, _mm256_sub_epi32(both, _mm256_set1_epi32(32)));
    }
  }
};

template <typename C, typename S>
struct Format {
  using Codes = C;
  using Scales = S;
};
template <DType kType>
struct FormatOf;
template <>
struct FormatOf<DType::q4_0> : Format<Nibbles<3>, HalfScale> {};
template <>
struct FormatOf<DType::q4_1> : Format<Nibbles<kNoOffset>, HalfScaleMin> {};
template <>
struct FormatOf<DType::q5_0> : Format<FiveBits<4>, HalfScale> {};
template <>
struct FormatOf<DType::q5_1> : Format<FiveBits<kNoOffset>, HalfScaleMin> {};
template <>
struct FormatOf<DType::q8_0> : Format<Bytes, HalfScale> {};
template <>
struct FormatOf<DType::q2_k> : Format<TwoBits, FourScaleMin> {};
template <>
struct FormatOf<DType::q3_k> : Format<ThreeBits, SixScale> {};
template <>
struct FormatOf<DType::q4_k> : Format<Nibbles<kNoOffset>, SixScaleMin> {};
template <>
struct FormatOf<DType::q5_k> : Format<FiveBits<kNoOffset>, SixScaleMin> {};
template <>
struct FormatOf<DType::q6_k> : Format<SixBits, ByteScale> {};
template <>
struct FormatOf<DType::iq4_nl> : Format<TableNibbles<Iq4Table>, HalfScale> {};
template <>
struct FormatOf<DType::iq4_xs> : Format<TableNibbles<Iq4Table>, SplitScale> {};
template <>
struct FormatOf<DType::mxfp4> : Format<TableNibbles<Mxfp4Table>, PowerScale> {};

// ---- packed panels × up to four tokens ----

// The first n of eight rows, or none, or all.
MORU_INLINE Half first_rows(size_t n) {
  const int count = n > 8 ? 8 : static_cast<int>(n);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// `scaled`: by the token's scales already, as sums of 8-bit activations are.
template <bool scaled>
MORU_INLINE void store(float* y, Half rows, bool add, __m256 acc, float scale) {
  if constexpr (scaled) {
    _mm256_maskstore_ps(y, rows, add ? _mm256_add_ps(_mm256_maskload_ps(y, rows), acc) : acc);
    return;
  }
  const __m256 s = _mm256_set1_ps(scale);
  const __m256 out =
      add ? _mm256_fmadd_ps(acc, s, _mm256_maskload_ps(y, rows)) : _mm256_mul_ps(acc, s);
  _mm256_maskstore_ps(y, rows, out);
}

// Adds quads kFirst … kFirst + 3 of a unit.
template <typename C, int kFirst, int kTokens>
MORU_INLINE void add_quads(const uint8_t* unit, const int16_t* x, size_t stride,
                           Half (&dots)[kTokens]) {
  const Half w[4] = {C::template quad<kFirst>(unit), C::template quad<kFirst + 1>(unit),
                     C::template quad<kFirst + 2>(unit), C::template quad<kFirst + 3>(unit)};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Half even = _mm256_and_si256(w[i], _mm256_set1_epi16(255));
    const Half odd = _mm256_srli_epi16(w[i], 8);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      const int16_t* at = x + static_cast<size_t>(t) * stride + 4 * (kFirst + i);
      dots[t] = _mm256_add_epi32(dots[t], _mm256_madd_epi16(even, broadcast(at)));
      dots[t] = _mm256_add_epi32(dots[t], _mm256_madd_epi16(odd, broadcast(at + 2)));
      keep_order(dots[t]);
    }
  }
}

// Where a token's numbers of the block at hand stand.
struct BlockOf {
  const int32_t* sums;
  const float *scales, *scaled_sums;  // 8 bits only
};

// k8: activations have 8 bits. They come as int16 all the same: vpmaddubsw, with codes of eight
// bits, would need as many instructions for the signs as widening does.
template <typename C, typename S, bool k8, int kTokens>
MORU_INLINE void end_block(Half (&dots)[kTokens], __m256 scale, __m256 min, const BlockOf& block,
                           const Tokens& tokens, __m256* acc) {
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) {
    const size_t sum = static_cast<size_t>(t) * tokens.sums_stride;
    Half dot = dots[t];
    if constexpr (C::kOffsetBits != kNoOffset)
      dot = _mm256_sub_epi32(dot, _mm256_slli_epi32(broadcast(block.sums + sum), C::kOffsetBits));
    __m256 scales = scale;
    if constexpr (k8)
      scales = _mm256_mul_ps(
          scale, _mm256_set1_ps(block.scales[static_cast<size_t>(t) * tokens.unit_stride]));
    acc[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), scales, acc[t]);
    if constexpr (S::kMin)
      acc[t] = _mm256_fmadd_ps(min,
                               k8 ? _mm256_set1_ps(block.scaled_sums[sum])
                                  : _mm256_cvtepi32_ps(broadcast(block.sums + sum)),
                               acc[t]);
    dots[t] = _mm256_setzero_si256();
  }
}

// How far ahead of the codes to prefetch; the AVX-512 kernels say why.
constexpr size_t kAheadBytes = 12 << 10;

template <typename C, typename S, bool k8, int kTokens>
void direct_tokens(const Panels& panels, const Tokens& tokens, const Target& y) noexcept {
  constexpr size_t kUnits = S::kBlock * S::kBlocks / kUnitCols;  // of a scale record
  constexpr size_t kEach = kUnitCols / S::kBlock;                // blocks of a unit
  const size_t stride = tokens.stride;
  for (size_t row = 0; row < panels.rows; row += kPanelRows) {
    const uint8_t* record = panels.data + row / kPanelRows * panels.panel_bytes;
    const uint8_t* unit = record + panels.codes_at;
    const uint8_t* ahead = record + kAheadBytes;
    BlockOf block{tokens.sums, tokens.scales, tokens.scaled_sums};
    const int16_t* x = tokens.codes;
    __m256 acc[2][kTokens];
    Half dots[kTokens];
    for (int t = 0; t < kTokens; ++t) {
      acc[0][t] = acc[1][t] = _mm256_setzero_ps();
      dots[t] = _mm256_setzero_si256();
    }
    for (size_t done = 0; done < panels.units; done += kUnits, record += S::kBytes) {
      __m256 scale[2][S::kBlocks], min[2][S::kBlocks];
      for (size_t h = 0; h < 2; ++h) S::decode(record, h, scale[h], min[h]);
#pragma GCC unroll 1
      for (size_t u = 0; u < kUnits; ++u, unit += C::kUnitBytes, x += kUnitCols) {
        constexpr size_t kShare = C::kUnitBytes + S::kBytes / kUnits;
        if (ahead < panels.until) {
          for (size_t line = 0; line < kShare; line += 64)
            _mm_prefetch(reinterpret_cast<const char*>(ahead + line), _MM_HINT_T1);
        }
        ahead += kShare;
        const size_t first = kEach * u, last = kEach * u + kEach - 1;
#pragma GCC unroll 1
        for (size_t h = 0; h < 2; ++h) {
          asm("" : "+r"(x));  // or its broadcasts would be kept for both halves, in memory
          add_quads<C, 0>(unit + 32 * h, x, stride, dots);
          if constexpr (S::kBlock == 16)
            end_block<C, S, k8>(dots, scale[h][first], min[h][first], block, tokens, acc[h]);
          add_quads<C, 4>(unit + 32 * h, x, stride, dots);
          const BlockOf end{block.sums + kEach - 1, block.scales,
                            k8 ? block.scaled_sums + kEach - 1 : nullptr};
          end_block<C, S, k8>(dots, scale[h][last], min[h][last], end, tokens, acc[h]);
        }
        block.sums += kEach;
        if constexpr (k8) {
          block.scaled_sums += kEach;
          ++block.scales;
        }
      }
    }
    const size_t left = panels.rows - row;
    for (int t = 0; t < kTokens; ++t) {
      float* out = y.y + static_cast<size_t>(t) * y.ldy + row;
      const float by = k8 ? 1 : tokens.scales[t];
      store<k8>(out, first_rows(left), y.add, acc[0][t], by);
      if (left > 8) store<k8>(out + 8, first_rows(left - 8), y.add, acc[1][t], by);
    }
  }
}

template <DType kType, bool k8>
void direct(const Panels& panels, const Tokens& tokens, const Target& y) noexcept {
  using C = typename FormatOf<kType>::Codes;
  using S = typename FormatOf<kType>::Scales;
  static_assert(C::kUnitBytes == kPanelFormat[panel_format_index(kType)].unit_bytes);
  static_assert(S::kBytes == kPanelFormat[panel_format_index(kType)].scale_bytes);
  static_assert(S::kMin == kPanelFormat[panel_format_index(kType)].has_min);
  switch (tokens.count) {
    case 1:
      return direct_tokens<C, S, k8, 1>(panels, tokens, y);
    case 2:
      return direct_tokens<C, S, k8, 2>(panels, tokens, y);
    case 3:
      return direct_tokens<C, S, k8, 3>(panels, tokens, y);
    default:
      return direct_tokens<C, S, k8, 4>(panels, tokens, y);
  }
}

// ---- unpacked stripes ----

template <typename C, int q>
MORU_INLINE void unpack_quad(const uint8_t* unit, size_t h, size_t lanes, int16_t* codes) {
  const Half quad = C::template quad<q>(unit + 32 * h);
  Half even = _mm256_and_si256(quad, _mm256_set1_epi16(255));
  Half odd = _mm256_srli_epi16(quad, 8);
  if constexpr (C::kOffsetBits != kNoOffset) {
    const Half offset = _mm256_set1_epi16(1 << C::kOffsetBits);
    even = _mm256_sub_epi16(even, offset);
    odd = _mm256_sub_epi16(odd, offset);
  }
  int16_t* at = codes + 2 * lanes * (2 * q) + 16 * h;
  store_half(at, even);
  store_half(at + 2 * lanes, odd);
}

template <DType kType>
void unpack(const uint8_t* record, const uint8_t* unit, size_t units, const Stripe& out) noexcept {
  using C = typename FormatOf<kType>::Codes;
  using S = typename FormatOf<kType>::Scales;
  constexpr size_t kUnits = S::kBlock * S::kBlocks / kUnitCols;
  const size_t lanes = out.lanes;
  int16_t* codes = out.codes;
  for (size_t u = 0; u < units; ++u, unit += C::kUnitBytes, codes += kUnitCols * lanes)
    for (size_t h = 0; h < 2; ++h) {
      unpack_quad<C, 0>(unit, h, lanes, codes);
      unpack_quad<C, 1>(unit, h, lanes, codes);
      unpack_quad<C, 2>(unit, h, lanes, codes);
      unpack_quad<C, 3>(unit, h, lanes, codes);
      unpack_quad<C, 4>(unit, h, lanes, codes);
      unpack_quad<C, 5>(unit, h, lanes, codes);
      unpack_quad<C, 6>(unit, h, lanes, codes);
      unpack_quad<C, 7>(unit, h, lanes, codes);
    }
  float* scales = out.scales;
  float* mins = out.mins;
  for (size_t done = 0; done < units; done += kUnits, record += S::kBytes) {
    for (size_t h = 0; h < 2; ++h) {
      __m256 scale[S::kBlocks], min[S::kBlocks];
      S::decode(record, h, scale, min);
      for (size_t b = 0; b < S::kBlocks; ++b) {
        _mm256_storeu_ps(scales + b * lanes + 8 * h, scale[b]);
        if constexpr (S::kMin) _mm256_storeu_ps(mins + b * lanes + 8 * h, min[b]);
      }
    }
    scales += S::kBlocks * lanes;
    if constexpr (S::kMin) mins += S::kBlocks * lanes;
  }
}

// Asks for a line of the result that will be written; the AVX-512 kernels say why.
MORU_INLINE void own_soon(const float* p) { asm volatile("prefetchw %0" : : "m"(*p)); }

// 16 rows × kTokens ≤ 4 tokens: 8 integer sums, 2 weights, a broadcast and a product of the 16
// registers; float sums stay in memory, touched once a block.
template <size_t kBlock, bool kMin, bool k8, int kTokens>
MORU_INLINE void stripe_tile(const Stripe& w, size_t cols, size_t lane, size_t rows,
                             const Tokens& tokens, size_t first, const Target& y) {
  const int16_t* x = tokens.codes + first * tokens.stride;
  const int32_t* sums = tokens.sums + first * tokens.sums_stride;
  const float* scaled_sums = k8 ? tokens.scaled_sums + first * tokens.sums_stride : nullptr;
  const float* unit_scales = k8 ? tokens.scales + first * tokens.unit_stride : nullptr;
  const size_t stride = tokens.stride, sums_stride = tokens.sums_stride;
  const int16_t* codes = w.codes + 2 * lane;
  const float *scales = w.scales + lane, *mins = w.mins + lane;
  __m256 acc[kTokens][2];
  for (int t = 0; t < kTokens; ++t) {
    acc[t][0] = acc[t][1] = _mm256_setzero_ps();
    own_soon(y.y + (first + static_cast<size_t>(t)) * y.ldy + lane);
  }
  const size_t blocks = cols / kBlock;
  for (size_t block = 0; block < blocks; ++block) {
    Half dots[kTokens][2];
    for (int t = 0; t < kTokens; ++t) dots[t][0] = dots[t][1] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (size_t pair = 0; pair < kBlock / 2; ++pair) {
      const Half w0 = load_half(codes + 64 * pair), w1 = load_half(codes + 64 * pair + 16);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        const Half both = broadcast(x + static_cast<size_t>(t) * stride + 2 * pair);
        dots[t][0] = _mm256_add_epi32(dots[t][0], _mm256_madd_epi16(w0, both));
        dots[t][1] = _mm256_add_epi32(dots[t][1], _mm256_madd_epi16(w1, both));
      }
    }
    const __m256 scale0 = _mm256_loadu_ps(scales), scale1 = _mm256_loadu_ps(scales + 8);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      __m256 s0 = scale0, s1 = scale1;
      if constexpr (k8) {
        const __m256 unit =
            _mm256_set1_ps(unit_scales[static_cast<size_t>(t) * tokens.unit_stride]);
        s0 = _mm256_mul_ps(s0, unit);
        s1 = _mm256_mul_ps(s1, unit);
      }
      acc[t][0] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[t][0]), s0, acc[t][0]);
      acc[t][1] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[t][1]), s1, acc[t][1]);
    }
    if constexpr (kMin) {
      const __m256 min0 = _mm256_loadu_ps(mins), min1 = _mm256_loadu_ps(mins + 8);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        const size_t at = static_cast<size_t>(t) * sums_stride;
        const __m256 sum =
            k8 ? _mm256_set1_ps(scaled_sums[at]) : _mm256_cvtepi32_ps(broadcast(sums + at));
        acc[t][0] = _mm256_fmadd_ps(min0, sum, acc[t][0]);
        acc[t][1] = _mm256_fmadd_ps(min1, sum, acc[t][1]);
      }
      mins += kStripeRows;
      ++sums;
      if constexpr (k8) ++scaled_sums;
    }
    if (k8 && (kBlock == 32 || block % 2 == 1)) ++unit_scales;
    codes += kStripeRows * kBlock;
    x += kBlock;
    scales += kStripeRows;
  }
  for (int t = 0; t < kTokens; ++t) {
    float* out = y.y + (first + static_cast<size_t>(t)) * y.ldy + lane;
    const float by = k8 ? 1 : tokens.scales[first + static_cast<size_t>(t)];
    store<k8>(out, first_rows(rows), y.add, acc[t][0], by);
    if (rows > 8) store<k8>(out + 8, first_rows(rows - 8), y.add, acc[t][1], by);
  }
}

template <size_t kBlock, bool kMin, bool k8>
void stripe(const Stripe& w, size_t cols, size_t rows, const Tokens& x, const Target& y) noexcept {
  // Tokens inside, so that the 16 rows' weights of a tile are still in L2, tokens in L1.
  for (size_t t = 0; t < x.count; t += 4)
    for (size_t lane = 0; lane < rows; lane += 16) {
      const size_t left = rows - lane;
      switch (x.count - t) {
        case 1:
          stripe_tile<kBlock, kMin, k8, 1>(w, cols, lane, left, x, t, y);
          break;
        case 2:
          stripe_tile<kBlock, kMin, k8, 2>(w, cols, lane, left, x, t, y);
          break;
        case 3:
          stripe_tile<kBlock, kMin, k8, 3>(w, cols, lane, left, x, t, y);
          break;
        default:
          stripe_tile<kBlock, kMin, k8, 4>(w, cols, lane, left, x, t, y);
          break;
      }
    }
}

// ---- values and activations ----

// Turns eight halves (pair i, row r) into eight (row r, pair i).
MORU_INLINE void transpose(Half (&v)[8]) {
  Half a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
    a[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  // b[4g + s] holds in its 128-bit part p the pairs 4g … 4g + 3 of row 4p + s.
  for (int s = 0; s < 4; ++s) {
    v[s] = _mm256_permute2x128_si256(b[s], b[4 + s], 0x20);
    v[4 + s] = _mm256_permute2x128_si256(b[s], b[4 + s], 0x31);
  }
}

void dequantize(const Stripe& w, size_t cols, size_t block, size_t first, size_t count, float* out,
                size_t ld) noexcept {
  for (size_t c = 0; c < cols; c += 16)
    for (size_t h = 0; h < 2; ++h) {
      Half v[8];
      for (size_t i = 0; i < 8; ++i) v[i] = load_half(w.codes + 2 * (c / 2 + i) * w.lanes + 16 * h);
      transpose(v);
      for (size_t i = 0; i < 8; ++i) {
        const size_t r = 8 * h + i;
        if (r < first || r >= first + count) continue;
        const size_t at = c / block * w.lanes + r;
        const __m128i part[2] = {_mm256_castsi256_si128(v[i]), _mm256_extracti128_si256(v[i], 1)};
        for (size_t s = 0; s < 2; ++s) {
          __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(part[s])),
                                       _mm256_set1_ps(w.scales[at]));
          if (w.mins != nullptr) value = _mm256_add_ps(value, _mm256_set1_ps(w.mins[at]));
          _mm256_storeu_ps(out + (r - first) * ld + c + 8 * s, value);
        }
      }
    }
}

MORU_INLINE uint32_t max_of(Half v) {
  __m128i four = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  four = _mm_max_epu32(four, _mm_shuffle_epi32(four, _MM_SHUFFLE(1, 0, 3, 2)));
  four = _mm_max_epu32(four, _mm_shuffle_epi32(four, _MM_SHUFFLE(2, 3, 0, 1)));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(four));
}
MORU_INLINE int32_t sum_of_16(Half codes) {
  const Half pairs = _mm256_madd_epi16(codes, _mm256_set1_epi16(1));
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, _MM_SHUFFLE(1, 0, 3, 2)));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, _MM_SHUFFLE(2, 3, 0, 1)));
  return _mm_cvtsi128_si32(sum);
}

float quantize(const float* x, size_t k, int16_t* codes, int8_t* digits, int32_t* sums16,
               int32_t* sums32) noexcept {
  const Half magnitude = _mm256_set1_epi32(0x7fffffff);
  Half most = _mm256_setzero_si256();
  for (size_t i = 0; i < k; i += 8)
    most = _mm256_max_epu32(most, _mm256_and_si256(load_half(x + i), magnitude));
  const uint32_t largest = max_of(most);
  float max;
  std::memcpy(&max, &largest, sizeof max);
  const bool finite = largest < 0x7f800000u, usable = finite && max >= 0x1p-100f;
  const Half mask = _mm256_set1_epi32(usable ? -1 : 0);
  const __m256 inverse = _mm256_set1_ps(usable ? static_cast<float>(kMaxCode) / max : 0);
  // Bytes of each quad of codes (low, high, low, high …) to its digits in a word's order.
  const Half to_high = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(1, 5, 3, 7, -1, -1, -1, -1, 9, 13, 11, 15, -1, -1, -1, -1));
  const Half to_low = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(-1, -1, -1, -1, 0, 4, 2, 6, -1, -1, -1, -1, 8, 12, 10, 14));
  for (size_t i = 0; i < k; i += 16) {
    Half n[2];
    for (size_t h = 0; h < 2; ++h)
      n[h] = _mm256_and_si256(
          mask, _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * h), inverse)));
    const Half both =
        _mm256_permute4x64_epi64(_mm256_packs_epi32(n[0], n[1]), _MM_SHUFFLE(3, 1, 2, 0));
    store_half(codes + i, both);
    if (digits != nullptr) {
      const Half high =
          _mm256_shuffle_epi8(_mm256_add_epi16(both, _mm256_set1_epi16(128)), to_high);
      store_half(digits + 2 * i, _mm256_or_si256(high, _mm256_shuffle_epi8(both, to_low)));
    }
    sums16[i / 16] = sum_of_16(both);
  }
  for (size_t b = 0; b < k / 32; ++b) sums32[b] = sums16[2 * b] + sums16[2 * b + 1];
  if (!finite) return __builtin_nanf("");
  return usable ? max / static_cast<float>(kMaxCode) : 0;
}

void quantize8(const float* x, size_t k, const Row8& out) noexcept {
  const Half magnitude = _mm256_set1_epi32(0x7fffffff);
  for (size_t u = 0; u < k / kUnitCols; ++u, x += kUnitCols) {
    Half most = _mm256_setzero_si256();
    for (size_t i = 0; i < kUnitCols; i += 8)
      most = _mm256_max_epu32(most, _mm256_and_si256(load_half(x + i), magnitude));
    const uint32_t largest = max_of(most);
    float max;
    std::memcpy(&max, &largest, sizeof max);
    const bool finite = largest < 0x7f800000u, usable = finite && max >= 0x1p-100f;
    const Half mask = _mm256_set1_epi32(usable ? -1 : 0);
    const __m256 inverse = _mm256_set1_ps(usable ? kMaxCode8 / max : 0);
    const float scale = !finite ? __builtin_nanf("") : usable ? max / kMaxCode8 : 0;
    out.scales[u] = scale;
    for (size_t h = 0; h < 2; ++h) {
      Half n[2];
      for (size_t i = 0; i < 2; ++i)
        n[i] = _mm256_and_si256(
            mask, _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 16 * h + 8 * i), inverse)));
      const Half both =
          _mm256_permute4x64_epi64(_mm256_packs_epi32(n[0], n[1]), _MM_SHUFFLE(3, 1, 2, 0));
      store_half(out.codes + u * kUnitCols + 16 * h, both);
      out.sums16[2 * u + h] = sum_of_16(both);
      out.scaled16[2 * u + h] = static_cast<float>(out.sums16[2 * u + h]) * scale;
    }
    out.sums32[u] = out.sums16[2 * u] + out.sums16[2 * u + 1];
    out.scaled32[u] = static_cast<float>(out.sums32[u]) * scale;
  }
}

template <DType kType>
constexpr FormatKernels kFormat = {direct<kType, false>, direct<kType, true>, unpack<kType>,
                                   unpack<kType>};

constexpr QuantKernels kKernels = {
    {kFormat<DType::q4_0>, kFormat<DType::q4_1>, kFormat<DType::q5_0>, kFormat<DType::q5_1>,
     kFormat<DType::q8_0>, kFormat<DType::q2_k>, kFormat<DType::q3_k>, kFormat<DType::q4_k>,
     kFormat<DType::q5_k>, kFormat<DType::q6_k>, kFormat<DType::iq4_nl>, kFormat<DType::iq4_xs>,
     kFormat<DType::mxfp4>},
    {{stripe<32, false, false>, stripe<32, true, false>},
     {stripe<16, false, false>, stripe<16, true, false>}},
    {{stripe<32, false, true>, stripe<32, true, true>},
     {stripe<16, false, true>, stripe<16, true, true>}},
    dequantize,
    quantize,
    quantize8,
    true,
};

}  // namespace

const QuantKernels& quant_kernels_avx2() noexcept { return kKernels; }

}  // namespace moru
