// The inner loops of the exact profile's product, one set a level of the instruction set, and the
// layout of packed weights that they share.
//
// Sixteen rows of a matrix make a panel; columns go in units of 32. A panel is
//
//   | scales: a record each 32 (legacy) or 256 (K) columns | pad to 64 | codes: a record each unit
//   |
//
// Everything is interleaved by row, so that a vector holds the same thing of sixteen rows and no
// sum ever runs across a vector. Columns come in quads, of which a unit has eight. A word is 64
// bytes, of which bytes 4r … 4r + 3 belong to row r: the four columns of a quad in the order 0, 2,
// 1, 3, so that the even bytes of a word, widened, are two neighbouring columns as int16, and so
// are the odd bytes. A word of codes times a token's four digits, broadcast as 32 bits, is sixteen
// rows' partial dots: one vpdpbusd. AVX2 takes the two halves of a word one after the other.
//
// Code records. A code is unsigned; a weight is code − offset, or table[code]:
//
//   nibbles   4 words. Byte of word z: low four bits of quad 2z's code, then of quad 2z + 1's.
//   fifth     1 word after the nibbles (Q5): quad q's fifth bit at bit (4 + q) & 7 of each byte.
//   top two   2 words after the nibbles (Q6_K): quad 4y + c's top bits at bit (4 + 2c) & 7 of word
//   y. two bits  2 words (Q2_K, Q3_K): quad 4y + c at bit 2c of word y. third     1 word after the
//   two bits (Q3_K): quad q's third bit at bit (2 + q) & 7. bytes     8 words (Q8_0): word q is
//   quad q.
//
// High bits stand where one shift of the word brings a quad's to their place above the low ones.
//
// Scale records ([16] means: one for each row):
//
//   Q4_0 Q5_0 Q8_0 IQ4_NL  f16 d[16]
//   Q4_1 Q5_1              f16 d[16], m[16]
//   MXFP4                  u8 e[16]
//   Q4_K Q5_K              f16 d[16], dmin[16]; six(scale 0…7, min 0…7)
//   Q3_K                   f16 d[16]; six(scale 0…15)
//   Q2_K                   f16 d[16], dmin[16]; u8 (scale | min << 4)[16 sub-blocks][16]
//   Q6_K                   f16 d[16]; i8 scale[16 sub-blocks][16]
//   IQ4_XS                 f16 d[16]; u32 [16] nibble b: low four bits of scale b; u16 [16] bits
//                          2b: its high two
//
//   six(v0 … v15) = three u32 [16]: v(5i + j) at bit 6j of word i; v15's three bit pairs, lowest
//   first, at bit 30 of each.
//
// What a product is, bit for bit, at every level and for any number of tokens. For token t and row
// r, over blocks b of 16 or 32 columns in order:
//
//   dot  = Σ weight · token code              exact in int32: 32 · 128 · 32,639 < 2^31
//   acc  = fma(float(dot), scale_b, acc)      scale_b = d or d · sub-scale, exact in f32
//   acc  = fma(min_b, float(Σ token codes), acc)   formats with a minimum; min_b = m or −dmin · min
//   y    = acc · token scale, or fma(acc, token scale, y)
//
// With activations of 8 bits a token has a scale for every 32 columns, unit_scale, and
//
//   acc  = fma(float(dot), scale_b · unit_scale, acc)          the product of scales rounded
//   acc  = fma(min_b, float(Σ token codes) · unit_scale, acc)  likewise
//   y    = acc, or y + acc
#pragma once
#include <cstddef>
#include <cstdint>

#include "base/cpu.h"
#include "formats/dtype.h"

namespace moru {

inline constexpr size_t kPanelRows = 16;
inline constexpr size_t kUnitCols = 32;
inline constexpr size_t kStripeRows = 32;   // rows of an unpacked stripe: two panels
inline constexpr size_t kDirectTokens = 4;  // most tokens that `direct` multiplies at once

// What the layout of a format's panels depends on.
struct PanelFormat {
  size_t block;  // columns that share a scale: 16 or 32
  bool has_min;
  size_t scale_cols;   // columns of a scale record: 32 or 256
  size_t scale_bytes;  // of a scale record
  size_t unit_bytes;   // of a code record
};
inline constexpr size_t kPanelFormats = 13;
constexpr size_t panel_format_index(DType type) {
  return static_cast<size_t>(type) - static_cast<size_t>(DType::q4_0);
}
inline constexpr PanelFormat kPanelFormat[kPanelFormats] = {
    /* q4_0   */ {32, false, 32, 32, 256},
    /* q4_1   */ {32, true, 32, 64, 256},
    /* q5_0   */ {32, false, 32, 32, 320},
    /* q5_1   */ {32, true, 32, 64, 320},
    /* q8_0   */ {32, false, 32, 32, 512},
    /* q2_k   */ {16, true, 256, 320, 128},
    /* q3_k   */ {16, false, 256, 224, 192},
    /* q4_k   */ {32, true, 256, 256, 256},
    /* q5_k   */ {32, true, 256, 256, 320},
    /* q6_k   */ {16, false, 256, 288, 384},
    /* iq4_nl */ {32, false, 32, 32, 256},
    /* iq4_xs */ {32, false, 256, 128, 256},
    /* mxfp4  */ {32, false, 32, 16, 256},
};

// Consecutive panels of a matrix.
struct Panels {
  const uint8_t* data;  // 64-byte aligned
  size_t panel_bytes;
  size_t codes_at;  // where a panel's code records begin
  size_t units;     // 32-column units of a row
  size_t rows;      // rows to compute; the last panel may have fewer than 16
  // No address from here on is prefetched: another thread reads it.
  const uint8_t* until = nullptr;
};

// The largest code of an activation: the largest number whose two balanced digits fit int8.
inline constexpr int kMaxCode = 127 * 256 + 127;
inline constexpr float kMaxCode8 = 127;  // of 8 bits

// Rows of activations.
struct Tokens {
  const int16_t* codes;  // [count, stride]
  size_t stride;
  // 16 bits: [count, 2 stride] code = 256 · high + low: each quad's four high digits, then its low
  // ones, in a word's order; only `direct` reads them. 8 bits: [count, stride] codes in that order.
  const int8_t* digits;
  const int32_t* sums;  // [count, sums_stride] of codes, by the format's block of 16 or 32 columns
  size_t sums_stride;
  const float* scales;       // 16 bits: [count]; 8 bits: [count, unit_stride], each of 32 columns
  size_t unit_stride;        // 8 bits only
  const float* scaled_sums;  // 8 bits only: [count, sums_stride] sum · scale
  size_t count;
};

// y[t · ldy + r]; `add` adds to it.
struct Target {
  float* y;
  size_t ldy;
  bool add;
};

// A stripe unpacked to int16: codes [pairs][lanes][2] and scales, minimums [blocks][lanes], where
// `lanes` is 32 for the two panels of a stripe, the second one's data beginning at lane 16. For
// activations of 8 bits a level may store bytes there instead: [quads][lanes][4], weight + 128.
struct Stripe {
  int16_t* codes;
  float* scales;
  float* mins;  // untouched by formats without a minimum
  size_t lanes;
};

// Multiplies packed panels with up to kDirectTokens tokens.
using DirectKernel = void (*)(const Panels& w, const Tokens& x, const Target& y) noexcept;
// Unpacks one panel into 16 lanes.
using UnpackKernel = void (*)(const uint8_t* scales, const uint8_t* codes, size_t units,
                              const Stripe& out) noexcept;
// Multiplies a stripe of 32 lanes, `rows` ≤ 32 of them wanted, with any number of tokens.
using StripeKernel = void (*)(const Stripe& w, size_t cols, size_t rows, const Tokens& x,
                              const Target& y) noexcept;

// The names that end in 8 take activations of 8 bits.
struct FormatKernels {
  DirectKernel direct, direct8;
  UnpackKernel unpack, unpack8;
};

// What a row of 8 bits consists of, as in Tokens; the sums by 16 and by 32 columns.
struct Row8 {
  int16_t* codes;
  int8_t* digits;
  float* scales;
  int32_t *sums16, *sums32;
  float *scaled16, *scaled32;
};

struct QuantKernels {
  FormatKernels formats[kPanelFormats];
  // Indexed by whether the block is 16 and whether there are minimums.
  StripeKernel stripe[2][2], stripe8[2][2];
  // f32 values of `count` rows from `first` of a panel unpacked into 16 lanes: out[i · ld + column]
  // = scale · code (+ min, where mins is not null), each operation rounded.
  void (*dequantize)(const Stripe& w, size_t cols, size_t block, size_t first, size_t count,
                     float* out, size_t ld) noexcept;
  // One row of activations, k a multiple of 32: what Tokens holds of it, and the returned scale, as
  // QuantizedRows::set_row says. digits may be null.
  float (*quantize)(const float* x, size_t k, int16_t* codes, int8_t* digits, int32_t* sums16,
                    int32_t* sums32) noexcept;
  // The same at 8 bits: codes or digits, whichever this level's kernels read, may be null.
  void (*quantize8)(const float* x, size_t k, const Row8& out) noexcept;
  bool codes8;  // the kernels for 8 bits read codes, not digits
};

const QuantKernels& quant_kernels_scalar() noexcept;
const QuantKernels& quant_kernels_avx2() noexcept;
const QuantKernels& quant_kernels_avx512() noexcept;
// Of a level that this processor has.
const QuantKernels& quant_kernels(Isa level);

}  // namespace moru
