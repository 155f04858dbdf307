#include "engine/few_rows.h"

#include <algorithm>
#include <array>

#include "base/cpu.h"
#include "base/error.h"
#include "base/half.h"
#include "engine/few_rows_kernels.h"
#include "engine/weight_pieces.h"

namespace moru {
namespace {

constexpr size_t kItemRows = 4;  // as many as a kernel takes at a time

FewRowsKernel kernel() {
  switch (isa()) {
    case Isa::scalar:
      return few_rows_scalar;
    case Isa::avx2:
      return few_rows_avx2;
    case Isa::avx512:
      return few_rows_avx512;
  }
  return few_rows_scalar;
}

}  // namespace

void few_rows_scalar(const uint16_t* x, size_t m, const uint16_t* w, size_t rows, size_t k,
                     float* y, size_t ldy, bool add) noexcept {
  for (size_t t = 0; t < m; ++t)
    for (size_t r = 0; r < rows; ++r) {
      float sum = 0;
      for (size_t i = 0; i < k; ++i)
        sum += f32_from_bf16(x[t * k + i]) * f32_from_bf16(w[r * k + i]);
      float& out = y[t * ldy + r];
      out = add ? out + sum : sum;
    }
}

WeightItems few_rows_items(const uint16_t* w, size_t rows, size_t k) {
  return {w, (rows + kItemRows - 1) / kItemRows, 2 * k * kItemRows};
}

void multiply_few_rows(Pool& pool, const uint16_t* x, size_t m, size_t k,
                       std::span<const FewRowsProduct> products,
                       std::span<const WeightItems> next) {
  MORU_CHECK(m >= 1 && m <= kFewRows && products.size() <= kPhaseProducts);
  std::array<WeightItems, kPhaseProducts> items;
  for (size_t i = 0; i < products.size(); ++i)
    items[i] = few_rows_items(products[i].w, products[i].rows, k);
  each_weight_piece(pool, std::span(items).first(products.size()), next,
                    [&](size_t product, size_t begin, size_t end, size_t) {
                      const FewRowsProduct& p = products[product];
                      const size_t row = begin * kItemRows,
                                   rows = std::min(end * kItemRows, p.rows) - row;
                      kernel()(x, m, p.w + row * k, rows, k, p.y + row, p.ldy, p.add);
                    });
}

}  // namespace moru
