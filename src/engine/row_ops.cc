#include "engine/row_ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/error.h"
#include "base/pieces.h"
#include "engine/float_kernels.h"

namespace moru {
namespace {

// Elements of the least piece of work: 64 KB of f32, a few microseconds, so that a single row of a
// decode step stays on the calling thread and waking the others pays.
constexpr size_t kItemElements = size_t{16} << 10;
// Rows whose weight gradients are summed before they join the others.
constexpr size_t kGradientRows = 64;
// Columns of logits whose sum is one f32 sum; chunks are joined in double, in order.
constexpr size_t kLogitColumns = 4096;

// work(first, count) over the rows [0, m) of n elements each.
template <typename Work>
void each_rows(Pool& pool, size_t m, size_t n, Work&& work) {
  const size_t rows = std::max<size_t>(1, kItemElements / std::max<size_t>(1, n));
  each_piece(pool, m, rows, [&](size_t begin, size_t end) { work(begin, end - begin); });
}

// work(first, count) over [0, count).
template <typename Work>
void each_range(Pool& pool, size_t count, Work&& work) {
  each_rows(pool, count, 1, work);
}

// Memory of the calling thread that only grows: nothing is allocated once sizes repeat.
template <typename T, int kUse>
T* scratch(size_t count) {
  static thread_local std::vector<T> memory;
  if (memory.size() < count) memory.resize(count);
  return memory.data();
}

bool is_gelu(Activation act) {
  MORU_DCHECK(act != Activation::swiglu_oai);
  return act == Activation::gelu_tanh;
}

// swiglu_oai by way of silu: (u + 1) / 1.702 · silu(1.702 g).
void gate_oai(const float* gate, const float* up, size_t n, float* h) {
  constexpr size_t kChunk = 512;
  constexpr float kLimit = 7, kAlpha = 1.702f;
  float g[kChunk], u[kChunk];
  for (size_t at = 0; at < n; at += kChunk) {
    const size_t count = std::min(kChunk, n - at);
    for (size_t i = 0; i < count; ++i) {
      g[i] = std::min(gate[at + i], kLimit) * kAlpha;
      u[i] = (std::clamp(up[at + i], -kLimit, kLimit) + 1) / kAlpha;
    }
    float_kernels().gate(false, g, u, count, h + at);
  }
}

// What one chunk of a row's logits contributes: its maximum and Σ exp(x − maximum).
struct ChunkSum {
  float max, sum;
};
size_t chunks_of(size_t n) { return (n + kLogitColumns - 1) / kLogitColumns; }

double join(const ChunkSum* chunks, size_t count) {
  float top = -std::numeric_limits<float>::infinity();
  for (size_t c = 0; c < count; ++c) top = std::max(top, chunks[c].max);
  if (std::isinf(top)) return double{top};
  double sum = 0;
  for (size_t c = 0; c < count; ++c)
    sum += double{chunks[c].sum} * std::exp(double{chunks[c].max} - double{top});
  return double{top} + std::log(sum);
}

}  // namespace

void rms_norm_rows(Pool& pool, const float* x, size_t ldx, size_t m, size_t n, const float* w,
                   float eps, float* y, size_t ldy, float* inverse_rms) {
  each_rows(pool, m, n, [&](size_t row, size_t count) {
    float_kernels().rms_norm(x + row * ldx, ldx, count, n, w, eps, y + row * ldy, ldy,
                             inverse_rms == nullptr ? nullptr : inverse_rms + row);
  });
}

void layer_norm_rows(Pool& pool, const float* x, size_t ldx, size_t m, size_t n, const float* w,
                     float eps, float* y, size_t ldy, float* inverse_rms) {
  MORU_CHECK(inverse_rms == nullptr);
  each_rows(pool, m, n, [&](size_t first, size_t count) {
    for (size_t row = first; row < first + count; ++row) {
      const float* from = x + row * ldx;
      float* to = y + row * ldy;
      double sum = 0;
      for (size_t i = 0; i < n; ++i) sum += double{from[i]};
      const auto mean = static_cast<float>(sum / static_cast<double>(n));
      for (size_t i = 0; i < n; ++i) to[i] = from[i] - mean;
      float_kernels().rms_norm(to, ldy, 1, n, w, eps, to, ldy, nullptr);
    }
  });
}

void rms_norm_rows_bf16(Pool& pool, const float* x, size_t ldx, size_t m, size_t n, const float* w,
                        float eps, uint16_t* y, size_t ldy, float* inverse_rms) {
  each_rows(pool, m, n, [&](size_t row, size_t count) {
    float_kernels().rms_norm_bf16(x + row * ldx, ldx, count, n, w, eps, y + row * ldy, ldy,
                                  inverse_rms == nullptr ? nullptr : inverse_rms + row);
  });
}

void rms_norm_backward(Pool& pool, const float* x, size_t ldx, const float* inverse_rms,
                       const float* dy, size_t ldy, size_t m, size_t n, const float* w, float* dx,
                       size_t lddx, float* dw) {
  const FloatKernels& kernels = float_kernels();
  if (dw == nullptr) {
    each_rows(pool, m, n, [&](size_t row, size_t count) {
      kernels.rms_norm_backward(x + row * ldx, ldx, inverse_rms + row, dy + row * ldy, ldy, count,
                                n, w, dx + row * lddx, lddx, nullptr);
    });
    return;
  }
  const size_t tiles = (m + kGradientRows - 1) / kGradientRows;
  float* parts = scratch<float, 0>(tiles * n);
  pool.each(tiles, [&](size_t tile) {
    const size_t row = tile * kGradientRows, count = std::min(kGradientRows, m - row);
    std::fill_n(parts + tile * n, n, 0.0f);
    kernels.rms_norm_backward(x + row * ldx, ldx, inverse_rms + row, dy + row * ldy, ldy, count, n,
                              w, dx + row * lddx, lddx, parts + tile * n);
  });
  for (size_t tile = 0; tile < tiles; ++tile) kernels.add_scaled(parts + tile * n, n, 1.0f, dw);
}

namespace {

void to_floats(const float* x, size_t n, float* y) { std::memcpy(y, x, n * sizeof(float)); }
void to_floats(const uint16_t* x, size_t n, float* y) { float_kernels().widen_bf16(x, n, y); }

template <typename T>
void add_normed(Pool& pool, const T* sub, size_t ldsub, size_t m, size_t n, const float* w,
                float eps, float scale, const float* x, float* y, float* inverse_rms) {
  const FloatKernels& kernels = float_kernels();
  each_rows(pool, m, n, [&](size_t first, size_t count) {
    float* normed = scratch<float, 4>(n);
    for (size_t row = first; row < first + count; ++row) {
      to_floats(sub + row * ldsub, n, normed);
      kernels.rms_norm(normed, n, 1, n, w, eps, normed, n,
                       inverse_rms == nullptr ? nullptr : inverse_rms + row);
      if (y != x) std::memcpy(y + row * n, x + row * n, n * sizeof(float));
      kernels.add_scaled(normed, n, scale, y + row * n);
    }
  });
}

}  // namespace

void add_normed_rows(Pool& pool, const float* sub, size_t ldsub, size_t m, size_t n, const float* w,
                     float eps, float scale, const float* x, float* y, float* inverse_rms) {
  add_normed(pool, sub, ldsub, m, n, w, eps, scale, x, y, inverse_rms);
}
void add_normed_rows(Pool& pool, const uint16_t* sub, size_t ldsub, size_t m, size_t n,
                     const float* w, float eps, float scale, const float* x, float* y,
                     float* inverse_rms) {
  add_normed(pool, sub, ldsub, m, n, w, eps, scale, x, y, inverse_rms);
}

void add_normed_backward_bf16(Pool& pool, const uint16_t* sub, size_t ldsub,
                              const float* inverse_rms, const float* dy, size_t m, size_t n,
                              const float* w, float scale, uint16_t* d_sub, size_t ldd) {
  const FloatKernels& kernels = float_kernels();
  each_rows(pool, m, n, [&](size_t first, size_t count) {
    float* wide = scratch<float, 4>(2 * n);
    float* d = wide + n;
    for (size_t row = first; row < first + count; ++row) {
      kernels.widen_bf16(sub + row * ldsub, n, wide);
      std::fill_n(d, n, 0.0f);
      kernels.rms_norm_backward(wide, n, inverse_rms + row, dy + row * n, n, 1, n, w, d, n,
                                nullptr);
      if (scale != 1) kernels.scale(d, n, scale, d);
      kernels.round_to_bf16(d, n, d_sub + row * ldd);
    }
  });
}

void rope_rows(Pool& pool, const RopeTable& table, std::span<const int32_t> positions, float* x,
               size_t ldx, size_t heads, size_t head_dim, bool inverse) {
  MORU_DCHECK(table.dims % 2 == 0 && table.dims <= head_dim);
  each_rows(pool, positions.size(), heads * head_dim, [&](size_t row, size_t count) {
    float_kernels().rope(table.cosines, table.sines, table.dims, positions.data() + row, count,
                         x + row * ldx, ldx, heads, head_dim, inverse);
  });
}

void gate_elements(Activation act, const float* gate, const float* up, size_t n, float* h) {
  if (act == Activation::swiglu_oai) return gate_oai(gate, up, n, h);
  float_kernels().gate(is_gelu(act), gate, up, n, h);
}

void gate_rows(Pool& pool, Activation act, const float* gate, size_t ldg, const float* up,
               size_t ldu, size_t m, size_t n, float* h, size_t ldh) {
  each_rows(pool, m, n, [&](size_t first, size_t count) {
    for (size_t row = first; row < first + count; ++row)
      gate_elements(act, gate + row * ldg, up + row * ldu, n, h + row * ldh);
  });
}

void gate_rows_bf16(Pool& pool, Activation act, const uint16_t* gate, const uint16_t* up, size_t ld,
                    size_t m, size_t n, uint16_t* h) {
  each_rows(pool, m, n, [&](size_t first, size_t count) {
    for (size_t i = first * ld; i < (first + count) * ld; i += ld)
      float_kernels().gate_bf16(is_gelu(act), gate + i, up + i, n, h + i);
  });
}

void gate_backward_bf16(Pool& pool, Activation act, const uint16_t* gate, const uint16_t* up,
                        size_t ld, const float* dh, size_t m, size_t n, uint16_t* d_gate,
                        uint16_t* d_up) {
  each_rows(pool, m, n, [&](size_t first, size_t count) {
    for (size_t row = first; row < first + count; ++row) {
      const size_t i = row * ld;
      float_kernels().gate_backward_bf16(is_gelu(act), gate + i, up + i, dh + row * n, n,
                                         d_gate + i, d_up + i);
    }
  });
}

void gate_backward(Pool& pool, Activation act, const float* gate, const float* up, const float* dh,
                   size_t m, size_t n, float* d_gate, float* d_up) {
  each_range(pool, m * n, [&](size_t i, size_t count) {
    float_kernels().gate_backward(is_gelu(act), gate + i, up + i, dh + i, count, d_gate + i,
                                  d_up + i);
  });
}

void add_bias_rows(Pool& pool, float* y, size_t ldy, size_t m, size_t n, const float* bias) {
  each_rows(pool, m, n, [&](size_t first, size_t count) {
    for (size_t row = first; row < first + count; ++row)
      float_kernels().add_scaled(bias, n, 1.0f, y + row * ldy);
  });
}

void add_rows(Pool& pool, const float* x, size_t ldx, size_t m, size_t n, float scale, float* y,
              size_t ldy) {
  each_rows(pool, m, n, [&](size_t first, size_t count) {
    for (size_t row = first; row < first + count; ++row)
      float_kernels().add_scaled(x + row * ldx, n, scale, y + row * ldy);
  });
}

void round_to_bf16(Pool& pool, const float* x, size_t count, uint16_t* y) {
  each_range(pool, count,
             [&](size_t i, size_t n) { float_kernels().round_to_bf16(x + i, n, y + i); });
}

void round_rows_to_bf16(Pool& pool, const float* x, size_t m, size_t n, uint16_t* y, size_t ldy) {
  if (ldy == n) return round_to_bf16(pool, x, m * n, y);
  each_rows(pool, m, n, [&](size_t first, size_t count) {
    for (size_t row = first; row < first + count; ++row)
      float_kernels().round_to_bf16(x + row * n, n, y + row * ldy);
  });
}

void widen_rows_bf16(Pool& pool, const uint16_t* x, size_t ldx, size_t m, size_t n, float* y) {
  const FloatKernels& kernels = float_kernels();
  if (ldx == n)
    return each_range(pool, m * n,
                      [&](size_t i, size_t count) { kernels.widen_bf16(x + i, count, y + i); });
  each_rows(pool, m, n, [&](size_t first, size_t count) {
    for (size_t row = first; row < first + count; ++row)
      kernels.widen_bf16(x + row * ldx, n, y + row * n);
  });
}

void softcap_rows(Pool& pool, float* x, size_t count, float cap) {
  each_range(pool, count, [&](size_t i, size_t n) { float_kernels().softcap(x + i, n, cap); });
}

float log_sum_exp(Floats x) {
  const FloatKernels& kernels = float_kernels();
  const size_t chunks = chunks_of(x.size());
  ChunkSum* sums = scratch<ChunkSum, 1>(chunks);
  for (size_t c = 0; c < chunks; ++c) {
    const size_t at = c * kLogitColumns, count = std::min(kLogitColumns, x.size() - at);
    kernels.exp_sum(x.data() + at, count, nullptr, &sums[c].max, &sums[c].sum);
  }
  return static_cast<float>(join(sums, chunks));
}

// Two passes over a row: chunk by chunk the maximum and exp(x − maximum), written if the gradient
// is wanted; then, with the row's log-sum-exp known, one factor per chunk makes probabilities of
// them. The second pass needs no exp.
void cross_entropy_rows(Pool& pool, float* logits, size_t ld, size_t m, size_t n,
                        const int32_t* targets, float* nll, float d_scale,
                        const std::function<void(size_t, float*)>& take_gradient) {
  const FloatKernels& kernels = float_kernels();
  const size_t chunks = chunks_of(n);
  ChunkSum* sums = scratch<ChunkSum, 1>(m * chunks);
  double* lse = scratch<double, 2>(m);
  const auto chunk_size = [&](size_t c) { return std::min(kLogitColumns, n - c * kLogitColumns); };

  // d: the row's gradient, which may be where its logits are; null: not wanted.
  const auto sum_chunk = [&](size_t row, size_t c, float* d) {
    ChunkSum& s = sums[row * chunks + c];
    kernels.exp_sum(logits + row * ld + c * kLogitColumns, chunk_size(c),
                    d == nullptr ? nullptr : d + c * kLogitColumns, &s.max, &s.sum);
  };
  const auto grade_chunk = [&](size_t row, size_t c, float* d) {
    float* x = d + c * kLogitColumns;
    const double shift = double{sums[row * chunks + c].max} - lse[row];
    kernels.scale(x, chunk_size(c), static_cast<float>(double{d_scale} * std::exp(shift)), x);
    const size_t target = static_cast<size_t>(targets[row]);
    if (target / kLogitColumns == c) d[target] -= d_scale;
  };
  const auto join_row = [&](size_t row) {
    lse[row] = join(sums + row * chunks, chunks);
    nll[row] = static_cast<float>(lse[row] - double{nll[row]});
  };
  for (size_t row = 0; row < m; ++row)
    nll[row] = logits[row * ld + static_cast<size_t>(targets[row])];

  // Many rows: a row is an item and stays in the cache between the passes. Few: a chunk is an item.
  if (m >= 4 * pool.size())
    return pool.each(m, [&](size_t row) {
      float* d = d_scale == 0 ? nullptr : take_gradient ? scratch<float, 3>(n) : logits + row * ld;
      for (size_t c = 0; c < chunks; ++c) sum_chunk(row, c, d);
      join_row(row);
      if (d == nullptr) return;
      for (size_t c = 0; c < chunks; ++c) grade_chunk(row, c, d);
      if (take_gradient) take_gradient(row, d);
    });
  const auto place = [&](size_t row) { return d_scale == 0 ? nullptr : logits + row * ld; };
  pool.each(m * chunks, [&](size_t i) { sum_chunk(i / chunks, i % chunks, place(i / chunks)); });
  for (size_t row = 0; row < m; ++row) join_row(row);
  if (d_scale == 0) return;
  pool.each(m * chunks, [&](size_t i) { grade_chunk(i / chunks, i % chunks, place(i / chunks)); });
  if (take_gradient) pool.each(m, [&](size_t row) { take_gradient(row, place(row)); });
}

}  // namespace moru
