#include "engine/few_rows.h"

#include <algorithm>

#include "base/cpu.h"
#include "base/error.h"
#include "base/half.h"
#include "engine/few_rows_kernels.h"

namespace moru {
namespace {

// Weights of one item of work: long enough to hide its start, short enough that threads finish
// together. A multiple of the rows that a kernel takes at a time.
constexpr size_t kItemBytes = 32 << 10;

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

void multiply_few_rows(Pool& pool, const uint16_t* x, size_t m, size_t k,
                       std::span<const FewRowsProduct> products) {
  MORU_CHECK(m >= 1 && m <= kFewRows);
  const size_t item_rows = std::max<size_t>(4, kItemBytes / (2 * k) / 4 * 4);
  const auto items_of = [&](const FewRowsProduct& p) {
    return (p.rows + item_rows - 1) / item_rows;
  };
  size_t items = 0;
  for (const FewRowsProduct& p : products) items += items_of(p);
  pool.each(items, [&](size_t item) {
    for (const FewRowsProduct& p : products) {
      if (item < items_of(p)) {
        const size_t row = item * item_rows;
        return kernel()(x, m, p.w + row * k, std::min(item_rows, p.rows - row), k, p.y + row, p.ldy,
                        p.add);
      }
      item -= items_of(p);
    }
  });
}

}  // namespace moru
