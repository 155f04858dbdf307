// The exact product with AVX-512 VNNI. This file alone is built with these instructions, so it
// shares no inline function with the rest of the program and instantiates no std template.
//
// Packed weights times few tokens: codes stay unsigned bytes and a token's 16 bits are two signed
// digits, so a word of 64 codes costs two vpdpbusd and no widening; a weight's offset is taken off
// the block's dot by its sum of token codes. Many tokens: a stripe is widened to int16 once, then
// every vpdpwssd does 32 whole products. Both do 32 products a cycle where the port takes one
// 512-bit dot a cycle, and both are exact.
#include <immintrin.h>

#include <cstring>

#include "engine/quant_kernels.h"

// GCC 12 takes the undefined vectors inside its own intrinsics for a mistake of ours.
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace moru {
namespace {

#define MORU_INLINE [[gnu::always_inline]] static inline

using Word = __m512i;

MORU_INLINE Word load_word(const void* p) { return _mm512_loadu_si512(p); }

// Four bytes of a token (two codes, or four digits), for every row.
MORU_INLINE Word broadcast(const void* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return _mm512_set1_epi32(four);
}

// Bits of a where the mask has ones, else of b.
MORU_INLINE Word select(Word mask, Word a, Word b) {
  return _mm512_ternarylogic_epi32(mask, a, b, 0xca);
}

// Shifts right by kBits, or left where it is negative; bits that cross bytes are masked by callers.
template <int kBits>
MORU_INLINE Word shifted(Word v) {
  if constexpr (kBits > 0)
    return _mm512_srli_epi16(v, kBits);
  else if constexpr (kBits < 0)
    return _mm512_slli_epi16(v, -kBits);
  else
    return v;
}

// ---- code records: quad<q> gives the word of quad q's codes; weight = code − 2^kOffsetBits ----

constexpr int kNoOffset = -1;

template <int q>
MORU_INLINE Word nibble(const uint8_t* unit) {
  return _mm512_and_si512(shifted<4 * (q % 2)>(load_word(unit + 64 * (q / 2))),
                          _mm512_set1_epi8(15));
}

template <int kOffset>
struct Nibbles {
  static constexpr size_t kUnitBytes = 256;
  static constexpr int kOffsetBits = kOffset;
  template <int q>
  MORU_INLINE Word quad(const uint8_t* unit) {
    return nibble<q>(unit);
  }
};

// The table of a format whose weights are not evenly spaced, plus its offset, four times.
#define MORU_FOUR_TIMES(...) \
  { __VA_ARGS__, __VA_ARGS__, __VA_ARGS__, __VA_ARGS__ }
struct Iq4Table {  // + 128
  static constexpr int kOffsetBits = 7;
  alignas(64) static constexpr uint8_t kValues[64] = MORU_FOUR_TIMES(1, 24, 45, 63, 79, 93, 106,
                                                                     118, 129, 141, 153, 166, 181,
                                                                     197, 217, 241);
};
struct Mxfp4Table {  // + 16
  static constexpr int kOffsetBits = 4;
  alignas(64) static constexpr uint8_t kValues[64] = MORU_FOUR_TIMES(16, 17, 18, 19, 20, 22, 24, 28,
                                                                     16, 15, 14, 13, 12, 10, 8, 4);
};
template <typename Table>
struct TableNibbles {
  static constexpr size_t kUnitBytes = 256;
  static constexpr int kOffsetBits = Table::kOffsetBits;
  template <int q>
  MORU_INLINE Word quad(const uint8_t* unit) {
    return _mm512_shuffle_epi8(load_word(Table::kValues), nibble<q>(unit));
  }
};

template <int kOffset>
struct FiveBits {
  static constexpr size_t kUnitBytes = 320;
  static constexpr int kOffsetBits = kOffset;
  template <int q>
  MORU_INLINE Word quad(const uint8_t* unit) {
    const Word low = shifted<4 * (q % 2)>(load_word(unit + 64 * (q / 2)));
    const Word high =
        shifted < q < 4 ? q : q - 8 > (load_word(unit + 256));  // bit (4 + q) & 7 to 4
    return _mm512_and_si512(select(_mm512_set1_epi8(15), low, high), _mm512_set1_epi8(31));
  }
};

struct SixBits {
  static constexpr size_t kUnitBytes = 384;
  static constexpr int kOffsetBits = 5;
  template <int q>
  MORU_INLINE Word quad(const uint8_t* unit) {
    constexpr int c = q % 4, kShift = c < 2 ? 2 * c : 2 * c - 8;  // bit (4 + 2c) & 7 to 4
    const Word low = shifted<4 * (q % 2)>(load_word(unit + 64 * (q / 2)));
    const Word high = shifted<kShift>(load_word(unit + 256 + 64 * (q / 4)));
    return _mm512_and_si512(select(_mm512_set1_epi8(15), low, high), _mm512_set1_epi8(63));
  }
};

struct TwoBits {
  static constexpr size_t kUnitBytes = 128;
  static constexpr int kOffsetBits = kNoOffset;
  template <int q>
  MORU_INLINE Word quad(const uint8_t* unit) {
    return _mm512_and_si512(shifted<2 * (q % 4)>(load_word(unit + 64 * (q / 4))),
                            _mm512_set1_epi8(3));
  }
};

struct ThreeBits {
  static constexpr size_t kUnitBytes = 192;
  static constexpr int kOffsetBits = 2;
  template <int q>
  MORU_INLINE Word quad(const uint8_t* unit) {
    const Word low = shifted<2 * (q % 4)>(load_word(unit + 64 * (q / 4)));
    const Word high =
        shifted < q < 6 ? q : q - 8 > (load_word(unit + 128));  // bit (2 + q) & 7 to 2
    return _mm512_and_si512(select(_mm512_set1_epi8(3), low, high), _mm512_set1_epi8(7));
  }
};

struct Bytes {
  static constexpr size_t kUnitBytes = 512;
  static constexpr int kOffsetBits = 7;
  template <int q>
  MORU_INLINE Word quad(const uint8_t* unit) {
    return load_word(unit + 64 * q);
  }
};

// ---- scale records: decode() gives scale and minimum of each block of a record ----

MORU_INLINE __m512 halves(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
MORU_INLINE Word bytes_to_i32(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
MORU_INLINE __m512 negative(__m512 v) {
  return _mm512_castsi512_ps(
      _mm512_xor_si512(_mm512_castps_si512(v), _mm512_set1_epi32(static_cast<int>(0x80000000u))));
}
MORU_INLINE __m512 times(__m512 d, Word n) { return _mm512_mul_ps(d, _mm512_cvtepi32_ps(n)); }

struct HalfScale {
  static constexpr size_t kBlock = 32, kBlocks = 1, kBytes = 32;
  static constexpr bool kMin = false;
  MORU_INLINE void decode(const uint8_t* p, __m512* scale, __m512*) { scale[0] = halves(p); }
};
struct HalfScaleMin {
  static constexpr size_t kBlock = 32, kBlocks = 1, kBytes = 64;
  static constexpr bool kMin = true;
  MORU_INLINE void decode(const uint8_t* p, __m512* scale, __m512* min) {
    scale[0] = halves(p);
    min[0] = halves(p + 32);
  }
};
struct PowerScale {
  static constexpr size_t kBlock = 32, kBlocks = 1, kBytes = 16;
  static constexpr bool kMin = false;
  MORU_INLINE void decode(const uint8_t* p, __m512* scale, __m512*) {
    const Word e = bytes_to_i32(p);
    const Word normal = _mm512_slli_epi32(_mm512_sub_epi32(e, _mm512_set1_epi32(1)), 23);
    const Word subnormal = _mm512_sllv_epi32(_mm512_set1_epi32(0x00200000), e);
    const __mmask16 tiny = _mm512_cmplt_epi32_mask(e, _mm512_set1_epi32(2));
    scale[0] = _mm512_castsi512_ps(_mm512_mask_mov_epi32(normal, tiny, subnormal));
  }
};

// The sixteen 6-bit values of six().
MORU_INLINE void six_bits(const uint8_t* p, Word (&v)[16]) {
  const Word six = _mm512_set1_epi32(63);
  Word rest[3];
  for (int i = 0; i < 3; ++i) {
    const Word word = load_word(p + 64 * i);
    for (int j = 0; j < 5; ++j)
      v[5 * i + j] = _mm512_and_si512(_mm512_srli_epi32(word, static_cast<unsigned>(6 * j)), six);
    rest[i] = _mm512_srli_epi32(word, 30);
  }
  v[15] = _mm512_or_si512(
      rest[0], _mm512_or_si512(_mm512_slli_epi32(rest[1], 2), _mm512_slli_epi32(rest[2], 4)));
}

struct SixScaleMin {  // Q4_K, Q5_K
  static constexpr size_t kBlock = 32, kBlocks = 8, kBytes = 256;
  static constexpr bool kMin = true;
  MORU_INLINE void decode(const uint8_t* p, __m512* scale, __m512* min) {
    const __m512 d = halves(p), minus_dmin = negative(halves(p + 32));
    Word v[16];
    six_bits(p + 64, v);
    for (int b = 0; b < 8; ++b) {
      scale[b] = times(d, v[b]);
      min[b] = times(minus_dmin, v[8 + b]);
    }
  }
};
struct SixScale {  // Q3_K
  static constexpr size_t kBlock = 16, kBlocks = 16, kBytes = 224;
  static constexpr bool kMin = false;
  MORU_INLINE void decode(const uint8_t* p, __m512* scale, __m512*) {
    const __m512 d = halves(p);
    Word v[16];
    six_bits(p + 32, v);
    for (int b = 0; b < 16; ++b) scale[b] = times(d, _mm512_sub_epi32(v[b], _mm512_set1_epi32(32)));
  }
};
struct FourScaleMin {  // Q2_K
  static constexpr size_t kBlock = 16, kBlocks = 16, kBytes = 320;
  static constexpr bool kMin = true;
  MORU_INLINE void decode(const uint8_t* p, __m512* scale, __m512* min) {
    const __m512 d = halves(p), minus_dmin = negative(halves(p + 32));
    for (int b = 0; b < 16; ++b) {
      const Word both = bytes_to_i32(p + 64 + 16 * b);
      scale[b] = times(d, _mm512_and_si512(both, _mm512_set1_epi32(15)));
      min[b] = times(minus_dmin, _mm512_srli_epi32(both, 4));
    }
  }
};
struct ByteScale {  // Q6_K
  static constexpr size_t kBlock = 16, kBlocks = 16, kBytes = 288;
  static constexpr bool kMin = false;
  MORU_INLINE void decode(const uint8_t* p, __m512* scale, __m512*) {
    const __m512 d = halves(p);
    for (int b = 0; b < 16; ++b)
      scale[b] = times(d, _mm512_cvtepi8_epi32(
                              _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 32 + 16 * b))));
  }
};
struct SplitScale {  // IQ4_XS
  static constexpr size_t kBlock = 32, kBlocks = 8, kBytes = 128;
  static constexpr bool kMin = false;
  MORU_INLINE void decode(const uint8_t* p, __m512* scale, __m512*) {
    const __m512 d = halves(p);
    const Word low = load_word(p + 32);
    const Word high =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 96)));
    for (unsigned b = 0; b < 8; ++b) {
      const Word l = _mm512_and_si512(_mm512_srli_epi32(low, 4 * b), _mm512_set1_epi32(15));
      const Word h = _mm512_and_si512(_mm512_srli_epi32(high, 2 * b), _mm512_set1_epi32(3));
      const Word both = _mm512_or_si512(l, _mm512_slli_epi32(h, 4));
      scale[b] = times(d, _mm512_sub_epi32(both, _mm512_set1_epi32(32)));
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

template <bool k8>
MORU_INLINE void store(float* y, __mmask16 rows, bool add, __m512 acc, float scale) {
  if constexpr (k8) {  // scaled already
    _mm512_mask_storeu_ps(y, rows, add ? _mm512_add_ps(_mm512_maskz_loadu_ps(rows, y), acc) : acc);
    return;
  }
  const __m512 s = _mm512_set1_ps(scale);
  const __m512 out =
      add ? _mm512_fmadd_ps(acc, s, _mm512_maskz_loadu_ps(rows, y)) : _mm512_mul_ps(acc, s);
  _mm512_mask_storeu_ps(y, rows, out);
}

MORU_INLINE __mmask16 first_rows(size_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << n) - 1);
}

// How activations enter a dot: as two digits of a token's 16 bits, or as 8 bits.
struct Bits16 {
  static constexpr bool k8 = false;
  static constexpr size_t kQuadBytes = 8;
  struct Dot {
    Word high, low;
  };
  MORU_INLINE Dot zero() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
  MORU_INLINE void add(Dot& dot, int, Word w, const int8_t* quad) {
    dot.high = _mm512_dpbusd_epi32(dot.high, w, broadcast(quad));
    dot.low = _mm512_dpbusd_epi32(dot.low, w, broadcast(quad + 4));
  }
  MORU_INLINE Word sum(const Dot& dot) {
    return _mm512_add_epi32(_mm512_slli_epi32(dot.high, 8), dot.low);
  }
};
struct Bits8 {
  static constexpr bool k8 = true;
  static constexpr size_t kQuadBytes = 4;
  struct Dot {  // two, or each dot would wait for the one before it
    Word even, odd;
  };
  MORU_INLINE Dot zero() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
  MORU_INLINE void add(Dot& dot, int i, Word w, const int8_t* quad) {
    Word& sum = i % 2 == 0 ? dot.even : dot.odd;
    sum = _mm512_dpbusd_epi32(sum, w, broadcast(quad));
  }
  MORU_INLINE Word sum(const Dot& dot) { return _mm512_add_epi32(dot.even, dot.odd); }
};

// Adds quads kFirst … kFirst + 3 of a unit.
template <typename C, typename A, int kFirst, int kTokens>
MORU_INLINE void add_quads(const uint8_t* unit, const int8_t* x, size_t stride,
                           typename A::Dot (&dots)[kTokens]) {
  const Word w[4] = {C::template quad<kFirst>(unit), C::template quad<kFirst + 1>(unit),
                     C::template quad<kFirst + 2>(unit), C::template quad<kFirst + 3>(unit)};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t)
      A::add(dots[t], i, w[i],
             x + static_cast<size_t>(t) * stride + A::kQuadBytes * static_cast<size_t>(kFirst + i));
}

// Where a token's numbers of the block at hand stand.
struct BlockOf {
  const int32_t* sums;
  const float *scales, *scaled_sums;  // 8 bits only
};

template <typename C, typename S, typename A, int kTokens>
MORU_INLINE void end_block(typename A::Dot (&dots)[kTokens], __m512 scale, __m512 min,
                           const BlockOf& block, const Tokens& tokens, __m512 (&acc)[kTokens]) {
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) {
    const size_t sum = static_cast<size_t>(t) * tokens.sums_stride;
    Word dot = A::sum(dots[t]);
    if constexpr (C::kOffsetBits != kNoOffset)
      dot = _mm512_sub_epi32(dot, _mm512_slli_epi32(broadcast(block.sums + sum), C::kOffsetBits));
    __m512 scales = scale;
    if constexpr (A::k8)
      scales = _mm512_mul_ps(
          scale, _mm512_set1_ps(block.scales[static_cast<size_t>(t) * tokens.unit_stride]));
    acc[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scales, acc[t]);
    if constexpr (S::kMin)
      acc[t] = _mm512_fmadd_ps(min,
                               A::k8 ? _mm512_set1_ps(block.scaled_sums[sum])
                                     : _mm512_cvtepi32_ps(broadcast(block.sums + sum)),
                               acc[t]);
    dots[t] = A::zero();
  }
}

// How far ahead of the codes to prefetch into L2, and how: the processor's own prefetchers do not
// keep up with a loop that does this much between two lines (one thread, Q4_0: 12 GB/s without, 28
// with it). Panels follow each other, so what lies ahead is the next panels' scales and codes.
constexpr size_t kAheadBytes = 12 << 10;

template <typename C, typename S, typename A, int kTokens>
void direct_tokens(const Panels& panels, const Tokens& tokens, const Target& y) noexcept {
  constexpr size_t kUnits = S::kBlock * S::kBlocks / kUnitCols;  // of a scale record
  constexpr size_t kEach = kUnitCols / S::kBlock;                // blocks of a unit
  const size_t stride = tokens.stride * A::kQuadBytes / 4;
  for (size_t row = 0; row < panels.rows; row += kPanelRows) {
    const uint8_t* record = panels.data + row / kPanelRows * panels.panel_bytes;
    const uint8_t* unit = record + panels.codes_at;
    const uint8_t* ahead = record + kAheadBytes;
    BlockOf block{tokens.sums, tokens.scales, tokens.scaled_sums};
    const int8_t* x = tokens.digits;
    __m512 acc[kTokens];
    typename A::Dot dots[kTokens];
    for (int t = 0; t < kTokens; ++t) {
      acc[t] = _mm512_setzero_ps();
      dots[t] = A::zero();
    }
    const auto end = [&](const __m512& scale, const __m512& min) __attribute__((always_inline)) {
      end_block<C, S, A>(dots, scale, min, block, tokens, acc);
      ++block.sums;
      if constexpr (A::k8) ++block.scaled_sums;
    };
    for (size_t done = 0; done < panels.units; done += kUnits, record += S::kBytes) {
      __m512 scale[S::kBlocks], min[S::kBlocks];
      S::decode(record, scale, min);
#pragma GCC unroll 1
      for (size_t u = 0; u < kUnits; ++u, unit += C::kUnitBytes, x += 8 * A::kQuadBytes) {
        constexpr size_t kShare = C::kUnitBytes + S::kBytes / kUnits;
        if (ahead < panels.until) {
          for (size_t line = 0; line < kShare; line += 64)
            _mm_prefetch(reinterpret_cast<const char*>(ahead + line), _MM_HINT_T1);
        }
        ahead += kShare;
        add_quads<C, A, 0>(unit, x, stride, dots);
        if constexpr (S::kBlock == 16) end(scale[2 * u], min[2 * u]);
        add_quads<C, A, 4>(unit, x, stride, dots);
        end(scale[kEach * u + kEach - 1], min[kEach * u + kEach - 1]);
        if constexpr (A::k8) ++block.scales;
      }
    }
    for (int t = 0; t < kTokens; ++t)
      store<A::k8>(y.y + static_cast<size_t>(t) * y.ldy + row, first_rows(panels.rows - row), y.add,
                   acc[t], A::k8 ? 1 : tokens.scales[t]);
  }
}

template <DType kType, typename A>
void direct(const Panels& panels, const Tokens& tokens, const Target& y) noexcept {
  using C = typename FormatOf<kType>::Codes;
  using S = typename FormatOf<kType>::Scales;
  static_assert(C::kUnitBytes == kPanelFormat[panel_format_index(kType)].unit_bytes);
  static_assert(S::kBytes == kPanelFormat[panel_format_index(kType)].scale_bytes);
  static_assert(S::kMin == kPanelFormat[panel_format_index(kType)].has_min);
  switch (tokens.count) {
    case 1:
      return direct_tokens<C, S, A, 1>(panels, tokens, y);
    case 2:
      return direct_tokens<C, S, A, 2>(panels, tokens, y);
    case 3:
      return direct_tokens<C, S, A, 3>(panels, tokens, y);
    default:
      return direct_tokens<C, S, A, 4>(panels, tokens, y);
  }
}

// ---- unpacked stripes ----

// A quad's words of int16: columns 0 and 1, then 2 and 3.
template <typename C>
MORU_INLINE void put_quad(Word quad, size_t lanes, int16_t* codes) {
  Word even = _mm512_and_si512(quad, _mm512_set1_epi16(255));
  Word odd = _mm512_srli_epi16(quad, 8);
  if constexpr (C::kOffsetBits != kNoOffset) {
    const Word offset = _mm512_set1_epi16(1 << (C::kOffsetBits & 15));
    even = _mm512_sub_epi16(even, offset);
    odd = _mm512_sub_epi16(odd, offset);
  }
  _mm512_storeu_si512(codes, even);
  _mm512_storeu_si512(codes + 2 * lanes, odd);
}
// The same as bytes, weight + 128.
template <typename C>
MORU_INLINE void put_quad8(Word quad, int16_t* codes) {
  constexpr int kMore = C::kOffsetBits == kNoOffset ? 128 : 128 - (1 << (C::kOffsetBits & 15));
  _mm512_storeu_si512(codes, _mm512_add_epi8(quad, _mm512_set1_epi8(static_cast<char>(kMore))));
}

template <DType kType, typename A>
void unpack(const uint8_t* record, const uint8_t* unit, size_t units, const Stripe& out) noexcept {
  using C = typename FormatOf<kType>::Codes;
  using S = typename FormatOf<kType>::Scales;
  constexpr size_t kUnits = S::kBlock * S::kBlocks / kUnitCols;
  const size_t lanes = out.lanes;
  int16_t* codes = out.codes;
  for (size_t u = 0; u < units; ++u, unit += C::kUnitBytes) {
    const Word quads[8] = {C::template quad<0>(unit), C::template quad<1>(unit),
                           C::template quad<2>(unit), C::template quad<3>(unit),
                           C::template quad<4>(unit), C::template quad<5>(unit),
                           C::template quad<6>(unit), C::template quad<7>(unit)};
#pragma GCC unroll 8
    for (int q = 0; q < 8; ++q, codes += (A::k8 ? 2 : 4) * lanes) {
      if constexpr (A::k8)
        put_quad8<C>(quads[q], codes);
      else
        put_quad<C>(quads[q], lanes, codes);
    }
  }
  float* scales = out.scales;
  float* mins = out.mins;
  for (size_t done = 0; done < units; done += kUnits, record += S::kBytes) {
    __m512 scale[S::kBlocks], min[S::kBlocks];
    S::decode(record, scale, min);
    for (size_t b = 0; b < S::kBlocks; ++b, scales += lanes) {
      _mm512_storeu_ps(scales, scale[b]);
      if constexpr (S::kMin) {
        _mm512_storeu_ps(mins, min[b]);
        mins += lanes;
      }
    }
  }
}

// Asks for a line of the result that will be written once the sums are done. It was last read by
// either thread, so it must come from the other's cache, and stores wait for each other.
MORU_INLINE void own_soon(const float* p) { asm volatile("prefetchw %0" : : "m"(*p)); }

// Sums of a block of kTokens tokens with the rows of two words, for activations of 16 bits.
template <size_t kBlock, int kTokens>
MORU_INLINE void add_block(const int16_t* codes, const int16_t* x, size_t stride,
                           Word (&dot0)[kTokens], Word (&dot1)[kTokens]) {
  for (int t = 0; t < kTokens; ++t) dot0[t] = dot1[t] = _mm512_setzero_si512();
#pragma GCC unroll 4
  for (size_t pair = 0; pair < kBlock / 2; ++pair) {
    const Word w0 = load_word(codes + 64 * pair), w1 = load_word(codes + 64 * pair + 32);
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t) {
      const Word both = broadcast(x + static_cast<size_t>(t) * stride + 2 * pair);
      dot0[t] = _mm512_dpwssd_epi32(dot0[t], w0, both);
      dot1[t] = _mm512_dpwssd_epi32(dot1[t], w1, both);
    }
  }
}
// For 8 bits: bytes of weight + 128, so a sum begins with what the 128 would add too much.
template <size_t kBlock, int kTokens>
MORU_INLINE void add_block8(const int16_t* codes, const int8_t* x, size_t stride,
                            const int32_t* sums, size_t sums_stride, Word (&dot0)[kTokens],
                            Word (&dot1)[kTokens]) {
#pragma GCC unroll 6
  for (int t = 0; t < kTokens; ++t)
    dot0[t] = dot1[t] = _mm512_set1_epi32(-128 * sums[static_cast<size_t>(t) * sums_stride]);
#pragma GCC unroll 8
  for (size_t quad = 0; quad < kBlock / 4; ++quad) {
    const Word w0 = load_word(codes + 64 * quad), w1 = load_word(codes + 64 * quad + 32);
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t) {
      const Word four = broadcast(x + static_cast<size_t>(t) * stride + 4 * quad);
      dot0[t] = _mm512_dpbusd_epi32(dot0[t], w0, four);
      dot1[t] = _mm512_dpbusd_epi32(dot1[t], w1, four);
    }
  }
}

// 2 words of rows × kTokens tokens: 12 integer and 12 float sums, 2 weights and 1 broadcast of the
// 32 registers. Every weight is loaded once for six tokens, every token's pair once for 32 rows.
template <size_t kBlock, bool kMin, typename A, int kTokens>
MORU_INLINE void stripe_tile(const Stripe& w, size_t cols, __mmask16 rows0, __mmask16 rows1,
                             const Tokens& tokens, size_t first, const Target& y) {
  const size_t stride = tokens.stride, sums_stride = tokens.sums_stride;
  const int16_t* x = A::k8 ? nullptr : tokens.codes + first * stride;
  const int8_t* x8 = A::k8 ? tokens.digits + first * stride : nullptr;
  const int32_t* sums = tokens.sums + first * sums_stride;
  const float* scaled_sums = A::k8 ? tokens.scaled_sums + first * sums_stride : nullptr;
  const float* unit_scales = A::k8 ? tokens.scales + first * tokens.unit_stride : nullptr;
  const int16_t* codes = w.codes;
  const float *scales = w.scales, *mins = w.mins;
  __m512 acc0[kTokens], acc1[kTokens];
  for (int t = 0; t < kTokens; ++t) {
    acc0[t] = acc1[t] = _mm512_setzero_ps();
    if constexpr (!A::k8) {  // where a tile is over too soon it does not pay
      own_soon(y.y + (first + static_cast<size_t>(t)) * y.ldy);
      own_soon(y.y + (first + static_cast<size_t>(t)) * y.ldy + 16);
    }
  }
  const size_t blocks = cols / kBlock;
  for (size_t block = 0; block < blocks; ++block) {
    Word dot0[kTokens], dot1[kTokens];
    if constexpr (A::k8)
      add_block8<kBlock>(codes, x8, stride, sums, sums_stride, dot0, dot1);
    else
      add_block<kBlock>(codes, x, stride, dot0, dot1);
    const __m512 scale0 = _mm512_loadu_ps(scales), scale1 = _mm512_loadu_ps(scales + 16);
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t) {
      __m512 s0 = scale0, s1 = scale1;
      if constexpr (A::k8) {
        const __m512 unit =
            _mm512_set1_ps(unit_scales[static_cast<size_t>(t) * tokens.unit_stride]);
        s0 = _mm512_mul_ps(s0, unit);
        s1 = _mm512_mul_ps(s1, unit);
      }
      acc0[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot0[t]), s0, acc0[t]);
      acc1[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot1[t]), s1, acc1[t]);
    }
    if constexpr (kMin) {
      const __m512 min0 = _mm512_loadu_ps(mins), min1 = _mm512_loadu_ps(mins + 16);
#pragma GCC unroll 6
      for (int t = 0; t < kTokens; ++t) {
        const size_t at = static_cast<size_t>(t) * sums_stride;
        const __m512 sum =
            A::k8 ? _mm512_set1_ps(scaled_sums[at]) : _mm512_cvtepi32_ps(broadcast(sums + at));
        acc0[t] = _mm512_fmadd_ps(min0, sum, acc0[t]);
        acc1[t] = _mm512_fmadd_ps(min1, sum, acc1[t]);
      }
      mins += 32;
    }
    scales += 32;
    if constexpr (A::k8) {
      codes += 16 * kBlock;
      x8 += kBlock;
      ++scaled_sums;
      if (kBlock == 32 || block % 2 == 1) ++unit_scales;
    } else {
      codes += 32 * kBlock;
      x += kBlock;
    }
    if constexpr (kMin || A::k8) ++sums;
  }
  for (int t = 0; t < kTokens; ++t) {
    float* out = y.y + (first + static_cast<size_t>(t)) * y.ldy;
    const float scale = A::k8 ? 1 : tokens.scales[first + static_cast<size_t>(t)];
    store<A::k8>(out, rows0, y.add, acc0[t], scale);
    store<A::k8>(out + 16, rows1, y.add, acc1[t], scale);
  }
}

template <size_t kBlock, bool kMin, typename A>
void stripe(const Stripe& w, size_t cols, size_t rows, const Tokens& x, const Target& y) noexcept {
  const __mmask16 rows0 = first_rows(rows), rows1 = first_rows(rows > 16 ? rows - 16 : 0);
  for (size_t t = 0; t < x.count;) {
    // Seven and eight are not left with a tile of one or two, which would wait for its own sums.
    const size_t left = x.count - t, n = left == 7 || left == 8 ? 4 : left < 6 ? left : 6;
    switch (n) {
      case 1:
        stripe_tile<kBlock, kMin, A, 1>(w, cols, rows0, rows1, x, t, y);
        break;
      case 2:
        stripe_tile<kBlock, kMin, A, 2>(w, cols, rows0, rows1, x, t, y);
        break;
      case 3:
        stripe_tile<kBlock, kMin, A, 3>(w, cols, rows0, rows1, x, t, y);
        break;
      case 4:
        stripe_tile<kBlock, kMin, A, 4>(w, cols, rows0, rows1, x, t, y);
        break;
      case 5:
        stripe_tile<kBlock, kMin, A, 5>(w, cols, rows0, rows1, x, t, y);
        break;
      default:
        stripe_tile<kBlock, kMin, A, 6>(w, cols, rows0, rows1, x, t, y);
        break;
    }
    t += n;
  }
}

// ---- values and activations ----

// Turns sixteen words (pair i, row r) into sixteen (row r, pair i).
MORU_INLINE void transpose(Word (&v)[16]) {
  Word a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  // b[4g + s] holds in its 128-bit part q the pairs 4g … 4g + 3 of row 4q + s.
#pragma GCC unroll 4
  for (int s = 0; s < 4; ++s) {
    const Word low01 = _mm512_shuffle_i32x4(b[s], b[4 + s], 0x88);
    const Word high01 = _mm512_shuffle_i32x4(b[s], b[4 + s], 0xdd);
    const Word low23 = _mm512_shuffle_i32x4(b[8 + s], b[12 + s], 0x88);
    const Word high23 = _mm512_shuffle_i32x4(b[8 + s], b[12 + s], 0xdd);
    v[s] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    v[8 + s] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    v[4 + s] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    v[12 + s] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
}

void dequantize(const Stripe& w, size_t cols, size_t block, size_t first, size_t count, float* out,
                size_t ld) noexcept {
  for (size_t c = 0; c < cols; c += kUnitCols) {
    Word v[16];
    for (size_t i = 0; i < 16; ++i) v[i] = load_word(w.codes + 2 * (c / 2 + i) * w.lanes);
    transpose(v);
    for (size_t i = 0; i < count; ++i) {
      const size_t r = first + i;
      const __m256i part[2] = {_mm512_castsi512_si256(v[r]), _mm512_extracti64x4_epi64(v[r], 1)};
      for (size_t h = 0; h < 2; ++h) {
        const size_t at = (c + 16 * h) / block * w.lanes + r;
        __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(part[h])),
                                     _mm512_set1_ps(w.scales[at]));
        if (w.mins != nullptr) value = _mm512_add_ps(value, _mm512_set1_ps(w.mins[at]));
        _mm512_storeu_ps(out + i * ld + c + 16 * h, value);
      }
    }
  }
}

float quantize(const float* x, size_t k, int16_t* codes, int8_t* digits, int32_t* sums16,
               int32_t* sums32) noexcept {
  const Word magnitude = _mm512_set1_epi32(0x7fffffff);
  Word most = _mm512_setzero_si512();
  for (size_t i = 0; i < k; i += 16)
    most = _mm512_max_epu32(most, _mm512_and_si512(load_word(x + i), magnitude));
  const uint32_t largest = _mm512_reduce_max_epu32(most);
  float max;
  std::memcpy(&max, &largest, sizeof max);
  const bool finite = largest < 0x7f800000u, usable = finite && max >= 0x1p-100f;
  const __mmask16 lanes = usable ? 0xffff : 0;
  const __m512 inverse = _mm512_set1_ps(usable ? static_cast<float>(kMaxCode) / max : 0);
  // Bytes of each quad of codes (low, high, low, high …) to its digits in a word's order.
  const Word to_high = _mm512_broadcast_i32x4(
      _mm_setr_epi8(1, 5, 3, 7, -1, -1, -1, -1, 9, 13, 11, 15, -1, -1, -1, -1));
  const Word to_low = _mm512_broadcast_i32x4(
      _mm_setr_epi8(-1, -1, -1, -1, 0, 4, 2, 6, -1, -1, -1, -1, 8, 12, 10, 14));
  for (size_t i = 0; i < k; i += 32) {
    Word n[2];
    for (size_t h = 0; h < 2; ++h)
      n[h] =
          _mm512_maskz_cvtps_epi32(lanes, _mm512_mul_ps(_mm512_loadu_ps(x + i + 16 * h), inverse));
    const Word both = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(n[0])),
                                         _mm512_cvtepi32_epi16(n[1]), 1);
    _mm512_storeu_si512(codes + i, both);
    if (digits != nullptr) {
      const Word high =
          _mm512_shuffle_epi8(_mm512_add_epi16(both, _mm512_set1_epi16(128)), to_high);
      const Word low = _mm512_shuffle_epi8(both, to_low);
      _mm512_storeu_si512(digits + 2 * i, _mm512_or_si512(high, low));
    }
    // Sums of 16: two by two, then the four of each quarter, then the quarters of each half.
    Word sum = _mm512_madd_epi16(both, _mm512_set1_epi16(1));
    sum = _mm512_add_epi32(sum, _mm512_shuffle_epi32(sum, _MM_PERM_BADC));
    sum = _mm512_add_epi32(sum, _mm512_shuffle_epi32(sum, _MM_PERM_CDAB));
    sum = _mm512_add_epi32(sum, _mm512_shuffle_i32x4(sum, sum, _MM_SHUFFLE(2, 3, 0, 1)));
    sums16[i / 16] = _mm_cvtsi128_si32(_mm512_castsi512_si128(sum));
    sums16[i / 16 + 1] = _mm_cvtsi128_si32(_mm512_extracti32x4_epi32(sum, 2));
    sums32[i / 32] = sums16[i / 16] + sums16[i / 16 + 1];
  }
  if (!finite) return __builtin_nanf("");
  return usable ? max / static_cast<float>(kMaxCode) : 0;
}

void quantize8(const float* x, size_t k, const Row8& out) noexcept {
  const Word magnitude = _mm512_set1_epi32(0x7fffffff);
  // Bytes of each quad, 0 1 2 3, to a word's order.
  const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
  for (size_t u = 0; u < k / kUnitCols; ++u, x += kUnitCols) {
    const Word bits[2] = {load_word(x), load_word(x + 16)};
    const uint32_t largest = _mm512_reduce_max_epu32(_mm512_max_epu32(
        _mm512_and_si512(bits[0], magnitude), _mm512_and_si512(bits[1], magnitude)));
    float max;
    std::memcpy(&max, &largest, sizeof max);
    const bool finite = largest < 0x7f800000u, usable = finite && max >= 0x1p-100f;
    const __mmask16 lanes = usable ? 0xffff : 0;
    const __m512 inverse = _mm512_set1_ps(usable ? kMaxCode8 / max : 0);
    const float scale = !finite ? __builtin_nanf("") : usable ? max / kMaxCode8 : 0;
    out.scales[u] = scale;
    for (size_t h = 0; h < 2; ++h) {
      const Word n =
          _mm512_maskz_cvtps_epi32(lanes, _mm512_mul_ps(_mm512_castsi512_ps(bits[h]), inverse));
      const __m128i bytes = _mm_shuffle_epi8(_mm512_cvtepi32_epi8(n), order);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out.digits + u * kUnitCols + 16 * h), bytes);
      out.sums16[2 * u + h] = _mm512_reduce_add_epi32(n);
      out.scaled16[2 * u + h] = static_cast<float>(out.sums16[2 * u + h]) * scale;
    }
    out.sums32[u] = out.sums16[2 * u] + out.sums16[2 * u + 1];
    out.scaled32[u] = static_cast<float>(out.sums32[u]) * scale;
  }
}

template <DType kType>
constexpr FormatKernels kFormat = {direct<kType, Bits16>, direct<kType, Bits8>,
                                   unpack<kType, Bits16>, unpack<kType, Bits8>};

constexpr QuantKernels kKernels = {
    {kFormat<DType::q4_0>, kFormat<DType::q4_1>, kFormat<DType::q5_0>, kFormat<DType::q5_1>,
     kFormat<DType::q8_0>, kFormat<DType::q2_k>, kFormat<DType::q3_k>, kFormat<DType::q4_k>,
     kFormat<DType::q5_k>, kFormat<DType::q6_k>, kFormat<DType::iq4_nl>, kFormat<DType::iq4_xs>,
     kFormat<DType::mxfp4>},
    {{stripe<32, false, Bits16>, stripe<32, true, Bits16>},
     {stripe<16, false, Bits16>, stripe<16, true, Bits16>}},
    {{stripe<32, false, Bits8>, stripe<32, true, Bits8>},
     {stripe<16, false, Bits8>, stripe<16, true, Bits8>}},
    dequantize,
    quantize,
    quantize8,
    false,
};

}  // namespace

const QuantKernels& quant_kernels_avx512() noexcept { return kKernels; }

}  // namespace moru
