// The products of bf16_product.h with vdpbf16ps.
// GCC 12 takes the undefined vectors inside its own intrinsics for a mistake of ours.
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "engine/bf16_product.h"
#include "engine/bf16_rows_body.h"

namespace moru {
namespace {

__mmask16 first_lanes(size_t count) {
  return static_cast<__mmask16>((uint32_t{1} << smaller(count, kLanes)) - 1);
}
__mmask32 first_halves(size_t count) {
  return static_cast<__mmask32>((uint64_t{1} << smaller(count, 2 * kLanes)) - 1);
}

// ---- packing ----------------------------------------------------------------------------------

// 16 rows of 16 dwords become 16 columns.
inline void transpose(__m512i r[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // r[4g + j] holds column j of rows 4g … 4g + 3 in lane 0, column 4 + j in lane 1, ….
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i low = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    const __m512i high = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    const __m512i low_odd = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    const __m512i high_odd = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(low, high, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(low, high, 0xdd);
    t[4 + j] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// Up to 16 columns, each with its k in a row, `step` apart, as pairs [k/2][16][2]; the pairs of one
// k stand `stride` elements from those of the next. Missing columns and an odd k's half are zeros.
void pack_columns(const uint16_t* from, size_t step, size_t columns, size_t k, uint16_t* to,
                  size_t stride) {
  for (size_t at = 0; at < k; at += 2 * kLanes) {
    const __mmask32 mask = first_halves(k - at);
    __m512i rows[16];
#pragma GCC unroll 16
    for (size_t c = 0; c < 16; ++c) prefetch(from + (16 + c) * step + at);  // for the next call
#pragma GCC unroll 16
    for (size_t c = 0; c < 16; ++c)
      rows[c] = c < columns ? _mm512_maskz_loadu_epi16(mask, from + c * step + at)
                            : _mm512_setzero_si512();
    transpose(rows);
    const size_t pairs = divide_up(smaller(k - at, 2 * kLanes), 2);
    uint16_t* out = to + at / 2 * stride;
    if (pairs == kLanes) {
#pragma GCC unroll 16
      for (size_t p = 0; p < kLanes; ++p) _mm512_storeu_si512(out + p * stride, rows[p]);
    } else {
      for (size_t p = 0; p < pairs; ++p) _mm512_storeu_si512(out + p * stride, rows[p]);
    }
  }
}

// Rows of k that are prefetched ahead of those being interleaved.
constexpr size_t kRowsAhead = 16;

// Two rows of 16 as pairs.
inline __m512i interleave(const uint16_t* first, const uint16_t* second, __mmask16 mask) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, first));
  if (second == nullptr) return low;
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, second));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// The stripe of b for `k` elements from `first`: panels of 32 columns, the last one of 16 where
// that is enough. `block_pairs` are the pairs of k of all terms of the block, `pair` where this
// one's begin.
void pack_b(const Bf16Term& term, size_t first, size_t k, size_t n, size_t pair, size_t block_pairs,
            uint16_t* packed) {
  const uint16_t* from = term.b + first * term.b_step;
  if (term.b_step == 1) {
    for (size_t col = 0; col < n; col += kCols) {
      const size_t columns = smaller(n - col, kCols);
      const size_t stride = columns > kLanes ? 2 * kCols : 2 * kLanes;
      uint16_t* to = packed + 2 * col * block_pairs + pair * stride;
      for (size_t half = 0; half < columns; half += kLanes)
        pack_columns(from + (col + half) * term.b_col, term.b_col, smaller(columns - half, kLanes),
                     k, to + 2 * half, stride);
    }
    return;
  }
  for (size_t i = 0; i < k; i += 2) {
    const uint16_t* row = from + i * term.b_step;
    const uint16_t* next = i + 1 < k ? row + term.b_step : nullptr;
    for (size_t col = 0; col < n; col += kCols) {
      const size_t columns = smaller(n - col, kCols);
      const size_t stride = columns > kLanes ? 2 * kCols : 2 * kLanes;
      uint16_t* to = packed + 2 * col * block_pairs + (pair + i / 2) * stride;
      prefetch(row + col + kRowsAhead * term.b_step);
      prefetch(row + col + (kRowsAhead + 1) * term.b_step);
      _mm512_storeu_si512(
          to, interleave(row + col, next == nullptr ? nullptr : next + col, first_lanes(columns)));
      if (columns > kLanes)
        _mm512_storeu_si512(
            to + 2 * kLanes,
            interleave(row + col + kLanes, next == nullptr ? nullptr : next + col + kLanes,
                       first_lanes(columns - kLanes)));
    }
  }
}

// Up to 96 rows of a whose neighbours in memory are rows: tiles of 12, each [k/2][12][2].
void pack_a(const Bf16Term& term, size_t first, size_t k, size_t row, size_t rows,
            uint16_t* packed) {
  const size_t tile = kBf16Rows * 2 * divide_up(k, 2);
  for (size_t i = 0; i < k; i += 2) {
    const uint16_t* first_row = term.a + row + (first + i) * term.a_step;
    prefetch(first_row + kRowsAhead * term.a_step);
    prefetch(first_row + (kRowsAhead + 1) * term.a_step);
    prefetch(first_row + kRowsAhead * term.a_step, 64);
    prefetch(first_row + (kRowsAhead + 1) * term.a_step, 64);
    prefetch(first_row + kRowsAhead * term.a_step, 128);
    prefetch(first_row + (kRowsAhead + 1) * term.a_step, 128);
    // 48 rows are three vectors and four tiles: lanes 0-11, 12-15 and 0-7, 8-15 and 0-3, 4-15.
    for (size_t group = 0; group < rows; group += 3 * kLanes) {
      const size_t count = smaller(rows - group, 3 * kLanes);
      uint16_t* to = packed + group / kBf16Rows * tile + i * kBf16Rows;
      const uint16_t* one = first_row + group;
      const uint16_t* two = i + 1 < k ? one + term.a_step : nullptr;
      const __m512i v0 = interleave(one, two, first_lanes(count));
      _mm512_mask_storeu_epi32(to, 0x0fff, v0);
      if (count <= 12) continue;
      _mm512_mask_storeu_epi32(to + tile - 24, 0xf000, v0);
      if (count <= 16) continue;
      const __m512i v1 = interleave(one + kLanes, two == nullptr ? nullptr : two + kLanes,
                                    first_lanes(count - kLanes));
      _mm512_mask_storeu_epi32(to + tile + 8, 0x00ff, v1);
      if (count <= 24) continue;
      _mm512_mask_storeu_epi32(to + 2 * tile - 16, 0xff00, v1);
      if (count <= 32) continue;
      const __m512i v2 = interleave(one + 2 * kLanes, two == nullptr ? nullptr : two + 2 * kLanes,
                                    first_lanes(count - 2 * kLanes));
      _mm512_mask_storeu_epi32(to + 2 * tile + 16, 0x000f, v2);
      if (count <= 36) continue;
      _mm512_mask_storeu_epi32(to + 3 * tile - 8, 0xfff0, v2);
    }
  }
}

// Copies rows of k elements, zeros up to an even k.
void copy_a(const uint16_t* from, size_t step, size_t rows, size_t k, uint16_t* to, size_t row) {
  for (size_t r = 0; r < rows; ++r)
    for (size_t i = 0; i < k; i += 2 * kLanes)
      _mm512_storeu_si512(to + r * row + i,
                          _mm512_maskz_loadu_epi16(first_halves(k - i), from + r * step + i));
}

// ---- the product ------------------------------------------------------------------------------

// A stretch of k of one term in the block at hand.
struct Stretch {
  const Bf16Term* term;
  size_t first, k;
  uint16_t* packed;  // of rows that cannot be read where they stand
  size_t row;        // elements between copied rows

  size_t pairs() const { return divide_up(k, 2); }
  bool by_columns() const { return term->a_step != 1; }
  // Twelve rows whose distance is a multiple of 2 KB fall into the same lines of L1.
  bool copied() const { return !by_columns() && (k % 2 != 0 || term->a_row % 1024 == 0); }
};

// Brings a part of the next rows nearer while those before them are multiplied.
void prefetch_rows(const Stretch& s, size_t row, size_t rows, size_t part, size_t parts) {
  if (s.by_columns()) return;
  const uint16_t* a = s.term->a + row * s.term->a_row + s.first;
  for (size_t r = rows * part / parts; r < rows * (part + 1) / parts; ++r)
    for (size_t i = 0; i < s.k; i += 2 * kLanes)
      _mm_prefetch(reinterpret_cast<const char*>(a + r * s.term->a_row + i), _MM_HINT_T1);
}

// y += or = the product over one block of k, from b as it is packed.
void multiply_block(const Bf16Tile& tile, const Stretch* stretches, size_t count, size_t pairs,
                    const uint16_t* packed_b, Sink sink) {
  const auto* add = sink.add;
  auto* y = static_cast<unsigned char*>(sink.y);
  const size_t size = sink.bf16 ? 2 : 4;
  for (size_t row = 0; row < tile.m; row += kBf16Rows) {
    const size_t rows = smaller(tile.m - row, kBf16Rows), in_panel = row % kBf16Panel;
    Piece pieces[kBf16Terms];
    for (size_t i = 0; i < count; ++i) {
      const Stretch& s = stretches[i];
      const uint16_t* a = s.term->a + row * s.term->a_row + s.first * s.term->a_step;
      if (s.by_columns()) {
        if (in_panel == 0)
          pack_a(*s.term, s.first, s.k, row, smaller(tile.m - row, kBf16Panel), s.packed);
        pieces[i] = {s.packed + in_panel * 2 * s.pairs(), 2, 2 * kBf16Rows, s.pairs()};
      } else if (s.copied()) {
        copy_a(a, s.term->a_row, rows, s.k, s.packed, s.row);
        pieces[i] = {s.packed, s.row, 2, s.pairs()};
      } else {
        pieces[i] = {a, s.term->a_row, 2, s.pairs()};
      }
    }
    for (size_t col = 0; col < tile.n; col += kCols) {
      const size_t columns = smaller(tile.n - col, kCols);
      for (size_t i = 0; i < count; ++i)
        prefetch_rows(stretches[i], row + rows, smaller(tile.m - row - rows, kBf16Rows),
                      col / kCols, divide_up(tile.n, kCols));
      sink.lanes[0] = first_lanes(columns);
      sink.lanes[1] = columns > kLanes ? first_lanes(columns - kLanes) : __mmask16{0};
      if (add != nullptr) sink.add = add + row * sink.ld_add + col;
      sink.y = y + (row * sink.ldy + col) * size;
      kMultiplyRows[columns > kLanes ? 1 : 0][rows - 1](pieces, count, packed_b + 2 * col * pairs,
                                                        sink);
    }
  }
}

}  // namespace

void bf16_tile_avx512(const Bf16Tile& tile) noexcept {
  auto* const packed_b = static_cast<uint16_t*>(tile.workspace);
  uint16_t* const packed_a = packed_b + kBf16PackedB / 2;
  auto* const sums = reinterpret_cast<float*>(packed_a + kBf16PackedA / 2);

  size_t depth = 0;
  for (size_t i = 0; i < tile.term_count; ++i) depth += tile.terms[i].k;
  const size_t blocks = depth == 0 ? 1 : divide_up(depth, kBf16Depth);
  const size_t most = divide_up(divide_up(depth, blocks), 2 * kLanes) * 2 * kLanes;
  // Unfinished sums are f32: in y itself if it is.
  const bool aside = tile.transposed || (tile.bf16 && blocks > 1);
  float* const partial = aside ? sums : static_cast<float*>(tile.y);
  const size_t ld_partial = aside ? divide_up(tile.n, kCols) * kCols : tile.ldy;

  size_t term = 0, done = 0;  // of that term's k
  for (size_t block = 0; block < blocks; ++block) {
    Stretch stretches[kBf16Terms];
    size_t count = 0, k = 0, pairs = 0;
    uint16_t* room = packed_a;
    while (term < tile.term_count && k < most) {
      const Bf16Term& from = tile.terms[term];
      Stretch& s = stretches[count];
      s = {&from, done, smaller(from.k - done, most - k), room, 0};
      done += s.k;
      k += s.k;
      if (done == from.k) {
        ++term;
        done = 0;
      }
      if (s.k == 0) continue;
      pairs += s.pairs();
      // An odd number of cache lines.
      s.row = divide_up(s.k, 64) * 64 + 32;
      if (s.by_columns())
        room += kBf16Panel * 2 * s.pairs();
      else if (s.copied())
        room += kBf16Rows * s.row;
      ++count;
    }
    size_t pair = 0;
    for (size_t i = 0; i < count; ++i) {
      const Stretch& s = stretches[i];
      pack_b(*s.term, s.first, s.k, tile.n, pair, pairs, packed_b);
      pair += s.pairs();
    }
    const bool last = block + 1 == blocks;
    Sink sink{.add = nullptr,
              .ld_add = ld_partial,
              .y = partial,
              .ldy = ld_partial,
              .bf16 = false,
              .scale = tile.scale,
              .lanes = {}};
    if (block > 0) {
      sink.add = partial;
    } else if (tile.base != nullptr && !aside) {
      sink.add = tile.base;
      sink.ld_add = tile.ldy;
    }
    if (last && !tile.transposed) {
      sink.y = tile.y;
      sink.ldy = tile.ldy;
      sink.bf16 = tile.bf16;
    }
    multiply_block(tile, stretches, count, pairs, packed_b, sink);
  }
  if (!tile.transposed) return;
  auto* y = static_cast<float*>(tile.y);
  for (size_t c = 0; c < tile.n; ++c)
    for (size_t r = 0; r < tile.m; ++r) {
      float& to = y[c * tile.ldy + r];
      const float sum = sums[r * ld_partial + c];
      to = tile.base != nullptr ? tile.base[c * tile.ldy + r] + sum : sum;
    }
}

void bf16_pack_shared_avx512(const Bf16Shared& product, size_t col, size_t cols) noexcept {
  const Bf16Term term{.a = nullptr,
                      .a_row = 0,
                      .a_step = 0,
                      .b = product.b + col,
                      .b_col = 1,
                      .b_step = product.b_step,
                      .k = product.k};
  const size_t width = divide_up(product.n, kCols) * kCols;
  for (size_t first = 0; first < product.k; first += kBf16SharedDepth) {
    const size_t k = smaller(kBf16SharedDepth, product.k - first), pairs = divide_up(k, 2);
    pack_b(term, first, k, cols, 0, pairs, product.packed + first * width + 2 * col * pairs);
  }
}

void bf16_shared_tile_avx512(const Bf16Shared& product, size_t row, size_t m, size_t col, size_t n,
                             float* y, size_t ldy, bool accumulate, void* workspace) noexcept {
  static_assert(2 * kBf16Panel * kBf16SharedDepth <= kBf16WorkspaceBytes);
  auto* const packed_a = static_cast<uint16_t*>(workspace);
  const Bf16Term term{.a = product.a + row,
                      .a_row = 1,
                      .a_step = product.a_step,
                      .b = nullptr,
                      .b_col = 0,
                      .b_step = 0,
                      .k = product.k};
  const size_t width = divide_up(product.n, kCols) * kCols;
  for (size_t panel = 0; panel < m; panel += kBf16Panel) {
    const size_t rows = smaller(m - panel, kBf16Panel);
    for (size_t first = 0; first < product.k; first += kBf16SharedDepth) {
      const size_t k = smaller(kBf16SharedDepth, product.k - first), pairs = divide_up(k, 2);
      pack_a(term, first, k, panel, rows, packed_a);
      for (size_t c = 0; c < n; c += kCols) {
        const size_t columns = smaller(n - c, kCols);
        const uint16_t* b = product.packed + first * width + 2 * (col + c) * pairs;
        for (size_t r = 0; r < rows; r += kBf16Rows) {
          const Piece piece{packed_a + r * 2 * pairs, 2, 2 * kBf16Rows, pairs};
          float* to = y + (panel + r) * ldy + c;
          const Sink sink{
              .add = first > 0 || accumulate ? to : nullptr,
              .ld_add = ldy,
              .y = to,
              .ldy = ldy,
              .bf16 = false,
              .scale = 1,
              .lanes = {first_lanes(columns),
                        columns > kLanes ? first_lanes(columns - kLanes) : __mmask16{0}}};
          kMultiplyRows[columns > kLanes ? 1 : 0][smaller(rows - r, kBf16Rows) - 1](&piece, 1, b,
                                                                                    sink);
        }
      }
    }
  }
}

}  // namespace moru
