#include "engine/few_rows.h"

#include <algorithm>

#include "base/cpu.h"
#include "base/error.h"
#include "base/half.h"
#include "base/pieces.h"
#include "engine/few_rows_kernels.h"

namespace moru {
namespace {

constexpr size_t kItemRows = 4;  // as many as a kernel takes at a time
// No piece of a thread's work is smaller than this many bytes of weights.
constexpr size_t kLeastBytes = 16 << 10;

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
  const auto items_of = [](const FewRowsProduct& p) {
    return (p.rows + kItemRows - 1) / kItemRows;
  };
  size_t items = 0;
  for (const FewRowsProduct& p : products) items += items_of(p);
  const size_t least = std::max<size_t>(1, kLeastBytes / (2 * k * kItemRows));
  each_piece(pool, items, least, [&](size_t begin, size_t end) {
    size_t first = 0;  // of a product's items
    for (const FewRowsProduct& p : products) {
      const size_t next = first + items_of(p);
      const size_t from = std::max(begin, first), to = std::min(end, next);
      if (from < to) {
        const size_t row = (from - first) * kItemRows;
        const size_t rows = std::min((to - first) * kItemRows, p.rows) - row;
        kernel()(x, m, p.w + row * k, rows, k, p.y + row, p.ldy, p.add);
      }
      first = next;
    }
  });
}

}  // namespace moru
