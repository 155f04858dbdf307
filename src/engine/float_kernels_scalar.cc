// The definition: 16 lanes as an array.
#include <cstddef>
#include <cstdint>

#include "base/half.h"
#include "engine/float_kernels.h"

namespace moru {
namespace {

struct Vec {
  float lane[16];
};
struct Mask {
  bool lane[16];
};
constexpr size_t kTileRows = 6, kTileVecs = 1, kTallTileRows = 6, kTallTileVecs = 1;

template <typename F>
inline Vec lanes(F f) {
  Vec y;
  for (int i = 0; i < 16; ++i) y.lane[i] = f(i);
  return y;
}

inline Vec zero() { return Vec{}; }
inline Vec splat(float x) {
  return lanes([=](int) { return x; });
}
inline Vec load(const float* p) {
  return lanes([=](int i) { return p[i]; });
}
inline void store(float* p, Vec v) {
  for (int i = 0; i < 16; ++i) p[i] = v.lane[i];
}
inline Vec load_bf16(const uint16_t* p) {
  return lanes([=](int i) { return f32_from_bf16(p[i]); });
}
inline void store_bf16(uint16_t* p, Vec v) {
  for (int i = 0; i < 16; ++i) p[i] = bf16_from_f32(v.lane[i]);
}
inline Vec load_f16(const uint16_t* p) {
  return lanes([=](int i) { return f32_from_f16(p[i]); });
}
inline void store_f16(uint16_t* p, Vec v) {
  for (int i = 0; i < 16; ++i) p[i] = f16_from_f32(v.lane[i]);
}
inline Vec load_i8(const int8_t* p) {
  return lanes([=](int i) { return static_cast<float>(p[i]); });
}
inline Vec load_part(const float* p, size_t n) {
  return lanes([=](int i) { return static_cast<size_t>(i) < n ? p[i] : 0.0f; });
}
inline void store_part(float* p, size_t n, Vec v) {
  for (size_t i = 0; i < n; ++i) p[i] = v.lane[i];
}

inline Vec add(Vec a, Vec b) {
  return lanes([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Vec sub(Vec a, Vec b) {
  return lanes([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline Vec mul(Vec a, Vec b) {
  return lanes([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline Vec div(Vec a, Vec b) {
  return lanes([&](int i) { return a.lane[i] / b.lane[i]; });
}
inline Vec root(Vec a) {
  return lanes([&](int i) { return __builtin_sqrtf(a.lane[i]); });
}
inline Vec fma(Vec a, Vec b, Vec c) {
  return lanes([&](int i) { return __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]); });
}
inline Vec fnma(Vec a, Vec b, Vec c) {
  return lanes([&](int i) { return __builtin_fmaf(-a.lane[i], b.lane[i], c.lane[i]); });
}
inline Vec max(Vec a, Vec b) {
  return lanes([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Vec min(Vec a, Vec b) {
  return lanes([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Vec magnitude(Vec a) {
  return lanes([&](int i) { return __builtin_fabsf(a.lane[i]); });
}
inline Vec with_sign(Vec a, Vec sign) {
  return lanes([&](int i) { return __builtin_copysignf(a.lane[i], sign.lane[i]); });
}
inline Mask less(Vec a, Vec b) {
  Mask m;
  for (int i = 0; i < 16; ++i) m.lane[i] = a.lane[i] < b.lane[i];
  return m;
}
inline Mask lanes_between(int first, int end) {
  Mask m;
  for (int i = 0; i < 16; ++i) m.lane[i] = i >= first && i < end;
  return m;
}
inline Vec select(Mask m, Vec yes, Vec no) {
  return lanes([&](int i) { return m.lane[i] ? yes.lane[i] : no.lane[i]; });
}
// To nearest, ties to even, for |x| < 2^22: adding 1.5 · 2^23 leaves no room for a fraction.
inline Vec round_to_integer(Vec x) {
  return lanes([&](int i) { return (x.lane[i] + 12582912.0f) - 12582912.0f; });
}
// x · 2^n for whole −126 ≤ n ≤ 127.
inline Vec times_power_of_two(Vec x, Vec n) {
  return lanes([&](int i) {
    const auto exponent = std::bit_cast<uint32_t>(n.lane[i] + 12582912.0f) + 127;
    return x.lane[i] * std::bit_cast<float>(exponent << 23);
  });
}
inline float sum_lanes(Vec v) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v.lane[i] += v.lane[i + half];
  return v.lane[0];
}
inline float max_lanes(Vec v) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i)
      v.lane[i] = v.lane[i] > v.lane[i + half] ? v.lane[i] : v.lane[i + half];
  return v.lane[0];
}
// 16 words of 32 bits, each a whole number or a pair of 16-bit ones.
struct Words {
  uint32_t lane[16];
};
template <typename F>
inline Words words(F f) {
  Words y;
  for (int i = 0; i < 16; ++i) y.lane[i] = f(i);
  return y;
}
inline int32_t low_half(uint32_t word) { return static_cast<int16_t>(word & 0xffff); }
inline int32_t high_half(uint32_t word) { return static_cast<int16_t>(word >> 16); }

inline Words zero_words() { return Words{}; }
inline Words load_words(const int16_t* p) {
  Words y;
  __builtin_memcpy(y.lane, p, sizeof y.lane);
  return y;
}
inline void store_words(int16_t* p, Words w) { __builtin_memcpy(p, w.lane, sizeof w.lane); }
inline Words splat_pair(const int16_t* p) {
  uint32_t pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return words([=](int) { return pair; });
}
// acc + a₀b₀ + a₁b₁ in each word.
inline Words add_dots(Words acc, Words a, Words b) {
  return words([&](int i) {
    const int32_t low = low_half(a.lane[i]) * low_half(b.lane[i]);
    const int32_t high = high_half(a.lane[i]) * high_half(b.lane[i]);
    return acc.lane[i] + static_cast<uint32_t>(low) + static_cast<uint32_t>(high);
  });
}
inline Words add_words(Words a, Words b) {
  return words([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline int32_t sum_of_words(Words w) {
  uint32_t sum = 0;
  for (const uint32_t word : w.lane) sum += word;
  return static_cast<int32_t>(sum);
}
inline Vec to_floats(Words w) {
  return lanes([&](int i) { return static_cast<float>(static_cast<int32_t>(w.lane[i])); });
}
// To nearest, ties to even; NaN becomes some number.
inline Words to_words(Vec v) {
  const Vec whole = round_to_integer(v);
  return words([&](int i) {
    const float x = whole.lane[i];
    return x >= -4194304.0f && x <= 4194304.0f ? static_cast<uint32_t>(static_cast<int32_t>(x))
                                               : 0x80000000u;
  });
}
// The low halves as pairs (a, b).
inline Words pair_up(Words a, Words b) {
  return words([&](int i) { return (a.lane[i] & 0xffff) | b.lane[i] << 16; });
}
inline void store_low_halves(int16_t* p, Words w) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int16_t>(w.lane[i] & 0xffff);
}
inline void transpose(const float* p, size_t ld, Vec out[16]) {
  for (size_t d = 0; d < 16; ++d)
    for (size_t t = 0; t < 16; ++t) out[d].lane[t] = p[t * ld + d];
}

#include "engine/float_kernels_body.h"

}  // namespace

constexpr FloatKernels kScalarFloatKernels = make_table();

}  // namespace moru
