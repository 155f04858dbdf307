// The definition of the exact product: every other level must give these bits. Plain loops, one
// weight at a time, reading the packed layout as quant_kernels.h draws it.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "base/half.h"
#include "engine/quant_kernels.h"
#include "formats/blocks.h"

namespace moru {
namespace {

uint16_t u16_at(const uint8_t* p, size_t i) {
  uint16_t value;
  std::memcpy(&value, p + 2 * i, sizeof value);
  return value;
}
uint32_t u32_at(const uint8_t* p, size_t i) {
  uint32_t value;
  std::memcpy(&value, p + 4 * i, sizeof value);
  return value;
}
float half_at(const uint8_t* p, size_t r) { return f32_from_f16(u16_at(p, r)); }

// The weight of row r and column c of a unit, before its scale.
template <DType kType>
int weight_at(const uint8_t* unit, size_t c, size_t r) {
  constexpr size_t kOrder[4] = {0, 2, 1, 3};
  const size_t q = c / 4, byte = 4 * r + kOrder[c % 4];
  if constexpr (kType == DType::q8_0) {
    return unit[64 * q + byte] - 128;
  } else if constexpr (kType == DType::q2_k || kType == DType::q3_k) {
    const int low = unit[64 * (q / 4) + byte] >> (2 * (q % 4)) & 3;
    if constexpr (kType == DType::q2_k) return low;
    const int third = unit[128 + byte] >> ((2 + q) & 7) & 1;
    return (low | third << 2) - 4;
  } else {
    const int low = unit[64 * (q / 2) + byte] >> (4 * (q % 2)) & 15;
    if constexpr (kType == DType::iq4_nl || kType == DType::iq4_xs)
      return kIq4Values[static_cast<size_t>(low)];
    if constexpr (kType == DType::mxfp4) return kMxfp4Values[static_cast<size_t>(low)];
    if constexpr (kType == DType::q4_0) return low - 8;
    if constexpr (kType == DType::q4_1 || kType == DType::q4_k) return low;
    if constexpr (kType == DType::q6_k) {
      const int top = unit[256 + 64 * (q / 4) + byte] >> ((4 + 2 * q) & 7) & 3;
      return (low | top << 4) - 32;
    }
    const int fifth = unit[256 + byte] >> ((4 + q) & 7) & 1;
    return (low | fifth << 4) - (kType == DType::q5_0 ? 16 : 0);
  }
}

// Value n of the sixteen that six() packs.
int six_bits(const uint8_t* words, size_t n, size_t r) {
  const auto word = [&](size_t i) { return u32_at(words + 64 * i, r); };
  if (n < 15) return static_cast<int>(word(n / 5) >> (6 * (n % 5)) & 63);
  return static_cast<int>(word(0) >> 30 | word(1) >> 30 << 2 | word(2) >> 30 << 4);
}

struct ScaleMinF32 {
  float scale, min;
};

// Scale and minimum of row r in block b of a scale record.
template <DType kType>
ScaleMinF32 scale_at(const uint8_t* record, size_t b, size_t r) {
  switch (kType) {
    case DType::q4_1:
    case DType::q5_1:
      return {half_at(record, r), half_at(record + 32, r)};
    case DType::mxfp4: {
      const uint32_t e = record[r];  // 2^(e − 128), where 2^-128 and 2^-127 are subnormal
      return {std::bit_cast<float>(e < 2 ? 0x00200000u << e : (e - 1) << 23), 0};
    }
    case DType::q4_k:
    case DType::q5_k: {
      const auto scale = static_cast<float>(six_bits(record + 64, b, r));
      const auto min = static_cast<float>(six_bits(record + 64, 8 + b, r));
      return {half_at(record, r) * scale, -(half_at(record + 32, r) * min)};
    }
    case DType::q3_k:
      return {half_at(record, r) * static_cast<float>(six_bits(record + 32, b, r) - 32), 0};
    case DType::q2_k: {
      const uint8_t both = record[64 + 16 * b + r];
      return {half_at(record, r) * static_cast<float>(both & 15),
              -(half_at(record + 32, r) * static_cast<float>(both >> 4))};
    }
    case DType::q6_k: {
      const auto scale = static_cast<int8_t>(record[32 + 16 * b + r]);
      return {half_at(record, r) * static_cast<float>(scale), 0};
    }
    case DType::iq4_xs: {
      const auto low = static_cast<int>(u32_at(record + 32, r) >> (4 * b) & 15);
      const int high = u16_at(record + 96, r) >> (2 * b) & 3;
      return {half_at(record, r) * static_cast<float>((low | high << 4) - 32), 0};
    }
    default:
      return {half_at(record, r), 0};
  }
}

template <DType kType>
void unpack(const uint8_t* scales, const uint8_t* codes, size_t units, const Stripe& out) noexcept {
  constexpr PanelFormat format = kPanelFormat[panel_format_index(kType)];
  for (size_t c = 0; c < units * kUnitCols; ++c)
    for (size_t r = 0; r < kPanelRows; ++r)
      out.codes[2 * (c / 2 * out.lanes + r) + c % 2] = static_cast<int16_t>(
          weight_at<kType>(codes + c / kUnitCols * format.unit_bytes, c % kUnitCols, r));
  constexpr size_t per_record = format.scale_cols / format.block;
  for (size_t b = 0; b < units * kUnitCols / format.block; ++b)
    for (size_t r = 0; r < kPanelRows; ++r) {
      const ScaleMinF32 s =
          scale_at<kType>(scales + b / per_record * format.scale_bytes, b % per_record, r);
      out.scales[b * out.lanes + r] = s.scale;
      if (format.has_min) out.mins[b * out.lanes + r] = s.min;
    }
}

// Adds a block of a row's product with token t; x's scales come in here or at the end.
template <bool k8, bool kMin, size_t kBlock>
void end_block(float& acc, int32_t dot, float scale, float min, const Tokens& x, size_t t,
               size_t b) {
  const size_t at = t * x.sums_stride + b;
  if (k8) scale *= x.scales[t * x.unit_stride + b * kBlock / kUnitCols];
  acc = std::fma(static_cast<float>(dot), scale, acc);
  if (kMin) acc = std::fma(min, k8 ? x.scaled_sums[at] : static_cast<float>(x.sums[at]), acc);
}

template <bool k8>
void store(const Target& y, size_t t, size_t r, float acc, const Tokens& x) {
  float& out = y.y[t * y.ldy + r];
  if (k8)
    out = y.add ? out + acc : acc;
  else
    out = y.add ? std::fma(acc, x.scales[t], out) : acc * x.scales[t];
}

template <DType kType, bool k8>
void direct(const Panels& w, const Tokens& x, const Target& y) noexcept {
  constexpr PanelFormat format = kPanelFormat[panel_format_index(kType)];
  constexpr size_t per_record = format.scale_cols / format.block;
  constexpr size_t per_unit = kUnitCols / format.block;
  for (size_t row = 0; row < w.rows; ++row) {
    const uint8_t* panel = w.data + row / kPanelRows * w.panel_bytes;
    const size_t r = row % kPanelRows;
    for (size_t t = 0; t < x.count; ++t) {
      float acc = 0;
      for (size_t b = 0; b < w.units * per_unit; ++b) {
        const uint8_t* unit = panel + w.codes_at + b / per_unit * format.unit_bytes;
        const int16_t* code = x.codes + t * x.stride + b * format.block;
        int32_t dot = 0;
        for (size_t c = 0; c < format.block; ++c)
          dot += weight_at<kType>(unit, b % per_unit * format.block + c, r) * code[c];
        const ScaleMinF32 s =
            scale_at<kType>(panel + b / per_record * format.scale_bytes, b % per_record, r);
        end_block<k8, format.has_min, format.block>(acc, dot, s.scale, s.min, x, t, b);
      }
      store<k8>(y, t, row, acc, x);
    }
  }
}

template <size_t kBlock, bool kMin, bool k8>
void stripe(const Stripe& w, size_t cols, size_t rows, const Tokens& x, const Target& y) noexcept {
  for (size_t t = 0; t < x.count; ++t)
    for (size_t r = 0; r < rows; ++r) {
      float acc = 0;
      for (size_t b = 0; b < cols / kBlock; ++b) {
        int32_t dot = 0;
        for (size_t c = b * kBlock; c < (b + 1) * kBlock; ++c)
          dot += w.codes[2 * (c / 2 * w.lanes + r) + c % 2] * x.codes[t * x.stride + c];
        const size_t at = b * w.lanes + r;
        end_block<k8, kMin, kBlock>(acc, dot, w.scales[at], kMin ? w.mins[at] : 0, x, t, b);
      }
      store<k8>(y, t, r, acc, x);
    }
}

void dequantize(const Stripe& w, size_t cols, size_t block, size_t first, size_t count, float* out,
                size_t ld) noexcept {
  for (size_t i = 0; i < count; ++i)
    for (size_t c = 0; c < cols; ++c) {
      const size_t r = first + i, at = c / block * w.lanes + r;
      const auto code = static_cast<float>(w.codes[2 * (c / 2 * w.lanes + r) + c % 2]);
      const float value = code * w.scales[at];
      out[i * ld + c] = w.mins != nullptr ? value + w.mins[at] : value;
    }
}

float quantize(const float* x, size_t k, int16_t* codes, int8_t* digits, int32_t* sums16,
               int32_t* sums32) noexcept {
  uint32_t largest = 0;  // of the magnitudes as bits, where a NaN is above infinity
  for (size_t i = 0; i < k; ++i)
    largest = std::max(largest, std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu);
  const float max = std::bit_cast<float>(largest);
  const bool finite = largest < 0x7f800000u, usable = finite && max >= 0x1p-100f;
  const float inverse = usable ? static_cast<float>(kMaxCode) / max : 0;
  for (size_t i = 0; i < k; ++i)
    codes[i] = usable ? static_cast<int16_t>(std::lrint(x[i] * inverse)) : int16_t{0};
  for (size_t b = 0; b < k / 16; ++b) {
    sums16[b] = 0;
    for (size_t i = 16 * b; i < 16 * b + 16; ++i) sums16[b] += codes[i];
  }
  for (size_t b = 0; b < k / 32; ++b) sums32[b] = sums16[2 * b] + sums16[2 * b + 1];
  if (digits != nullptr)
    for (size_t quad = 0; quad < k / 4; ++quad)
      for (size_t i = 0; i < 4; ++i) {
        constexpr size_t kOrder[4] = {0, 2, 1, 3};
        const int code = codes[4 * quad + i], high = (code + 128) >> 8;
        digits[8 * quad + kOrder[i]] = static_cast<int8_t>(high);
        digits[8 * quad + 4 + kOrder[i]] = static_cast<int8_t>(code - 256 * high);
      }
  if (!finite) return std::bit_cast<float>(0x7fc00000u);
  return usable ? max / static_cast<float>(kMaxCode) : 0;
}

void quantize8(const float* x, size_t k, const Row8& out) noexcept {
  for (size_t u = 0; u < k / kUnitCols; ++u, x += kUnitCols) {
    uint32_t largest = 0;
    for (size_t i = 0; i < kUnitCols; ++i)
      largest = std::max(largest, std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu);
    const float max = std::bit_cast<float>(largest);
    const bool finite = largest < 0x7f800000u, usable = finite && max >= 0x1p-100f;
    const float inverse = usable ? kMaxCode8 / max : 0;
    const float scale = !finite ? std::bit_cast<float>(0x7fc00000u) : usable ? max / kMaxCode8 : 0;
    out.scales[u] = scale;
    int32_t sums[2] = {0, 0};
    for (size_t i = 0; i < kUnitCols; ++i) {
      const auto code = usable ? static_cast<int16_t>(std::lrint(x[i] * inverse)) : int16_t{0};
      sums[i / 16] += code;
      if (out.codes != nullptr) out.codes[u * kUnitCols + i] = code;
      constexpr size_t kOrder[4] = {0, 2, 1, 3};
      if (out.digits != nullptr)
        out.digits[u * kUnitCols + i / 4 * 4 + kOrder[i % 4]] = static_cast<int8_t>(code);
    }
    for (size_t h = 0; h < 2; ++h) {
      out.sums16[2 * u + h] = sums[h];
      out.scaled16[2 * u + h] = static_cast<float>(sums[h]) * scale;
    }
    out.sums32[u] = sums[0] + sums[1];
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

const QuantKernels& quant_kernels_scalar() noexcept { return kKernels; }

}  // namespace moru
