// What a decoder block does to rows besides products: norms, rotary positions, gates, biases.
//
// Forward and backward stand side by side. All matrices are row major; `ld` is the distance between
// rows in elements. Rows are independent and every row is reduced in one fixed order (16 lanes
// four times over, then a fixed tree), so results do not depend on the number of rows or threads,
// nor on the level of the instruction set. f32 throughout; the bf16 variants read and write bf16
// and compute in f32.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>

#include "base/threads.h"

namespace moru {

using Floats = std::span<const float>;

// y[i] = x[i] · w[i] / sqrt(mean(x²) + eps)   arXiv:1910.07467
// x, y: [m, n]; w: [n]. y may be x. Rows may also be heads: m · heads rows of head_dim.
// inverse_rms: [m] or null, kept for the backward pass.
void rms_norm_rows(Pool& pool, const float* x, size_t ldx, size_t m, size_t n, const float* w,
                   float eps, float* y, size_t ldy, float* inverse_rms = nullptr);
// The same with y rounded to bf16, as the float profile's products want it.
void rms_norm_rows_bf16(Pool& pool, const float* x, size_t ldx, size_t m, size_t n, const float* w,
                        float eps, uint16_t* y, size_t ldy, float* inverse_rms = nullptr);
// The same of x − mean(x): LayerNorm without bias, arXiv:1607.06450. inverse_rms must be null.
void layer_norm_rows(Pool& pool, const float* x, size_t ldx, size_t m, size_t n, const float* w,
                     float eps, float* y, size_t ldy, float* inverse_rms = nullptr);
// dx += the gradient through the norm: with g = dy · w, r = inverse_rms,
//   dx[i] += r · (g[i] − x[i] · r² · mean(g · x)).
// dw: [n] or null; dw += Σ over rows of dy · x · r, in fixed tiles of 64 rows.
void rms_norm_backward(Pool& pool, const float* x, size_t ldx, const float* inverse_rms,
                       const float* dy, size_t ldy, size_t m, size_t n, const float* w, float* dx,
                       size_t lddx, float* dw = nullptr);
// Where a sub-layer's output is normed before it joins the stream: y = x + scale · rms_norm(sub).
// sub in f32 or bf16; y may be x.
void add_normed_rows(Pool& pool, const float* sub, size_t ldsub, size_t m, size_t n, const float* w,
                     float eps, float scale, const float* x, float* y, float* inverse_rms);
void add_normed_rows(Pool& pool, const uint16_t* sub, size_t ldsub, size_t m, size_t n,
                     const float* w, float eps, float scale, const float* x, float* y,
                     float* inverse_rms);
// And back: d_sub = scale · the gradient through the norm, rounded to bf16.
void add_normed_backward_bf16(Pool& pool, const uint16_t* sub, size_t ldsub,
                              const float* inverse_rms, const float* dy, size_t m, size_t n,
                              const float* w, float scale, uint16_t* d_sub, size_t ldd);

// Rotary positions, half-split pairs (i, i + dims/2)   arXiv:2104.09864
// cosines, sines: [max_positions, dims / 2]; x: [m, heads · head_dim], the first `dims` of each
// head turn. `inverse` turns back: the backward pass.
struct RopeTable {
  const float* cosines;
  const float* sines;
  size_t dims;
};
void rope_rows(Pool& pool, const RopeTable& table, std::span<const int32_t> positions, float* x,
               size_t ldx, size_t heads, size_t head_dim, bool inverse = false);

// h = act(gate) · up; [m, n] each, h may be gate. The backward writes d_gate and d_up (either may
// alias its forward value) from dh. swiglu_oai, forward in f32 alone, is
//   (u + 1) · g · σ(1.702 g), g = min(gate, 7), u = up within ±7.
enum class Activation { silu, gelu_tanh, swiglu_oai };
void gate_rows(Pool& pool, Activation act, const float* gate, size_t ldg, const float* up,
               size_t ldu, size_t m, size_t n, float* h, size_t ldh);
// n elements by the calling thread.
void gate_elements(Activation act, const float* gate, const float* up, size_t n, float* h);
// In bf16 all rows stand ld apart, but those of dh, f32, n.
void gate_rows_bf16(Pool& pool, Activation act, const uint16_t* gate, const uint16_t* up, size_t ld,
                    size_t m, size_t n, uint16_t* h);
void gate_backward_bf16(Pool& pool, Activation act, const uint16_t* gate, const uint16_t* up,
                        size_t ld, const float* dh, size_t m, size_t n, uint16_t* d_gate,
                        uint16_t* d_up);
void gate_backward(Pool& pool, Activation act, const float* gate, const float* up, const float* dh,
                   size_t m, size_t n, float* d_gate, float* d_up);

// y[r, :] += bias.
void add_bias_rows(Pool& pool, float* y, size_t ldy, size_t m, size_t n, const float* bias);
// y += scale · x, [m, n].
void add_rows(Pool& pool, const float* x, size_t ldx, size_t m, size_t n, float scale, float* y,
              size_t ldy);
void round_to_bf16(Pool& pool, const float* x, size_t count, uint16_t* y);
// [m, n], the rows of f32 without gaps.
void round_rows_to_bf16(Pool& pool, const float* x, size_t m, size_t n, uint16_t* y, size_t ldy);
void widen_rows_bf16(Pool& pool, const uint16_t* x, size_t ldx, size_t m, size_t n, float* y);

// logits = cap · tanh(logits / cap), in place.
void softcap_rows(Pool& pool, float* x, size_t count, float cap);

// One row's log(sum(exp(x))), with the maximum taken out: f32 over 4,096 values, then double. A row
// of −∞ gives −∞.
float log_sum_exp(Floats x);

// Cross-entropy of m rows of logits [m, n] against targets [m]: nll[r] = lse(row) − row[target].
// With d_scale ≠ 0 the logits are overwritten by d_scale · (softmax − onehot), the gradient.
// Targets lie in [0, n); a logit of −∞ is a token that cannot be. With `take_gradient` rows of the
// gradient are handed to it, row by row, by the thread in whose cache they stand, and what becomes
// of the logits is its affair.
void cross_entropy_rows(Pool& pool, float* logits, size_t ld, size_t m, size_t n,
                        const int32_t* targets, float* nll, float d_scale,
                        const std::function<void(size_t row, float* gradient)>& take_gradient = {});

}  // namespace moru
