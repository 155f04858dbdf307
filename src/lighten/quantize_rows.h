// What quantize.cc shares with the quantizers of each family of types. Not for other modules.
#pragma once
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "base/half.h"
#include "lighten/scale_search.h"

namespace moru {

// A checked row. importance is positive, with a mean of about 1.
struct WeightedRow {
  const float* x;           // [cols]
  const float* importance;  // [cols]
  size_t cols;
  double mean_square;  // of x
};

// One block's worth of a row, multiplied by a power of two so that its extreme lies in [1, 2):
// then neither huge nor tiny weights leave the range of f32 in any sum. x is what the searches
// see; a scale found for it is stored as scale·2^exponent.
template <size_t N>
struct ScaledBlock {
  alignas(32) std::array<float, N> x;
  alignas(32) std::array<float, N> w;
  int exponent = 0;

  // The half that holds `scale`, at most the largest finite one, and what it stands for here.
  struct Half {
    uint16_t bits;
    float value;
  };
  Half half_of(float scale) const {
    constexpr float kLargest = 65504;
    const float wide = std::ldexp(scale, exponent);
    const uint16_t bits = f16_from_f32(std::min(std::max(wide, -kLargest), kLargest));
    return {bits, std::ldexp(f32_from_f16(bits), -exponent)};
  }
};

enum class Spread { row, block };  // where σ² of the weights comes from

// The block at `at`; false if nothing in it is large enough to be stored as other than zero.
template <size_t N>
bool load_block(const WeightedRow& row, size_t at, Spread spread, ScaledBlock<N>& block) {
  const float* x = row.x + at;
  const float extreme = std::abs(extreme_of<N>(x));
  // The smallest half is 2⁻²⁴; codes reach at most 2⁷ and scales of sub-blocks another 2⁷ down.
  if (extreme < 0x1p-60f) return false;
  block.exponent = std::ilogb(extreme);
  const float factor = std::ldexp(1.0f, -block.exponent);
  double sum = 0;
  for (size_t i = 0; i < N; ++i) {
    block.x[i] = x[i] * factor;
    sum += double{block.x[i]} * block.x[i];
  }
  const double square =
      spread == Spread::block ? 2 * sum / double{N} : row.mean_square * double{factor} * factor;
  const auto sigma2 = static_cast<float>(std::min(square, 1e30));
  for (size_t i = 0; i < N; ++i)
    block.w[i] = row.importance[at + i] * std::sqrt(sigma2 + block.x[i] * block.x[i]);
  return true;
}

using RowQuantizer = void (*)(const WeightedRow& row, std::byte* out);
void quantize_q4_0(const WeightedRow& row, std::byte* out);
void quantize_q5_0(const WeightedRow& row, std::byte* out);
void quantize_q8_0(const WeightedRow& row, std::byte* out);
void quantize_q4_1(const WeightedRow& row, std::byte* out);
void quantize_q5_1(const WeightedRow& row, std::byte* out);
void quantize_iq4_nl(const WeightedRow& row, std::byte* out);
void quantize_q3_k(const WeightedRow& row, std::byte* out);
void quantize_q4_k(const WeightedRow& row, std::byte* out);
void quantize_q5_k(const WeightedRow& row, std::byte* out);
void quantize_q6_k(const WeightedRow& row, std::byte* out);
void quantize_iq4_xs(const WeightedRow& row, std::byte* out);

}  // namespace moru
