// The kernels of float_kernels.h over a vector of 16 floats. Included by each level's file inside
// its anonymous namespace, after it has defined Vec, Mask, the sizes of tiles and the operations;
// so this file includes nothing but its own parts.

// A matrix operand in f16.
struct Half {
  uint16_t bits;
};
inline Vec load(const Half* p) { return load_f16(&p->bits); }
// Into the second-level cache: asked into the first, 24 lines in flight hold up what follows them
// (measured: 23 GB/s, against 35 of 37 that the memory gives).
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// ---- Rows of any length -------------------------------------------------------------------------

// How a loop over a row reads and writes: 16 elements, or the last few. uint16_t is bf16 here.
struct Whole {
  Vec get(const float* p) const { return load(p); }
  Vec get(const uint16_t* p) const { return load_bf16(p); }
  Vec get_or(const float* p, float) const { return load(p); }
  Vec keep(Vec v) const { return v; }
  void put(float* p, Vec v) const { store(p, v); }
  void put(uint16_t* p, Vec v) const { store_bf16(p, v); }
};
struct Part {
  size_t n;
  Vec get(const float* p) const { return load_part(p, n); }
  Vec get(const uint16_t* p) const {
    uint16_t words[16] = {};
    for (size_t i = 0; i < n; ++i) words[i] = p[i];
    return load_bf16(words);
  }
  Vec get_or(const float* p, float rest) const {
    return select(lanes_between(0, static_cast<int>(n)), load_part(p, n), splat(rest));
  }
  Vec keep(Vec v) const { return select(lanes_between(0, static_cast<int>(n)), v, zero()); }
  void put(float* p, Vec v) const { store_part(p, n, v); }
  void put(uint16_t* p, Vec v) const {
    uint16_t words[16];
    store_bf16(words, v);
    for (size_t i = 0; i < n; ++i) p[i] = words[i];
  }
};

// f(i, io) for each 16 elements of [0, n).
template <typename F>
inline void each_vec(size_t n, F f) {
  size_t i = 0;
  for (; i + 16 <= n; i += 16) f(i, Whole{});
  if (i < n) f(i, Part{n - i});
}

// Folds [0, n) with acc = f(i, io, acc), from four accumulators, so that the latency of an addition
// is hidden, and joins them as (0 + 1) + (2 + 3).
template <typename F, typename Join>
inline Vec fold(size_t n, Vec start, F f, Join join) {
  Vec a = start, b = start, c = start, d = start;
  size_t i = 0;
  for (; i + 64 <= n; i += 64) {
    a = f(i, Whole{}, a);
    b = f(i + 16, Whole{}, b);
    c = f(i + 32, Whole{}, c);
    d = f(i + 48, Whole{}, d);
  }
  for (; i + 16 <= n; i += 16) a = f(i, Whole{}, a);
  if (i < n) b = f(i, Part{n - i}, b);
  return join(join(a, b), join(c, d));
}
template <typename F>
inline float fold_sum(size_t n, F f) {
  return sum_lanes(fold(n, zero(), f, [](Vec a, Vec b) { return add(a, b); }));
}

// ---- Functions ----------------------------------------------------------------------------------

// e^x: x = n·ln 2 + r, |r| ≤ ½ ln 2, and a polynomial of degree 7 in r (Cephes, expf). Relative
// error below 2e-7 for −87 ≤ x ≤ 88.37; below that 0, so that no subnormal number appears, above
// it e^88.37. NaN stays NaN: min and max return their second operand then.
inline Vec exp_of(Vec x) {
  const Mask vanishes = less(x, splat(-87.0f));
  const Vec in_range = min(splat(88.37f), max(splat(-87.0f), x));
  const Vec n = round_to_integer(mul(in_range, splat(1.44269504f)));
  Vec r = fnma(n, splat(0.693359375f), in_range);
  r = fnma(n, splat(-2.12194440e-4f), r);
  Vec p = fma(splat(1.9875691500e-4f), r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  const Vec fraction = add(fma(p, mul(r, r), r), splat(1.0f));
  return select(vanishes, zero(), times_power_of_two(fraction, n));
}

// 2^t for attention, where t is a score less the row's maximum: at most about 0, and what is below
// 2^−100 may as well be 2^−100. A minimax polynomial of degree 5 on [−½, ½] with p(0) = 1; relative
// error below 2e-7.
inline Vec exp2_of(Vec t) {
  const Vec in_range = max(splat(-100.0f), t);
  const Vec n = round_to_integer(in_range), r = sub(in_range, n);
  Vec p = fma(splat(1.326472731e-3f), r, splat(9.671512991e-3f));
  p = fma(p, r, splat(5.550733581e-2f));
  p = fma(p, r, splat(2.402224243e-1f));
  p = fma(p, r, splat(6.931470037e-1f));
  return times_power_of_two(fma(p, r, splat(1.0f)), n);
}

// 1 / (1 + e^−x)
inline Vec sigmoid_of(Vec x) { return div(splat(1.0f), add(splat(1.0f), exp_of(sub(zero(), x)))); }

// Small arguments by an odd polynomial (Cephes, tanhf), others as 1 − 2 / (e^2|x| + 1).
inline Vec tanh_of(Vec x) {
  const Vec size = magnitude(x), z = mul(x, x);
  Vec p = fma(splat(-5.70498872745e-3f), z, splat(2.06390887954e-2f));
  p = fma(p, z, splat(-5.37397155531e-2f));
  p = fma(p, z, splat(1.33314422036e-1f));
  p = fma(p, z, splat(-3.33332819422e-1f));
  const Vec small = fma(mul(p, z), x, x);
  const Vec grown = add(exp_of(add(size, size)), splat(1.0f));
  const Vec large = with_sign(sub(splat(1.0f), div(splat(2.0f), grown)), x);
  return select(less(size, splat(0.625f)), small, large);
}

// gelu_tanh(x) = ½x(1 + tanh u) = x · sigmoid(2u), u = √(2/π) (x + 0.044715 x³).
inline Vec gelu_inner(Vec x) {  // 2u
  const Vec cubic = fma(mul(x, x), splat(0.044715f), splat(1.0f));
  return mul(mul(x, splat(1.59576912f)), cubic);
}

template <bool kGelu>
inline Vec activate(Vec x) {
  return mul(x, sigmoid_of(kGelu ? gelu_inner(x) : x));
}

// act(x) and its derivative: with s the sigmoid of a(x), s + x · s(1 − s) · a′.
struct Activated {
  Vec value, slope;
};
template <bool kGelu>
inline Activated activate_with_slope(Vec x) {
  const Vec s = sigmoid_of(kGelu ? gelu_inner(x) : x);
  Vec inner_slope = splat(1.0f);
  if (kGelu) {
    const Vec cubic = fma(mul(x, x), splat(3 * 0.044715f), splat(1.0f));
    inner_slope = mul(splat(1.59576912f), cubic);
  }
  const Vec value = mul(x, s);
  return {value, fma(mul(value, sub(splat(1.0f), s)), inner_slope, s)};
}

// ---- Row operations -----------------------------------------------------------------------------

template <typename Out>
void rms_norm(const float* x, size_t ldx, size_t m, size_t n, const float* w, float eps, Out* y,
              size_t ldy, float* inverse_rms) {
  for (size_t row = 0; row < m; ++row, x += ldx, y += ldy) {
    const float squares = fold_sum(n, [=](size_t i, auto io, Vec acc) {
      const Vec v = io.get(x + i);
      return fma(v, v, acc);
    });
    const float inverse = 1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + eps);
    if (inverse_rms != nullptr) inverse_rms[row] = inverse;
    const Vec r = splat(inverse);
    each_vec(n,
             [=](size_t i, auto io) { io.put(y + i, mul(mul(io.get(x + i), r), io.get(w + i))); });
  }
}

void rms_norm_backward(const float* x, size_t ldx, const float* inverse_rms, const float* dy,
                       size_t ldy, size_t m, size_t n, const float* w, float* dx, size_t lddx,
                       float* dw) {
  for (size_t row = 0; row < m; ++row, x += ldx, dy += ldy, dx += lddx) {
    const float r = inverse_rms[row];
    const float product = fold_sum(n, [=](size_t i, auto io, Vec acc) {
      return fma(mul(io.get(dy + i), io.get(w + i)), io.get(x + i), acc);
    });
    const Vec inverse = splat(r), along = splat(r * r * (product / static_cast<float>(n)));
    each_vec(n, [=](size_t i, auto io) {
      const Vec v = io.get(x + i), d = io.get(dy + i);
      const Vec across = fnma(v, along, mul(d, io.get(w + i)));
      io.put(dx + i, fma(across, inverse, io.get(dx + i)));
      if (dw != nullptr) io.put(dw + i, fma(mul(d, v), inverse, io.get(dw + i)));
    });
  }
}

void rope(const float* cosines, const float* sines, size_t dims, const int32_t* positions, size_t m,
          float* x, size_t ldx, size_t heads, size_t head_dim, bool inverse) {
  const size_t half = dims / 2;
  for (size_t row = 0; row < m; ++row) {
    const size_t at = static_cast<size_t>(positions[row]) * half;
    for (size_t head = 0; head < heads; ++head) {
      float* a = x + row * ldx + head * head_dim;
      each_vec(half, [=](size_t i, auto io) {
        const Vec c = io.get(cosines + at + i);
        const Vec s = inverse ? sub(zero(), io.get(sines + at + i)) : io.get(sines + at + i);
        const Vec u = io.get(a + i), v = io.get(a + half + i);
        io.put(a + i, fnma(v, s, mul(u, c)));
        io.put(a + half + i, fma(u, s, mul(v, c)));
      });
    }
  }
}

template <bool kGelu, typename T>
inline void gate_as(const T* gate, const T* up, size_t n, T* h) {
  each_vec(n, [=](size_t i, auto io) {
    io.put(h + i, mul(activate<kGelu>(io.get(gate + i)), io.get(up + i)));
  });
}
template <typename T>
void gate_row(bool gelu, const T* gate, const T* up, size_t n, T* h) {
  gelu ? gate_as<true>(gate, up, n, h) : gate_as<false>(gate, up, n, h);
}

template <bool kGelu, typename T>
inline void gate_backward_as(const T* gate, const T* up, const float* dh, size_t n, T* d_gate,
                             T* d_up) {
  each_vec(n, [=](size_t i, auto io) {
    const Activated act = activate_with_slope<kGelu>(io.get(gate + i));
    const Vec u = io.get(up + i), d = io.get(dh + i);
    io.put(d_gate + i, mul(mul(d, u), act.slope));
    io.put(d_up + i, mul(d, act.value));
  });
}
template <typename T>
void gate_backward_row(bool gelu, const T* gate, const T* up, const float* dh, size_t n, T* d_gate,
                       T* d_up) {
  gelu ? gate_backward_as<true>(gate, up, dh, n, d_gate, d_up)
       : gate_backward_as<false>(gate, up, dh, n, d_gate, d_up);
}

void add_scaled(const float* x, size_t n, float scale, float* y) {
  const Vec s = splat(scale);
  each_vec(n, [=](size_t i, auto io) { io.put(y + i, fma(io.get(x + i), s, io.get(y + i))); });
}

// The + 0 turns −0 into +0: see "Zeros" below.
void scale_row(const float* x, size_t n, float factor, float* y) {
  const Vec f = splat(factor);
  each_vec(n, [=](size_t i, auto io) { io.put(y + i, fma(io.get(x + i), f, zero())); });
}

void round_row(const float* x, size_t n, uint16_t* y) {
  each_vec(n, [=](size_t i, auto io) { io.put(y + i, io.get(x + i)); });
}
void widen_row(const uint16_t* x, size_t n, float* y) {
  each_vec(n, [=](size_t i, auto io) { io.put(y + i, io.get(x + i)); });
}

void softcap_row(float* x, size_t n, float cap) {
  const Vec c = splat(cap), inverse = splat(1.0f / cap);
  each_vec(n,
           [=](size_t i, auto io) { io.put(x + i, mul(c, tanh_of(mul(io.get(x + i), inverse)))); });
}

float dot(const float* x, const float* y, size_t n) {
  return fold_sum(
      n, [=](size_t i, auto io, Vec acc) { return fma(io.get(x + i), io.get(y + i), acc); });
}

void exp_sum(const float* x, size_t n, float* y, float* max_out, float* sum_out) {
  const float low = -__builtin_inff();
  const float top = max_lanes(fold(
      n, splat(low), [=](size_t i, auto io, Vec acc) { return max(acc, io.get_or(x + i, low)); },
      [](Vec a, Vec b) { return max(a, b); }));
  const Vec shift = splat(top == low ? 0.0f : top);  // −∞ − −∞ would be NaN
  *max_out = top;
  *sum_out = fold_sum(n, [=](size_t i, auto io, Vec acc) {
    const Vec e = exp_of(sub(io.get(x + i), shift));
    if (y != nullptr) io.put(y + i, e);
    return add(acc, io.keep(e));
  });
}

// Nothing is fused, so that the update is what separate operations give.
void adamw(const AdamWStep& step, const float* g, size_t n, float* m, float* v, float* p) {
  const Vec beta1 = splat(step.beta1), rest1 = splat(step.rest1);
  const Vec beta2 = splat(step.beta2), rest2 = splat(step.rest2);
  const Vec scale = splat(step.scale), decay = splat(step.decay), rate = splat(step.rate);
  const Vec divisor = splat(step.root), eps = splat(step.eps);
  each_vec(n, [=](size_t i, auto io) {
    const Vec gradient = mul(io.get(g + i), scale);
    const Vec first = add(mul(beta1, io.get(m + i)), mul(rest1, gradient));
    const Vec second = add(mul(beta2, io.get(v + i)), mul(mul(rest2, gradient), gradient));
    io.put(m + i, first);
    io.put(v + i, second);
    const Vec size = add(div(root(second), divisor), eps);
    io.put(p + i, sub(mul(io.get(p + i), decay), div(mul(rate, first), size)));
  });
}

// ---- Products -----------------------------------------------------------------------------------

// C[M, 16·N] (+)= A[M, k] · B[k, 16·N], with C in registers. Each element is one chain of fused
// multiply-adds in the order of k, so its bits depend neither on the tile's shape nor on where the
// chain is cut between calls.
struct Operands {
  const float* a;
  size_t row_stride, k_stride;  // of a
  size_t ldb;
  float* c;
  size_t ldc;
  bool accumulate;
};
// An operand in f16 comes straight from the cache's memory, where pages lie scattered, out of reach
// of the hardware's prefetcher: while B is used, what is used next, at `ahead`, is asked for.
template <size_t kRows, size_t kVecs, typename B>
void tile_product(size_t k, const Operands& o, const B* b, const B* ahead, size_t column) {
  const float* a = o.a;
  float* c = o.c + column;
  b += column;
  ahead += column;
  Vec acc[kRows][kVecs];
#pragma GCC unroll 8
  for (size_t r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (size_t v = 0; v < kVecs; ++v)
      acc[r][v] = o.accumulate ? load(c + r * o.ldc + 16 * v) : zero();
  const size_t row_stride = o.row_stride, k_stride = o.k_stride, ldb = o.ldb;
  for (size_t i = 0; i < k; ++i, a += k_stride, b += ldb) {
    if constexpr (sizeof(B) == 2) {
      prefetch(ahead);
      if (kVecs > 2) prefetch(ahead + 32);
      ahead += ldb;
    }
    Vec row[kVecs];
#pragma GCC unroll 8
    for (size_t v = 0; v < kVecs; ++v) row[v] = load(b + 16 * v);
#pragma GCC unroll 8
    for (size_t r = 0; r < kRows; ++r) {
      const Vec x = splat(a[r * row_stride]);
#pragma GCC unroll 8
      for (size_t v = 0; v < kVecs; ++v) acc[r][v] = fma(x, row[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (size_t r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (size_t v = 0; v < kVecs; ++v) store(c + r * o.ldc + 16 * v, acc[r][v]);
}

template <size_t kRows, typename B>
inline void row_product(size_t vecs, size_t k, const Operands& o, const B* b, const B* ahead) {
  constexpr size_t kVecs = kRows <= kTileRows ? kTileVecs : kTallTileVecs;
  size_t v = 0;
  for (; v + kVecs <= vecs; v += kVecs) tile_product<kRows, kVecs>(k, o, b, ahead, 16 * v);
  if constexpr (kVecs > 2) {
    if (vecs - v == 3) tile_product<kRows, 3>(k, o, b, ahead, 16 * v);
    if (vecs - v == 2) tile_product<kRows, 2>(k, o, b, ahead, 16 * v);
  }
  if constexpr (kVecs > 1) {
    if (vecs - v == 1) tile_product<kRows, 1>(k, o, b, ahead, 16 * v);
  }
}

// The same for up to kTallTileRows rows and any number of vectors.
template <typename B>
void product(size_t rows, size_t vecs, size_t k, const Operands& o, const B* b, const B* ahead) {
  static_assert(kTileRows == 6 && (kTallTileRows == 6 || kTallTileRows == 8));
  switch (rows) {
    case 1:
      return row_product<1>(vecs, k, o, b, ahead);
    case 2:
      return row_product<2>(vecs, k, o, b, ahead);
    case 3:
      return row_product<3>(vecs, k, o, b, ahead);
    case 4:
      return row_product<4>(vecs, k, o, b, ahead);
    case 5:
      return row_product<5>(vecs, k, o, b, ahead);
    case 6:
      return row_product<6>(vecs, k, o, b, ahead);
  }
  if constexpr (sizeof(B) == 2 && kTallTileRows == 8) {
    if (rows == 7) return row_product<7>(vecs, k, o, b, ahead);
    if (rows == 8) return row_product<8>(vecs, k, o, b, ahead);
  }
}
inline void product(size_t rows, size_t vecs, size_t k, const Operands& o, const float* b) {
  product(rows, vecs, k, o, b, b);
}

// Calls f(first, count) for tiles of at most `most` of `rows`, as even as they can be: 7 rows are
// 4 + 3, not 6 + 1.
template <typename F>
inline void each_tile(size_t rows, size_t most, F f) {
  size_t left = (rows + most - 1) / most;
  for (size_t first = 0; first < rows; --left) {
    const size_t count = (rows - first + left - 1) / left;
    f(first, count);
    first += count;
  }
}

// ---- Pages --------------------------------------------------------------------------------------

inline void put_words(float* p, Vec v) { store(p, v); }
inline void put_words(Half* p, Vec v) {
  // The finite range of f16. NaN stays NaN.
  store_f16(&p->bits, max(splat(-65504.0f), min(splat(65504.0f), v)));
}

template <typename T>
inline void put_keys_as(const float* k, size_t ldk, size_t first, size_t count, size_t head_dim,
                        T* page) {
  for (size_t t = 0; t < count;) {
    if (count - t >= 16 && (first + t) % 16 == 0) {
      for (size_t d = 0; d < head_dim; d += 16) {
        Vec columns[16];
        transpose(k + t * ldk + d, ldk, columns);
        for (size_t i = 0; i < 16; ++i)
          put_words(page + (d + i) * kKeyPage + first + t, columns[i]);
      }
      t += 16;
    } else {
      for (size_t d = 0; d < head_dim; d += 16) {
        T words[16];
        put_words(words, load(k + t * ldk + d));
        for (size_t i = 0; i < 16; ++i) page[(d + i) * kKeyPage + first + t] = words[i];
      }
      ++t;
    }
  }
}
template <typename T>
inline void put_values_as(const float* v, size_t ldv, size_t first, size_t count, size_t head_dim,
                          T* page) {
  for (size_t t = 0; t < count; ++t)
    for (size_t d = 0; d < head_dim; d += 16)
      put_words(page + (first + t) * head_dim + d, load(v + t * ldv + d));
}
// ---- Attention ----------------------------------------------------------------------------------
//
// Over f32 and f16 here, over i16 in code_attention_body.h.
//
// Zeros. Rows of one tile may see different keys; the product runs over all that any of them sees,
// with probability 0 where a row does not see. That adds exactly nothing, but may turn a −0 into
// +0; the last step (scale_row) makes every zero +0, so that a token's bits do not depend on which
// rows it shared a tile with.

struct Range {
  uint32_t first, end;
};
inline Range seen_by(const uint32_t* first, const uint32_t* end, size_t rows) {
  Range seen = {UINT32_MAX, 0};
  for (size_t r = 0; r < rows; ++r) {
    if (first[r] >= end[r]) continue;
    if (first[r] < seen.first) seen.first = first[r];
    if (end[r] > seen.end) seen.end = end[r];
  }
  return seen.first < seen.end ? seen : Range{0, 0};
}
inline Range within(Range range, size_t from, size_t to) {
  const auto a = static_cast<uint32_t>(from), b = static_cast<uint32_t>(to);
  const Range part = {range.first > a ? range.first : a, range.end < b ? range.end : b};
  return part.first < part.end ? part : Range{a, a};
}

// Lanes [i, i + 16) of a row that sees [first, end).
struct Seen {
  int first, end;
  bool all(size_t i) const {
    return first <= static_cast<int>(i) && static_cast<int>(i) + 16 <= end;
  }
  bool none(size_t i) const {
    return end <= static_cast<int>(i) || static_cast<int>(i) + 16 <= first;
  }
  Mask mask(size_t i) const {
    const auto at = static_cast<int>(i);
    return lanes_between(first - at, end - at);
  }
};
constexpr float kLog2E = 1.44269504f;

// cap · tanh(scale · q·k / cap), over 16-lane groups of [begin, end).
inline void cap_scores(float* scores, size_t begin, size_t end, float scale, float cap) {
  const Vec inverse = splat(scale / cap), c = splat(cap);
  for (size_t i = begin; i < end; i += 16)
    store(scores + i, mul(c, tanh_of(mul(load(scores + i), inverse))));
}

// Scores → 2^(factor · score − max), zero where the row does not see; factor = scale · log2 e, so
// that it is the exponential of the scaled score. `tile` is the range that the products of the
// row's tile use.
inline void softmax_row(float* scores, Range tile, Seen seen, float scale, float softcap,
                        float* max_out, float* sum_out) {
  const size_t begin = tile.first / 16 * 16;
  if (softcap > 0) cap_scores(scores, begin, tile.end, scale, softcap);
  const float factor = softcap > 0 ? kLog2E : scale * kLog2E;
  const Vec low = splat(-__builtin_inff()), f = splat(factor);
  Vec even = low, odd = low;
  for (size_t i = begin; i < tile.end; i += 32) {
    const Vec x = load(scores + i);
    even = max(even, seen.all(i) ? x : select(seen.mask(i), x, low));
    if (i + 16 >= tile.end) break;
    const Vec y = load(scores + i + 16);
    odd = max(odd, seen.all(i + 16) ? y : select(seen.mask(i + 16), y, low));
  }
  const float top = factor * max_lanes(max(even, odd));
  const Vec shift = splat(-top);
  Vec sum = zero();
  for (size_t i = begin; i < tile.end; i += 16) {
    Vec p = exp2_of(fma(load(scores + i), f, shift));
    if (!seen.all(i)) p = select(seen.mask(i), p, zero());
    store(scores + i, p);
    sum = add(sum, p);
  }
  *max_out = top;
  *sum_out = sum_lanes(sum);
}

// A page's part [first, end) of 16-column (or row) groups as f32.
inline void widen_words(const Half* from, size_t count, float* to) {
  for (size_t i = 0; i < count; i += 16) store(to + i, load(from + i));
}

void widen_q8_keys(const int8_t* codes, const float* scales, size_t head_dim, float* to) {
  for (size_t i = 0; i < head_dim * kKeyPage; i += 16)
    store(to + i, mul(load_i8(codes + i), load(scales + i % kKeyPage)));
}
void widen_q8_values(const int8_t* codes, const float* scales, size_t head_dim, float* to) {
  for (size_t t = 0; t < kKeyPage; ++t) {
    const Vec scale = splat(scales[t]);
    for (size_t i = t * head_dim; i < (t + 1) * head_dim; i += 16)
      store(to + i, mul(load_i8(codes + i), scale));
  }
}

#include "engine/code_attention_body.h"

void put_keys(const float* k, size_t ldk, size_t first, size_t count, size_t head_dim,
              PageType type, void* page) {
  switch (type) {
    case PageType::f32:
      return put_keys_as(k, ldk, first, count, head_dim, static_cast<float*>(page));
    case PageType::f16:
      return put_keys_as(k, ldk, first, count, head_dim, static_cast<Half*>(page));
    case PageType::i16:
      return put_key_codes(k, ldk, first, count, head_dim, static_cast<int16_t*>(page));
  }
}

void put_values(const float* v, size_t ldv, size_t first, size_t count, size_t head_dim,
                PageType type, void* page) {
  switch (type) {
    case PageType::f32:
      return put_values_as(v, ldv, first, count, head_dim, static_cast<float*>(page));
    case PageType::f16:
      return put_values_as(v, ldv, first, count, head_dim, static_cast<Half*>(page));
    case PageType::i16:
      return put_value_codes(v, ldv, first, count, head_dim, static_cast<int16_t*>(page));
  }
}

// Below this many rows a page of f16 is widened as it is read, in tiles tall enough to read it once
// for a group of up to 8 heads; above, it is widened once for all rows.
constexpr size_t kWidenRows = 12;
inline bool widens(const AttendBlock& b) { return b.type == PageType::f16 && b.rows >= kWidenRows; }
inline size_t rows_per_tile(const AttendBlock& b) {
  return b.type == PageType::f16 && !widens(b) ? kTallTileRows : kTileRows;
}

template <typename T>
inline void scores_of_page(const AttendBlock& b, size_t page, const T* keys, const T* ahead) {
  each_tile(b.rows, rows_per_tile(b), [&](size_t r, size_t count) {
    const size_t start = page * kKeyPage;
    const Range seen = within(seen_by(b.first + r, b.end + r, count), start, start + kKeyPage);
    if (seen.first == seen.end) return;
    const size_t v = (seen.first - start) / 16, end = (seen.end - start + 15) / 16;
    const Operands o{.a = b.q + r * b.ldq,
                     .row_stride = b.ldq,
                     .k_stride = 1,
                     .ldb = kKeyPage,
                     .c = b.scores + r * kKeyBlock + start + 16 * v,
                     .ldc = kKeyBlock,
                     .accumulate = false};
    product(count, end - v, b.head_dim, o, keys + 16 * v, ahead + 16 * v);
  });
}

template <typename T>
inline void values_of_page(const AttendBlock& b, size_t page, const T* values, const T* ahead,
                           size_t ldv) {
  each_tile(b.rows, rows_per_tile(b), [&](size_t r, size_t count) {
    const size_t start = page * kKeyPage;
    const Range tile = seen_by(b.first + r, b.end + r, count);
    const Range seen = within(tile, start, start + kKeyPage);
    if (seen.first == seen.end) return;
    const Operands o{.a = b.scores + r * kKeyBlock + seen.first,
                     .row_stride = kKeyBlock,
                     .k_stride = 1,
                     .ldb = ldv,
                     .c = b.out + r * b.head_dim,
                     .ldc = b.head_dim,
                     .accumulate = seen.first != tile.first};
    const size_t skip = (seen.first - start) * ldv;
    product(count, b.head_dim / 16, seen.end - seen.first, o, values + skip, ahead + skip);
  });
}

void attend_block(const AttendBlock& b) {
  if (b.type == PageType::i16) return attend_codes(b);
  const size_t page_words = kKeyPage * b.head_dim;
  const bool widen = widens(b);
  for (size_t p = 0; p < b.pages; ++p) {
    if (b.type == PageType::f16 && !widen) {
      const auto* keys = static_cast<const Half*>(b.keys[p]);
      const void* ahead = p + 1 < b.pages ? b.keys[p + 1] : b.values[0];
      scores_of_page(b, p, keys, static_cast<const Half*>(ahead));
      continue;
    }
    if (widen) widen_words(static_cast<const Half*>(b.keys[p]), page_words, b.page);
    const float* keys = widen ? b.page : static_cast<const float*>(b.keys[p]);
    scores_of_page(b, p, keys, keys);
  }
  each_tile(b.rows, rows_per_tile(b), [&](size_t r0, size_t count) {
    const Range tile = seen_by(b.first + r0, b.end + r0, count);
    for (size_t r = r0; r < r0 + count; ++r)
      softmax_row(b.scores + r * kKeyBlock, tile,
                  {static_cast<int>(b.first[r]), static_cast<int>(b.end[r])}, b.scale, b.softcap,
                  b.max + r, b.sum + r);
  });
  for (size_t p = 0; p < b.pages; ++p) {
    if (b.type == PageType::f16 && !widen) {
      const auto* values = static_cast<const Half*>(b.values[p]);
      const void* ahead = p + 1 < b.pages ? b.values[p + 1] : b.next;
      values_of_page(b, p, values, static_cast<const Half*>(ahead), b.ldv);
      continue;
    }
    if (widen) widen_words(static_cast<const Half*>(b.values[p]), page_words, b.page);
    const float* values = widen ? b.page : static_cast<const float*>(b.values[p]);
    values_of_page(b, p, values, values, widen ? b.head_dim : b.ldv);
  }
}

// The factors by which the old and the new sum shrink; all lanes are equal.
void merge_block(const AttendBlock& b, float* max_of, float* sum_of, float* out) {
  for (size_t r = 0; r < b.rows; ++r) {
    if (b.first[r] >= b.end[r]) continue;
    const Vec old_max = splat(max_of[r]), new_max = splat(b.max[r]);
    const Vec top = max(old_max, new_max);
    // 2^−100 of a sum that is 0 at first.
    const Vec keep = exp2_of(sub(old_max, top)), join = exp2_of(sub(new_max, top));
    float lanes_out[16];
    store(lanes_out, top);
    max_of[r] = lanes_out[0];
    store(lanes_out, fma(splat(b.sum[r]), join, mul(splat(sum_of[r]), keep)));
    sum_of[r] = lanes_out[0];
    float* y = out + r * b.head_dim;
    const float* x = b.out + r * b.head_dim;
    for (size_t d = 0; d < b.head_dim; d += 16)
      store(y + d, fma(load(x + d), join, mul(load(y + d), keep)));
  }
}

// p = exp(s − lse), the probability; ds = p · (dp − delta) · scale, the gradient of q·k, both zero
// where the row does not see. With a softcap s = cap · tanh(u), ds gets the slope 1 − tanh²(u).
inline void probability_row(const AttendBackwardTile& t, size_t r, size_t vecs) {
  float* p = t.p + r * kKeyPage;
  float* ds = t.ds + r * kKeyPage;
  const Seen seen = {static_cast<int>(t.first[r]), static_cast<int>(t.end[r])};
  const Vec scale = splat(t.scale), delta = splat(t.delta[r]);
  const Vec shift = splat(t.lse[r] * -kLog2E);
  const Vec factor = splat(t.softcap > 0 ? t.softcap * kLog2E : t.scale * kLog2E);
  const Vec inverse = splat(t.softcap > 0 ? t.scale / t.softcap : 0);
  for (size_t i = 0; i < 16 * vecs; i += 16) {
    Vec s = load(p + i), slope = scale;
    if (t.softcap > 0) {
      s = tanh_of(mul(s, inverse));
      slope = mul(scale, fnma(s, s, splat(1.0f)));
    }
    Vec e = exp2_of(fma(s, factor, shift));
    Vec g = mul(mul(e, sub(load(ds + i), delta)), slope);
    if (!seen.all(i)) {
      const Mask mask = seen.mask(i);
      e = select(mask, e, zero());
      g = select(mask, g, zero());
    }
    store(p + i, e);
    store(ds + i, g);
  }
}

void attend_backward_tile(const AttendBackwardTile& t) {
  const size_t key_vecs = (t.keys + 15) / 16, dim_vecs = t.head_dim / 16;
  each_tile(t.rows, kTileRows, [&](size_t r0, size_t count) {
    const Range seen = seen_by(t.first + r0, t.end + r0, count);
    const size_t v = seen.first / 16, end = (seen.end + 15) / 16;
    if (v < end) {
      product(count, end - v, t.head_dim,
              {.a = t.q + r0 * t.ldq,
               .row_stride = t.ldq,
               .k_stride = 1,
               .ldb = kKeyPage,
               .c = t.p + r0 * kKeyPage + 16 * v,
               .ldc = kKeyPage,
               .accumulate = false},
              t.k_page + 16 * v);
      product(count, end - v, t.head_dim,
              {.a = t.d_out + r0 * t.ldo,
               .row_stride = t.ldo,
               .k_stride = 1,
               .ldb = kKeyPage,
               .c = t.ds + r0 * kKeyPage + 16 * v,
               .ldc = kKeyPage,
               .accumulate = false},
              t.v_page + 16 * v);
    }
    // All vectors: what no row of this tile sees must be zero for the sums over rows below.
    for (size_t r = r0; r < r0 + count; ++r) probability_row(t, r, key_vecs);
    if (seen.first < seen.end)
      product(count, dim_vecs, seen.end - seen.first,
              {.a = t.ds + r0 * kKeyPage + seen.first,
               .row_stride = kKeyPage,
               .k_stride = 1,
               .ldb = t.ldkv,
               .c = t.dq + r0 * t.lddq,
               .ldc = t.lddq,
               .accumulate = true},
              t.k + seen.first * t.ldkv);
  });
  // dV = Pᵀ · dO and dK = dSᵀ · Q, over the rows that see any key of the tile.
  size_t from = 0, to = 0;
  each_tile(t.keys, kTileRows, [&](size_t j, size_t count) {
    while (from < t.rows && t.end[from] <= j) ++from;
    if (to < from) to = from;
    while (to < t.rows && t.first[to] < j + count) ++to;
    if (from == to) return;
    product(count, dim_vecs, to - from,
            {.a = t.p + from * kKeyPage + j,
             .row_stride = 1,
             .k_stride = kKeyPage,
             .ldb = t.ldo,
             .c = t.dv + j * t.lddkv,
             .ldc = t.lddkv,
             .accumulate = true},
            t.d_out + from * t.ldo);
    product(count, dim_vecs, to - from,
            {.a = t.ds + from * kKeyPage + j,
             .row_stride = 1,
             .k_stride = kKeyPage,
             .ldb = t.ldq,
             .c = t.dk + j * t.lddkv,
             .ldc = t.lddkv,
             .accumulate = true},
            t.q + from * t.ldq);
  });
}

constexpr FloatKernels make_table() {
  return {
      .rms_norm = rms_norm<float>,
      .rms_norm_bf16 = rms_norm<uint16_t>,
      .rms_norm_backward = rms_norm_backward,
      .rope = rope,
      .gate = gate_row<float>,
      .gate_bf16 = gate_row<uint16_t>,
      .gate_backward = gate_backward_row<float>,
      .gate_backward_bf16 = gate_backward_row<uint16_t>,
      .add_scaled = add_scaled,
      .scale = scale_row,
      .round_to_bf16 = round_row,
      .widen_bf16 = widen_row,
      .softcap = softcap_row,
      .dot = dot,
      .exp_sum = exp_sum,
      .adamw = adamw,
      .put_keys = put_keys,
      .put_values = put_values,
      .widen_q8_keys = widen_q8_keys,
      .widen_q8_values = widen_q8_values,
      .attend_block = attend_block,
      .merge_block = merge_block,
      .attend_backward_tile = attend_backward_tile,
  };
}
