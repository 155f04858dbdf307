#include "lighten/quantize.h"

#include <fmt/format.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "base/error.h"
#include "lighten/quantize_rows.h"

namespace moru {
namespace {

// What an importance of zero is raised to, as a share of the row's mean.
constexpr float kLeastImportance = 1e-4f;

struct QuantizerRow {
  DType type;
  RowQuantizer quantize;
  Spread spread;
};
constexpr QuantizerRow kQuantizers[] = {
    {DType::q4_0, quantize_q4_0, Spread::row},       {DType::q4_1, quantize_q4_1, Spread::row},
    {DType::q5_0, quantize_q5_0, Spread::row},       {DType::q5_1, quantize_q5_1, Spread::row},
    {DType::q8_0, quantize_q8_0, Spread::row},       {DType::iq4_nl, quantize_iq4_nl, Spread::row},
    {DType::q3_k, quantize_q3_k, Spread::block},     {DType::q4_k, quantize_q4_k, Spread::block},
    {DType::q5_k, quantize_q5_k, Spread::block},     {DType::q6_k, quantize_q6_k, Spread::block},
    {DType::iq4_xs, quantize_iq4_xs, Spread::block},
};

const QuantizerRow* quantizer_of(DType type) {
  for (const QuantizerRow& row : kQuantizers)
    if (row.type == type) return &row;
  return nullptr;
}

[[noreturn]] void refuse(size_t column, std::string what, const char* cure) {
  throw Error(ErrorKind::bad_input,
              {.where = fmt::format("column {}", column), .what = std::move(what), .cure = cure});
}

double checked_mean_square(Floats x) {
  double sum = 0;
  for (size_t j = 0; j < x.size(); ++j) {
    if (!std::isfinite(x[j]))
      refuse(j, fmt::format("the weight is {}", x[j]),
             "the model is damaged: fetch or convert it again");
    sum += double{x[j]} * x[j];
  }
  return x.empty() ? 0 : sum / static_cast<double>(x.size());
}

// Relative to the row's mean, and never zero.
std::vector<float> usable_importance(Floats importance, size_t cols) {
  double sum = 0;
  for (size_t j = 0; j < importance.size(); ++j) {
    if (!std::isfinite(importance[j]) || importance[j] < 0)
      refuse(j, fmt::format("the importance is {}", importance[j]), "calibrate again");
    sum += importance[j];
  }
  if (sum == 0) return std::vector<float>(cols, 1.0f);
  std::vector<float> relative(importance.begin(), importance.end());
  const double scale = static_cast<double>(cols) / sum;
  for (float& v : relative) v = std::max(static_cast<float>(double{v} * scale), kLeastImportance);
  return relative;
}

// `largest` is the greatest finite number of the type.
void store_halves(Floats x, std::span<std::byte> out, float largest, uint16_t (*narrow)(float)) {
  for (size_t j = 0; j < x.size(); ++j) {
    const uint16_t bits = narrow(std::clamp(x[j], -largest, largest));
    std::memcpy(out.data() + 2 * j, &bits, sizeof bits);
  }
}

}  // namespace

bool can_quantize(DType type) { return is_float(type) || quantizer_of(type) != nullptr; }

void quantize_row(DType type, Floats x, Floats importance, std::span<std::byte> out) {
  MORU_CHECK(can_quantize(type));
  MORU_CHECK(out.size() == bytes_of(type, x.size()));
  MORU_CHECK(importance.empty() || importance.size() == x.size());
  const double mean_square = checked_mean_square(x);
  const std::vector<float> weights = usable_importance(importance, x.size());
  if (x.empty()) return;
  if (type == DType::f32) {
    std::memcpy(out.data(), x.data(), x.size_bytes());
  } else if (type == DType::f16) {
    store_halves(x, out, 65504.0f, f16_from_f32);
  } else if (type == DType::bf16) {
    store_halves(x, out, 0x1.fep127f, bf16_from_f32);
  } else {
    quantizer_of(type)->quantize({x.data(), weights.data(), x.size(), mean_square}, out.data());
  }
}

double weighted_error(DType type, Floats x, Floats importance, Floats y) {
  MORU_CHECK(x.size() == y.size());
  const double row_square = checked_mean_square(x);
  const std::vector<float> weights = usable_importance(importance, x.size());
  const QuantizerRow* quantizer = quantizer_of(type);
  const bool by_block = quantizer != nullptr && quantizer->spread == Spread::block;
  const size_t block = by_block ? traits(type).block : x.size();
  double sum = 0;
  for (size_t at = 0; at < x.size(); at += block) {
    const double sigma2 = by_block ? 2 * checked_mean_square(x.subspan(at, block)) : row_square;
    for (size_t j = at; j < at + block; ++j) {
      const double off = double{x[j]} - y[j];
      sum += double{weights[j]} * std::sqrt(sigma2 + double{x[j]} * x[j]) * off * off;
    }
  }
  return sum;
}

}  // namespace moru
