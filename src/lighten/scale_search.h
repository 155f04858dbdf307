// Weighted least-squares searches for the scale (and minimum) under which a few dozen weights are
// rounded. The building blocks of every quantizer here.
//
// For fixed codes q the error Σ w (x − d·q)² is a parabola in d, with its lowest value
// Σ w x² − (Σ w x q)² / Σ w q² at d = Σ w x q / Σ w q². The codes are what makes the problem hard:
// so each of a list of candidate scales rounds once, and the parabola of the codes it gave is
// solved exactly. With a minimum (x ≈ d·q + m) the same is a 2×2 system.
//
// Four lanes at a time, by the compilers' vector extension: every x86-64 and ARM64 has them, and
// the order of the sums, so the bits, does not depend on the machine.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "formats/blocks.h"

namespace moru {

inline constexpr size_t kLanes = 4;
using Lanes = float __attribute__((vector_size(16)));

inline Lanes load(const float* p) {
  Lanes v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Lanes all_lanes(float v) { return Lanes{v, v, v, v}; }
inline float sum_of(Lanes l) { return (l[0] + l[2]) + (l[1] + l[3]); }

// The codes of a type, as the numbers that they stand for.
template <int kLow, int kHigh>
struct LinearCodes {
  // Ties to even: adding 1.5·2²³ leaves no bit for the fraction.
  static Lanes nearest(Lanes v) {
    constexpr float kMagic = 12582912.0f;
    const Lanes low = all_lanes(float{kLow}), high = all_lanes(float{kHigh});
    v = v > low ? v : low;
    v = v < high ? v : high;
    return (v + kMagic) - kMagic;
  }
  static uint8_t stored(float code) { return static_cast<uint8_t>(static_cast<int>(code) - kLow); }
};

// The 16 values of IQ4_NL and IQ4_XS.
struct Iq4Codes {
  static Lanes nearest(Lanes v) {
    Lanes code = all_lanes(float{kIq4Values[0]});
    for (size_t k = 1; k < kIq4Values.size(); ++k) {
      const Lanes step = all_lanes(static_cast<float>(kIq4Values[k] - kIq4Values[k - 1]));
      const float middle = 0.5f * static_cast<float>(kIq4Values[k] + kIq4Values[k - 1]);
      code += v > middle ? step : Lanes{};
    }
    return code;
  }
  static uint8_t stored(float code) {
    return static_cast<uint8_t>(
        std::lower_bound(kIq4Values.begin(), kIq4Values.end(), static_cast<int>(code)) -
        kIq4Values.begin());
  }
};

inline float inverse_of(float scale) { return scale == 0 ? 0 : 1 / scale; }

// Σ w (x − scale·q + min)², codes being the nearest under this very scale.
// x, w: [N]
template <typename Codes, size_t N>
float error_at(const float* x, const float* w, float scale, float min) {
  const float inverse = inverse_of(scale);
  Lanes sum{};
  for (size_t i = 0; i < N; i += kLanes) {
    const Lanes shifted = load(x + i) + min;
    const Lanes off = shifted - scale * Codes::nearest(shifted * inverse);
    sum += load(w + i) * off * off;
  }
  return sum_of(sum);
}

template <typename Codes, size_t N>
void store_codes(const float* x, float scale, float min, uint8_t* codes) {
  const float inverse = inverse_of(scale);
  for (size_t i = 0; i < N; i += kLanes) {
    const Lanes nearest = Codes::nearest((load(x + i) + min) * inverse);
    for (size_t l = 0; l < kLanes; ++l) codes[i + l] = Codes::stored(nearest[l]);
  }
}

// The sums that a least-squares fit needs, of the codes under one scale and minimum.
struct CodeSums {
  float q = 0, qq = 0, qx = 0;  // Σ w q, Σ w q², Σ w q x
};
template <typename Codes, size_t N>
CodeSums sums_at(const float* x, const float* w, float inverse, float min) {
  Lanes q{}, qq{}, qx{};
  for (size_t i = 0; i < N; i += kLanes) {
    const Lanes value = load(x + i);
    const Lanes code = Codes::nearest((value + min) * inverse);
    const Lanes weighted = load(w + i) * code;
    q += weighted;
    qq += weighted * code;
    qx += weighted * value;
  }
  return {sum_of(q), sum_of(qq), sum_of(qx)};
}

// The element of the largest magnitude, with its sign.
template <size_t N>
float extreme_of(const float* x) {
  float largest = 0;
  for (size_t i = 0; i < N; ++i) largest = std::abs(x[i]) > std::abs(largest) ? x[i] : largest;
  return largest;
}

struct SymmetricFit {
  float scale = 0;
  float gain = 0;   // Σ w x² less the error: what the codes explain
  float curve = 0;  // Σ w q²: what an error in the scale costs
};

// The best scale that putting the extreme element on one of `anchors` (numbers in code units)
// leads to, polished by rounding again under it.
// x, w: [N], N a multiple of 4
template <typename Codes, size_t N>
SymmetricFit fit_symmetric(const float* x, const float* w, std::span<const float> anchors) {
  SymmetricFit best;
  const float extreme = extreme_of<N>(x);
  if (extreme == 0) return best;
  const auto attempt = [&](float inverse) {
    const CodeSums s = sums_at<Codes, N>(x, w, inverse, 0);
    if (!(s.qq > 0) || s.qx * s.qx <= best.gain * s.qq) return false;
    best = {s.qx / s.qq, s.qx * s.qx / s.qq, s.qq};
    return true;
  };
  const float unit = 1 / extreme;
  for (const float anchor : anchors) attempt(anchor * unit);
  for (int round = 0; round < 3 && best.scale != 0; ++round)
    if (!attempt(1 / best.scale)) break;
  return best;
}

struct AffineFit {
  float scale = 0, min = 0;  // x ≈ scale·q − min
  float error = 0;
  CodeSums sums;
};

enum class Minimum {
  not_below_zero,  // Q4_K, Q5_K: the stored minimum has no sign
  any,             // Q4_1, Q5_1
};

// The best scale and minimum for codes 0 … kTop. `spans` are the numbers of steps, in code units,
// that the range of x is cut into.
template <int kTop, size_t N, Minimum kMinimum>
AffineFit fit_affine(const float* x, const float* w, std::span<const float> spans) {
  using Codes = LinearCodes<0, kTop>;
  float low = x[0], high = x[0];
  for (size_t i = 1; i < N; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
  Lanes lane_w{}, lane_x{}, lane_xx{};
  for (size_t i = 0; i < N; i += kLanes) {
    const Lanes value = load(x + i), weight = load(w + i), weighted = weight * value;
    lane_w += weight;
    lane_x += weighted;
    lane_xx += weighted * value;
  }
  const float sum_w = sum_of(lane_w), sum_x = sum_of(lane_x), sum_xx = sum_of(lane_xx);
  if (kMinimum == Minimum::not_below_zero && low > 0) low = 0;

  AffineFit best;
  best.min = kMinimum == Minimum::any ? -sum_x / sum_w : std::max(0.0f, -sum_x / sum_w);
  best.error = sum_xx + 2 * best.min * sum_x + best.min * best.min * sum_w;
  if (!(high > low)) return best;
  const auto attempt = [&](float inverse, float shift) {
    const CodeSums s = sums_at<Codes, N>(x, w, inverse, shift);
    const float determinant = sum_w * s.qq - s.q * s.q;
    if (!(s.qq > 0)) return false;
    float scale = s.qx / s.qq, min = 0;
    if (determinant > 0) {
      scale = (sum_w * s.qx - s.q * sum_x) / determinant;
      min = (s.q * s.qx - s.qq * sum_x) / determinant;
      if (kMinimum == Minimum::not_below_zero && min < 0) {
        min = 0;
        scale = s.qx / s.qq;
      }
    }
    // Σ w (x − scale·q + min)², multiplied out.
    const float error = sum_xx + scale * scale * s.qq + min * min * sum_w - 2 * scale * s.qx +
                        2 * min * sum_x - 2 * scale * min * s.q;
    if (!(error < best.error) || !(scale > 0)) return false;
    best = {scale, min, error, s};
    return true;
  };
  const float unit = 1 / (high - low);
  for (const float span : spans) attempt(span * unit, -low);
  for (int round = 0; round < 3 && best.scale > 0; ++round)
    if (!attempt(1 / best.scale, best.min)) break;
  return best;
}

}  // namespace moru
