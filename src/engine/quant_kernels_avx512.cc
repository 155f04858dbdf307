// The exact product with AVX-512 VNNI. This file alone is built with these instructions, so it
// shares no inline function with the rest of the program and instantiates no std template.
//
// The loops are bound by three things: memory for one or two tokens; the vpdpwssd units for many;
// and, between, the shifts and permutes that unpack codes. vpermw reads only the low five bits of
// each lane, so codes of up to five bits need no mask and come out as signed weights at once.
#include <immintrin.h>

#include <cstring>

#include "engine/quant_kernels.h"

// GCC 12 takes the undefined vectors inside its own intrinsics for a mistake of ours.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace moru {
namespace {

#define MORU_INLINE [[gnu::always_inline]] static inline

using Word = __m512i;

MORU_INLINE Word load_word(const void* p) { return _mm512_loadu_si512(p); }

// Two neighbouring codes of a token, for every row.
MORU_INLINE Word broadcast_pair(const int16_t* codes) {
  int32_t both;
  std::memcpy(&both, codes, sizeof both);
  return _mm512_set1_epi32(both);
}

// r from a where the mask has ones, else from b.
MORU_INLINE Word select(Word mask, Word a, Word b) {
  return _mm512_ternarylogic_epi32(mask, a, b, 0xca);
}

// Shifts every 16-bit lane right by kBits, or left where it is negative.
template <int kBits>
MORU_INLINE Word shifted(Word v) {
  if constexpr (kBits > 0)
    return _mm512_srli_epi16(v, kBits);
  else if constexpr (kBits < 0)
    return _mm512_slli_epi16(v, -kBits);
  else
    return v;
}

// ---- code records: group<z> gives the weights of pairs 4z … 4z + 3 of a unit ----

alignas(64) constexpr int16_t kUnsigned5[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10,
                                                11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                                22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
alignas(64) constexpr int16_t kSigned5[32] = {-16, -15, -14, -13, -12, -11, -10, -9, -8, -7, -6,
                                              -5,  -4,  -3,  -2,  -1,  0,   1,   2,  3,  4,  5,
                                              6,   7,   8,   9,   10,  11,  12,  13, 14, 15};
alignas(64) constexpr int16_t kUnsigned4[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9, 10,
                                                11, 12, 13, 14, 15, 0,  1,  2,  3,  4, 5,
                                                6,  7,  8,  9,  10, 11, 12, 13, 14, 15};
alignas(64) constexpr int16_t kSigned4[32] = {-8, -7, -6, -5, -4, -3, -2, -1, 0,  1,  2,
                                              3,  4,  5,  6,  7,  -8, -7, -6, -5, -4, -3,
                                              -2, -1, 0,  1,  2,  3,  4,  5,  6,  7};
alignas(64) constexpr int16_t kSigned3[32] = {-4, -3, -2, -1, 0,  1,  2,  3,  -4, -3, -2,
                                              -1, 0,  1,  2,  3,  -4, -3, -2, -1, 0,  1,
                                              2,  3,  -4, -3, -2, -1, 0,  1,  2,  3};
alignas(64) constexpr int16_t kIq4[32] = {-127, -104, -83, -65, -49, -35,  -22,  -10, 1,   13,  25,
                                          38,   53,   69,  89,  113, -127, -104, -83, -65, -49, -35,
                                          -22,  -10,  1,   13,  25,  38,   53,   69,  89,  113};
alignas(64) constexpr int16_t kE2m1[32] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12,
                                           0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

template <const int16_t* kTable>
struct Nibbles {
  static constexpr size_t kUnitBytes = 256;
  template <int z>
  MORU_INLINE void group(const uint8_t* unit, Word* w) {
    const Word table = load_word(kTable), lanes = load_word(unit + 64 * z);
    w[0] = _mm512_permutexvar_epi16(lanes, table);
    w[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(lanes, 4), table);
    w[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(lanes, 8), table);
    w[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(lanes, 12), table);
  }
};

template <const int16_t* kTable>
struct FiveBits {
  static constexpr size_t kUnitBytes = 320;
  template <int z>
  MORU_INLINE void group(const uint8_t* unit, Word* w) {
    const Word table = load_word(kTable), low = _mm512_set1_epi8(15);
    const Word lanes = load_word(unit + 64 * z), fifth = load_word(unit + 256);
    // Bit ((4 + c) & 7) of each byte goes to bit 4, c = 2z and 2z + 1.
    constexpr int kEven = 2 * z < 4 ? 2 * z : 2 * z - 8, kOdd = kEven + 1;
    const Word even = select(low, lanes, shifted<kEven>(fifth));
    const Word odd = select(low, _mm512_srli_epi16(lanes, 4), shifted<kOdd>(fifth));
    w[0] = _mm512_permutexvar_epi16(even, table);
    w[1] = _mm512_permutexvar_epi16(odd, table);
    w[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(even, 8), table);
    w[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(odd, 8), table);
  }
};

struct SixBits {
  static constexpr size_t kUnitBytes = 384;
  template <int z>
  MORU_INLINE void group(const uint8_t* unit, Word* w) {
    const Word low = _mm512_set1_epi8(0x3c);
    const Word lanes = load_word(unit + 64 * z), top = load_word(unit + 256 + 64 * (z / 2));
    // The code to the top six bits of each byte; one arithmetic shift then gives the weight.
    constexpr int kEven = 4 * (z & 1) - 6, kOdd = kEven + 2;
    const Word even = select(low, _mm512_slli_epi16(lanes, 2), shifted<kEven>(top));
    const Word odd = select(low, _mm512_srli_epi16(lanes, 2), shifted<kOdd>(top));
    w[0] = _mm512_srai_epi16(_mm512_slli_epi16(even, 8), 10);
    w[1] = _mm512_srai_epi16(_mm512_slli_epi16(odd, 8), 10);
    w[2] = _mm512_srai_epi16(even, 10);
    w[3] = _mm512_srai_epi16(odd, 10);
  }
};

struct TwoBits {
  static constexpr size_t kUnitBytes = 128;
  template <int z>
  MORU_INLINE void group(const uint8_t* unit, Word* w) {
    const Word three = _mm512_set1_epi16(3), lanes = load_word(unit + 64 * (z / 2));
    constexpr int kFirst = 8 * (z & 1);
    w[0] = _mm512_and_si512(shifted<kFirst>(lanes), three);
    w[1] = _mm512_and_si512(shifted<kFirst + 2>(lanes), three);
    w[2] = _mm512_and_si512(shifted<kFirst + 4>(lanes), three);
    w[3] = _mm512_and_si512(shifted<kFirst + 6>(lanes), three);
  }
};

struct ThreeBits {
  static constexpr size_t kUnitBytes = 192;
  // Pairs 8v + j (low bytes) and 8v + 4 + j (high bytes).
  template <int v, int j>
  MORU_INLINE Word both(Word lanes, Word third) {
    constexpr int c = 4 * v + j, kShift = c < 6 ? c : c - 8;
    return select(_mm512_set1_epi8(3), shifted<2 * j>(lanes), shifted<kShift>(third));
  }
  template <int z>
  MORU_INLINE void group(const uint8_t* unit, Word* w) {
    constexpr int v = z / 2, kByte = 8 * (z & 1);
    const Word table = load_word(kSigned3);
    const Word lanes = load_word(unit + 64 * v), third = load_word(unit + 128);
    w[0] = _mm512_permutexvar_epi16(shifted<kByte>(both<v, 0>(lanes, third)), table);
    w[1] = _mm512_permutexvar_epi16(shifted<kByte>(both<v, 1>(lanes, third)), table);
    w[2] = _mm512_permutexvar_epi16(shifted<kByte>(both<v, 2>(lanes, third)), table);
    w[3] = _mm512_permutexvar_epi16(shifted<kByte>(both<v, 3>(lanes, third)), table);
  }
};

struct Bytes {
  static constexpr size_t kUnitBytes = 512;
  template <int z>
  MORU_INLINE void group(const uint8_t* unit, Word* w) {
    for (int j = 0; j < 4; ++j)
      w[j] = _mm512_cvtepi8_epi16(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(unit + 32 * (4 * z + j))));
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
struct FormatOf<DType::q4_0> : Format<Nibbles<kSigned4>, HalfScale> {};
template <>
struct FormatOf<DType::q4_1> : Format<Nibbles<kUnsigned4>, HalfScaleMin> {};
template <>
struct FormatOf<DType::q5_0> : Format<FiveBits<kSigned5>, HalfScale> {};
template <>
struct FormatOf<DType::q5_1> : Format<FiveBits<kUnsigned5>, HalfScaleMin> {};
template <>
struct FormatOf<DType::q8_0> : Format<Bytes, HalfScale> {};
template <>
struct FormatOf<DType::q2_k> : Format<TwoBits, FourScaleMin> {};
template <>
struct FormatOf<DType::q3_k> : Format<ThreeBits, SixScale> {};
template <>
struct FormatOf<DType::q4_k> : Format<Nibbles<kUnsigned4>, SixScaleMin> {};
template <>
struct FormatOf<DType::q5_k> : Format<FiveBits<kUnsigned5>, SixScaleMin> {};
template <>
struct FormatOf<DType::q6_k> : Format<SixBits, ByteScale> {};
template <>
struct FormatOf<DType::iq4_nl> : Format<Nibbles<kIq4>, HalfScale> {};
template <>
struct FormatOf<DType::iq4_xs> : Format<Nibbles<kIq4>, SplitScale> {};
template <>
struct FormatOf<DType::mxfp4> : Format<Nibbles<kE2m1>, PowerScale> {};

// ---- packed panels × up to four tokens ----

MORU_INLINE void store(float* y, __mmask16 rows, bool add, __m512 acc, float scale) {
  const __m512 s = _mm512_set1_ps(scale);
  const __m512 out =
      add ? _mm512_fmadd_ps(acc, s, _mm512_maskz_loadu_ps(rows, y)) : _mm512_mul_ps(acc, s);
  _mm512_mask_storeu_ps(y, rows, out);
}

MORU_INLINE __mmask16 first_rows(size_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << n) - 1);
}

// Adds the dots of pairs 4z … 4z + 3. One token has two chains of sums, so that the latency of
// vpdpwssd does not bind.
template <typename C, int z, int kTokens, int kChains>
MORU_INLINE void add_group(const uint8_t* unit, const int16_t* const (&x)[kTokens],
                           Word (&dot)[kTokens][kChains]) {
  Word w[4];
  C::template group<z>(unit, w);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j)
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t)
      dot[t][j % kChains] =
          _mm512_dpwssd_epi32(dot[t][j % kChains], w[j], broadcast_pair(x[t] + 2 * (4 * z + j)));
}

template <typename S, int kTokens, int kChains>
MORU_INLINE void end_block(Word (&dot)[kTokens][kChains], __m512 scale, __m512 min,
                           const float* sums, size_t sums_stride, __m512 (&acc)[kTokens]) {
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) {
    Word sum = dot[t][0];
    if constexpr (kChains == 2) sum = _mm512_add_epi32(sum, dot[t][1]);
    acc[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, acc[t]);
    if constexpr (S::kMin)
      acc[t] =
          _mm512_fmadd_ps(min, _mm512_set1_ps(sums[static_cast<size_t>(t) * sums_stride]), acc[t]);
    for (int c = 0; c < kChains; ++c) dot[t][c] = _mm512_setzero_si512();
  }
}

template <typename C, typename S, int kTokens>
void direct_tokens(const Panels& panels, const Tokens& tokens, const Target& y) noexcept {
  constexpr int kChains = kTokens == 1 ? 2 : 1;
  constexpr size_t kUnits = S::kBlock * S::kBlocks / kUnitCols;  // of a scale record
  for (size_t row = 0; row < panels.rows; row += kPanelRows) {
    const uint8_t* record = panels.data + row / kPanelRows * panels.panel_bytes;
    const uint8_t* unit = record + panels.codes_at;
    const float* sums = tokens.sums;
    const int16_t* x[kTokens];
    __m512 acc[kTokens];
    Word dot[kTokens][kChains];
    for (int t = 0; t < kTokens; ++t) {
      x[t] = tokens.codes + static_cast<size_t>(t) * tokens.stride;
      acc[t] = _mm512_setzero_ps();
      for (int c = 0; c < kChains; ++c) dot[t][c] = _mm512_setzero_si512();
    }
    for (size_t done = 0; done < panels.units; done += kUnits, record += S::kBytes) {
      __m512 scale[S::kBlocks], min[S::kBlocks];
      S::decode(record, scale, min);
#pragma GCC unroll 1
      for (size_t u = 0; u < kUnits; ++u, unit += C::kUnitBytes) {
        if constexpr (S::kBlock == 32) {
          add_group<C, 0>(unit, x, dot);
          add_group<C, 1>(unit, x, dot);
          add_group<C, 2>(unit, x, dot);
          add_group<C, 3>(unit, x, dot);
          end_block<S>(dot, scale[u], min[u], sums, tokens.sums_stride, acc);
          sums += 1;
        } else {
          add_group<C, 0>(unit, x, dot);
          add_group<C, 1>(unit, x, dot);
          end_block<S>(dot, scale[2 * u], min[2 * u], sums, tokens.sums_stride, acc);
          add_group<C, 2>(unit, x, dot);
          add_group<C, 3>(unit, x, dot);
          end_block<S>(dot, scale[2 * u + 1], min[2 * u + 1], sums + 1, tokens.sums_stride, acc);
          sums += 2;
        }
        for (int t = 0; t < kTokens; ++t) x[t] += kUnitCols;
      }
    }
    for (int t = 0; t < kTokens; ++t)
      store(y.y + static_cast<size_t>(t) * y.ldy + row, first_rows(panels.rows - row), y.add,
            acc[t], tokens.scales[t]);
  }
}

template <DType kType>
void direct(const Panels& panels, const Tokens& tokens, const Target& y) noexcept {
  using C = typename FormatOf<kType>::Codes;
  using S = typename FormatOf<kType>::Scales;
  static_assert(C::kUnitBytes == kPanelFormat[panel_format_index(kType)].unit_bytes);
  static_assert(S::kBytes == kPanelFormat[panel_format_index(kType)].scale_bytes);
  static_assert(S::kMin == kPanelFormat[panel_format_index(kType)].has_min);
  switch (tokens.count) {
    case 1:
      return direct_tokens<C, S, 1>(panels, tokens, y);
    case 2:
      return direct_tokens<C, S, 2>(panels, tokens, y);
    case 3:
      return direct_tokens<C, S, 3>(panels, tokens, y);
    default:
      return direct_tokens<C, S, 4>(panels, tokens, y);
  }
}

// ---- unpacked stripes ----

template <DType kType>
void unpack(const uint8_t* record, const uint8_t* unit, size_t units, const Stripe& out) noexcept {
  using C = typename FormatOf<kType>::Codes;
  using S = typename FormatOf<kType>::Scales;
  constexpr size_t kUnits = S::kBlock * S::kBlocks / kUnitCols;
  const size_t lanes = out.lanes;
  int16_t* codes = out.codes;
  for (size_t u = 0; u < units; ++u, unit += C::kUnitBytes) {
    Word w[16];
    C::template group<0>(unit, w);
    C::template group<1>(unit, w + 4);
    C::template group<2>(unit, w + 8);
    C::template group<3>(unit, w + 12);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i, codes += 2 * lanes) _mm512_storeu_si512(codes, w[i]);
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

// 2 words of rows × kTokens tokens: 12 integer and 12 float sums, 2 weights and 1 broadcast of the
// 32 registers. Every weight is loaded once for six tokens, every token's pair once for 32 rows.
template <size_t kBlock, bool kMin, int kTokens>
MORU_INLINE void stripe_tile(const Stripe& w, size_t cols, __mmask16 rows0, __mmask16 rows1,
                             const Tokens& tokens, size_t first, const Target& y) {
  const int16_t* x = tokens.codes + first * tokens.stride;
  const float* sums = tokens.sums + first * tokens.sums_stride;
  const size_t stride = tokens.stride, sums_stride = tokens.sums_stride;
  const int16_t* codes = w.codes;
  const float *scales = w.scales, *mins = w.mins;
  __m512 acc0[kTokens], acc1[kTokens];
  for (int t = 0; t < kTokens; ++t) acc0[t] = acc1[t] = _mm512_setzero_ps();
  for (size_t blocks = cols / kBlock; blocks > 0; --blocks) {
    Word dot0[kTokens], dot1[kTokens];
    for (int t = 0; t < kTokens; ++t) dot0[t] = dot1[t] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (size_t pair = 0; pair < kBlock / 2; ++pair) {
      const Word w0 = load_word(codes + 64 * pair), w1 = load_word(codes + 64 * pair + 32);
#pragma GCC unroll 6
      for (int t = 0; t < kTokens; ++t) {
        const Word both = broadcast_pair(x + static_cast<size_t>(t) * stride + 2 * pair);
        dot0[t] = _mm512_dpwssd_epi32(dot0[t], w0, both);
        dot1[t] = _mm512_dpwssd_epi32(dot1[t], w1, both);
      }
    }
    const __m512 scale0 = _mm512_loadu_ps(scales), scale1 = _mm512_loadu_ps(scales + 16);
    for (int t = 0; t < kTokens; ++t) {
      acc0[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot0[t]), scale0, acc0[t]);
      acc1[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot1[t]), scale1, acc1[t]);
    }
    if constexpr (kMin) {
      const __m512 min0 = _mm512_loadu_ps(mins), min1 = _mm512_loadu_ps(mins + 16);
      for (int t = 0; t < kTokens; ++t) {
        const __m512 sum = _mm512_set1_ps(sums[static_cast<size_t>(t) * sums_stride]);
        acc0[t] = _mm512_fmadd_ps(min0, sum, acc0[t]);
        acc1[t] = _mm512_fmadd_ps(min1, sum, acc1[t]);
      }
      mins += 32;
      ++sums;
    }
    codes += 32 * kBlock;
    x += kBlock;
    scales += 32;
  }
  for (int t = 0; t < kTokens; ++t) {
    float* out = y.y + (first + static_cast<size_t>(t)) * y.ldy;
    const float scale = tokens.scales[first + static_cast<size_t>(t)];
    store(out, rows0, y.add, acc0[t], scale);
    store(out + 16, rows1, y.add, acc1[t], scale);
  }
}

template <size_t kBlock, bool kMin>
void stripe(const Stripe& w, size_t cols, size_t rows, const Tokens& x, const Target& y) noexcept {
  const __mmask16 rows0 = first_rows(rows), rows1 = first_rows(rows > 16 ? rows - 16 : 0);
  size_t t = 0;
  for (; t + 6 <= x.count; t += 6) stripe_tile<kBlock, kMin, 6>(w, cols, rows0, rows1, x, t, y);
  switch (x.count - t) {
    case 1:
      return stripe_tile<kBlock, kMin, 1>(w, cols, rows0, rows1, x, t, y);
    case 2:
      return stripe_tile<kBlock, kMin, 2>(w, cols, rows0, rows1, x, t, y);
    case 3:
      return stripe_tile<kBlock, kMin, 3>(w, cols, rows0, rows1, x, t, y);
    case 4:
      return stripe_tile<kBlock, kMin, 4>(w, cols, rows0, rows1, x, t, y);
    case 5:
      return stripe_tile<kBlock, kMin, 5>(w, cols, rows0, rows1, x, t, y);
    default:
      return;
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

float quantize(const float* x, size_t k, int16_t* codes, float* sums16, float* sums32) noexcept {
  const Word magnitude = _mm512_set1_epi32(0x7fffffff);
  Word most = _mm512_setzero_si512();
  for (size_t i = 0; i < k; i += 16)
    most = _mm512_max_epu32(most, _mm512_and_si512(load_word(x + i), magnitude));
  const uint32_t largest = _mm512_reduce_max_epu32(most);
  float max;
  std::memcpy(&max, &largest, sizeof max);
  const bool finite = largest < 0x7f800000u, usable = finite && max >= 0x1p-100f;
  const __mmask16 lanes = usable ? 0xffff : 0;
  const __m512 inverse = _mm512_set1_ps(usable ? 32767.0f / max : 0);
  for (size_t i = 0; i < k; i += 32) {
    Word n[2];
    int32_t sum[2];
    for (size_t h = 0; h < 2; ++h) {
      n[h] =
          _mm512_maskz_cvtps_epi32(lanes, _mm512_mul_ps(_mm512_loadu_ps(x + i + 16 * h), inverse));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i + 16 * h),
                          _mm512_cvtepi32_epi16(n[h]));
      sum[h] = _mm512_reduce_add_epi32(n[h]);
      sums16[i / 16 + h] = static_cast<float>(sum[h]);
    }
    sums32[i / 32] = static_cast<float>(sum[0] + sum[1]);
  }
  if (!finite) return __builtin_nanf("");
  return usable ? max / 32767.0f : 0;
}

template <DType kType>
constexpr FormatKernels kFormat = {direct<kType>, unpack<kType>};

constexpr QuantKernels kKernels = {
    {kFormat<DType::q4_0>, kFormat<DType::q4_1>, kFormat<DType::q5_0>, kFormat<DType::q5_1>,
     kFormat<DType::q8_0>, kFormat<DType::q2_k>, kFormat<DType::q3_k>, kFormat<DType::q4_k>,
     kFormat<DType::q5_k>, kFormat<DType::q6_k>, kFormat<DType::iq4_nl>, kFormat<DType::iq4_xs>,
     kFormat<DType::mxfp4>},
    {{stripe<32, false>, stripe<32, true>}, {stripe<16, false>, stripe<16, true>}},
    dequantize,
    quantize,
};

}  // namespace

const QuantKernels& quant_kernels_avx512() noexcept { return kKernels; }

}  // namespace moru
