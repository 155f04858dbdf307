// Attention over pages of 16-bit codes (PageType::i16): part of float_kernels_body.h.
//
// A query, a key, a value are each a row of codes and one scale, and so are a row's probabilities
// within a page. Their products are added up in 32 bits, exactly, in pairs of neighbours: twice as
// many a cycle as in f32, and finer than f16 would be. Nothing overflows:
//
//   scores   codes are such that ‖q‖ and ‖k‖ are at most 46,000: by Cauchy and Schwarz any part of
//            Σ q·k stays below 46,010² < 2^31, while each element keeps up to 16 bits
//   values   the codes of a row's probabilities in one page sum up to 32,767 but for rounding, so
//            that Σ p·v stays below 2^31
//
// A key's scale is multiplied with its score; a value's is part of the probability's code.

constexpr float kMostCode = 32767.0f, kMostNorm = 46000.0f;

// What the codes of a row are multiplied with to give it, and its inverse.
struct CodeScale {
  float scale, inverse;
};
// Of a row whose largest element has size `largest`, which may be no more than `most`.
inline CodeScale code_scale(float largest, float most) {
  // The scale of a row with a NaN or an infinity is not finite, its inverse 0.
  const float scale = largest / most;
  const bool codes = largest > 1e-30f && largest < 1e30f;
  return {scale, codes ? most / largest : 0.0f};
}
inline float largest_of(const float* x, size_t n) {
  Vec most = zero();
  for (size_t i = 0; i < n; i += 16) {
    const Vec v = magnitude(load(x + i));
    most = select(less(v, most), most, v);  // NaN gets in; the sum of squares keeps it
  }
  return max_lanes(most);
}
inline CodeScale value_scale(const float* x, size_t n) {
  const float squares = dot(x, x, n), largest = largest_of(x, n);
  return code_scale(squares < 1e36f ? largest : __builtin_inff(), kMostCode);
}
inline CodeScale key_scale(const float* x, size_t n) {
  const float squares = dot(x, x, n), norm = __builtin_sqrtf(squares);
  const float largest = largest_of(x, n) * (kMostNorm / kMostCode);
  return code_scale(squares < 1e36f ? (norm > largest ? norm : largest) : __builtin_inff(),
                    kMostNorm);
}

inline float* scales_of(int16_t* page, size_t head_dim) {
  return reinterpret_cast<float*>(page + kKeyPage * head_dim);
}
inline const float* scales_of(const void* page, size_t head_dim) {
  return reinterpret_cast<const float*>(static_cast<const int16_t*>(page) + kKeyPage * head_dim);
}

inline void put_codes(const float* x, float inverse, size_t n, int16_t* codes) {
  const Vec factor = splat(inverse);
  for (size_t i = 0; i < n; i += 16)
    store_low_halves(codes + i, to_words(mul(load(x + i), factor)));
}

inline void put_key_codes(const float* k, size_t ldk, size_t first, size_t count, size_t head_dim,
                          int16_t* page) {
  float* scales = scales_of(page, head_dim) + first;
  for (size_t t = 0; t < count;) {
    const size_t part = count - t >= 16 && (first + t) % 16 == 0 ? 16 : 1;
    float inverse[16];
    for (size_t i = 0; i < part; ++i) {
      const CodeScale s = key_scale(k + (t + i) * ldk, head_dim);
      scales[t + i] = s.scale;
      inverse[i] = s.inverse;
    }
    int16_t* to = page + 2 * (first + t);
    for (size_t d = 0; d < head_dim; d += 16, to += 16 * kKeyPage) {
      if (part == 16) {
        Vec columns[16];
        transpose(k + t * ldk + d, ldk, columns);
        const Vec factor = load(inverse);
        for (size_t i = 0; i < 16; i += 2)
          store_words(to + i * kKeyPage, pair_up(to_words(mul(columns[i], factor)),
                                                 to_words(mul(columns[i + 1], factor))));
        continue;
      }
      int16_t codes[16];
      put_codes(k + t * ldk + d, inverse[0], 16, codes);
      for (size_t i = 0; i < 16; ++i) to[i / 2 * 2 * kKeyPage + i % 2] = codes[i];
    }
    t += part;
  }
}

inline void put_value_codes(const float* v, size_t ldv, size_t first, size_t count, size_t head_dim,
                            int16_t* page) {
  float* scales = scales_of(page, head_dim) + first;
  for (size_t t = 0; t < count;) {
    const float* row = v + t * ldv;
    const CodeScale s = value_scale(row, head_dim);
    scales[t] = s.scale;
    int16_t* to = page + (first + t) / 2 * 2 * head_dim;
    if ((first + t) % 2 == 0 && t + 1 < count) {
      const CodeScale next = value_scale(row + ldv, head_dim);
      scales[t + 1] = next.scale;
      const Vec factor = splat(s.inverse), next_factor = splat(next.inverse);
      for (size_t d = 0; d < head_dim; d += 16)
        store_words(to + 2 * d, pair_up(to_words(mul(load(row + d), factor)),
                                        to_words(mul(load(row + ldv + d), next_factor))));
      t += 2;
      continue;
    }
    to += (first + t) % 2;
    for (size_t d = 0; d < head_dim; d += 16) {
      int16_t codes[16];
      put_codes(row + d, s.inverse, 16, codes);
      for (size_t i = 0; i < 16; ++i) to[2 * (d + i)] = codes[i];
    }
    ++t;
  }
}

// C[M, 16·N] = A[M, 2k] · B[2k, 16·N] of codes, with C in 32-bit words in registers; finish(r, v,
// C) takes each vector of it. A's rows are `lda` codes apart; B is [k][ldb][2].
struct CodeOperands {
  const int16_t *a, *b;
  size_t lda, ldb, pairs;
  const int16_t* ahead;  // what is used next, asked for meanwhile; or null
};
template <size_t kRows, size_t kVecs, bool kAhead, typename Finish>
inline void code_tile(const CodeOperands& o, size_t column, Finish finish) {
  Words acc[kRows][kVecs];
#pragma GCC unroll 8
  for (size_t r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (size_t v = 0; v < kVecs; ++v) acc[r][v] = zero_words();
  const int16_t *a = o.a, *b = o.b + 2 * column, *ahead = o.ahead + (kAhead ? 2 * column : 0);
  const size_t lda = o.lda, step = 2 * o.ldb;
  for (size_t i = 0; i < o.pairs; ++i, a += 2, b += step) {
    if constexpr (kAhead) {
#pragma GCC unroll 8
      for (size_t v = 0; v < kVecs; ++v) prefetch(ahead + 32 * v);
      ahead += step;
    }
    Words row[kVecs];
#pragma GCC unroll 8
    for (size_t v = 0; v < kVecs; ++v) row[v] = load_words(b + 32 * v);
#pragma GCC unroll 8
    for (size_t r = 0; r < kRows; ++r) {
      const Words x = splat_pair(a + r * lda);
#pragma GCC unroll 8
      for (size_t v = 0; v < kVecs; ++v) acc[r][v] = add_dots(acc[r][v], x, row[v]);
    }
  }
#pragma GCC unroll 8
  for (size_t r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (size_t v = 0; v < kVecs; ++v) finish(r, column / 16 + v, acc[r][v]);
}

template <size_t kRows, bool kAhead, typename Finish>
inline void code_rows(size_t vecs, const CodeOperands& o, Finish finish) {
  size_t v = 0;
  for (; v + kTileVecs <= vecs; v += kTileVecs)
    code_tile<kRows, kTileVecs, kAhead>(o, 16 * v, finish);
  if constexpr (kTileVecs > 1) {
    if (vecs - v == 3) code_tile<kRows, 3, kAhead>(o, 16 * v, finish);
    if (vecs - v == 2) code_tile<kRows, 2, kAhead>(o, 16 * v, finish);
    if (vecs - v == 1) code_tile<kRows, 1, kAhead>(o, 16 * v, finish);
  }
}
template <bool kAhead, typename Finish>
inline void code_product_as(size_t rows, size_t vecs, const CodeOperands& o, Finish finish) {
  static_assert(kTileRows == 6);
  switch (rows) {
    case 1:
      return code_rows<1, kAhead>(vecs, o, finish);
    case 2:
      return code_rows<2, kAhead>(vecs, o, finish);
    case 3:
      return code_rows<3, kAhead>(vecs, o, finish);
    case 4:
      return code_rows<4, kAhead>(vecs, o, finish);
    case 5:
      return code_rows<5, kAhead>(vecs, o, finish);
    case 6:
      return code_rows<6, kAhead>(vecs, o, finish);
  }
}
// For up to kTileRows rows and any number of vectors.
template <typename Finish>
inline void code_product(size_t rows, size_t vecs, const CodeOperands& o, Finish finish) {
  o.ahead != nullptr ? code_product_as<true>(rows, vecs, o, finish)
                     : code_product_as<false>(rows, vecs, o, finish);
}

// A row's codes and scales while a block is worked on. Scores become probabilities in place: of a
// page's 64 words the first 32 then hold the codes, the next their scale.
struct CodedRows {
  int16_t* q;     // [rows, head_dim]
  float* scales;  // [rows], of q
};
inline int16_t* codes_of_page(const AttendBlock& b, size_t row, size_t page) {
  return reinterpret_cast<int16_t*>(b.scores + row * kKeyBlock + page * kKeyPage);
}
inline float& scale_of_page(const AttendBlock& b, size_t row, size_t page) {
  return b.scores[row * kKeyBlock + page * kKeyPage + kKeyPage / 2];
}

// Scores of one page, each multiplied with its key's scale.
inline void code_scores(const AttendBlock& b, const CodedRows& rows, size_t page,
                        const void* ahead) {
  const auto* keys = static_cast<const int16_t*>(b.keys[page]);
  const float* key_scales = scales_of(keys, b.head_dim);
  const size_t start = page * kKeyPage;
  each_tile(b.rows, kTileRows, [&](size_t r, size_t count) {
    const Range seen = within(seen_by(b.first + r, b.end + r, count), start, start + kKeyPage);
    if (seen.first == seen.end) return;
    const size_t v0 = (seen.first - start) / 16, end = (seen.end - start + 15) / 16;
    float* to = b.scores + r * kKeyBlock + start + 16 * v0;
    const float* scales = key_scales + 16 * v0;
    const CodeOperands o{.a = rows.q + r * b.head_dim,
                         .b = keys + 32 * v0,
                         .lda = b.head_dim,
                         .ldb = kKeyPage,
                         .pairs = b.head_dim / 2,
                         .ahead = r == 0 ? static_cast<const int16_t*>(ahead) : nullptr};
    code_product(count, end - v0, o, [=](size_t row, size_t v, Words dots) {
      store(to + row * kKeyBlock + 16 * v, mul(to_floats(dots), load(scales + 16 * v)));
    });
  });
}

// The maximum of scores over 16-lane groups of `tile` that the row sees.
inline float seen_max(const float* scores, Range tile, Seen seen) {
  const Vec low = splat(-__builtin_inff());
  Vec even = low, odd = low;
  for (size_t i = tile.first / 16 * 16; i < tile.end; i += 32) {
    const Vec x = load(scores + i);
    even = max(even, seen.all(i) ? x : select(seen.mask(i), x, low));
    if (i + 16 >= tile.end) break;
    const Vec y = load(scores + i + 16);
    odd = max(odd, seen.all(i + 16) ? y : select(seen.mask(i + 16), y, low));
  }
  return max_lanes(max(even, odd));
}

// Scores of row r → codes of 2^(factor · score − max) · the value's scale, zero where the row does
// not see, for all pages that `tile`, the range of the row's tile, reaches.
inline void code_softmax_row(const AttendBlock& b, size_t r, Range tile, float q_scale) {
  float* scores = b.scores + r * kKeyBlock;
  const Seen seen = {static_cast<int>(b.first[r]), static_cast<int>(b.end[r])};
  const float scale = b.scale * q_scale;
  if (b.softcap > 0) cap_scores(scores, tile.first / 16 * 16, tile.end, scale, b.softcap);
  const float factor = b.softcap > 0 ? kLog2E : scale * kLog2E;
  const float top = factor * seen_max(scores, tile, seen);
  const Vec f = splat(factor), shift = splat(-top);
  Vec sum = zero();
  for (size_t page = tile.first / kKeyPage; page * kKeyPage < tile.end; ++page) {
    const float* value_scales = scales_of(b.values[page], b.head_dim);
    Vec weights[kKeyPage / 16];
#pragma GCC unroll 4
    for (size_t v = 0; v < kKeyPage / 16; ++v) {
      const size_t i = page * kKeyPage + 16 * v;
      weights[v] = zero();
      if (seen.none(i)) continue;
      Vec p = exp2_of(fma(load(scores + i), f, shift));
      Vec weight = mul(p, load(value_scales + 16 * v));
      if (!seen.all(i)) {
        p = select(seen.mask(i), p, zero());
        weight = select(seen.mask(i), weight, zero());
      }
      sum = add(sum, p);
      weights[v] = weight;
    }
    const float total = sum_lanes(add(add(weights[0], weights[1]), add(weights[2], weights[3])));
    const Vec inverse = splat(total > 1e-30f ? kMostCode / total : 0.0f);
    int16_t* codes = codes_of_page(b, r, page);
    Words sums = zero_words();
#pragma GCC unroll 4
    for (size_t v = 0; v < kKeyPage / 16; ++v) {
      const Words words = to_words(mul(weights[v], inverse));
      store_low_halves(codes + 16 * v, words);
      sums = add_words(sums, words);
    }
    // Equal probabilities are all rounded the same way: their sum must stay what it was.
    const int32_t code_sum = sum_of_words(sums);
    scale_of_page(b, r, page) = code_sum > 0 ? total / static_cast<float>(code_sum) : total;
  }
  b.max[r] = top;
  b.sum[r] = sum_lanes(sum);
}

// Adds one page's values, weighted, to the rows' results.
inline void code_values(const AttendBlock& b, size_t page, const void* ahead) {
  const auto* values = static_cast<const int16_t*>(b.values[page]);
  const size_t start = page * kKeyPage, dim = b.head_dim;
  each_tile(b.rows, kTileRows, [&](size_t r, size_t count) {
    const Range tile = seen_by(b.first + r, b.end + r, count);
    const Range seen = within(tile, start, start + kKeyPage);
    if (seen.first == seen.end) return;
    const size_t pair = (seen.first - start) / 2, end = (seen.end - start + 1) / 2;
    const bool begins = tile.first / kKeyPage == page;
    const CodeOperands o{.a = codes_of_page(b, r, page) + 2 * pair,
                         .b = values + 2 * pair * dim,
                         .lda = 2 * kKeyBlock,
                         .ldb = dim,
                         .pairs = end - pair,
                         .ahead = r == 0 ? static_cast<const int16_t*>(ahead) : nullptr};
    float* to = b.out + r * dim;
    const float* scales = &scale_of_page(b, r, page);
    code_product(count, dim / 16, o, [=](size_t row, size_t v, Words dots) {
      float* y = to + row * dim + 16 * v;
      const Vec x = to_floats(dots), scale = splat(scales[row * kKeyBlock]);
      store(y, begins ? mul(x, scale) : fma(x, scale, load(y)));
    });
  });
}

inline void attend_codes(const AttendBlock& b) {
  CodedRows rows{};
  rows.scales = b.page;
  rows.q = reinterpret_cast<int16_t*>(b.page + b.rows);
  for (size_t r = 0; r < b.rows; ++r) {
    const CodeScale s = key_scale(b.q + r * b.ldq, b.head_dim);
    rows.scales[r] = s.scale;
    put_codes(b.q + r * b.ldq, s.inverse, b.head_dim, rows.q + r * b.head_dim);
  }
  for (size_t p = 0; p < b.pages; ++p)
    code_scores(b, rows, p, p + 1 < b.pages ? b.keys[p + 1] : b.values[0]);
  each_tile(b.rows, kTileRows, [&](size_t r0, size_t count) {
    const Range tile = seen_by(b.first + r0, b.end + r0, count);
    for (size_t r = r0; r < r0 + count; ++r) code_softmax_row(b, r, tile, rows.scales[r]);
  });
  for (size_t p = 0; p < b.pages; ++p)
    code_values(b, p, p + 1 < b.pages ? b.values[p + 1] : b.next);
}
