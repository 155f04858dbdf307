// Codes into ggml's blocks: the inverse of what formats/dequantize.cc unpacks. Codes are the
// unsigned numbers that the block stores, one a byte, in the order of the elements.
#pragma once
#include <array>
#include <cstdint>
#include <cstring>

#include "formats/blocks.h"

namespace moru {

using Codes32 = std::array<uint8_t, 32>;
using Codes256 = std::array<uint8_t, 256>;

// The low four bits of 32 codes, element j beside element j + 16.
inline void pack_nibbles(const uint8_t* codes, uint8_t* qs) {
  for (size_t j = 0; j < 16; ++j)
    qs[j] = static_cast<uint8_t>((codes[j] & 15) | (codes[j + 16] & 15) << 4);
}

// The fifth bits of 32 codes, element e at bit e.
inline void pack_fifth_bits(const Codes32& codes, uint8_t (&qh)[4]) {
  uint32_t bits = 0;
  for (size_t e = 0; e < 32; ++e) bits |= static_cast<uint32_t>(codes[e] >> 4) << e;
  std::memcpy(qh, &bits, sizeof bits);
}

inline void pack_codes(const Codes32& codes, BlockQ4_0& b) { pack_nibbles(codes.data(), b.qs); }
inline void pack_codes(const Codes32& codes, BlockQ4_1& b) { pack_nibbles(codes.data(), b.qs); }
inline void pack_codes(const Codes32& codes, BlockIq4Nl& b) { pack_nibbles(codes.data(), b.qs); }
inline void pack_codes(const Codes32& codes, BlockQ5_0& b) {
  pack_nibbles(codes.data(), b.qs);
  pack_fifth_bits(codes, b.qh);
}
inline void pack_codes(const Codes32& codes, BlockQ5_1& b) {
  pack_nibbles(codes.data(), b.qs);
  pack_fifth_bits(codes, b.qh);
}
inline void pack_codes(const Codes32& codes, BlockQ8_0& b) {  // code = q + 127
  for (size_t j = 0; j < 32; ++j) b.qs[j] = static_cast<int8_t>(codes[j] - 127);
}

inline void pack_codes(const Codes256& codes, BlockIq4Xs& b) {
  for (size_t s = 0; s < 8; ++s) pack_nibbles(codes.data() + 32 * s, b.qs + 16 * s);
}

// Q4_K and Q5_K: 64 elements to 32 bytes.
inline void pack_halves(const Codes256& codes, uint8_t (&qs)[128]) {
  for (size_t g = 0; g < 4; ++g)
    for (size_t l = 0; l < 32; ++l)
      qs[32 * g + l] =
          static_cast<uint8_t>((codes[64 * g + l] & 15) | (codes[64 * g + 32 + l] & 15) << 4);
}
inline void pack_codes(const Codes256& codes, BlockQ4K& b) { pack_halves(codes, b.qs); }
inline void pack_codes(const Codes256& codes, BlockQ5K& b) {
  pack_halves(codes, b.qs);
  for (size_t l = 0; l < 32; ++l) {
    int bits = 0;
    for (size_t s = 0; s < 8; ++s) bits |= (codes[32 * s + l] >> 4) << s;
    b.qh[l] = static_cast<uint8_t>(bits);
  }
}

// Q3_K: code = q + 4, the stored third bit is that of the code.
inline void pack_codes(const Codes256& codes, BlockQ3K& b) {
  for (uint8_t& mask : b.hmask) mask = 0;
  for (size_t n = 0; n < 2; ++n) {
    for (size_t l = 0; l < 32; ++l) {
      int low = 0, high = 0;
      for (size_t k = 0; k < 4; ++k) {
        const int code = codes[128 * n + 32 * k + l];
        low |= (code & 3) << (2 * k);
        high |= (code >> 2) << (4 * n + k);
      }
      b.qs[32 * n + l] = static_cast<uint8_t>(low);
      b.hmask[l] = static_cast<uint8_t>(b.hmask[l] | high);
    }
  }
}

// Q6_K: code = q + 32.
inline void pack_codes(const Codes256& codes, BlockQ6K& b) {
  for (size_t n = 0; n < 2; ++n) {
    for (size_t l = 0; l < 32; ++l) {
      const uint8_t* c = codes.data() + 128 * n + l;
      b.ql[64 * n + l] = static_cast<uint8_t>((c[0] & 15) | (c[64] & 15) << 4);
      b.ql[64 * n + 32 + l] = static_cast<uint8_t>((c[32] & 15) | (c[96] & 15) << 4);
      b.qh[32 * n + l] = static_cast<uint8_t>(c[0] >> 4 | (c[32] >> 4) << 2 | (c[64] >> 4) << 4 |
                                              (c[96] >> 4) << 6);
    }
  }
}

// Scales of sub-blocks into their fields; signed ones already have their offset added.
inline void pack_iq4xs_scales(const std::array<uint8_t, 8>& scales, BlockIq4Xs& b) {
  unsigned high = 0;
  for (size_t s = 0; s < 8; s += 2) {
    b.scales_l[s / 2] = static_cast<uint8_t>((scales[s] & 15) | (scales[s + 1] & 15) << 4);
    high |= static_cast<unsigned>(scales[s] >> 4 | (scales[s + 1] >> 4) << 2) << (2 * s);
  }
  b.scales_h = static_cast<uint16_t>(high);
}

}  // namespace moru
