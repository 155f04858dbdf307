// The byte layouts of ggml's quantized blocks, for the decoders here and the encoders of lighten/.
// Spec: ggml's ggml-common.h. Little endian; a `uint16_t d` is an IEEE half.
//
// Nibble order: in blocks of 32 (Q4_0 … MXFP4, and each 32 of IQ4_XS) byte j holds element j in
// its low half and element j + 16 in its high half. In Q4_K and Q5_K 32 bytes hold 64 elements:
// the low halves are the first 32, the high halves the next 32.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>

namespace moru {

struct BlockQ4_0 {  // x = d·(q − 8)
  static constexpr size_t kElements = 32;
  uint16_t d;
  uint8_t qs[16];
};
struct BlockQ4_1 {  // x = d·q + m
  static constexpr size_t kElements = 32;
  uint16_t d, m;
  uint8_t qs[16];
};
struct BlockQ5_0 {  // x = d·(q − 16), bit e of qh is the fifth bit of element e
  static constexpr size_t kElements = 32;
  uint16_t d;
  uint8_t qh[4];
  uint8_t qs[16];
};
struct BlockQ5_1 {  // x = d·q + m
  static constexpr size_t kElements = 32;
  uint16_t d, m;
  uint8_t qh[4];
  uint8_t qs[16];
};
struct BlockQ8_0 {  // x = d·q
  static constexpr size_t kElements = 32;
  uint16_t d;
  int8_t qs[32];
};
struct BlockIq4Nl {  // x = d·kIq4Values[q]
  static constexpr size_t kElements = 32;
  uint16_t d;
  uint8_t qs[16];
};
struct BlockMxfp4 {  // x = 2^(e − 128)·kMxfp4Values[q]
  static constexpr size_t kElements = 32;
  uint8_t e;
  uint8_t qs[16];
};

// 16 sub-blocks of 16: x = d·(scale & 15)·q − dmin·(scale >> 4).
// Element 128n + 32k + l: two bits at 2k of qs[32n + l].
struct BlockQ2K {
  static constexpr size_t kElements = 256;
  uint8_t scales[16];
  uint8_t qs[64];
  uint16_t d, dmin;
};
// 16 sub-blocks of 16: x = d·(scale − 32)·(q − 4). The low two bits of q stand as in Q2_K, the
// third is bit 4n + k of hmask[l]. Scales are packed as unpack_q3k_scales says.
struct BlockQ3K {
  static constexpr size_t kElements = 256;
  uint8_t hmask[32];
  uint8_t qs[64];
  uint8_t scales[12];
  uint16_t d;
};
// 8 sub-blocks of 32: x = d·scale·q − dmin·min. Scales are packed as scale_min_of says.
struct BlockQ4K {
  static constexpr size_t kElements = 256;
  uint16_t d, dmin;
  uint8_t scales[12];
  uint8_t qs[128];
};
struct BlockQ5K {  // as Q4_K; the fifth bit of element l of sub-block b is bit b of qh[l]
  static constexpr size_t kElements = 256;
  uint16_t d, dmin;
  uint8_t scales[12];
  uint8_t qh[32];
  uint8_t qs[128];
};
// 16 sub-blocks of 16: x = d·scale·(q − 32). Element 128n + 32t + l: low four bits in
// ql[64n + 32(t & 1) + l], low half for t < 2; high two bits at 2t of qh[32n + l].
struct BlockQ6K {
  static constexpr size_t kElements = 256;
  uint8_t ql[128];
  uint8_t qh[64];
  int8_t scales[16];
  uint16_t d;
};
// 8 sub-blocks of 32: x = d·(scale − 32)·kIq4Values[q]. Low four bits of scale b: nibble b of
// scales_l; high two bits at 2b of scales_h.
struct BlockIq4Xs {
  static constexpr size_t kElements = 256;
  uint16_t d;
  uint16_t scales_h;
  uint8_t scales_l[4];
  uint8_t qs[128];
};

static_assert(sizeof(BlockQ4_0) == 18 && sizeof(BlockQ4_1) == 20 && sizeof(BlockQ5_0) == 22);
static_assert(sizeof(BlockQ5_1) == 24 && sizeof(BlockQ8_0) == 34 && sizeof(BlockIq4Nl) == 18);
static_assert(sizeof(BlockMxfp4) == 17 && sizeof(BlockQ2K) == 84 && sizeof(BlockQ3K) == 110);
static_assert(sizeof(BlockQ4K) == 144 && sizeof(BlockQ5K) == 176 && sizeof(BlockQ6K) == 210);
static_assert(sizeof(BlockIq4Xs) == 136);

inline constexpr std::array<int8_t, 16> kIq4Values = {-127, -104, -83, -65, -49, -35, -22, -10,
                                                      1,    13,   25,  38,  53,  69,  89,  113};
// Twice the values of E2M1; the half is in the exponent. Code 8, minus zero, decodes to plus zero
// as it does in ggml.
inline constexpr std::array<int8_t, 16> kMxfp4Values = {0, 1,  2,  3,  4,  6,  8,  12,
                                                        0, -1, -2, -3, -4, -6, -8, -12};

// The 6-bit scale and minimum of sub-block b of Q4_K and Q5_K:
//   u[0…3] = scale 0…3, with the high two bits of scale 4…7 on top
//   u[4…7] = min 0…3, with the high two bits of min 4…7 on top
//   u[8…11] = low four bits of scale 4…7 | low four bits of min 4…7
struct ScaleMin {
  uint8_t scale, min;
};
inline ScaleMin scale_min_of(const uint8_t (&u)[12], size_t b) {
  if (b < 4) return {static_cast<uint8_t>(u[b] & 63), static_cast<uint8_t>(u[b + 4] & 63)};
  return {static_cast<uint8_t>((u[b + 4] & 15) | (u[b - 4] >> 6) << 4),
          static_cast<uint8_t>((u[b + 4] >> 4) | (u[b] >> 6) << 4)};
}
inline void pack_scale_mins(const std::array<ScaleMin, 8>& values, uint8_t (&u)[12]) {
  for (size_t b = 0; b < 4; ++b) {
    const ScaleMin low = values[b], high = values[b + 4];
    u[b] = static_cast<uint8_t>(low.scale | (high.scale >> 4) << 6);
    u[b + 4] = static_cast<uint8_t>(low.min | (high.min >> 4) << 6);
    u[b + 8] = static_cast<uint8_t>((high.scale & 15) | (high.min & 15) << 4);
  }
}

// The 16 scales of Q3_K, 6 bits each, before 32 is taken off: low four bits of scale j are nibble
// j/8 of u[j % 8], high two bits at 2(j/4) of u[8 + j % 4].
inline std::array<uint8_t, 16> unpack_q3k_scales(const uint8_t (&u)[12]) {
  std::array<uint8_t, 16> scales;
  for (size_t j = 0; j < 16; ++j) {
    const int low = (u[j % 8] >> (4 * (j / 8))) & 15;
    const int high = (u[8 + j % 4] >> (2 * (j / 4))) & 3;
    scales[j] = static_cast<uint8_t>(low | high << 4);
  }
  return scales;
}
inline void pack_q3k_scales(const std::array<uint8_t, 16>& scales, uint8_t (&u)[12]) {
  for (uint8_t& byte : u) byte = 0;
  for (size_t j = 0; j < 16; ++j) {
    u[j % 8] = static_cast<uint8_t>(u[j % 8] | (scales[j] & 15) << (4 * (j / 8)));
    u[8 + j % 4] = static_cast<uint8_t>(u[8 + j % 4] | (scales[j] >> 4) << (2 * (j / 4)));
  }
}

}  // namespace moru
