// Types of 32 elements with their own half-precision scale: Q4_0, Q5_0, Q8_0, IQ4_NL, and with a
// minimum, Q4_1 and Q5_1.
#include <cstring>
#include <vector>

#include "lighten/pack.h"
#include "lighten/quantize_rows.h"

namespace moru {
namespace {

constexpr size_t kBlock = 32;
using Scaled = ScaledBlock<kBlock>;

// Keeps the best scale that has been tried, as it will be stored: rounded to half precision, and
// every code nearest under the rounded scale.
template <typename Codes>
class BestScale {
 public:
  explicit BestScale(const Scaled& block) : block_(block) {}
  bool attempt(float scale) {
    const Scaled::Half d = block_.half_of(scale);
    const float error = error_at<Codes, kBlock>(block_.x.data(), block_.w.data(), d.value, 0);
    if (!(error < error_)) return false;
    error_ = error;
    d_ = d;
    return true;
  }
  float scale() const { return d_.value; }
  uint16_t bits() const { return d_.bits; }

 private:
  const Scaled& block_;
  Scaled::Half d_{};
  float error_ = std::numeric_limits<float>::infinity();
};

// The scale to which the codes of `scale` fit best, again and again while that helps.
template <typename Codes>
void polish(const Scaled& block, BestScale<Codes>& best) {
  for (int round = 0; round < 4; ++round) {
    const CodeSums s =
        sums_at<Codes, kBlock>(block.x.data(), block.w.data(), inverse_of(best.scale()), 0);
    if (!(s.qq > 0) || !best.attempt(s.qx / s.qq)) return;
  }
}

// Where the extreme element may land. The first is what plain rounding does: it uses the one more
// code that two's complement has below zero.
template <typename Codes>
struct Anchors;
template <>
struct Anchors<LinearCodes<-8, 7>> {
  static constexpr float kValues[] = {-8.0f, -7.0f, -7.2f, -7.4f, -7.6f, -7.8f, -8.2f, -8.4f,
                                      -8.6f, -8.8f, -9.0f, -6.6f, -6.3f, -6.0f, -5.0f, -4.0f,
                                      -3.0f, -2.0f, -1.0f, 1.0f,  2.0f,  3.0f,  4.0f,  5.0f,
                                      6.0f,  6.4f,  6.8f,  7.0f,  7.2f,  7.4f,  7.7f,  8.0f};
};
template <>
struct Anchors<LinearCodes<-16, 15>> {
  static constexpr float kValues[] = {
      -16.0f, -14.6f, -14.8f, -15.0f, -15.2f, -15.4f, -15.6f, -15.8f, -16.2f, -16.4f,
      -16.6f, -16.8f, -17.0f, -14.0f, -13.0f, -12.0f, -11.0f, -10.0f, -9.0f,  -8.0f,
      9.0f,   10.0f,  11.0f,  12.0f,  13.0f,  14.0f,  14.5f,  15.0f,  15.3f,  15.6f};
};
template <>
struct Anchors<Iq4Codes> {
  static constexpr float kValues[] = {
      -127, -104, -83,  -65,  -49,  -35,  -22,  -10,  1,    13,   25,   38,   53,  69,  89,
      113,  -130, -134, -138, -142, -124, -121, -118, -115, -112, -109, -101, -98, -95, -92,
      -89,  86,   92,   95,   98,   101,  104,  107,  110,  116,  119,  122,  126};
};

template <typename Codes>
uint16_t search_scale(const Scaled& block, Codes32& codes) {
  BestScale<Codes> best(block);
  const auto& anchors = Anchors<Codes>::kValues;
  best.attempt(extreme_of<kBlock>(block.x.data()) / anchors[0]);
  best.attempt(fit_symmetric<Codes, kBlock>(block.x.data(), block.w.data(), anchors).scale);
  polish(block, best);
  store_codes<Codes, kBlock>(block.x.data(), best.scale(), 0, codes.data());
  return best.bits();
}

// At 8 bits a step is so small that it is the rounding of the scale to half precision that counts:
// scales are compared as they are stored. Codes keep to ±127, since kernels negate them.
using ByteCodes = LinearCodes<-127, 127>;
template <>
uint16_t search_scale<ByteCodes>(const Scaled& block, Codes32& codes) {
  BestScale<ByteCodes> best(block);
  const float extreme = std::abs(extreme_of<kBlock>(block.x.data()));
  for (int top = 127; top >= 108; --top) best.attempt(extreme / static_cast<float>(top));
  polish(block, best);
  store_codes<ByteCodes, kBlock>(block.x.data(), best.scale(), 0, codes.data());
  return best.bits();
}

template <typename Codes, typename Block>
void quantize_symmetric(const WeightedRow& row, std::byte* out) {
  Scaled scaled;
  for (size_t at = 0; at < row.cols; at += kBlock, out += sizeof(Block)) {
    Block block{};
    Codes32 codes;
    if (load_block(row, at, Spread::row, scaled)) {
      block.d = search_scale<Codes>(scaled, codes);
    } else {
      codes.fill(Codes::stored(Codes::nearest(Lanes{})[0]));
    }
    pack_codes(codes, block);
    std::memcpy(out, &block, sizeof block);
  }
}

// --- with a minimum: x ≈ d·q + m -----------------------------------------------------------

// The number of steps of the range: plain rounding first, then finer ones around it, then whole
// ones for blocks that were on a shorter lattice already.
template <int kTop>
std::vector<float> spans_of() {
  std::vector<float> spans = {float{kTop}};
  for (int i = -18; i <= 18; ++i)
    if (i != 0) spans.push_back(float{kTop} + 0.05f * static_cast<float>(i));
  for (int whole = kTop - 1; whole >= 1; --whole) spans.push_back(static_cast<float>(whole));
  return spans;
}

template <int kTop, typename Block>
void quantize_affine(const WeightedRow& row, std::byte* out) {
  using Codes = LinearCodes<0, kTop>;
  static const std::vector<float> spans = spans_of<kTop>();
  Scaled scaled;
  for (size_t at = 0; at < row.cols; at += kBlock, out += sizeof(Block)) {
    Block block{};
    Codes32 codes{};
    if (load_block(row, at, Spread::row, scaled)) {
      const float *x = scaled.x.data(), *w = scaled.w.data();
      float error = std::numeric_limits<float>::infinity();
      Scaled::Half best_d{}, best_m{};
      const auto attempt = [&](float scale, float min) {
        const Scaled::Half d = scaled.half_of(scale), m = scaled.half_of(min);
        const float e = error_at<Codes, kBlock>(x, w, d.value, -m.value);
        if (!(e < error)) return;
        error = e;
        best_d = d;
        best_m = m;
      };
      const auto [low, high] = std::minmax_element(scaled.x.begin(), scaled.x.end());
      attempt((*high - *low) / float{kTop}, *low);
      const AffineFit fit = fit_affine<kTop, kBlock, Minimum::any>(x, w, spans);
      attempt(fit.scale, -fit.min);
      block.d = best_d.bits;
      block.m = best_m.bits;
      store_codes<Codes, kBlock>(x, best_d.value, -best_m.value, codes.data());
    }
    pack_codes(codes, block);
    std::memcpy(out, &block, sizeof block);
  }
}

}  // namespace

void quantize_q4_0(const WeightedRow& row, std::byte* out) {
  quantize_symmetric<LinearCodes<-8, 7>, BlockQ4_0>(row, out);
}
void quantize_q5_0(const WeightedRow& row, std::byte* out) {
  quantize_symmetric<LinearCodes<-16, 15>, BlockQ5_0>(row, out);
}
void quantize_q8_0(const WeightedRow& row, std::byte* out) {
  quantize_symmetric<ByteCodes, BlockQ8_0>(row, out);
}
void quantize_iq4_nl(const WeightedRow& row, std::byte* out) {
  quantize_symmetric<Iq4Codes, BlockIq4Nl>(row, out);
}
void quantize_q4_1(const WeightedRow& row, std::byte* out) {
  quantize_affine<15, BlockQ4_1>(row, out);
}
void quantize_q5_1(const WeightedRow& row, std::byte* out) {
  quantize_affine<31, BlockQ5_1>(row, out);
}

}  // namespace moru
