// Products of a few rows of bf16 activations with bf16 weights: the steps of the bf16 profile in
// which every weight is read for a few tokens only, so that the speed of memory is the limit.
//
// A result depends on its row of weights and its row of activations alone, at one level of the
// instruction set: not on the rows beside it or on the number of threads.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>

#include "base/threads.h"
#include "engine/weight_pieces.h"

namespace moru {

inline constexpr size_t kFewRows = 8;

// y [m, rows] f32, ldy apart, = x · wᵀ, or += with `add`.
struct FewRowsProduct {
  const uint16_t* w;  // [rows, k]
  size_t rows;
  float* y;
  size_t ldy;
  bool add;
};

// Weights [rows, k] as a phase of few rows reads them.
WeightItems few_rows_items(const uint16_t* w, size_t rows, size_t k);

// x: [m, k] bf16, 1 ≤ m ≤ kFewRows. All products in one parallel phase; the next one reads `next`.
void multiply_few_rows(Pool& pool, const uint16_t* x, size_t m, size_t k,
                       std::span<const FewRowsProduct> products,
                       std::span<const WeightItems> next = {});

}  // namespace moru
