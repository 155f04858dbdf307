// dX = dY · W for a head whose softmax leaves most of dY next to nothing: what vanishes is left out
// ("gradient filtering", Cut Cross-Entropy, arXiv:2411.09009, with a bound by row instead of one by
// element).
//
// Of each row of dY the smallest elements may go, as long as their magnitudes add up to at most
// kFilteredShare of the row's. For a softmax, whose row adds up to 2 (1 − p_target) in magnitude,
// that is 2⁻⁹ (1 − p_target): as much as rounding every element to bf16 may cost. An element goes
// if it may go in all of the twelve rows that are multiplied at a time, so that what is left of
// them is
//
//   places [n]    the columns that stay, in order      kept [12][n]   bf16
//
// and a pair of rows of W, read where they stand, is put together from lines that are in the cache.
// Which elements go is a function of the twelve rows alone, and sums run in the order of columns.
//
// Included by a file of one level, so integer types alone (float_kernels.h says why).
#pragma once
#include <cstddef>
#include <cstdint>

namespace moru {

inline constexpr float kFilteredShare = 1.0f / 1024;
inline constexpr size_t kFilterRows = 12;       // rows that share their columns
inline constexpr size_t kFilterColumns = 4096;  // of dY at a time
// Elements between kept rows: an odd number of cache lines, with room for what is asked for ahead.
inline constexpr size_t kKeptStride = kFilterColumns + 96;
// Columns of dX that are multiplied at a time.
inline constexpr size_t kFilterTile = 32;

// The magnitude below which elements of a row [n] may go: a power of two times the row's sum of
// magnitudes, or 0 if even the smallest ones are too many. All zeros may go.
float negligible_avx512(const float* row, size_t n) noexcept;

// Columns [0, n), n ≤ kFilterColumns, of `rows` ≤ 12 rows of dY that one row at least may not lose.
// kept [12][kKeptStride], zeros below `rows`; places: column times ldw. Both are filled up to an
// even number. Returns how many columns stay.
size_t pick_avx512(const float* dy, size_t ld, size_t rows, size_t n, const float* negligible,
                   size_t ldw, uint16_t* kept, uint32_t* places) noexcept;

// y [rows, cols ≤ 32] += kept [rows, count] · w [count, cols], w's rows at w + places.
void multiply_picked_avx512(const uint16_t* kept, const uint32_t* places, size_t count,
                            const uint16_t* w, size_t rows, size_t cols, float* y,
                            size_t ldy) noexcept;

}  // namespace moru
