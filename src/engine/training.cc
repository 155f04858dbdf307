#include "engine/training.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "base/half.h"
#include "engine/training_block.h"

namespace moru {
namespace {

// Tokens are padded to whole tiles by a document that nothing looks at: products come in few
// shapes, for each of which a kernel is generated once.
constexpr size_t kTokenTile = 64;
size_t padded(size_t tokens) { return (tokens + kTokenTile - 1) / kTokenTile * kTokenTile; }

// Elements that one thread takes at a time in copies.
constexpr size_t kCopyTile = 1 << 16;

// Rows of the head at a time: enough to amortise reading its weights, little enough that logits
// stay small beside the model (SmolLM2: 256 rows, 50 MB).
size_t head_rows_for(size_t vocab) {
  constexpr size_t kLogitsBytes = 64 << 20;
  return std::clamp(kLogitsBytes / (4 * vocab) / kTokenTile * kTokenTile, size_t{64}, size_t{256});
}

size_t largest_group_rank(const Lora& lora) {
  size_t largest = 0;
  for (const LoraLayer& layer : lora.layers)
    for (const InputGroup& group : kInputGroups)
      largest = std::max(largest, group_rank(layer, group));
  return largest;
}

DType dense_type(const Model& model) {
  const DenseMatrix* output = model.output().dense();
  if (output == nullptr)
    throw Error(ErrorKind::unsupported, {.where = "training",
                                         .what = "the model's matrices are not dense",
                                         .cure = "load it with the profile bf16 or f32"});
  return output->type;
}

}  // namespace

size_t TrainingBatch::trained() const {
  return static_cast<size_t>(
      std::count_if(targets.begin(), targets.end(), [](int32_t t) { return t != kNoTarget; }));
}

void TrainingBatch::append(std::span<const int32_t> document, std::span<const uint8_t> is_trained) {
  MORU_CHECK(document.size() == is_trained.size() && !document.empty());
  ids.insert(ids.end(), document.begin(), document.end());
  for (size_t i = 1; i < document.size(); ++i)
    targets.push_back(is_trained[i] != 0 ? document[i] : kNoTarget);
  targets.push_back(kNoTarget);
  starts.push_back(ids.size());
}

// ---- rows -------------------------------------------------------------------------------------

DenseView view_of(const Matrix& matrix) {
  const DenseMatrix& m = *matrix.dense();
  return {m.type, m.data.data(), m.rows, m.cols, m.cols};
}

void copy_floats(Pool& pool, const float* x, size_t count, float* y) {
  pool.each((count + kCopyTile - 1) / kCopyTile, [&](size_t tile) {
    const size_t first = tile * kCopyTile, n = std::min(kCopyTile, count - first);
    std::memcpy(y + first, x + first, n * sizeof(float));
  });
}

void zero_floats(Pool& pool, float* x, size_t count) {
  pool.each((count + kCopyTile - 1) / kCopyTile, [&](size_t tile) {
    const size_t first = tile * kCopyTile, n = std::min(kCopyTile, count - first);
    std::memset(x + first, 0, n * sizeof(float));
  });
}

void store(Pool& pool, const float* x, size_t count, const Rows& y) {
  if (y.type == DType::bf16)
    round_to_bf16(pool, x, count, y.bf16());
  else
    copy_floats(pool, x, count, y.f32());
}

void load(Pool& pool, const Rows& x, size_t count, float* y) {
  if (x.type == DType::bf16)
    widen_bf16(pool, x.bf16(), count, y);
  else
    copy_floats(pool, x.f32(), count, y);
}

void norm_rows(Pool& pool, const float* x, size_t m, size_t n, const Vector& gain, float eps,
               const Rows& y, float* inverse_rms) {
  if (y.type == DType::bf16)
    rms_norm_rows_bf16(pool, x, n, m, n, gain.data(), eps, y.bf16(), n, inverse_rms);
  else
    rms_norm_rows(pool, x, n, m, n, gain.data(), eps, y.f32(), n, inverse_rms);
}

Qkv<float> split_qkv(const LoraTraining::State& s, float* buffer) {
  const size_t q = s.tokens * s.config().q_width(), k = s.tokens * s.config().kv_width();
  return {buffer, buffer + q, buffer + q + k};
}

Qkv<Rows> split_qkv(const LoraTraining::State& s, const Rows& buffer) {
  const size_t qw = s.config().q_width(), kvw = s.config().kv_width();
  const size_t q = s.tokens * qw, k = s.tokens * kvw;
  return {{buffer.type, buffer.at(0), qw},
          {buffer.type, buffer.at(q), kvw},
          {buffer.type, buffer.at(q + k), kvw}};
}

// ---- memory -----------------------------------------------------------------------------------

AttentionShape LoraTraining::State::attention(size_t layer) const {
  const Config& c = config();
  return {.heads = c.heads,
          .kv_heads = c.kv_heads,
          .head_dim = c.head_dim,
          .scale = c.attn_scale,
          .softcap = c.attn_softcap,
          .window = c.is_windowed(layer) ? c.window : 0};
}

DenseView LoraTraining::State::stacked_a(size_t layer, InputGroup group) const {
  const LoraLayer& pairs = lora->layers[layer];
  const LoraPair& first = pairs[group.first];
  return {type, values.at(first.a), group_rank(pairs, group), first.in, first.in};
}

DenseView LoraTraining::State::b(const LoraPair& pair) const {
  return {type, values.at(pair.b), pair.out, pair.rank, pair.rank};
}

bool LoraTraining::State::adapts(size_t layer, InputGroup group) const {
  return group_rank(lora->layers[layer], group) != 0;
}

// The whole memory plan: called once to count, once to hand out.
void LoraTraining::State::lay_out(Arena& arena) {
  const Config& c = config();
  const size_t t = padded(options.tokens), d = c.width, f = c.ffn_width;
  const bool sandwich = c.norm_layout == NormLayout::sandwich;
  const bool keep_light = options.recompute == Recompute::none;

  const auto take_remade = [&](Kept& k) {  // what Recompute::light makes anew
    k.n_attn = arena.take_rows(type, t, d);
    k.n_ffn = arena.take_rows(type, t, d);
    k.hidden = arena.take_rows(type, t, f);
  };
  const auto take_rest = [&](Kept& k, const LoraLayer& pairs) {
    k.rms_attn = arena.take<float>(t);
    k.qkv = arena.take_rows(type, t, qkv_width());
    k.lse = arena.take<float>(t * c.heads);
    k.mixed = arena.take_rows(type, t, c.q_width());
    k.x_ffn = arena.take<float>(t * d);
    k.rms_ffn = arena.take<float>(t);
    k.gate = arena.take_rows(type, t, f);
    k.up = arena.take_rows(type, t, f);
    if (sandwich) {
      k.attn_sub = arena.take_rows(type, t, d);
      k.rms_attn_post = arena.take<float>(t);
      k.ffn_sub = arena.take_rows(type, t, d);
      k.rms_ffn_post = arena.take<float>(t);
    }
    for (size_t g = 0; g < kInputGroups.size(); ++g)
      k.u[g] = arena.take_rows(type, t, group_rank(pairs, kInputGroups[g]));
  };

  // One set for blocks that keep nothing: below the lowest adapted one, in evaluation, and all of
  // them with Recompute::block. Its u is wide enough for any layer.
  passing = {};
  passing.x_attn = arena.take<float>(t * d);
  take_remade(passing);
  LoraLayer widest{};
  for (const LoraLayer& layer : lora->layers)
    for (size_t p = 0; p < kProjections; ++p)
      widest[p].rank = std::max(widest[p].rank, layer[p].rank);
  take_rest(passing, widest);

  kept.assign(c.layers, passing);
  for (size_t l = lowest; l < c.layers; ++l) {
    kept[l].x_attn = arena.take<float>(t * d);
    if (options.recompute == Recompute::block) continue;
    take_rest(kept[l], lora->layers[l]);
    if (keep_light) take_remade(kept[l]);
  }
  // A layer's own u has no gaps between rows, whichever buffer it stands in.
  for (size_t l = 0; l < c.layers; ++l)
    for (size_t g = 0; g < kInputGroups.size(); ++g)
      kept[l].u[g].ld = group_rank(lora->layers[l], kInputGroups[g]);

  x_out = arena.take<float>(t * d);
  Scratch& s = scratch;
  s.qkv = arena.take<float>(t * qkv_width());
  s.rms_q = arena.take<float>(t * c.heads);
  s.rms_k = arena.take<float>(t * c.kv_heads);
  s.wide = arena.take<float>(t * std::max(f, qkv_width()));
  s.mixed = arena.take<float>(t * c.q_width());
  s.sub = arena.take<float>(t * d);
  s.dx = arena.take<float>(t * d);
  s.dn = arena.take<float>(t * d);
  s.d_mixed = arena.take<float>(t * c.q_width());
  s.d_qkv = arena.take<float>(t * qkv_width());
  if (c.qk_norm != QkNorm::none) s.d_raw = arena.take<float>(t * qkv_width());
  s.d_out = arena.take_rows(type, t, d);
  s.d_proj = arena.take_rows(type, t, qkv_width());
  s.du = arena.take_rows(type, t, std::max(largest_group_rank(*lora), size_t{1}));

  const size_t h = head_rows;
  s.head_x = arena.take<float>(h * d);
  s.head_rms = arena.take<float>(h);
  s.head_n = arena.take_rows(type, h, d);
  s.logits = arena.take<float>(h * c.vocab);
  if (c.final_softcap != 0) s.capped = arena.take<float>(h * c.vocab);
  s.d_logits =
      type == DType::bf16 ? arena.take_rows(type, h, c.vocab) : Rows{DType::f32, s.logits, c.vocab};
  s.head_dn = arena.take<float>(h * d);

  values = arena.take_rows(type, 1, lora->values.size());
  gradients = arena.take<float>(lora->values.size());
}

namespace {

void prepare(LoraTraining::State& s, const Model& model, const Lora& lora,
             const TrainingOptions& options) {
  s.model = &model;
  s.lora = &lora;
  s.options = options;
  s.type = dense_type(model);
  s.head_rows = head_rows_for(model.config.vocab);
  s.lowest = 0;
  const auto adapted = [](const LoraLayer& layer) {
    return std::any_of(layer.begin(), layer.end(), [](const LoraPair& p) { return p.rank != 0; });
  };
  while (s.lowest < lora.layers.size() && !adapted(lora.layers[s.lowest])) ++s.lowest;
}

}  // namespace

size_t LoraTraining::plan_bytes(const Model& model, const Lora& lora,
                                const TrainingOptions& options) {
  State state;
  prepare(state, model, lora, options);
  Arena count;
  state.lay_out(count);
  return count.used();
}

LoraTraining::LoraTraining(Pool& pool, const Model& model, const Lora& lora,
                           const TrainingOptions& options)
    : state_(std::make_unique<State>()) {
  State& s = *state_;
  prepare(s, model, lora, options);
  s.pool = &pool;
  Arena count;
  s.lay_out(count);
  s.memory = PageBuffer(count.used());
  Arena arena(static_cast<std::byte*>(s.memory.data()));
  s.lay_out(arena);
}

LoraTraining::~LoraTraining() = default;

std::span<float> LoraTraining::gradients() {
  return {state_->gradients, state_->lora->values.size()};
}

void LoraTraining::clear_gradients() {
  zero_floats(*state_->pool, state_->gradients, state_->lora->values.size());
}

// ---- a batch ----------------------------------------------------------------------------------

namespace {

// Takes up the batch: positions, documents and the embedded tokens, all padded to whole tiles.
struct Padded {
  std::vector<size_t> starts;
};
Padded embed(LoraTraining::State& s, const TrainingBatch& batch, float* x) {
  const Config& c = s.config();
  MORU_CHECK(batch.targets.size() == batch.tokens() && batch.starts.back() == batch.tokens());
  MORU_CHECK(padded(batch.tokens()) <= padded(s.options.tokens));
  s.tokens = padded(batch.tokens());
  Padded out{batch.starts};
  if (s.tokens != batch.tokens()) out.starts.push_back(s.tokens);
  s.positions.assign(s.tokens, 0);
  for (size_t doc = 0; doc < batch.documents(); ++doc)
    for (size_t i = batch.starts[doc]; i < batch.starts[doc + 1]; ++i)
      s.positions[i] = static_cast<int32_t>(i - batch.starts[doc]);
  s.pool->each(s.tokens, [&](size_t i) {
    const int32_t id = i < batch.tokens() ? batch.ids[i] : 0;
    MORU_CHECK(id >= 0 && static_cast<size_t>(id) < c.vocab);
    float* row = x + i * c.width;
    s.model->embedding.read_rows(static_cast<size_t>(id), 1, row);
    if (c.embedding_scale != 1)
      for (size_t j = 0; j < c.width; ++j) row[j] *= c.embedding_scale;
  });
  return out;
}

// d/dz of cap · tanh(z / cap) is 1 − (capped / cap)².
void softcap_backward(Pool& pool, const float* capped, size_t count, float cap, float* d) {
  pool.each((count + kCopyTile - 1) / kCopyTile, [&](size_t tile) {
    const size_t first = tile * kCopyTile, last = std::min(first + kCopyTile, count);
    for (size_t i = first; i < last; ++i) {
      const float ratio = capped[i] / cap;
      d[i] *= 1 - ratio * ratio;
    }
  });
}

// Loss of the trained rows of s.x_out, a few at a time, so that logits are never whole; where
// scale ≠ 0 also scratch.dx, its gradient by x_out (0 in rows that are not trained).
double head(LoraTraining::State& s, const TrainingBatch& batch, float scale, std::span<float> nll) {
  const Config& c = s.config();
  const size_t d = c.width, v = c.vocab;
  Scratch& sc = s.scratch;
  Pool& pool = *s.pool;
  std::vector<size_t> rows;
  for (size_t i = 0; i < batch.tokens(); ++i)
    if (batch.targets[i] != TrainingBatch::kNoTarget) rows.push_back(i);
  if (scale != 0) zero_floats(pool, sc.dx, s.tokens * d);
  std::fill(nll.begin(), nll.end(), 0.0f);

  double sum = 0;
  std::vector<int32_t> targets;
  std::vector<float> losses;
  for (size_t first = 0; first < rows.size(); first += s.head_rows) {
    const std::span<const size_t> chunk =
        std::span(rows).subspan(first, std::min(s.head_rows, rows.size() - first));
    const size_t m = padded(chunk.size());  // the rest is zeros
    targets.assign(m, 0);
    losses.assign(m, 0);
    for (size_t i = 0; i < m; ++i) {
      if (i >= chunk.size()) {
        std::memset(sc.head_x + i * d, 0, d * sizeof(float));
        continue;
      }
      std::memcpy(sc.head_x + i * d, s.x_out + chunk[i] * d, d * sizeof(float));
      targets[i] = batch.targets[chunk[i]];
    }
    norm_rows(pool, sc.head_x, m, d, s.model->final_norm, c.norm_eps, sc.head_n, sc.head_rms);
    matmul_nt(pool, sc.head_n.view(m, d), view_of(s.model->output()),
              {DType::f32, sc.logits, v, false, c.logit_scale});
    if (c.final_softcap != 0) {
      softcap_rows(pool, sc.logits, chunk.size() * v, c.final_softcap);
      if (scale != 0) copy_floats(pool, sc.logits, chunk.size() * v, sc.capped);
    }
    cross_entropy_rows(pool, sc.logits, v, chunk.size(), v, targets.data(), losses.data(), scale);
    for (size_t i = 0; i < chunk.size(); ++i) {
      sum += double{losses[i]};
      if (!nll.empty()) nll[chunk[i]] = losses[i];
    }
    if (scale == 0) continue;

    if (c.final_softcap != 0)
      softcap_backward(pool, sc.capped, chunk.size() * v, c.final_softcap, sc.logits);
    zero_floats(pool, sc.logits + chunk.size() * v, (m - chunk.size()) * v);
    if (s.type == DType::bf16) round_to_bf16(pool, sc.logits, m * v, sc.d_logits.bf16());
    matmul_nn(pool, sc.d_logits.view(m, v), view_of(s.model->output()),
              {DType::f32, sc.head_dn, d, false, c.logit_scale});
    // The gradient by the rows of x_out stands in dn until it is scattered.
    zero_floats(pool, sc.dn, m * d);
    rms_norm_backward(pool, sc.head_x, d, sc.head_rms, sc.head_dn, d, m, d,
                      s.model->final_norm.data(), sc.dn, d);
    for (size_t i = 0; i < chunk.size(); ++i)
      std::memcpy(sc.dx + chunk[i] * d, sc.dn + i * d, d * sizeof(float));
  }
  return sum;
}

double run(LoraTraining::State& s, const TrainingBatch& batch, float scale, std::span<float> nll) {
  MORU_CHECK(nll.empty() || nll.size() == batch.tokens());
  if (batch.tokens() == 0) return 0;
  const bool learns = scale != 0;
  const size_t layers = s.config().layers;
  store(*s.pool, s.lora->values.data(), s.lora->values.size(), s.values);
  const auto kept = [&](size_t l) -> const Kept& {
    return learns && l >= s.lowest ? s.kept[l] : s.passing;
  };
  const Padded documents = embed(s, batch, layers == 0 ? s.x_out : kept(0).x_attn);
  s.starts = documents.starts;
  for (size_t l = 0; l < layers; ++l) {
    Kept k = kept(l);
    for (size_t g = 0; g < kInputGroups.size(); ++g) k.u[g].ld = s.kept[l].u[g].ld;
    forward_layer(s, l, k, l + 1 < layers ? kept(l + 1).x_attn : s.x_out);
  }
  const double sum = head(s, batch, scale, nll);
  if (!learns) return sum;
  for (size_t l = layers; l > s.lowest; --l) backward_layer(s, l - 1, s.kept[l - 1]);
  return sum;
}

}  // namespace

double LoraTraining::accumulate(const TrainingBatch& batch, float scale, std::span<float> nll) {
  MORU_CHECK(scale != 0);
  return run(*state_, batch, scale, nll);
}

double LoraTraining::evaluate(const TrainingBatch& batch, std::span<float> nll) {
  return run(*state_, batch, 0, nll);
}

double training_flops(const Model& model, const Lora& lora, const TrainingBatch& batch) {
  const Config& c = model.config;
  const double t = static_cast<double>(batch.tokens());
  double flops = 4.0 * static_cast<double>(batch.trained() * c.vocab * c.width);
  for (size_t l = 0; l < c.layers; ++l) {
    for (size_t p = 0; p < kProjections; ++p) {
      const LoraPair& pair = lora.layers[l][p];
      // The lowest layer's q, k and v need no gradient by their input; counted all the same, it is
      // one layer's.
      flops += 4 * t * static_cast<double>(pair.in * pair.out);
      flops += 6 * t * static_cast<double>(pair.rank * (pair.in + pair.out));
    }
    // Scores and mixture: 2 products forward, 5 backward, over the keys that a query sees.
    double pairs = 0;
    for (size_t doc = 0; doc < batch.documents(); ++doc) {
      const double n = static_cast<double>(batch.starts[doc + 1] - batch.starts[doc]);
      const double window = c.is_windowed(l) ? std::min(n, static_cast<double>(c.window)) : n;
      pairs += window * (window + 1) / 2 + (n - window) * window;
    }
    flops += 7 * 2 * pairs * static_cast<double>(c.q_width());
  }
  return flops;
}

}  // namespace moru
