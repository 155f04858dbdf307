#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "engine/training_block.h"

namespace moru {
namespace {

// u = s · x · [A…]ᵀ for the adapted projections of one input. The scale s stands here because a
// product that both scales and adds falls to a slow path of oneDNN's.
void shrink(LoraTraining::State& s, size_t layer, size_t group, const Rows& x, const Rows& u) {
  const InputGroup members = kInputGroups[group];
  const LoraLayer& pairs = s.lora->layers[layer];
  size_t column = 0;
  for (size_t p = members.first; p < members.last;) {
    // One product for neighbours of one scale: nearly always all of them.
    size_t end = p, rank = 0;
    const float scale = pairs[p].scale;
    for (; end < members.last && (pairs[end].rank == 0 || pairs[end].scale == scale); ++end)
      rank += pairs[end].rank;
    if (rank != 0) {
      const DenseView a{s.type, s.values.at(pairs[p].a), rank, pairs[p].in, pairs[p].in};
      matmul_nt(*s.pool, x.view(s.tokens, pairs[p].in), a, u.target(column, scale));
    }
    column += rank;
    p = std::max(end, p + 1);
  }
}

// y (+)= x · Wᵀ + u · Bᵀ. u begins with the projection's own columns.
void project(LoraTraining::State& s, size_t layer, Projection projection, const Rows& x,
             const Rows& u, size_t u_column, const DenseTarget& y) {
  const LoraPair& pair = s.lora->layers[layer][static_cast<size_t>(projection)];
  const Matrix& w = matrix_of(s.model->layers[layer], projection);
  const DenseTerm terms[] = {{x.view(s.tokens, pair.in), s.dense(w)},
                             {u.view(s.tokens, pair.rank, u_column), s.b(pair)}};
  matmul_nt(*s.pool, std::span(terms, pair.rank == 0 ? 1 : 2), y);
}
// Into `to`, by way of f32 in `wide` where a bias or DoRA's factors follow.
void project_rows(LoraTraining::State& s, size_t layer, Projection projection, const Rows& x,
                  const Rows& u, size_t u_column, const Vector& bias, float* wide, const Rows& to) {
  if (bias.empty() && !s.is_dora(layer, projection))
    return project(s, layer, projection, x, u, u_column, to.target());
  const size_t out = s.pair(layer, projection).out;
  project(s, layer, projection, x, u, u_column, {DType::f32, wide, out, false, 1});
  scale_output(s, layer, projection, wide, out);
  if (!bias.empty()) add_bias_rows(*s.pool, wide, out, s.tokens, out, bias.data());
  store(*s.pool, wide, s.tokens, out, to);
}

// x_next = x + residual_scale · (sub, or norm(sub) in a sandwich), sub = input · Wᵀ (+ bias).
struct SubLayer {
  Projection projection;
  const Vector& bias;
  const Vector& post_norm;
  Rows u, sub;
  float* rms_post;
};
void add_sub_layer(LoraTraining::State& s, size_t layer, const SubLayer& part, const Rows& input,
                   const float* x, float* x_next) {
  const Config& c = s.config();
  const size_t t = s.tokens, d = c.width;
  const bool dora = s.is_dora(layer, part.projection);
  if (!part.post_norm.empty()) {
    // The norm reads what the backward pass will read, rounded in bf16.
    project_rows(s, layer, part.projection, input, part.u, 0, part.bias, s.scratch.sub, part.sub);
    const auto add = [&](const auto* sub) {
      add_normed_rows(*s.pool, sub, part.sub.ld, t, d, part.post_norm.data(), c.norm_eps,
                      c.residual_scale, x, x_next, part.rms_post);
    };
    return s.type == DType::bf16 ? add(part.sub.bf16()) : add(part.sub.f32());
  }
  if (part.bias.empty() && c.residual_scale == 1 && !dora) {
    project(s, layer, part.projection, input, part.u, 0, {DType::f32, x_next, d, true, 1, x});
    return;
  }
  if (x_next != x) copy_floats(*s.pool, x, t * d, x_next);
  float* sub = s.scratch.sub;
  project(s, layer, part.projection, input, part.u, 0, {DType::f32, sub, d, false, 1});
  scale_output(s, layer, part.projection, sub, d);
  if (!part.bias.empty()) add_bias_rows(*s.pool, sub, d, t, d, part.bias.data());
  if (dora) store(*s.pool, sub, t, d, part.sub);
  add_rows(*s.pool, sub, d, t, d, c.residual_scale, x_next, d);
}

}  // namespace

void finish_qkv(LoraTraining::State& s, size_t layer, const Kept& kept) {
  const Config& c = s.config();
  const Layer& w = s.model->layers[layer];
  const size_t t = s.tokens, h = c.head_dim;
  load(*s.pool, kept.qkv, t, s.qkv_width(), s.scratch.qkv);
  const Qkv<float> x = split_qkv(s, s.scratch.qkv);
  if (c.qk_norm == QkNorm::rms_before_rope) {
    rms_norm_rows(*s.pool, x.q, h, t * c.heads, h, w.q_norm.data(), c.norm_eps, x.q, h,
                  s.scratch.rms_q);
    rms_norm_rows(*s.pool, x.k, h, t * c.kv_heads, h, w.k_norm.data(), c.norm_eps, x.k, h,
                  s.scratch.rms_k);
  }
  if (!c.rotates(layer)) return;
  const RopeTable rope = s.model->rope_of(layer).view();
  rope_rows(*s.pool, rope, s.positions, x.q, c.q_width(), c.heads, h);
  rope_rows(*s.pool, rope, s.positions, x.k, c.kv_width(), c.kv_heads, h);
}

void make_hidden(LoraTraining::State& s, const Kept& k) {
  const size_t n = s.config().ffn_width;
  if (s.type == DType::bf16)
    gate_rows_bf16(*s.pool, s.config().activation, k.gate.bf16(), k.up.bf16(), k.gate.ld, s.tokens,
                   n, k.hidden.bf16());
  else
    gate_rows(*s.pool, s.config().activation, k.gate.f32(), n, k.up.f32(), n, s.tokens, n,
              k.hidden.f32(), n);
}

void forward_layer(LoraTraining::State& s, size_t layer, const Kept& k, float* x_next) {
  const Config& c = s.config();
  const Layer& w = s.model->layers[layer];
  const LoraLayer& lora = s.lora->layers[layer];
  const size_t t = s.tokens, d = c.width, qw = c.q_width(), kvw = c.kv_width();
  float* wide = s.scratch.wide;

  // Attention.
  norm_rows(*s.pool, k.x_attn, t, d, w.attn_norm, c.norm_eps, k.n_attn, k.rms_attn);
  shrink(s, layer, 0, k.n_attn, k.u[0]);
  const size_t u_k = lora[0].rank, u_v = u_k + lora[1].rank;
  const Qkv<Rows> qkv = split_qkv(s, k.qkv);
  project_rows(s, layer, Projection::q, k.n_attn, k.u[0], 0, w.q_bias, wide, qkv.q);
  project_rows(s, layer, Projection::k, k.n_attn, k.u[0], u_k, w.k_bias, wide, qkv.k);
  project_rows(s, layer, Projection::v, k.n_attn, k.u[0], u_v, w.v_bias, wide, qkv.v);
  finish_qkv(s, layer, k);
  const Qkv<float> x = split_qkv(s, s.scratch.qkv);
  attend_packed(*s.pool, s.attention(layer), s.documents, x.q, qw, x.k, x.v, kvw, s.scratch.mixed,
                qw, k.lse);
  store(*s.pool, s.scratch.mixed, t, qw, k.mixed);
  shrink(s, layer, 1, k.mixed, k.u[1]);
  add_sub_layer(
      s, layer,
      {Projection::o, w.attn_out_bias, w.attn_post_norm, k.u[1], k.attn_sub, k.rms_attn_post},
      k.mixed, k.x_attn, k.x_ffn);

  // Feed-forward.
  norm_rows(*s.pool, k.x_ffn, t, d, w.ffn_norm, c.norm_eps, k.n_ffn, k.rms_ffn);
  shrink(s, layer, 2, k.n_ffn, k.u[2]);
  static const Vector kNoBias;
  project_rows(s, layer, Projection::gate, k.n_ffn, k.u[2], 0, kNoBias, wide, k.gate);
  project_rows(s, layer, Projection::up, k.n_ffn, k.u[2], lora[4].rank, kNoBias, wide, k.up);
  make_hidden(s, k);
  shrink(s, layer, 3, k.hidden, k.u[3]);
  if (x_next == nullptr && w.ffn_post_norm.empty() && !s.is_dora(layer, Projection::down)) return;
  add_sub_layer(s, layer,
                {Projection::down, kNoBias, w.ffn_post_norm, k.u[3], k.ffn_sub, k.rms_ffn_post},
                k.hidden, k.x_ffn, x_next == nullptr ? s.scratch.dn : x_next);
}

}  // namespace moru
