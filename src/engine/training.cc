#include "engine/training.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/cpu.h"
#include "base/error.h"
#include "base/half.h"
#include "base/random.h"
#include "engine/filtered_product.h"
#include "engine/float_kernels.h"
#include "engine/training_block.h"
#include "engine/weights.h"

namespace moru {
namespace {

// Tokens are padded to whole tiles by a document that nothing looks at: products come in few
// shapes, for each of which a kernel is generated once.
constexpr size_t kTokenTile = 64;
size_t padded(size_t tokens) { return (tokens + kTokenTile - 1) / kTokenTile * kTokenTile; }

// Elements that one thread takes at a time in copies.
constexpr size_t kCopyTile = 1 << 16;

// Rows of the head at a time: enough to amortise reading and packing its weights, little enough
// that logits stay small beside activations (SmolLM2: 100 MB, Gemma 3: 540 MB).
size_t head_rows_for(size_t vocab) {
  constexpr size_t kLogitsBytes = 512 << 20;
  return std::clamp(kLogitsBytes / (4 * vocab) / kTokenTile * kTokenTile, size_t{64}, size_t{512});
}

size_t largest_group_rank(const Lora& lora) {
  size_t largest = 0;
  for (const LoraLayer& layer : lora.layers)
    for (const InputGroup& group : kInputGroups)
      largest = std::max(largest, group_rank(layer, group));
  return largest;
}

// What the backward pass does not have, by the flag's name.
void refuse_untrainable(const Config& c) {
  const std::pair<bool, std::string_view> flags[] = {
      {c.experts.count != 0, "experts"},
      {c.attn_sinks, "attention sinks"},
      {c.norm == NormKind::layer, "LayerNorm"},
      {c.norm_layout == NormLayout::parallel, "parallel blocks"},
      {c.norm_layout == NormLayout::post, "norms after the sub-layers alone"},
      {c.qk_norm == QkNorm::rms_after_rope, "norms of queries and keys after rotation"},
      {c.qk_norm == QkNorm::rms_whole_before_rope, "norms over all heads"},
  };
  for (const auto& [present, name] : flags)
    if (present)
      throw Error(ErrorKind::unsupported,
                  {.where = "training",
                   .what = fmt::format("{} has {}, which cannot be trained yet", c.family, name),
                   .cure = "tune a model of llama, mistral, qwen2, qwen3, gemma, phi3, granite or "
                           "hyperclovax"});
}

// Weights unpacked at a time where they are not stored in the core's precision: the head is taken
// in stripes of so many, everything else whole.
constexpr size_t kUnpackedMin = size_t{8} << 20;
// Rows that one thread unpacks at a time.
constexpr size_t kUnpackTile = 32;

DType type_of(const Model& model, const TrainingOptions& options) {
  const DenseMatrix* q = model.layers.empty() ? model.output().dense() : model.layers[0].q.dense();
  return q != nullptr && model.profile != Profile::exact ? q->type : options.quantized_type;
}

}  // namespace

size_t TrainingBatch::trained() const {
  return static_cast<size_t>(
      std::count_if(targets.begin(), targets.end(), [](int32_t t) { return t != kNoTarget; }));
}

void TrainingBatch::append(std::span<const int32_t> document, std::span<const uint8_t> is_trained,
                           uint64_t key) {
  MORU_CHECK(document.size() == is_trained.size() && !document.empty());
  ids.insert(ids.end(), document.begin(), document.end());
  for (size_t i = 1; i < document.size(); ++i)
    targets.push_back(is_trained[i] != 0 ? document[i] : kNoTarget);
  targets.push_back(kNoTarget);
  documents.push_back({.first = ids.size() - document.size(), .end = ids.size()});
  keys.push_back(key);
}

void TrainingBatch::append_after(size_t of, size_t prefix, std::span<const int32_t> document,
                                 std::span<const uint8_t> is_trained, uint64_t key) {
  MORU_CHECK(of < documents.size() && documents[of].prefix == 0 && prefix <= documents[of].rows());
  append(document, is_trained, key);
  if (prefix == 0) return;
  documents.back().prefix_first = documents[of].first;
  documents.back().prefix = prefix;
}

void add_noise(const EmbeddingNoise& noise, uint64_t key, size_t position, size_t length,
               std::span<float> x) {
  // Steps are seeds of their own, far from the seeds that adapters and orders are made with.
  Random random(noise.seed + (noise.step + 1) * 0x9e3779b97f4a7c15u, key, position * x.size());
  const float bound = noise.alpha / std::sqrt(static_cast<float>(length * x.size()));
  for (float& value : x) value += (2 * random.uniform() - 1) * bound;
}

// ---- rows -------------------------------------------------------------------------------------

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

void store(Pool& pool, const float* x, size_t rows, size_t cols, const Rows& y) {
  if (y.type == DType::bf16)
    round_rows_to_bf16(pool, x, rows, cols, y.bf16(), y.ld);
  else
    copy_floats(pool, x, rows * cols, y.f32());
}

void load(Pool& pool, const Rows& x, size_t rows, size_t cols, float* y) {
  if (x.type == DType::bf16)
    widen_rows_bf16(pool, x.bf16(), x.ld, rows, cols, y);
  else
    copy_floats(pool, x.f32(), rows * cols, y);
}

void norm_rows(Pool& pool, const float* x, size_t m, size_t n, const Vector& gain, float eps,
               const Rows& y, float* inverse_rms) {
  if (y.type == DType::bf16)
    rms_norm_rows_bf16(pool, x, n, m, n, gain.data(), eps, y.bf16(), y.ld, inverse_rms);
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
          .window = c.is_windowed(layer) ? c.window : 0,
          .sinks = nullptr,
          .bf16 = type == DType::bf16};
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

DenseView LoraTraining::State::dense(const Matrix& matrix, size_t first, size_t rows) {
  const size_t cols = matrix.cols(), size = type == DType::bf16 ? 2 : 4;
  if (!unpacks(matrix))
    return {type, static_cast<const std::byte*>(matrix.dense()->data.data()) + first * cols * size,
            rows, cols, cols};
  pool->each((rows + kUnpackTile - 1) / kUnpackTile, [&](size_t tile) {
    static thread_local std::vector<float> floats;
    const size_t at = tile * kUnpackTile, count = std::min(kUnpackTile, rows - at);
    if (type == DType::f32) return matrix.read_rows(first + at, count, unpacked.f32() + at * cols);
    floats.resize(kUnpackTile * cols);
    matrix.read_rows(first + at, count, floats.data());
    float_kernels().round_to_bf16(floats.data(), count * cols, unpacked.bf16() + at * cols);
  });
  return {type, unpacked.data, rows, cols, cols};
}

bool LoraTraining::State::filters() const {
  return type == DType::bf16 && options.filters && isa() == Isa::avx512;
}

// The whole memory plan: called once to count, once to hand out.
void LoraTraining::State::lay_out(Arena& arena) {
  const Config& c = config();
  const size_t t = padded(options.tokens), d = c.width, f = c.ffn_width;
  const bool sandwich = c.norm_layout == NormLayout::sandwich;
  const bool keep_light = options.recompute == Recompute::none;

  const auto take_remade = [&](Kept& k) {  // what Recompute::light makes anew
    k.n_attn = arena.take_operand(type, t, d);
    k.n_ffn = arena.take_operand(type, t, d);
    k.hidden = arena.take_operand(type, t, f);
  };
  const auto take_rest = [&](Kept& k, const LoraLayer& pairs) {
    k.rms_attn = arena.take<float>(t);
    k.qkv = arena.take_rows(type, t, qkv_width());
    k.lse = arena.take<float>(t * c.heads);
    k.mixed = arena.take_operand(type, t, c.q_width());
    k.x_ffn = arena.take<float>(t * d);
    k.rms_ffn = arena.take<float>(t);
    k.gate = arena.take_operand(type, t, f);
    k.up = arena.take_operand(type, t, f);
    if (sandwich || lora->dora) {
      k.attn_sub = arena.take_operand(type, t, d);
      k.rms_attn_post = arena.take<float>(t);
      k.ffn_sub = arena.take_operand(type, t, d);
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
  s.d_out = arena.take_operand(type, t, d);
  s.d_proj = arena.take_rows(type, t, qkv_width());
  s.du = arena.take_rows(type, t, std::max(largest_group_rank(*lora), size_t{1}));

  const size_t h = head_rows;
  s.head_x = arena.take<float>(h * d);
  s.head_rms = arena.take<float>(h);
  s.head_n = arena.take_operand(type, h, d);
  s.logits = arena.take<float>(h * c.vocab);
  if (c.final_softcap != 0) s.capped = arena.take<float>(h * c.vocab);
  // Rounded where they stand: a row of bf16 begins where its row of f32 did.
  s.d_logits = {type, s.logits, type == DType::bf16 ? 2 * c.vocab : c.vocab};
  s.head_dn = arena.take<float>(h * d);
  if (filters()) s.starts = arena.take<uint32_t>(h * (filter_stripes(c.vocab) + 1));

  values = arena.take_rows(type, 1, pair_values);
  if (lora->dora) {
    size_t magnitudes = 0, low = 0;
    for (const LoraLayer& layer : lora->layers)
      for (const LoraPair& pair : layer) {
        magnitudes += lora->magnitude(pair).size();
        low = std::max(low, pair.out * pair.rank);
      }
    dora.squared_norms = arena.take<float>(magnitudes);
    dora.scales = arena.take<float>(magnitudes);
    dora.low = arena.take<float>(low);
    dora.gate = arena.take_operand(type, t, f);
    dora.up = arena.take_operand(type, t, f);
  }
  // Room for whatever has to be unpacked, were it only because it is stored in another precision.
  size_t most = 0;
  for (const Layer& layer : model->layers)
    for (size_t p = 0; p < kProjections; ++p) {
      const Matrix& m = matrix_of(layer, static_cast<Projection>(p));
      if (unpacks(m)) most = std::max(most, m.rows() * m.cols());
    }
  unpacked_rows = c.vocab;
  if (unpacks(model->output())) {
    unpacked_rows = std::max(most, kUnpackedMin) / d;
    if (filters()) unpacked_rows = filter_stripes(unpacked_rows) * kFilterStripe;
    unpacked_rows = std::min(c.vocab, unpacked_rows);
    most = std::max(most, unpacked_rows * d);
  }
  unpacked = arena.take_rows(type, 1, most);
  gradients = arena.take<float>(lora->values.size());
}

namespace {

void prepare(LoraTraining::State& s, const Model& model, const Lora& lora,
             const TrainingOptions& options) {
  refuse_untrainable(model.config);
  // Only refresh() writes to the model, which a plan never calls.
  s.model = const_cast<Model*>(&model);
  s.lora = &lora;
  s.options = options;
  s.type = type_of(model, options);
  s.head_rows = head_rows_for(model.config.vocab);
  s.dora.first = lora.layers.empty() ? 0 : lora.layers[0][0].magnitude;
  s.pair_values = s.dora.first;
  for (const NamedWeight& weight : weights_of(*s.model))
    if (const WholeWeight* whole = lora.find_whole(weight.name))
      s.whole[weight.matrix != nullptr ? static_cast<const void*>(weight.matrix) : weight.vector] =
          whole->at;
  const size_t layers = model.config.layers;
  const auto learns = [&](const void* weight) { return s.whole.count(weight) != 0; };
  s.learns_whole.assign(layers, learns(&model.embedding) ? 1 : 0);
  std::vector<uint8_t> adapted(layers, 0);
  for (size_t l = 0; l < layers; ++l) {
    const auto* layer = reinterpret_cast<const std::byte*>(&model.layers[l]);
    for (const auto& [weight, at] : s.whole)
      if (weight >= layer && weight < layer + sizeof(Layer)) s.learns_whole[l] = 1;
    for (const LoraPair& pair : lora.layers[l]) adapted[l] |= pair.rank != 0 ? 1 : 0;
  }
  s.lowest = 0;
  while (s.lowest < layers && adapted[s.lowest] == 0 && s.learns_whole[s.lowest] == 0) ++s.lowest;
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

LoraTraining::LoraTraining(Pool& pool, Model& model, const Lora& lora,
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
  take_squared_norms(s);
  refresh();
}

LoraTraining::~LoraTraining() = default;

void LoraTraining::refresh() {
  State& s = *state_;
  store(*s.pool, s.lora->values.data(), 1, s.pair_values, s.values);
  put_whole(*s.pool, *s.lora, *s.model);
  refresh_scales(s);
}

std::span<float> LoraTraining::gradients() {
  return {state_->gradients, state_->lora->values.size()};
}

void LoraTraining::set_noise(const EmbeddingNoise& noise) { state_->noise = noise; }

void LoraTraining::clear_gradients() {
  zero_floats(*state_->pool, state_->gradients, state_->lora->values.size());
}

// ---- a batch ----------------------------------------------------------------------------------

namespace {

// Takes up the batch: positions, documents and the embedded tokens, all padded to whole tiles.
void embed(LoraTraining::State& s, const TrainingBatch& batch, float* x) {
  const Config& c = s.config();
  MORU_CHECK(batch.targets.size() == batch.tokens() &&
             batch.documents.back().end == batch.tokens());
  MORU_CHECK(padded(batch.tokens()) <= padded(s.options.tokens));
  s.tokens = padded(batch.tokens());
  s.documents = batch.documents;
  if (s.tokens != batch.tokens()) s.documents.push_back({batch.tokens(), s.tokens});
  s.positions.assign(s.tokens, 0);
  for (const PackedDocument& document : batch.documents)
    for (size_t i = document.first; i < document.end; ++i)
      s.positions[i] = static_cast<int32_t>(document.prefix + i - document.first);
  const auto reached = static_cast<size_t>(std::ranges::max(s.positions)) + 1;
  s.model->rope.reach(reached);
  s.model->local_rope.reach(reached);
  s.pool->each(s.tokens, [&](size_t i) {
    const int32_t id = i < batch.tokens() ? batch.ids[i] : 0;
    MORU_CHECK(id >= 0 && static_cast<size_t>(id) < c.vocab);
    float* row = x + i * c.width;
    s.model->embedding.read_rows(static_cast<size_t>(id), 1, row);
    if (c.embedding_scale != 1)
      for (size_t j = 0; j < c.width; ++j) row[j] *= c.embedding_scale;
  });
}

void add_noise(LoraTraining::State& s, const TrainingBatch& batch, float* x) {
  MORU_CHECK(batch.keys.size() == batch.documents.size());
  const size_t d = s.config().width;
  for (size_t i = 0; i < batch.documents.size(); ++i) {
    const PackedDocument& document = batch.documents[i];
    s.pool->each(document.rows(), [&](size_t row) {
      add_noise(s.noise, batch.keys[i], document.prefix + row, document.positions(),
                {x + (document.first + row) * d, d});
    });
  }
}

// The embedding's gradient, from scratch.dx by its rows: tokens in order within a stripe of
// columns.
void embed_backward(LoraTraining::State& s, const TrainingBatch& batch) {
  const Config& c = s.config();
  float* gradient = s.gradient_of(s.model->embedding);
  if (gradient == nullptr) return;
  constexpr size_t kColumns = 64;
  s.pool->each((c.width + kColumns - 1) / kColumns, [&](size_t tile) {
    const size_t first = tile * kColumns, count = std::min(kColumns, c.width - first);
    for (size_t i = 0; i < batch.tokens(); ++i)
      float_kernels().add_scaled(s.scratch.dx + i * c.width + first, count, c.embedding_scale,
                                 gradient + static_cast<size_t>(batch.ids[i]) * c.width + first);
  });
}

// d/dz of cap · tanh(z / cap) is 1 − (capped / cap)².
void softcap_backward(const float* capped, size_t n, float cap, float* d) {
  for (size_t i = 0; i < n; ++i) {
    const float ratio = capped[i] / cap;
    d[i] *= 1 - ratio * ratio;
  }
}

// Sixteen lanes, so that the mean and the largest are found in vectors.
LogitStats stats_of(const float* row, size_t n, size_t target) {
  float sums[16] = {}, largest[16];
  std::fill_n(largest, 16, -std::numeric_limits<float>::infinity());
  const size_t whole = n / 16 * 16;
  for (size_t i = 0; i < whole; i += 16)
    for (size_t j = 0; j < 16; ++j) {
      sums[j] += row[i + j];
      largest[j] = row[i + j] > largest[j] ? row[i + j] : largest[j];
    }
  double sum = 0;
  for (const float lane : sums) sum += double{lane};
  float top = *std::max_element(largest, largest + 16);
  for (size_t i = whole; i < n; ++i) {
    sum += double{row[i]};
    top = std::max(top, row[i]);
  }
  // With p = e^z / Σ e^z the entropy −Σ p log p is log Σ e^z − Σ p z.
  static thread_local std::vector<float> powers;
  powers.resize(n);
  const FloatKernels& kernels = float_kernels();
  float shift = 0, powers_sum = 0;
  kernels.exp_sum(row, n, powers.data(), &shift, &powers_sum);
  const double mean_z = double{kernels.dot(powers.data(), row, n)} / double{powers_sum};
  return {.mean = static_cast<float>(sum / static_cast<double>(n)),
          .entropy = static_cast<float>(double{shift} + std::log(double{powers_sum}) - mean_z),
          .top = row[target] >= top};
}

// y [m, vocab] = x · Wᵀ of the head.
void head_logits(LoraTraining::State& s, const DenseView& x, float* y) {
  const Config& c = s.config();
  for (size_t first = 0; first < c.vocab; first += s.unpacked_rows) {
    const size_t rows = std::min(s.unpacked_rows, c.vocab - first);
    matmul_nt(*s.pool, x, s.dense(s.model->output(), first, rows),
              {DType::f32, y + first, c.vocab, false, c.logit_scale});
  }
}

// dx [m, d] = dy [m, vocab] · W of the head.
void head_input_gradient(LoraTraining::State& s, const Rows& dy, size_t m, float* dx) {
  const Config& c = s.config();
  const size_t step = std::min(s.unpacked_rows, s.options.head_columns);
  for (size_t first = 0; first < c.vocab; first += step) {
    const size_t rows = std::min(step, c.vocab - first);
    matmul_nn(*s.pool, dy.view(m, rows, first), s.dense(s.model->output(), first, rows),
              {DType::f32, dx, c.width, first != 0, 1});
  }
}

// The list of what does not vanish of a row of the logits' gradient takes the second half of the
// row, and leaves the first to the row in bf16. If it does not fit there, the row in bf16 is all
// that is kept, and a stripe is listed when it is needed.
bool fits(size_t listed, size_t vocab) { return listed + kFilterAhead <= vocab / 2; }
uint32_t* list_of(const LoraTraining::State& s, size_t row) {
  const size_t v = s.config().vocab;
  return reinterpret_cast<uint32_t*>(s.scratch.logits + row * v + (v + 1) / 2);
}

// Makes an operand of a row's gradient, which may stand where the row does. whole: every element of
// it is wanted too.
void keep_gradient(LoraTraining::State& s, size_t row, const float* dy, bool whole) {
  const size_t v = s.config().vocab;
  float* const place = s.scratch.logits + row * v;
  if (s.type == DType::f32) {
    if (dy != place) std::memcpy(place, dy, v * sizeof(float));
    return;
  }
  static thread_local std::vector<uint32_t> list;
  size_t listed = 0;
  if (s.filters()) {
    list.resize(v + 16);
    uint32_t* starts = s.scratch.starts + row * (filter_stripes(v) + 1);
    list_kept_avx512(dy, v, negligible_avx512(dy, v), list.data(), starts);
    listed = starts[filter_stripes(v)];
  }
  if (whole || !s.filters() || !fits(listed, v))
    float_kernels().round_to_bf16(dy, v, reinterpret_cast<uint16_t*>(place));
  if (s.filters() && fits(listed, v))
    std::memcpy(list_of(s, row), list.data(), listed * sizeof(uint32_t));
}

// dx [m, d] = dy · W of the head from what rows of dy keep. Stripe by stripe of the vocabulary, so
// that a tile of W stays in L2 while rows meet it.
void filtered_input_gradient(LoraTraining::State& s, size_t m, float* dx) {
  constexpr size_t kRows = 32;  // of an item
  const Scratch& sc = s.scratch;
  const size_t v = s.config().vocab, stripes = filter_stripes(v), d = s.config().width;
  const size_t groups = (m + kRows - 1) / kRows, tiles = (d + kFilterTile - 1) / kFilterTile;
  const size_t tile_columns = ((d + tiles - 1) / tiles + 31) / 32 * 32;
  std::memset(dx, 0, m * d * sizeof(float));

  // Rows [at, at + kFilterStripe) of w are the stripe's.
  const auto add_stripe = [&](size_t stripe, const DenseView& w, size_t at) {
    const size_t width = std::min(kFilterStripe, v - stripe * kFilterStripe);
    s.pool->each(tiles * groups, [&](size_t item) {
      const size_t first = item / groups * tile_columns,
                   columns = std::min(tile_columns, d - first);
      const auto* tile = static_cast<const uint16_t*>(w.data) + at * w.ld + first;
      const auto* next =
          m >= kRows && at + 2 * kFilterStripe <= w.rows ? tile + kFilterStripe * w.ld : nullptr;
      for (size_t i = item % groups * kRows; i < std::min(m, (item % groups + 1) * kRows); ++i) {
        // Each of many rows brings a part of the next stripe nearer.
        for (size_t r = kFilterStripe * i / m; next && r < kFilterStripe * (i + 1) / m; ++r)
          for (size_t column = 0; column < columns; column += 32)
            __builtin_prefetch(next + r * w.ld + column, 0, 2);
        const uint32_t* starts = sc.starts + i * (stripes + 1);
        if (fits(starts[stripes], v)) {
          multiply_kept_avx512(list_of(s, i) + starts[stripe], starts[stripe + 1] - starts[stripe],
                               tile, w.ld, columns, dx + i * d + first);
          continue;
        }
        std::array<uint32_t, kFilterStripe + kFilterAhead> list{};
        const auto* dy = reinterpret_cast<const uint16_t*>(sc.logits + i * v);
        list_stripe_avx512(dy + stripe * kFilterStripe, width, list.data());
        multiply_kept_avx512(list.data(), width, tile, w.ld, columns, dx + i * d + first);
      }
    });
  };
  for (size_t first = 0; first < v; first += s.unpacked_rows) {
    const DenseView w = s.dense(s.model->output(), first, std::min(s.unpacked_rows, v - first));
    for (size_t at = 0; at < w.rows; at += kFilterStripe)
      add_stripe((first + at) / kFilterStripe, w, at);
  }
}

// What head() is to find besides the loss.
struct HeadTask {
  float scale = 0;                 // of the gradient; 0: none is wanted
  std::span<const float> factors;  // by token: multiply its gradient too; may be empty
  std::span<float> nll;            // by token; may be empty
  std::span<LogitStats> stats;     // by token; may be empty
};

// Loss of the trained rows of s.x_out, a few at a time, so that logits are never whole; where a
// gradient is wanted also scratch.dx, by x_out (0 in rows that are not trained), and those of the
// head and the last norm where they learn.
double head(LoraTraining::State& s, const TrainingBatch& batch, const HeadTask& task) {
  const Config& c = s.config();
  const size_t d = c.width, v = c.vocab;
  Scratch& sc = s.scratch;
  Pool& pool = *s.pool;
  std::vector<size_t> rows;
  for (size_t i = 0; i < batch.tokens(); ++i)
    if (batch.targets[i] != TrainingBatch::kNoTarget) rows.push_back(i);
  if (task.scale != 0) zero_floats(pool, sc.dx, s.tokens * d);
  std::fill(task.nll.begin(), task.nll.end(), 0.0f);
  float* d_head = s.gradient_of(s.model->output());

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
    head_logits(s, sc.head_n.view(m, d), sc.logits);
    if (c.final_softcap != 0) {
      softcap_rows(pool, sc.logits, chunk.size() * v, c.final_softcap);
      if (task.scale != 0) copy_floats(pool, sc.logits, chunk.size() * v, sc.capped);
    }
    if (!task.stats.empty())
      pool.each(chunk.size(), [&](size_t i) {
        task.stats[chunk[i]] = stats_of(sc.logits + i * v, v, static_cast<size_t>(targets[i]));
      });
    // A row's gradient becomes an operand as soon as the cross-entropy has made it.
    const auto take_gradient = [&](size_t i, float* dy) {
      if (c.final_softcap != 0) softcap_backward(sc.capped + i * v, v, c.final_softcap, dy);
      const float factor = (task.factors.empty() ? 1.0f : task.factors[chunk[i]]) * c.logit_scale;
      if (factor != 1) float_kernels().scale(dy, v, factor, dy);
      keep_gradient(s, i, dy, d_head != nullptr);
    };
    cross_entropy_rows(pool, sc.logits, v, chunk.size(), v, targets.data(), losses.data(),
                       task.scale, take_gradient);
    for (size_t i = 0; i < chunk.size(); ++i) {
      sum += double{losses[i]};
      if (!task.nll.empty()) task.nll[chunk[i]] = losses[i];
    }
    if (task.scale == 0) continue;

    zero_floats(pool, sc.logits + chunk.size() * v, (m - chunk.size()) * v);
    if (s.filters()) {
      filtered_input_gradient(s, chunk.size(), sc.head_dn);
      zero_floats(pool, sc.head_dn + chunk.size() * d, (m - chunk.size()) * d);
    } else {
      head_input_gradient(s, sc.d_logits, m, sc.head_dn);
    }
    if (d_head != nullptr)
      matmul_tn(pool, sc.d_logits.view(m, v), sc.head_n.view(m, d),
                {DType::f32, d_head, d, true, 1});
    // The gradient by the rows of x_out stands in dn until it is scattered.
    zero_floats(pool, sc.dn, m * d);
    rms_norm_backward(pool, sc.head_x, d, sc.head_rms, sc.head_dn, d, m, d,
                      s.model->final_norm.data(), sc.dn, d, s.gradient_of(s.model->final_norm));
    for (size_t i = 0; i < chunk.size(); ++i)
      std::memcpy(sc.dx + chunk[i] * d, sc.dn + i * d, d * sizeof(float));
  }
  return sum;
}

// The blocks forward, keeping for a backward pass or not.
void forward(LoraTraining::State& s, const TrainingBatch& batch, bool learns) {
  const size_t layers = s.config().layers;
  const auto kept = [&](size_t l) -> const Kept& {
    return learns && l >= s.lowest ? s.kept[l] : s.passing;
  };
  float* x = layers == 0 ? s.x_out : kept(0).x_attn;
  embed(s, batch, x);
  if (learns && s.noise.alpha != 0) add_noise(s, batch, x);
  for (size_t l = 0; l < layers; ++l) {
    Kept k = kept(l);
    for (size_t g = 0; g < kInputGroups.size(); ++g) k.u[g].ld = s.kept[l].u[g].ld;
    forward_layer(s, l, k, l + 1 < layers ? kept(l + 1).x_attn : s.x_out);
  }
}

// From scratch.dx by the last block's output to the gradients of all that learns.
void backward(LoraTraining::State& s, const TrainingBatch& batch) {
  for (size_t l = s.config().layers; l > s.lowest; --l) backward_layer(s, l - 1, s.kept[l - 1]);
  embed_backward(s, batch);
}

}  // namespace

double LoraTraining::accumulate(const TrainingBatch& batch, float scale, std::span<float> nll,
                                std::span<LogitStats> stats) {
  MORU_CHECK(scale != 0 && (nll.empty() || nll.size() == batch.tokens()) &&
             (stats.empty() || stats.size() == batch.tokens()));
  if (batch.tokens() == 0) return 0;
  State& s = *state_;
  forward(s, batch, true);
  const double sum = head(s, batch, {.scale = scale, .factors = {}, .nll = nll, .stats = stats});
  backward(s, batch);
  return sum;
}

void LoraTraining::accumulate(const TrainingBatch& batch, const WeighTokens& weigh,
                              TokenLosses& losses) {
  losses.nll.assign(batch.tokens(), 0);
  if (batch.tokens() == 0) return;
  State& s = *state_;
  const size_t d = s.config().width;
  std::vector<float> factors(batch.tokens(), 0.0f);
  HeadTask task{.scale = 1, .factors = {}, .nll = losses.nll, .stats = losses.stats};
  forward(s, batch, true);
  if (s.gradient_of(s.model->output()) == nullptr &&
      s.gradient_of(s.model->final_norm) == nullptr) {
    // A frozen head hands back one gradient a token, which can be multiplied afterwards.
    head(s, batch, task);
    weigh(losses.nll, factors);
    s.pool->each(batch.tokens(), [&](size_t i) {
      for (size_t j = 0; j < d; ++j) s.scratch.dx[i * d + j] *= factors[i];
    });
  } else {
    task.scale = 0;
    head(s, batch, task);
    weigh(losses.nll, factors);
    head(s, batch, {.scale = 1, .factors = factors, .nll = {}, .stats = {}});
  }
  backward(s, batch);
}

double LoraTraining::evaluate(const TrainingBatch& batch, std::span<float> nll) {
  MORU_CHECK(nll.empty() || nll.size() == batch.tokens());
  if (batch.tokens() == 0) return 0;
  forward(*state_, batch, false);
  return head(*state_, batch, {.scale = 0, .factors = {}, .nll = nll, .stats = {}});
}

void LoraTraining::evaluate(const TrainingBatch& batch, TokenLosses& losses) {
  losses.nll.assign(batch.tokens(), 0);
  if (batch.tokens() == 0) return;
  forward(*state_, batch, false);
  head(*state_, batch, {.scale = 0, .factors = {}, .nll = losses.nll, .stats = losses.stats});
}

double training_flops(const Model& model, const Lora& lora, const TrainingBatch& batch) {
  const Config& c = model.config;
  const double t = static_cast<double>(batch.tokens());
  double flops = 4.0 * static_cast<double>(batch.trained() * c.vocab * c.width);
  for (const WholeWeight& weight : lora.whole) {
    const bool head =
        weight.name == "output.weight" || (c.tied_head && weight.name == "token_embd.weight");
    if (head || (weight.rows > 1 && weight.name != "token_embd.weight"))
      flops += 2 * (head ? static_cast<double>(batch.trained()) : t) *
               static_cast<double>(weight.count());
  }
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
    const auto seen = [&](size_t positions) {
      const double n = static_cast<double>(positions);
      const double window = c.is_windowed(l) ? std::min(n, static_cast<double>(c.window)) : n;
      return window * (window + 1) / 2 + (n - window) * window;
    };
    for (const PackedDocument& document : batch.documents)
      pairs += seen(document.positions()) - seen(document.prefix);
    flops += 7 * 2 * pairs * static_cast<double>(c.q_width());
  }
  return flops;
}

}  // namespace moru
