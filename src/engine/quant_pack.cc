// Packing goes through one plain form: a row's codes of a unit as 32 bytes, and its scales as
// small integers. So a format is a reader of ggml's block and a choice among the writers of planes.
#include "engine/quant_pack.h"

#include <array>
#include <bit>
#include <cstring>

#include "base/error.h"
#include "formats/blocks.h"

namespace moru {
namespace {

static_assert(std::endian::native == std::endian::little);

using Codes = std::array<uint8_t, kUnitCols>;

void low_and_high(const uint8_t* qs, Codes& out) {  // nibble order of the blocks of 32
  for (size_t j = 0; j < 16; ++j) {
    out[j] = qs[j] & 15;
    out[j + 16] = qs[j] >> 4;
  }
}
void nibbles_of(const uint8_t* qs, bool high, Codes& out) {
  const int shift = high ? 4 : 0;
  for (size_t l = 0; l < 32; ++l) out[l] = (qs[l] >> shift) & 15;
}
// Eight bits at a time: each byte of a word is left its own bit, which a carry moves to its top.
void fifth_bits(const uint8_t (&qh)[4], Codes& out) {
  constexpr uint64_t kEach = 0x0101010101010101, kOwn = 0x8040201008040201;
  for (size_t e = 0; e < 4; ++e) {
    const uint64_t own = qh[e] * kEach & kOwn;
    uint64_t codes;
    std::memcpy(&codes, &out[8 * e], sizeof codes);
    codes |= ((own + 0x7f * kEach) >> 7 & kEach) << 4;
    std::memcpy(&out[8 * e], &codes, sizeof codes);
  }
}

// The codes of unit u of a block: u is 0 in blocks of 32.
void read_codes(const BlockQ4_0& b, size_t, Codes& out) { low_and_high(b.qs, out); }
void read_codes(const BlockQ4_1& b, size_t, Codes& out) { low_and_high(b.qs, out); }
void read_codes(const BlockIq4Nl& b, size_t, Codes& out) { low_and_high(b.qs, out); }
void read_codes(const BlockMxfp4& b, size_t, Codes& out) { low_and_high(b.qs, out); }
void read_codes(const BlockQ5_0& b, size_t, Codes& out) {
  low_and_high(b.qs, out);
  fifth_bits(b.qh, out);
}
void read_codes(const BlockQ5_1& b, size_t, Codes& out) {
  low_and_high(b.qs, out);
  fifth_bits(b.qh, out);
}
void read_codes(const BlockQ8_0& b, size_t, Codes& out) {
  for (size_t j = 0; j < 32; ++j) out[j] = static_cast<uint8_t>(b.qs[j] + 128);
}
void read_codes(const BlockQ2K& b, size_t u, Codes& out) {
  for (size_t l = 0; l < 32; ++l) out[l] = (b.qs[32 * (u / 4) + l] >> (2 * (u % 4))) & 3;
}
void read_codes(const BlockQ3K& b, size_t u, Codes& out) {
  for (size_t l = 0; l < 32; ++l) {
    const int low = (b.qs[32 * (u / 4) + l] >> (2 * (u % 4))) & 3;
    out[l] = static_cast<uint8_t>(low | ((b.hmask[l] >> u) & 1) << 2);
  }
}
void read_codes(const BlockQ4K& b, size_t u, Codes& out) {
  nibbles_of(b.qs + 32 * (u / 2), u % 2 != 0, out);
}
void read_codes(const BlockQ5K& b, size_t u, Codes& out) {
  nibbles_of(b.qs + 32 * (u / 2), u % 2 != 0, out);
  for (size_t l = 0; l < 32; ++l) out[l] = static_cast<uint8_t>(out[l] | ((b.qh[l] >> u) & 1) << 4);
}
void read_codes(const BlockQ6K& b, size_t u, Codes& out) {
  const size_t n = u / 4, t = u % 4;
  nibbles_of(b.ql + 64 * n + 32 * (t & 1), t >= 2, out);
  for (size_t l = 0; l < 32; ++l) {
    const int top = (b.qh[32 * n + l] >> (2 * t)) & 3;
    out[l] = static_cast<uint8_t>(out[l] | top << 4);
  }
}
void read_codes(const BlockIq4Xs& b, size_t u, Codes& out) { low_and_high(b.qs + 16 * u, out); }

// ---- planes ----

void put_u16(uint8_t* p, size_t i, unsigned value) {
  const auto v = static_cast<uint16_t>(value);
  std::memcpy(p + 2 * i, &v, sizeof v);
}
void or_u32(uint8_t* p, size_t i, uint32_t bits) {
  uint32_t v;
  std::memcpy(&v, p + 4 * i, sizeof v);
  v |= bits;
  std::memcpy(p + 4 * i, &v, sizeof v);
}

// The four codes of a quad in a word's order, one a byte; arithmetic on all four at once below
// never carries from one byte into another.
uint32_t quad_of(const Codes& codes, size_t q) {
  uint32_t c;
  std::memcpy(&c, &codes[4 * q], sizeof c);
  return (c & 0xff0000ff) | (c >> 8 & 0x0000ff00) | (c << 8 & 0x00ff0000);
}

template <DType kType>
void write_row(const Codes& codes, uint8_t* unit, size_t r) {
  const auto put = [&](size_t word, uint32_t bits) {
    std::memcpy(unit + 64 * word + 4 * r, &bits, sizeof bits);
  };
  constexpr uint32_t kEach = 0x01010101;  // times n: n in every byte
  if constexpr (kType == DType::q8_0) {
    for (size_t q = 0; q < 8; ++q) put(q, quad_of(codes, q));
  } else if constexpr (kType == DType::q2_k || kType == DType::q3_k) {
    uint32_t low[2] = {0, 0}, third = 0;
    for (size_t q = 0; q < 8; ++q) {
      const uint32_t quad = quad_of(codes, q);
      low[q / 4] |= (quad & (3 * kEach)) << (2 * (q % 4));
      third |= (quad >> 2 & kEach) << ((2 + q) & 7);
    }
    put(0, low[0]);
    put(1, low[1]);
    if constexpr (kType == DType::q3_k) put(2, third);
  } else {
    uint32_t fifth = 0, top[2] = {0, 0};
    for (size_t z = 0; z < 4; ++z) {
      const uint32_t first = quad_of(codes, 2 * z), second = quad_of(codes, 2 * z + 1);
      put(z, (first & (15 * kEach)) | (second & (15 * kEach)) << 4);
      fifth |= (first >> 4 & kEach) << ((4 + 2 * z) & 7) | (second >> 4 & kEach)
                                                               << ((5 + 2 * z) & 7);
      top[z / 2] |= (first >> 4 & (3 * kEach)) << ((4 + 4 * z) & 7) | (second >> 4 & (3 * kEach))
                                                                          << ((6 + 4 * z) & 7);
    }
    if constexpr (kType == DType::q5_0 || kType == DType::q5_1 || kType == DType::q5_k)
      put(4, fifth);
    if constexpr (kType == DType::q6_k) {
      put(4, top[0]);
      put(5, top[1]);
    }
  }
}

void write_six(const std::array<uint8_t, 16>& values, uint8_t* words, size_t r) {
  for (size_t n = 0; n < 15; ++n)
    or_u32(words + 64 * (n / 5), r, static_cast<uint32_t>(values[n]) << (6 * (n % 5)));
  for (size_t i = 0; i < 3; ++i)
    or_u32(words + 64 * i, r, static_cast<uint32_t>((values[15] >> (2 * i)) & 3) << 30);
}

// ---- scales; records are zero before ----

template <typename Block>  // blocks of 32 with a half, or two
void write_scales(const Block& b, uint8_t* record, size_t r) {
  put_u16(record, r, b.d);
  if constexpr (requires { b.m; }) put_u16(record + 32, r, b.m);
}
void write_scales(const BlockMxfp4& b, uint8_t* record, size_t r) { record[r] = b.e; }
template <typename Block>
void write_scale_mins(const Block& b, uint8_t* record, size_t r) {
  put_u16(record, r, b.d);
  put_u16(record + 32, r, b.dmin);
  std::array<uint8_t, 16> values;
  for (size_t s = 0; s < 8; ++s) {
    const ScaleMin both = scale_min_of(b.scales, s);
    values[s] = both.scale;
    values[8 + s] = both.min;
  }
  write_six(values, record + 64, r);
}
void write_scales(const BlockQ4K& b, uint8_t* record, size_t r) { write_scale_mins(b, record, r); }
void write_scales(const BlockQ5K& b, uint8_t* record, size_t r) { write_scale_mins(b, record, r); }
void write_scales(const BlockQ3K& b, uint8_t* record, size_t r) {
  put_u16(record, r, b.d);
  write_six(unpack_q3k_scales(b.scales), record + 32, r);
}
void write_scales(const BlockQ2K& b, uint8_t* record, size_t r) {
  put_u16(record, r, b.d);
  put_u16(record + 32, r, b.dmin);
  for (size_t s = 0; s < 16; ++s) record[64 + 16 * s + r] = b.scales[s];
}
void write_scales(const BlockQ6K& b, uint8_t* record, size_t r) {
  put_u16(record, r, b.d);
  for (size_t s = 0; s < 16; ++s) record[32 + 16 * s + r] = static_cast<uint8_t>(b.scales[s]);
}
void write_scales(const BlockIq4Xs& b, uint8_t* record, size_t r) {
  put_u16(record, r, b.d);
  uint32_t low;
  std::memcpy(&low, b.scales_l, sizeof low);
  or_u32(record + 32, r, low);
  put_u16(record + 96, r, b.scales_h);
}

template <DType kType, typename Block>
void pack(const std::byte* rows, size_t count, size_t cols, uint8_t* panel) {
  constexpr PanelFormat format = kPanelFormat[panel_format_index(kType)];
  static_assert(Block::kElements == format.scale_cols);
  const PanelSize size = panel_size(kType, cols);
  std::memset(panel, 0, size.bytes);
  const size_t blocks = cols / Block::kElements;
  for (size_t r = 0; r < count; ++r) {
    uint8_t* unit = panel + size.codes_at;
    for (size_t i = 0; i < blocks; ++i) {
      Block block;
      std::memcpy(&block, rows + (r * blocks + i) * sizeof(Block), sizeof block);
      write_scales(block, panel + i * format.scale_bytes, r);
      for (size_t u = 0; u < Block::kElements / kUnitCols; ++u, unit += format.unit_bytes) {
        Codes codes;
        read_codes(block, u, codes);
        write_row<kType>(codes, unit, r);
      }
    }
  }
}

}  // namespace

PanelSize panel_size(DType type, size_t cols) {
  const PanelFormat& format = kPanelFormat[panel_format_index(type)];
  const size_t scales = cols / format.scale_cols * format.scale_bytes;
  const size_t codes_at = (scales + 63) / 64 * 64;
  return {codes_at, codes_at + cols / kUnitCols * format.unit_bytes};
}

void pack_panel(DType type, const std::byte* rows, size_t count, size_t cols, uint8_t* panel) {
  switch (type) {
    case DType::q4_0:
      return pack<DType::q4_0, BlockQ4_0>(rows, count, cols, panel);
    case DType::q4_1:
      return pack<DType::q4_1, BlockQ4_1>(rows, count, cols, panel);
    case DType::q5_0:
      return pack<DType::q5_0, BlockQ5_0>(rows, count, cols, panel);
    case DType::q5_1:
      return pack<DType::q5_1, BlockQ5_1>(rows, count, cols, panel);
    case DType::q8_0:
      return pack<DType::q8_0, BlockQ8_0>(rows, count, cols, panel);
    case DType::q2_k:
      return pack<DType::q2_k, BlockQ2K>(rows, count, cols, panel);
    case DType::q3_k:
      return pack<DType::q3_k, BlockQ3K>(rows, count, cols, panel);
    case DType::q4_k:
      return pack<DType::q4_k, BlockQ4K>(rows, count, cols, panel);
    case DType::q5_k:
      return pack<DType::q5_k, BlockQ5K>(rows, count, cols, panel);
    case DType::q6_k:
      return pack<DType::q6_k, BlockQ6K>(rows, count, cols, panel);
    case DType::iq4_nl:
      return pack<DType::iq4_nl, BlockIq4Nl>(rows, count, cols, panel);
    case DType::iq4_xs:
      return pack<DType::iq4_xs, BlockIq4Xs>(rows, count, cols, panel);
    case DType::mxfp4:
      return pack<DType::mxfp4, BlockMxfp4>(rows, count, cols, panel);
    default:
      MORU_CHECK(is_quantized(type));
  }
}

}  // namespace moru
