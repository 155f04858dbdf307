// The inner loop of few_rows.h, one a level of the instruction set. Included by files of one level,
// so by integer types alone (float_kernels.h says why).
#pragma once
#include <cstddef>
#include <cstdint>

namespace moru {

// y[t · ldy + r] (+)= Σ over i of x[t · k + i] · w[r · k + i], for m ≤ 8 tokens and any number of
// rows. Sums run over the vector's lanes, which are then added up in a fixed order.
using FewRowsKernel = void (*)(const uint16_t* x, size_t m, const uint16_t* w, size_t rows,
                               size_t k, float* y, size_t ldy, bool add);

void few_rows_scalar(const uint16_t* x, size_t m, const uint16_t* w, size_t rows, size_t k,
                     float* y, size_t ldy, bool add) noexcept;
void few_rows_avx2(const uint16_t* x, size_t m, const uint16_t* w, size_t rows, size_t k, float* y,
                   size_t ldy, bool add) noexcept;
void few_rows_avx512(const uint16_t* x, size_t m, const uint16_t* w, size_t rows, size_t k,
                     float* y, size_t ldy, bool add) noexcept;

// How far ahead of the weights to prefetch into L2.
inline constexpr size_t kFewRowsAhead = 6 << 10;  // elements

}  // namespace moru
