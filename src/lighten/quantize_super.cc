// Super-blocks of 256 elements: sub-blocks with small integer scales under one or two halfs.
//
// Each quantizer goes the same way. First every sub-block finds the real scale (and minimum) that
// it would like best. Then a common unit d is fitted to those wishes, each counting as much as an
// error in it would cost. From there on only what can be stored is compared: integer scales near
// the wish, codes nearest under exactly those, and d refitted to the codes for as long as the error
// falls. Plain rounding competes from the start, so that the result is never worse.
#include <cstring>
#include <vector>

#include "lighten/pack.h"
#include "lighten/quantize_rows.h"

namespace moru {
namespace {

constexpr size_t kSuper = 256;
using Scaled = ScaledBlock<kSuper>;
constexpr float kInfinite = std::numeric_limits<float>::infinity();
constexpr int kRefits = 3;

float rounded(float v, float low, float high) {
  return std::nearbyint(std::min(std::max(v, low), high));
}

// --- one signed scale a sub-block: Q3_K, Q6_K, IQ4_XS ------------------------------------------

// Codes: of the elements; kSub: elements a sub-block; scales are integers kLow … −kLow − 1.
template <typename Codes, size_t kSub, int kLow>
class SymmetricSuper {
 public:
  static constexpr size_t kSubs = kSuper / kSub;
  static constexpr float kLowest = float{kLow}, kHighest = float{-kLow - 1};
  using Scales = std::array<float, kSubs>;

  SymmetricSuper(const Scaled& block, std::span<const float> anchors) : block_(block) {
    plain(anchors[0]);
    searched(anchors);
    for (int round = 0; round < kRefits; ++round)
      if (!refit()) break;
  }

  uint16_t d() const { return best_.d.bits; }
  // With kLow taken off, so from 0.
  std::array<uint8_t, kSubs> stored_scales() const {
    std::array<uint8_t, kSubs> stored;
    for (size_t b = 0; b < kSubs; ++b)
      stored[b] = static_cast<uint8_t>(static_cast<int>(best_.scales[b]) - kLow);
    return stored;
  }
  Codes256 codes() const {
    Codes256 codes;
    for (size_t b = 0; b < kSubs; ++b)
      store_codes<Codes, kSub>(x(b), best_.d.value * best_.scales[b], 0, codes.data() + kSub * b);
    return codes;
  }

 private:
  struct State {
    Scaled::Half d{};
    Scales scales{};
    float error = kInfinite;
  };

  const float* x(size_t b) const { return block_.x.data() + kSub * b; }
  const float* w(size_t b) const { return block_.w.data() + kSub * b; }
  float error_of(size_t b, float d, float scale) const {
    return error_at<Codes, kSub>(x(b), w(b), d * scale, 0);
  }

  // Integer scales nearest to the wishes, or within `reach` of them if that is better.
  bool attempt(float unit, const Scales& wishes, int reach) {
    State state;
    state.d = block_.half_of(unit);
    state.error = 0;
    const float inverse = inverse_of(state.d.value);
    for (size_t b = 0; b < kSubs; ++b) {
      const float middle = rounded(wishes[b] * inverse, kLowest, kHighest);
      float least = kInfinite;
      for (int step = -reach; step <= reach; ++step) {
        const float scale = middle + static_cast<float>(step);
        if (scale < kLowest || scale > kHighest) continue;
        const float error = error_of(b, state.d.value, scale);
        if (!(error < least)) continue;
        least = error;
        state.scales[b] = scale;
      }
      state.error += least;
    }
    if (!(state.error < best_.error)) return false;
    best_ = state;
    return true;
  }

  void plain(float anchor) {
    Scales wishes;
    for (size_t b = 0; b < kSubs; ++b) wishes[b] = extreme_of<kSub>(x(b)) / anchor;
    attempt(extreme_of<kSubs>(wishes.data()) / kLowest, wishes, 0);
  }

  void searched(std::span<const float> anchors) {
    static constexpr float kScaleAnchors[] = {
        kLowest,        kLowest + 0.25f, kLowest + 0.5f,  kLowest + 0.75f, kLowest + 1,
        kLowest + 1.5f, kLowest + 2,     kLowest - 0.25f, kHighest,        kHighest - 0.5f};
    Scales wishes, costs;
    for (size_t b = 0; b < kSubs; ++b) {
      const SymmetricFit fit = fit_symmetric<Codes, kSub>(x(b), w(b), anchors);
      wishes[b] = fit.scale;
      costs[b] = fit.curve;
    }
    using ScaleCodes = LinearCodes<kLow, -kLow - 1>;
    const SymmetricFit unit =
        fit_symmetric<ScaleCodes, kSubs>(wishes.data(), costs.data(), kScaleAnchors);
    attempt(unit.scale, wishes, 1);
    attempt(extreme_of<kSubs>(wishes.data()) / kLowest, wishes, 1);
  }

  // The unit to which the codes fit best, and the scales around their place under it.
  bool refit() {
    float qx = 0, qq = 0;
    Scales wishes;
    for (size_t b = 0; b < kSubs; ++b) {
      const float scale = best_.scales[b];
      wishes[b] = best_.d.value * scale;
      const CodeSums s = sums_at<Codes, kSub>(x(b), w(b), inverse_of(wishes[b]), 0);
      qx += scale * s.qx;
      qq += scale * scale * s.qq;
    }
    return qq > 0 && attempt(qx / qq, wishes, 1);
  }

  const Scaled& block_;
  State best_;
};

// --- a scale and a minimum a sub-block: Q4_K, Q5_K ---------------------------------------------

template <int kTop>
class AffineSuper {
 public:
  static constexpr size_t kSub = 32, kSubs = 8;
  using Codes = LinearCodes<0, kTop>;

  AffineSuper(const Scaled& block, std::span<const float> spans) : block_(block) {
    plain();
    searched(spans);
    for (int round = 0; round < kRefits; ++round)
      if (!refit()) break;
  }

  uint16_t d() const { return best_.d.bits; }
  uint16_t dmin() const { return best_.dmin.bits; }
  std::array<ScaleMin, kSubs> stored_scales() const {
    std::array<ScaleMin, kSubs> stored;
    for (size_t b = 0; b < kSubs; ++b)
      stored[b] = {static_cast<uint8_t>(best_.scales[b]), static_cast<uint8_t>(best_.mins[b])};
    return stored;
  }
  Codes256 codes() const {
    Codes256 codes;
    for (size_t b = 0; b < kSubs; ++b)
      store_codes<Codes, kSub>(x(b), best_.d.value * best_.scales[b],
                               best_.dmin.value * best_.mins[b], codes.data() + kSub * b);
    return codes;
  }

 private:
  static constexpr float kMost = 63;  // scales and minimums have six bits
  using Scales = std::array<float, kSubs>;
  struct State {
    Scaled::Half d{}, dmin{};
    Scales scales{}, mins{};
    float error = kInfinite;
  };

  const float* x(size_t b) const { return block_.x.data() + kSub * b; }
  const float* w(size_t b) const { return block_.w.data() + kSub * b; }

  bool attempt(float unit, float unit_min, const Scales& wishes, const Scales& min_wishes,
               int reach) {
    State state;
    state.d = block_.half_of(unit);
    state.dmin = block_.half_of(unit_min);
    state.error = 0;
    const float inverse = inverse_of(state.d.value), inverse_min = inverse_of(state.dmin.value);
    for (size_t b = 0; b < kSubs; ++b) {
      const float scale_0 = rounded(wishes[b] * inverse, 0, kMost);
      const float min_0 = rounded(min_wishes[b] * inverse_min, 0, kMost);
      float least = kInfinite;
      for (int i = -reach; i <= reach; ++i) {
        for (int j = -reach; j <= reach; ++j) {
          const float scale = scale_0 + static_cast<float>(i), min = min_0 + static_cast<float>(j);
          if (scale < 0 || scale > kMost || min < 0 || min > kMost) continue;
          const float error =
              error_at<Codes, kSub>(x(b), w(b), state.d.value * scale, state.dmin.value * min);
          if (!(error < least)) continue;
          least = error;
          state.scales[b] = scale;
          state.mins[b] = min;
        }
      }
      state.error += least;
    }
    if (!(state.error < best_.error)) return false;
    best_ = state;
    return true;
  }

  static float largest(const Scales& values) {
    return *std::max_element(values.begin(), values.end());
  }

  void plain() {
    Scales wishes, min_wishes;
    for (size_t b = 0; b < kSubs; ++b) {
      const auto [low, high] = std::minmax_element(x(b), x(b) + kSub);
      min_wishes[b] = std::max(0.0f, -*low);
      wishes[b] = std::max(0.0f, *high + min_wishes[b]) / float{kTop};
    }
    attempt(largest(wishes) / kMost, largest(min_wishes) / kMost, wishes, min_wishes, 0);
  }

  void searched(std::span<const float> spans) {
    static constexpr float kScaleAnchors[] = {63, 62.75f, 62.5f, 62.25f, 62, 61.5f, 61, 60, 63.25f};
    Scales wishes, min_wishes, costs, min_costs;
    for (size_t b = 0; b < kSubs; ++b) {
      const AffineFit fit = fit_affine<kTop, kSub, Minimum::not_below_zero>(x(b), w(b), spans);
      wishes[b] = fit.scale;
      min_wishes[b] = fit.min;
      costs[b] = fit.sums.qq;
      min_costs[b] = 0;
      for (size_t i = 0; i < kSub; ++i) min_costs[b] += w(b)[i];
    }
    using ScaleCodes = LinearCodes<0, 63>;
    const float unit =
        fit_symmetric<ScaleCodes, kSubs>(wishes.data(), costs.data(), kScaleAnchors).scale;
    const float unit_min =
        fit_symmetric<ScaleCodes, kSubs>(min_wishes.data(), min_costs.data(), kScaleAnchors).scale;
    attempt(unit, unit_min, wishes, min_wishes, 1);
    attempt(largest(wishes) / kMost, largest(min_wishes) / kMost, wishes, min_wishes, 1);
  }

  // The two units to which the codes fit best: x ≈ d·(scale·q) − dmin·min.
  bool refit() {
    float aa = 0, ab = 0, bb = 0, ax = 0, bx = 0;
    Scales wishes, min_wishes;
    for (size_t b = 0; b < kSubs; ++b) {
      const float scale = best_.scales[b], min = best_.mins[b];
      wishes[b] = best_.d.value * scale;
      min_wishes[b] = best_.dmin.value * min;
      const CodeSums s = sums_at<Codes, kSub>(x(b), w(b), inverse_of(wishes[b]), min_wishes[b]);
      float sum_w = 0, sum_x = 0;
      for (size_t i = 0; i < kSub; ++i) {
        sum_w += w(b)[i];
        sum_x += w(b)[i] * x(b)[i];
      }
      aa += scale * scale * s.qq;
      ab += scale * min * s.q;
      bb += min * min * sum_w;
      ax += scale * s.qx;
      bx += min * sum_x;
    }
    const float determinant = aa * bb - ab * ab;
    if (!(aa > 0)) return false;
    float unit = ax / aa, unit_min = 0;
    if (determinant > 0) {
      unit = (ax * bb - ab * bx) / determinant;
      unit_min = (ax * ab - aa * bx) / determinant;
      if (unit_min < 0) {
        unit = ax / aa;
        unit_min = 0;
      }
    }
    return unit > 0 && attempt(unit, unit_min, wishes, min_wishes, 1);
  }

  const Scaled& block_;
  State best_;
};

// --- rows --------------------------------------------------------------------------------------

// Calls encode(scaled, block) for each super-block that is not zero; zeros encode as zeros do.
template <typename Block, typename Encode>
void each_super(const WeightedRow& row, std::byte* out, Encode&& encode) {
  Scaled scaled;
  for (size_t at = 0; at < row.cols; at += kSuper, out += sizeof(Block)) {
    Block block{};  // d = 0: whatever the codes say, they mean zero
    if (load_block(row, at, Spread::block, scaled)) encode(scaled, block);
    std::memcpy(out, &block, sizeof block);
  }
}

template <int kTop>
std::vector<float> spans_of() {
  std::vector<float> spans;
  for (int i = -18; i <= 18; ++i) spans.push_back(float{kTop} + 0.05f * static_cast<float>(i));
  for (int whole = kTop - 1; whole >= kTop / 2; --whole) spans.push_back(static_cast<float>(whole));
  return spans;
}

// Codes −kTop … kTop − 1: the first is what plain rounding uses.
template <int kTop>
std::vector<float> anchors_of() {
  std::vector<float> anchors = {float{-kTop}};
  for (int i = -9; i <= 9; ++i)
    if (i != 0) anchors.push_back(float{-kTop} + 0.1f * static_cast<float>(i));
  for (int i = -4; i <= 4; ++i) anchors.push_back(float{kTop - 1} + 0.2f * static_cast<float>(i));
  return anchors;
}

template <int kTop, typename Block>
void quantize_affine_super(const WeightedRow& row, std::byte* out) {
  static const std::vector<float> spans = spans_of<kTop>();
  each_super<Block>(row, out, [&](const Scaled& scaled, Block& block) {
    const AffineSuper<kTop> found(scaled, spans);
    block.d = found.d();
    block.dmin = found.dmin();
    pack_scale_mins(found.stored_scales(), block.scales);
    pack_codes(found.codes(), block);
  });
}

}  // namespace

void quantize_q4_k(const WeightedRow& row, std::byte* out) {
  quantize_affine_super<15, BlockQ4K>(row, out);
}

void quantize_q5_k(const WeightedRow& row, std::byte* out) {
  quantize_affine_super<31, BlockQ5K>(row, out);
}

void quantize_q3_k(const WeightedRow& row, std::byte* out) {
  static const std::vector<float> anchors = anchors_of<4>();
  each_super<BlockQ3K>(row, out, [&](const Scaled& scaled, BlockQ3K& block) {
    const SymmetricSuper<LinearCodes<-4, 3>, 16, -32> found(scaled, anchors);
    block.d = found.d();
    pack_q3k_scales(found.stored_scales(), block.scales);
    pack_codes(found.codes(), block);
  });
}

void quantize_q6_k(const WeightedRow& row, std::byte* out) {
  static const std::vector<float> anchors = anchors_of<32>();
  each_super<BlockQ6K>(row, out, [&](const Scaled& scaled, BlockQ6K& block) {
    const SymmetricSuper<LinearCodes<-32, 31>, 16, -128> found(scaled, anchors);
    block.d = found.d();
    const auto scales = found.stored_scales();
    for (size_t b = 0; b < scales.size(); ++b)
      block.scales[b] = static_cast<int8_t>(scales[b] - 128);
    pack_codes(found.codes(), block);
  });
}

void quantize_iq4_xs(const WeightedRow& row, std::byte* out) {
  static const std::vector<float> anchors = [] {
    std::vector<float> values = {-127, 113, -104, 89, -83, 69, -65, 53};
    for (int i = 1; i <= 6; ++i)
      for (const int around : {-127, -115, 113})
        for (const int sign : {-1, 1}) values.push_back(static_cast<float>(around + 2 * i * sign));
    return values;
  }();
  each_super<BlockIq4Xs>(row, out, [&](const Scaled& scaled, BlockIq4Xs& block) {
    const SymmetricSuper<Iq4Codes, 32, -32> found(scaled, anchors);
    block.d = found.d();
    pack_iq4xs_scales(found.stored_scales(), block);
    pack_codes(found.codes(), block);
  });
}

}  // namespace moru
