// The inner loop of dense.h's bf16 products where the processor multiplies pairs of bf16
// (AVX512_BF16): one tile of a sum of products, by one thread.
//
//   y [m, n] = scale · Σ over terms of a [m, k] · b [k, n]   (+ y)
//
// The stripe of b is packed once per tile, [k/2][32 columns][2], so that one load brings the pairs
// of k of 16 columns; twelve rows of a are then run against two such loads at a time, 24 sums in
// registers. Rows of a are read where they stand if neighbours in k are neighbours in memory, and
// packed otherwise. k is cut into blocks that stay in L2.
//
// Sums run in the order of terms and of k, whatever the tile's place: an element's bits depend on
// its row of a and its column of b alone.
//
// Included by a file of one level, so integer types alone (float_kernels.h says why).
#pragma once
#include <cstddef>
#include <cstdint>

namespace moru {

struct Bf16Term {
  const uint16_t* a;
  size_t a_row, a_step;  // elements from row to row, and along k; one of them is 1
  const uint16_t* b;
  size_t b_col, b_step;  // elements from column to column, and along k; one of them is 1
  size_t k;
};

inline constexpr size_t kBf16Terms = 4;       // most terms of a sum
inline constexpr size_t kBf16Rows = 12;       // rows of a at a time
inline constexpr size_t kBf16Lanes = 16;      // columns of a vector
inline constexpr size_t kBf16Panel = 96;      // rows of a that are packed at a time
inline constexpr size_t kBf16TileCols = 192;  // most columns of a tile
inline constexpr size_t kBf16TileCells =
    1056 * 96;                              // most rows times columns, these in whole panels
inline constexpr size_t kBf16Depth = 1600;  // most of k in one block

struct Bf16Tile {
  const Bf16Term* terms;
  size_t term_count;  // 1 … kBf16Terms
  size_t m, n;        // at most kBf16TileCols columns, kBf16TileCells in all
  void* y;            // f32 or bf16, rows ldy apart
  size_t ldy;
  bool bf16;          // y's type
  const float* base;  // added to, rows ldy apart: y itself, or as it is laid out; null: nothing
  bool transposed;    // y is [n, m]
  float scale;
  void* workspace;  // kBf16WorkspaceBytes, aligned to 64, of this thread
};

// Packed columns of b, packed rows of a, and sums that are not finished. A row of a that is copied
// ends on a whole cache line and one more.
inline constexpr size_t kBf16PackedB = 2 * kBf16TileCols * (kBf16Depth + 2 * kBf16Terms);
inline constexpr size_t kBf16PackedA = 2 * kBf16Panel * (kBf16Depth + 96 * kBf16Terms);
inline constexpr size_t kBf16Sums = 4 * kBf16TileCells;
inline constexpr size_t kBf16WorkspaceBytes = kBf16PackedB + kBf16PackedA + kBf16Sums;

void bf16_tile_avx512(const Bf16Tile& tile) noexcept;

// y [m, n] = Σ a [m, k] · b [k, n] (+ y) where neighbours in memory are rows of a and columns of b:
// a weight's gradient, whose sum runs over tokens. b is packed once for all tiles, in blocks of
// kBf16SharedDepth of k, each [n/32][k/2][32][2]; a tile packs its rows of a, 96 at a time, and
// runs them against one panel of b after the other.
inline constexpr size_t kBf16SharedDepth = 512;
constexpr size_t bf16_shared_elements(size_t k, size_t n) {
  return (k + 1) / 2 * 2 * ((n + 2 * kBf16Lanes - 1) / (2 * kBf16Lanes) * 2 * kBf16Lanes);
}
struct Bf16Shared {
  const uint16_t *a, *b;
  size_t a_step, b_step;  // elements along k
  size_t k, n;            // of the whole product
  uint16_t* packed;       // bf16_shared_elements(k, n), aligned to 64
};
// The panels of columns [col, col + cols), col whole panels.
void bf16_pack_shared_avx512(const Bf16Shared& product, size_t col, size_t cols) noexcept;
// Rows [row, row + m) and columns [col, col + n) of y, whose rows stand ldy apart. workspace:
// kBf16WorkspaceBytes.
void bf16_shared_tile_avx512(const Bf16Shared& product, size_t row, size_t m, size_t col, size_t n,
                             float* y, size_t ldy, bool accumulate, void* workspace) noexcept;

}  // namespace moru
