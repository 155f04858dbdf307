// Blocks to f32, one decoder a type. Every value is computed in ggml's order, in f32: products of
// scales first, then times the code, then minus the minimum. Together with -ffp-contract=off that
// gives the bits of ggml's reference decoders.
#include <array>
#include <bit>
#include <cstring>

#include "base/error.h"
#include "base/half.h"
#include "formats/blocks.h"
#include "formats/dtype.h"

namespace moru {
namespace {

void decode(const BlockQ4_0& b, float* out) {
  const float d = f32_from_f16(b.d);
  for (size_t j = 0; j < 16; ++j) {
    out[j] = static_cast<float>((b.qs[j] & 15) - 8) * d;
    out[j + 16] = static_cast<float>((b.qs[j] >> 4) - 8) * d;
  }
}

void decode(const BlockQ4_1& b, float* out) {
  const float d = f32_from_f16(b.d), m = f32_from_f16(b.m);
  for (size_t j = 0; j < 16; ++j) {
    out[j] = static_cast<float>(b.qs[j] & 15) * d + m;
    out[j + 16] = static_cast<float>(b.qs[j] >> 4) * d + m;
  }
}

uint32_t fifth_bits(const uint8_t (&qh)[4]) {
  uint32_t bits;
  std::memcpy(&bits, qh, sizeof bits);
  return bits;
}

void decode(const BlockQ5_0& b, float* out) {
  const float d = f32_from_f16(b.d);
  const uint32_t qh = fifth_bits(b.qh);
  for (size_t j = 0; j < 16; ++j) {
    const auto high_0 = static_cast<int>((qh >> j) & 1),
               high_1 = static_cast<int>((qh >> (j + 16)) & 1);
    out[j] = static_cast<float>(((b.qs[j] & 15) | high_0 << 4) - 16) * d;
    out[j + 16] = static_cast<float>(((b.qs[j] >> 4) | high_1 << 4) - 16) * d;
  }
}

void decode(const BlockQ5_1& b, float* out) {
  const float d = f32_from_f16(b.d), m = f32_from_f16(b.m);
  const uint32_t qh = fifth_bits(b.qh);
  for (size_t j = 0; j < 16; ++j) {
    const auto high_0 = static_cast<int>((qh >> j) & 1),
               high_1 = static_cast<int>((qh >> (j + 16)) & 1);
    out[j] = static_cast<float>((b.qs[j] & 15) | high_0 << 4) * d + m;
    out[j + 16] = static_cast<float>((b.qs[j] >> 4) | high_1 << 4) * d + m;
  }
}

void decode(const BlockQ8_0& b, float* out) {
  const float d = f32_from_f16(b.d);
  for (size_t j = 0; j < 32; ++j) out[j] = static_cast<float>(b.qs[j]) * d;
}

void decode(const BlockIq4Nl& b, float* out) {
  const float d = f32_from_f16(b.d);
  for (size_t j = 0; j < 16; ++j) {
    out[j] = d * static_cast<float>(kIq4Values[b.qs[j] & 15]);
    out[j + 16] = d * static_cast<float>(kIq4Values[b.qs[j] >> 4]);
  }
}

void decode(const BlockMxfp4& b, float* out) {
  // 2^(e − 128); the two smallest exponents are subnormal.
  const uint32_t bits = b.e < 2 ? 0x00200000u << b.e : static_cast<uint32_t>(b.e - 1) << 23;
  const float d = std::bit_cast<float>(bits);
  for (size_t j = 0; j < 16; ++j) {
    out[j] = static_cast<float>(kMxfp4Values[b.qs[j] & 15]) * d;
    out[j + 16] = static_cast<float>(kMxfp4Values[b.qs[j] >> 4]) * d;
  }
}

void decode(const BlockQ2K& b, float* out) {
  const float d = f32_from_f16(b.d), dmin = f32_from_f16(b.dmin);
  for (size_t s = 0; s < 16; ++s) {
    const float scale = d * static_cast<float>(b.scales[s] & 15);
    const float min = dmin * static_cast<float>(b.scales[s] >> 4);
    const size_t n = s / 8, k = s % 8 / 2;
    const uint8_t* qs = b.qs + 32 * n + 16 * (s % 2);
    for (size_t l = 0; l < 16; ++l)
      out[16 * s + l] = scale * static_cast<float>((qs[l] >> (2 * k)) & 3) - min;
  }
}

void decode(const BlockQ3K& b, float* out) {
  const float d = f32_from_f16(b.d);
  const std::array<uint8_t, 16> scales = unpack_q3k_scales(b.scales);
  for (size_t s = 0; s < 16; ++s) {
    const float scale = d * static_cast<float>(scales[s] - 32);
    const size_t n = s / 8, k = s % 8 / 2;
    const uint8_t* qs = b.qs + 32 * n + 16 * (s % 2);
    const uint8_t* hmask = b.hmask + 16 * (s % 2);
    for (size_t l = 0; l < 16; ++l) {
      const int low = (qs[l] >> (2 * k)) & 3, high = (hmask[l] >> (4 * n + k)) & 1;
      out[16 * s + l] = scale * static_cast<float>(low + 4 * high - 4);
    }
  }
}

void decode(const BlockQ4K& b, float* out) {
  const float d = f32_from_f16(b.d), dmin = f32_from_f16(b.dmin);
  for (size_t s = 0; s < 8; ++s) {
    const ScaleMin u = scale_min_of(b.scales, s);
    const float scale = d * static_cast<float>(u.scale), min = dmin * static_cast<float>(u.min);
    const uint8_t* qs = b.qs + 32 * (s / 2);
    const unsigned shift = 4 * (s % 2);
    for (size_t l = 0; l < 32; ++l)
      out[32 * s + l] = scale * static_cast<float>((qs[l] >> shift) & 15) - min;
  }
}

void decode(const BlockQ5K& b, float* out) {
  const float d = f32_from_f16(b.d), dmin = f32_from_f16(b.dmin);
  for (size_t s = 0; s < 8; ++s) {
    const ScaleMin u = scale_min_of(b.scales, s);
    const float scale = d * static_cast<float>(u.scale), min = dmin * static_cast<float>(u.min);
    const uint8_t* qs = b.qs + 32 * (s / 2);
    const unsigned shift = 4 * (s % 2);
    for (size_t l = 0; l < 32; ++l) {
      const int code = ((qs[l] >> shift) & 15) | ((b.qh[l] >> s) & 1) << 4;
      out[32 * s + l] = scale * static_cast<float>(code) - min;
    }
  }
}

void decode(const BlockQ6K& b, float* out) {
  const float d = f32_from_f16(b.d);
  for (size_t s = 0; s < 16; ++s) {
    const float scale = d * static_cast<float>(b.scales[s]);
    const size_t n = s / 8, t = s % 8 / 2;
    const uint8_t* ql = b.ql + 64 * n + 32 * (t & 1) + 16 * (s % 2);
    const uint8_t* qh = b.qh + 32 * n + 16 * (s % 2);
    for (size_t l = 0; l < 16; ++l) {
      const int low = (ql[l] >> (4 * (t / 2))) & 15, high = (qh[l] >> (2 * t)) & 3;
      out[16 * s + l] = scale * static_cast<float>((low | high << 4) - 32);
    }
  }
}

void decode(const BlockIq4Xs& b, float* out) {
  const float d = f32_from_f16(b.d);
  for (size_t s = 0; s < 8; ++s) {
    const int low = (b.scales_l[s / 2] >> (4 * (s % 2))) & 15, high = (b.scales_h >> (2 * s)) & 3;
    const float scale = d * static_cast<float>((low | high << 4) - 32);
    const uint8_t* qs = b.qs + 16 * s;
    for (size_t j = 0; j < 16; ++j) {
      out[32 * s + j] = scale * static_cast<float>(kIq4Values[qs[j] & 15]);
      out[32 * s + j + 16] = scale * static_cast<float>(kIq4Values[qs[j] >> 4]);
    }
  }
}

using RowDecoder = void (*)(const std::byte* in, float* out, size_t count);

template <typename Block>
void decode_row(const std::byte* in, float* out, size_t count) {
  for (size_t i = 0; i < count; i += Block::kElements, in += sizeof(Block)) {
    Block block;  // a copy: blocks stand at any address
    std::memcpy(&block, in, sizeof block);
    decode(block, out + i);
  }
}

template <float (*widen)(uint16_t)>
void widen_row(const std::byte* in, float* out, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    uint16_t bits;
    std::memcpy(&bits, in + 2 * i, sizeof bits);
    out[i] = widen(bits);
  }
}

void copy_row(const std::byte* in, float* out, size_t count) {
  std::memcpy(out, in, count * sizeof(float));
}

// In the order of DType, up to the last quantized type.
constexpr std::array<RowDecoder, 16> kRowDecoders = {
    copy_row,
    widen_row<f32_from_f16>,
    widen_row<f32_from_bf16>,
    decode_row<BlockQ4_0>,
    decode_row<BlockQ4_1>,
    decode_row<BlockQ5_0>,
    decode_row<BlockQ5_1>,
    decode_row<BlockQ8_0>,
    decode_row<BlockQ2K>,
    decode_row<BlockQ3K>,
    decode_row<BlockQ4K>,
    decode_row<BlockQ5K>,
    decode_row<BlockQ6K>,
    decode_row<BlockIq4Nl>,
    decode_row<BlockIq4Xs>,
    decode_row<BlockMxfp4>,
};
static_assert(kRowDecoders.size() == static_cast<size_t>(DType::mxfp4) + 1);

}  // namespace

void dequantize(DType type, std::span<const std::byte> in, std::span<float> out) {
  MORU_CHECK(is_float(type) || is_quantized(type));
  MORU_CHECK(in.size() == bytes_of(type, out.size()));
  if (out.empty()) return;
  kRowDecoders[static_cast<size_t>(type)](in.data(), out.data(), out.size());
}

}  // namespace moru
