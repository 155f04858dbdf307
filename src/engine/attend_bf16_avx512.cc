// Training's attention with vdpbf16ps. All products are rows of one operand, twelve at a time,
// against columns of the other, packed in pairs of k (bf16_product.h):
//
//   S = Q·Kᵀ, dP = dO·Vᵀ     rows of queries · columns of keys, k = dimensions
//   O = P·V,  dQ = dS·K      rows of queries · columns of dimensions, k = keys
//   dV = Pᵀ·dO, dK = dSᵀ·Q   rows of keys · columns of dimensions, k = queries
// GCC 12 takes the undefined vectors inside its own intrinsics for a mistake of ours.
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "engine/attend_bf16.h"
#include "engine/bf16_rows_body.h"

namespace moru {
namespace {

constexpr float kLog2E = 1.44269504f;
// Elements between rows of bf16 beside their own: rows of different lines of L1.
constexpr size_t kGap = 32;

size_t larger(size_t a, size_t b) { return a > b ? a : b; }

inline __m512i rounded_pair(__m512 first, __m512 second) {
  alignas(64) static constexpr uint16_t kInterleave[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave),
                                  reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
}

// x [rows, columns] f32 as panels of 32 columns (the last one of 16 where that is enough), each
// [pairs][columns][2]; rows beyond x are zeros.
void pack_pairs(const float* x, size_t ld, size_t rows, size_t columns, size_t pairs,
                uint16_t* to) {
  for (size_t col = 0; col < columns; col += kCols) {
    const size_t vectors = smaller(columns - col, kCols) / kLanes;
    uint16_t* panel = to + 2 * col * pairs;
    for (size_t i = 0; i < pairs; ++i) {
      const float* row = x + 2 * i * ld + col;
      for (size_t v = 0; v < vectors; ++v, panel += 2 * kLanes) {
        const __m512 zero = _mm512_setzero_ps();
        const __m512 first = 2 * i < rows ? _mm512_loadu_ps(row + v * kLanes) : zero;
        const __m512 second = 2 * i + 1 < rows ? _mm512_loadu_ps(row + ld + v * kLanes) : zero;
        _mm512_storeu_si512(panel, rounded_pair(first, second));
      }
    }
  }
}

void round_rows(const float* x, size_t ld, size_t rows, size_t columns, uint16_t* to,
                size_t ld_to) {
  for (size_t r = 0; r < rows; ++r)
    for (size_t i = 0; i < columns; i += kLanes)
      _mm256_storeu_si256(
          reinterpret_cast<__m256i*>(to + r * ld_to + i),
          reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(x + r * ld + i))));
}

// y [rows ≤ 12, columns] = a · b (+ y). Panels of b hold `pairs` pairs of k, of which those from
// `first_pair` on count, as many as a has.
void multiply(const Piece& a, size_t rows, const uint16_t* b, size_t pairs, size_t first_pair,
              size_t columns, float* y, size_t ldy, bool add) {
  Sink sink{.add = nullptr,
            .ld_add = ldy,
            .y = nullptr,
            .ldy = ldy,
            .bf16 = false,
            .scale = 1,
            .lanes = {0xffff, 0xffff}};
  for (size_t col = 0; col < columns; col += kCols) {
    const size_t vectors = smaller(columns - col, kCols) / kLanes;
    sink.y = y + col;
    if (add) sink.add = y + col;
    kMultiplyRows[vectors - 1][rows - 1](
        &a, 1, b + 2 * col * pairs + first_pair * vectors * 2 * kLanes, sink);
  }
}

// As in float_kernels_body.h.
inline __m512 exp2_of(__m512 t) {
  const __m512 in_range = _mm512_max_ps(_mm512_set1_ps(-100.0f), t);
  const __m512 n = _mm512_roundscale_ps(in_range, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(in_range, n);
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(1.326472731e-3f), r, _mm512_set1_ps(9.671512991e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.550733581e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402224243e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931470037e-1f));
  return _mm512_scalef_ps(_mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f)), n);
}

inline float sum_lanes(__m512 v) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

// Lanes of the keys [first, end) in the vector that begins at key `at`.
inline __mmask16 seen_lanes(size_t first, size_t end, size_t at) {
  const auto upto = [&](size_t key) {
    return key <= at ? 0u : key >= at + kLanes ? 0xffffu : (1u << (key - at)) - 1;
  };
  return static_cast<__mmask16>(upto(end) & ~upto(first));
}

// The keys that any of some rows sees, to whole panels.
struct Range {
  size_t first, end;
};
Range panels_seen(const uint32_t* first, const uint32_t* end, size_t rows) {
  size_t from = kKeyBlock, to = 0;
  for (size_t r = 0; r < rows; ++r)
    if (first[r] < end[r]) {
      from = smaller(from, first[r]);
      to = larger(to, end[r]);
    }
  return from >= to ? Range{0, 0} : Range{from / kCols * kCols, divide_up(to, kCols) * kCols};
}

// p [range] bf16 = 2^(score · factor − max); 0 where the row does not see.
void softmax_row(const float* scores, Range range, size_t first, size_t end, float factor,
                 uint16_t* p, float* max_out, float* sum_out) {
  const __m512 lowest = _mm512_set1_ps(-3.4e38f);
  __m512 top = lowest;
  const size_t begin = larger(first / kLanes * kLanes, range.first);
  for (size_t i = begin; i < end; i += kLanes)
    top = _mm512_mask_max_ps(top, seen_lanes(first, end, i), top, _mm512_loadu_ps(scores + i));
  const float max = first < end ? _mm512_reduce_max_ps(top) * factor : 0;
  __m512 sum = _mm512_setzero_ps();
  for (size_t i = range.first; i < range.end; i += kLanes) {
    __m512 e = _mm512_setzero_ps();
    const __mmask16 lanes = seen_lanes(first, end, i);
    if (lanes != 0)
      e = _mm512_maskz_mov_ps(
          lanes, exp2_of(_mm512_fmsub_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(factor),
                                         _mm512_set1_ps(max))));
    sum = _mm512_add_ps(sum, e);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + i),
                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(e)));
  }
  *max_out = max;
  *sum_out = sum_lanes(sum);
}

}  // namespace

void attend_block_bf16_avx512(const AttendBlock& b, bool same_keys, void* workspace) noexcept {
  const size_t dim = b.head_dim, half = dim / 2, ld_q = dim + kGap, ld_p = kKeyBlock + kGap;
  auto* const keys = static_cast<uint16_t*>(workspace);
  uint16_t* const values = keys + kKeyBlock * dim;
  uint16_t* const q = values + kKeyBlock * dim;
  uint16_t* const p = q + kAttendBf16Rows * ld_q;
  const Range all = panels_seen(b.first, b.end, b.rows);
  size_t seen = 0;
  for (size_t r = 0; r < b.rows; ++r) seen = larger(seen, b.first[r] < b.end[r] ? b.end[r] : 0);
  // Panels of values hold the pairs of all keys of the block.
  constexpr size_t kPairs = kKeyBlock / 2, kPagePairs = kKeyPage / 2;
  if (!same_keys)
    for (size_t page = all.first / kKeyPage; page * kKeyPage < all.end; ++page) {
      pack_pairs(static_cast<const float*>(b.keys[page]), kKeyPage, dim, kKeyPage, half,
                 keys + page * kKeyPage * dim);
      const auto* rows = static_cast<const float*>(b.values[page]);
      const size_t count = smaller(seen - smaller(seen, page * kKeyPage), kKeyPage);
      for (size_t col = 0; col < dim; col += kCols) {
        const size_t columns = smaller(dim - col, kCols);
        pack_pairs(rows + col, b.ldv, count, columns, kPagePairs,
                   values + 2 * col * kPairs + page * kPagePairs * 2 * columns);
      }
    }
  round_rows(b.q, b.ldq, b.rows, dim, q, ld_q);
  for (size_t r0 = 0; r0 < b.rows; r0 += kBf16Rows) {
    const size_t rows = smaller(b.rows - r0, kBf16Rows);
    const Range range = panels_seen(b.first + r0, b.end + r0, rows);
    for (size_t key = range.first; key < range.end; key += kCols)
      multiply({q + r0 * ld_q, ld_q, 2, half}, rows, keys + key * dim, half, 0, kCols,
               b.scores + r0 * kKeyBlock + key, kKeyBlock, false);
    for (size_t r = r0; r < r0 + rows; ++r)
      softmax_row(b.scores + r * kKeyBlock, range, b.first[r], larger(b.first[r], b.end[r]),
                  b.scale * kLog2E, p + r * ld_p, b.max + r, b.sum + r);
    if (range.first == range.end) continue;
    multiply({p + r0 * ld_p + range.first, ld_p, 2, (range.end - range.first) / 2}, rows, values,
             kPairs, range.first / 2, dim, b.out + r0 * dim, dim, false);
  }
}

void attend_backward_tile_bf16_avx512(const AttendBackwardTile& t, bool same_keys,
                                      void* workspace) noexcept {
  const size_t dim = t.head_dim, half = dim / 2, ld_row = dim + kGap, ld_ds = kKeyPage + kGap;
  constexpr size_t kPairs = kKeyPage / 2;
  const size_t row_pairs = divide_up(t.rows, 2);
  auto* const k_columns = static_cast<uint16_t*>(workspace);
  uint16_t* const v_columns = k_columns + kKeyPage * dim;
  uint16_t* const k_pairs = v_columns + kKeyPage * dim;
  uint16_t* const q_rows = k_pairs + kKeyPage * dim;
  uint16_t* const do_rows = q_rows + kAttendBf16Rows * ld_row;
  uint16_t* const q_pairs = do_rows + kAttendBf16Rows * ld_row;
  uint16_t* const do_pairs = q_pairs + kAttendBf16Rows * dim;
  uint16_t* const p_pairs = do_pairs + kAttendBf16Rows * dim;  // [row_pairs][64 keys][2]
  uint16_t* const ds_pairs = p_pairs + kAttendBf16Rows * kKeyPage;
  uint16_t* const ds_rows = ds_pairs + kAttendBf16Rows * kKeyPage;
  if (!same_keys) {
    pack_pairs(t.k_page, kKeyPage, dim, kKeyPage, half, k_columns);
    pack_pairs(t.v_page, kKeyPage, dim, kKeyPage, half, v_columns);
    pack_pairs(t.k, t.ldkv, t.keys, dim, kPairs, k_pairs);
  }
  round_rows(t.q, t.ldq, t.rows, dim, q_rows, ld_row);
  round_rows(t.d_out, t.ldo, t.rows, dim, do_rows, ld_row);
  pack_pairs(t.q, t.ldq, t.rows, dim, row_pairs, q_pairs);
  pack_pairs(t.d_out, t.ldo, t.rows, dim, row_pairs, do_pairs);

  const __m512 scale = _mm512_set1_ps(t.scale), factor = _mm512_set1_ps(t.scale * kLog2E);
  for (size_t r0 = 0; r0 < t.rows; r0 += kBf16Rows) {
    const size_t rows = smaller(t.rows - r0, kBf16Rows);
    const Range range = panels_seen(t.first + r0, t.end + r0, rows);
    for (size_t key = range.first; key < range.end; key += kCols) {
      multiply({q_rows + r0 * ld_row, ld_row, 2, half}, rows, k_columns + key * dim, half, 0, kCols,
               t.p + r0 * kKeyPage + key, kKeyPage, false);
      multiply({do_rows + r0 * ld_row, ld_row, 2, half}, rows, v_columns + key * dim, half, 0,
               kCols, t.ds + r0 * kKeyPage + key, kKeyPage, false);
    }
    // p = exp(s − lse), ds = p · (dp − delta) · scale, two rows at a time; all keys, since what no
    // row sees must be zero for the sums over rows below.
    for (size_t r = r0; r < r0 + rows; r += 2)
      for (size_t i = 0; i < kKeyPage; i += kLanes) {
        __m512 p[2], ds[2];
        for (size_t j = 0; j < 2; ++j) {
          p[j] = ds[j] = _mm512_setzero_ps();
          if (r + j >= t.rows) continue;
          const __mmask16 lanes = seen_lanes(t.first[r + j], t.end[r + j], i);
          if (lanes != 0) {
            const size_t at = (r + j) * kKeyPage + i;
            const __m512 shift = _mm512_set1_ps(t.lse[r + j] * kLog2E);
            p[j] = _mm512_maskz_mov_ps(
                lanes, exp2_of(_mm512_fmsub_ps(_mm512_loadu_ps(t.p + at), factor, shift)));
            const __m512 over =
                _mm512_sub_ps(_mm512_loadu_ps(t.ds + at), _mm512_set1_ps(t.delta[r + j]));
            ds[j] = _mm512_maskz_mul_ps(lanes, _mm512_mul_ps(p[j], over), scale);
          }
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds_rows + (r + j) * ld_ds + i),
                              reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(ds[j])));
        }
        _mm512_storeu_si512(p_pairs + r * kKeyPage + 2 * i, rounded_pair(p[0], p[1]));
        _mm512_storeu_si512(ds_pairs + r * kKeyPage + 2 * i, rounded_pair(ds[0], ds[1]));
      }
    if (range.first == range.end) continue;
    multiply({ds_rows + r0 * ld_ds + range.first, ld_ds, 2, (range.end - range.first) / 2}, rows,
             k_pairs, kPairs, range.first / 2, dim, t.dq + r0 * t.lddq, t.lddq, true);
  }

  // Over the rows that see any key of twelve.
  size_t from = 0, to = 0;
  for (size_t j = 0; j < t.keys; j += kBf16Rows) {
    const size_t keys = smaller(t.keys - j, kBf16Rows);
    while (from < t.rows && t.end[from] <= j) ++from;
    if (to < from) to = from;
    while (to < t.rows && t.first[to] < j + keys) ++to;
    if (from == to) continue;
    const size_t first = from / 2, pairs = divide_up(to, 2) - first;
    const size_t at = first * 2 * kKeyPage + 2 * j;
    multiply({p_pairs + at, 2, 2 * kKeyPage, pairs}, keys, do_pairs, row_pairs, first, dim,
             t.dv + j * t.lddkv, t.lddkv, true);
    multiply({ds_pairs + at, 2, 2 * kKeyPage, pairs}, keys, q_pairs, row_pairs, first, dim,
             t.dk + j * t.lddkv, t.lddkv, true);
  }
}

}  // namespace moru
