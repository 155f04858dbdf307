#include <algorithm>
#include <array>
#include <cstring>

#include "base/error.h"
#include "base/half.h"
#include "engine/training_block.h"

namespace moru {
namespace {

// The gradient by one projection's output, [T, out].
struct OutputGradient {
  Projection projection;
  Rows rows;
};

// Gradients of what reads one input x [T, in], from dY of each:
//   du = s · dY · B    dB += dYᵀ · u (u holds s)    dA += duᵀ · x    dW += dYᵀ · x where W learns
// and, unless dx is null, dx (+)= Σ dY · W + du · A.
// x and dx have no gaps between rows.
void backward_group(LoraTraining::State& s, size_t layer, size_t group, const Rows& x,
                    const Rows& u, std::span<const OutputGradient> outputs, float* dx) {
  const size_t t = s.tokens;
  const LoraLayer& lora = s.lora->layers[layer];
  const Rows& du = s.scratch.du;
  size_t column = 0, whole = 0;
  std::array<DenseGradient, kDenseTerms> gradients;
  for (const OutputGradient& dy : outputs) {
    const LoraPair& pair = lora[static_cast<size_t>(dy.projection)];
    if (float* dw = s.gradient_of(matrix_of(s.model->layers[layer], dy.projection)))
      gradients[whole++] = {dy.rows.view(t, pair.out), {DType::f32, dw, pair.in, true, 1}};
    if (pair.rank == 0) continue;
    matmul_nn(*s.pool, dy.rows.view(t, pair.out), s.b(pair),
              {s.type, du.at(column), du.ld, false, pair.scale});
    matmul_tn(*s.pool, dy.rows.view(t, pair.out), u.view(t, pair.rank, column),
              {DType::f32, s.gradients + pair.b, pair.rank, true, 1});
    column += pair.rank;
  }
  const LoraPair& first = lora[kInputGroups[group].first];
  matmul_tn(*s.pool, std::span(gradients.data(), whole), x.view(t, first.in));
  const DenseView a = s.stacked_a(layer, kInputGroups[group]);
  if (column != 0)
    matmul_tn(*s.pool, du.view(t, column), x.view(t, first.in),
              {DType::f32, s.gradients + first.a, first.in, true, 1});
  if (dx == nullptr) return;
  // One sum, unless weights have to be unpacked, each into the place of the one before it.
  std::array<DenseTerm, kDenseTerms> terms;
  size_t count = 0;
  bool accumulate = false;
  const auto add_up = [&] {
    if (count != 0)
      matmul_nn(*s.pool, std::span(terms.data(), count), {DType::f32, dx, first.in, accumulate, 1});
    accumulate = true;
    count = 0;
  };
  for (const OutputGradient& dy : outputs) {
    const Matrix& w = matrix_of(s.model->layers[layer], dy.projection);
    if (s.unpacks(w) && count != 0) add_up();
    terms[count++] = {dy.rows.view(t, w.rows()), s.dense(w)};
  }
  if (column != 0) terms[count++] = {du.view(t, column), a};
  add_up();
}

// The gradient by a bias: sums over tokens, in their order.
void bias_gradient(LoraTraining::State& s, const Vector& bias, const Rows& dy) {
  float* db = s.gradient_of(bias);
  if (db == nullptr) return;
  constexpr size_t kColumns = 64;
  const size_t n = bias.size();
  s.pool->each((n + kColumns - 1) / kColumns, [&](size_t tile) {
    const size_t first = tile * kColumns, last = std::min(first + kColumns, n);
    for (size_t t = 0; t < s.tokens; ++t)
      for (size_t i = first; i < last; ++i) {
        const size_t at = t * dy.ld + i;
        db[i] += dy.type == DType::f32 ? dy.f32()[at] : f32_from_bf16(dy.bf16()[at]);
      }
  });
}

// The gradient by a sub-layer's output, from dx by the stream that it was added to; `own`: in
// memory that may be changed.
Rows output_gradient(LoraTraining::State& s, const Vector& post_norm, const Rows& sub,
                     const float* rms_post, bool own) {
  const Config& c = s.config();
  const size_t t = s.tokens, d = c.width;
  if (post_norm.empty() && c.residual_scale == 1) {
    if (s.type == DType::f32 && !own) return {DType::f32, s.scratch.dx, d};
    store(*s.pool, s.scratch.dx, t, d, s.scratch.d_out);
    return s.scratch.d_out;
  }
  if (!post_norm.empty() && s.type == DType::bf16 && s.gradient_of(post_norm) == nullptr) {
    add_normed_backward_bf16(*s.pool, sub.bf16(), sub.ld, rms_post, s.scratch.dx, t, d,
                             post_norm.data(), c.residual_scale, s.scratch.d_out.bf16(),
                             s.scratch.d_out.ld);
    return s.scratch.d_out;
  }
  // d_sub stands in dn, which no one needs yet; sub is widened into scratch.sub.
  float* d_sub = s.scratch.dn;
  zero_floats(*s.pool, d_sub, t * d);
  if (post_norm.empty()) {
    add_rows(*s.pool, s.scratch.dx, d, t, d, c.residual_scale, d_sub, d);
  } else {
    load(*s.pool, sub, t, d, s.scratch.sub);
    rms_norm_backward(*s.pool, s.scratch.sub, d, rms_post, s.scratch.dx, d, t, d, post_norm.data(),
                      d_sub, d, s.gradient_of(post_norm));
    if (c.residual_scale != 1) add_rows(*s.pool, d_sub, d, t, d, c.residual_scale - 1, d_sub, d);
  }
  store(*s.pool, d_sub, t, d, s.scratch.d_out);
  return s.scratch.d_out;
}

void copy_rows(LoraTraining::State& s, const Rows& from, const Rows& to) {
  const size_t bytes = from.ld * (from.type == DType::bf16 ? 2 : 4);
  s.pool->each(s.tokens, [&](size_t t) {
    std::memcpy(static_cast<std::byte*>(to.data) + t * bytes,
                static_cast<const std::byte*>(from.data) + t * bytes, bytes);
  });
}

// Gradients by gate and up take the place of their values.
void gate_gradients(LoraTraining::State& s, const Kept& k, const float* d_hidden) {
  const Activation act = s.config().activation;
  const size_t n = s.config().ffn_width;
  if (s.type == DType::bf16)
    gate_backward_bf16(*s.pool, act, k.gate.bf16(), k.up.bf16(), k.gate.ld, d_hidden, s.tokens, n,
                       k.gate.bf16(), k.up.bf16());
  else
    gate_backward(*s.pool, act, k.gate.f32(), k.up.f32(), d_hidden, s.tokens, n, k.gate.f32(),
                  k.up.f32());
}

// scratch.d_qkv, by what attention read, becomes d_proj, by what was projected.
void unfinish_qkv(LoraTraining::State& s, size_t layer, const Kept& kept) {
  const Config& c = s.config();
  const Layer& w = s.model->layers[layer];
  const size_t t = s.tokens, h = c.head_dim;
  const Qkv<float> d = split_qkv(s, s.scratch.d_qkv);
  if (c.rotates(layer)) {
    const RopeTable rope = s.model->rope_of(layer).view();
    rope_rows(*s.pool, rope, s.positions, d.q, c.q_width(), c.heads, h, true);
    rope_rows(*s.pool, rope, s.positions, d.k, c.kv_width(), c.kv_heads, h, true);
  }
  float* by_projected = s.scratch.d_qkv;
  if (c.qk_norm == QkNorm::rms_before_rope) {
    load(*s.pool, kept.qkv, t, s.qkv_width(), s.scratch.qkv);
    const Qkv<float> raw = split_qkv(s, s.scratch.qkv), d_raw = split_qkv(s, s.scratch.d_raw);
    zero_floats(*s.pool, d_raw.q, t * (c.q_width() + c.kv_width()));
    rms_norm_backward(*s.pool, raw.q, h, s.scratch.rms_q, d.q, h, t * c.heads, h, w.q_norm.data(),
                      d_raw.q, h, s.gradient_of(w.q_norm));
    rms_norm_backward(*s.pool, raw.k, h, s.scratch.rms_k, d.k, h, t * c.kv_heads, h,
                      w.k_norm.data(), d_raw.k, h, s.gradient_of(w.k_norm));
    copy_floats(*s.pool, d.v, t * c.kv_width(), d_raw.v);
    by_projected = s.scratch.d_raw;
  }
  store(*s.pool, by_projected, t, s.qkv_width(), s.scratch.d_proj);
}

}  // namespace

void backward_layer(LoraTraining::State& s, size_t layer, const Kept& k) {
  const Config& c = s.config();
  const Layer& w = s.model->layers[layer];
  const size_t t = s.tokens, d = c.width, qw = c.q_width(), kvw = c.kv_width();
  // Whether gradients flow on to the block's input.
  const bool passes = layer != s.lowest || s.learns_whole[layer] != 0;
  Scratch& sc = s.scratch;
  // What the lowest layer still has to reach.
  const bool wants_qkv = s.adapts(layer, kInputGroups[0]);
  const bool wants_mixed = passes || wants_qkv;
  const bool wants_attention = wants_mixed || s.adapts(layer, kInputGroups[1]);
  const bool wants_gates = wants_attention || s.adapts(layer, kInputGroups[2]);

  // What was not kept.
  if (s.options.recompute == Recompute::block) {
    forward_layer(s, layer, k, nullptr);
  } else if (s.options.recompute == Recompute::light) {
    norm_rows(*s.pool, k.x_attn, t, d, w.attn_norm, c.norm_eps, k.n_attn, nullptr);
    norm_rows(*s.pool, k.x_ffn, t, d, w.ffn_norm, c.norm_eps, k.n_ffn, nullptr);
    make_hidden(s, k);
  }

  // Feed-forward.
  static const Vector kNoBias;
  const Rows d_down = output_gradient(s, w.ffn_post_norm, k.ffn_sub, k.rms_ffn_post,
                                      s.is_dora(layer, Projection::down));
  magnitude_gradient(s, layer, Projection::down, k.ffn_sub, kNoBias, d_down);
  backward_group(s, layer, 3, k.hidden, k.u[3], {{{Projection::down, d_down}}},
                 wants_gates ? sc.wide : nullptr);
  if (!wants_gates) return;
  const bool dora_gate = s.is_dora(layer, Projection::gate),
             dora_up = s.is_dora(layer, Projection::up);
  if (dora_gate) copy_rows(s, k.gate, s.dora.gate);
  if (dora_up) copy_rows(s, k.up, s.dora.up);
  gate_gradients(s, k, sc.wide);
  if (dora_gate) magnitude_gradient(s, layer, Projection::gate, s.dora.gate, kNoBias, k.gate);
  if (dora_up) magnitude_gradient(s, layer, Projection::up, s.dora.up, kNoBias, k.up);
  backward_group(s, layer, 2, k.n_ffn, k.u[2],
                 {{{Projection::gate, k.gate}, {Projection::up, k.up}}},
                 wants_attention ? sc.dn : nullptr);
  if (!wants_attention) return;
  rms_norm_backward(*s.pool, k.x_ffn, d, k.rms_ffn, sc.dn, d, t, d, w.ffn_norm.data(), sc.dx, d,
                    s.gradient_of(w.ffn_norm));

  // Attention.
  const Rows d_o = output_gradient(s, w.attn_post_norm, k.attn_sub, k.rms_attn_post,
                                   s.is_dora(layer, Projection::o));
  bias_gradient(s, w.attn_out_bias, d_o);
  magnitude_gradient(s, layer, Projection::o, k.attn_sub, w.attn_out_bias, d_o);
  backward_group(s, layer, 1, k.mixed, k.u[1], {{{Projection::o, d_o}}},
                 wants_mixed ? sc.d_mixed : nullptr);
  if (!wants_mixed) return;
  finish_qkv(s, layer, k);
  load(*s.pool, k.mixed, t, qw, sc.mixed);
  const Qkv<float> x = split_qkv(s, sc.qkv), dx = split_qkv(s, sc.d_qkv);
  attend_packed_backward(*s.pool, s.attention(layer), s.documents, x.q, qw, x.k, x.v, kvw, sc.mixed,
                         sc.d_mixed, qw, k.lse, dx.q, dx.k, dx.v);
  unfinish_qkv(s, layer, k);
  const Qkv<Rows> d_proj = split_qkv(s, sc.d_proj);
  bias_gradient(s, w.q_bias, d_proj.q);
  bias_gradient(s, w.k_bias, d_proj.k);
  bias_gradient(s, w.v_bias, d_proj.v);
  const Qkv<Rows> proj = split_qkv(s, k.qkv);
  magnitude_gradient(s, layer, Projection::q, proj.q, w.q_bias, d_proj.q);
  magnitude_gradient(s, layer, Projection::k, proj.k, w.k_bias, d_proj.k);
  magnitude_gradient(s, layer, Projection::v, proj.v, w.v_bias, d_proj.v);
  backward_group(
      s, layer, 0, k.n_attn, k.u[0],
      {{{Projection::q, d_proj.q}, {Projection::k, d_proj.k}, {Projection::v, d_proj.v}}},
      passes ? sc.dn : nullptr);
  if (!passes) return;
  rms_norm_backward(*s.pool, k.x_attn, d, k.rms_attn, sc.dn, d, t, d, w.attn_norm.data(), sc.dx, d,
                    s.gradient_of(w.attn_norm));
}

}  // namespace moru
