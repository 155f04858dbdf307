// dX = dY · W for a head whose softmax leaves most of dY next to nothing: what vanishes is left out
// ("gradient filtering", Cut Cross-Entropy, arXiv:2411.09009, with a bound by row instead of one by
// element).
//
// Of each row of dY the smallest elements may go, as long as their magnitudes add up to at most
// kFilteredShare of the row's. For a softmax, whose row adds up to 2 (1 − p_target) in magnitude,
// that is 2⁻⁹ (1 − p_target): as much as rounding every element to bf16 may cost.
//
// What stays of a row is a list in the order of columns, one word an element: its value in bf16
// above, its column within its stripe of kFilterStripe columns below. A row of dX is made from the
// rows of W that its list names, two at a time, stripe after stripe: its bits depend on the row of
// dY alone.
//
// Included by a file of one level, so integer types alone (float_kernels.h says why).
#pragma once
#include <cstddef>
#include <cstdint>

namespace moru {

inline constexpr float kFilteredShare = 1.0f / 1024;
inline constexpr size_t kFilterStripe = 1024;
// Columns of dX that are multiplied at a time.
inline constexpr size_t kFilterTile = 384;
// Words that may be read past a stripe's list, whatever they are.
inline constexpr size_t kFilterAhead = 8;

constexpr size_t filter_stripes(size_t n) { return (n + kFilterStripe - 1) / kFilterStripe; }

// The magnitude below which elements of a row [n] may go: a power of two times the row's sum of
// magnitudes, or 0 if even the smallest ones are too many. All zeros may go.
float negligible_avx512(const float* row, size_t n) noexcept;

// Lists the elements of a row [n] that are not below `negligible`, and where each stripe's begin:
// starts [filter_stripes(n) + 1], the last one being the end. list has room for n + 16.
void list_kept_avx512(const float* row, size_t n, float negligible, uint32_t* list,
                      uint32_t* starts) noexcept;
// The list of all n ≤ kFilterStripe elements of a stripe that is in bf16 already.
void list_stripe_avx512(const uint16_t* row, size_t n, uint32_t* list) noexcept;

// y [cols ≤ kFilterTile] += the elements of one stripe's list times w [kFilterStripe, cols], rows
// ldw apart.
void multiply_kept_avx512(const uint32_t* list, size_t count, const uint16_t* w, size_t ldw,
                          size_t cols, float* y) noexcept;

}  // namespace moru
