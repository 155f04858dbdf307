#include "engine/forward.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "base/error.h"
#include "base/memory.h"
#include "base/pieces.h"
#include "engine/attention.h"
#include "engine/linear.h"
#include "engine/moe.h"
#include "engine/row_ops.h"

namespace moru {
namespace {

constexpr size_t kLogitRows = 32;  // rows of logits that exist at a time

// A matrix of activations, one row a token.
struct Rows {
  float* first = nullptr;
  size_t cols = 0;

  float* data() const { return first; }
  float* row(size_t r) const { return first + r * cols; }
};

KvShape cache_shape(const Config& c, const EngineOptions& options) {
  return {.layers = c.layers,
          .kv_heads = c.kv_heads,
          .head_dim = c.head_dim,
          .type = options.kv_type,
          .window = c.window,
          .windowed = c.windowed,
          .longest = c.context};
}

size_t cache_pages(const Config& c, const EngineOptions& options) {
  const KvShape shape = cache_shape(c, options);
  const size_t block = KvCache::groups(shape), page_bytes = KvCache::page_bytes(shape);
  if (options.cache_bytes == 0)
    return (options.cache_tokens + kPageTokens - 1) / kPageTokens * block;
  if (options.cache_bytes < 2 * block * page_bytes)
    throw Error(ErrorKind::usage,
                {.where = "KV cache",
                 .what = fmt::format("{} bytes do not hold even {} tokens of this model",
                                     options.cache_bytes, 2 * kPageTokens),
                 .cure = fmt::format("allow at least {} KiB", 2 * block * page_bytes / 1024 + 1)});
  return options.cache_bytes / page_bytes;
}

}  // namespace

struct Engine::State {
  Pool& pool;
  const Model& model;
  size_t step_tokens;
  KvCache cache;
  InputWatcher watcher;

  // One step's activations; rows beyond the step's tokens are stale. Attention, the feed-forward
  // network and logits follow each other in the same memory, and `gate` becomes what enters the
  // last product of its network. `up` comes last: many rows of quantized products are gated before
  // they get here, and never touch it.
  PageBuffer memory;
  Rows x, norm, branch, q, k, v, mixed, gate, up, logits;
  Operand operand;
  std::optional<ExpertsStep> experts;  // of models that have them
  std::vector<int32_t> positions;
  std::vector<size_t> ids;
  std::vector<AttentionSpan> attention_spans;
  const Adapter* own_adapter;
  std::vector<AdapterSpan> adapter_spans;  // of the step; empty if none has an adapter
  std::vector<float> adapter_low;
  std::span<const StepSpan> spans;  // of the step
  size_t tokens = 0;                // rows of x that are at work
  bool narrowed = false;            // they are those that want logits
  // The norm of a branch that has yet to join the stream; null: there is no such branch.
  const Vector* pending = nullptr;

  State(Pool& the_pool, const Model& the_model, const EngineOptions& options)
      : pool(the_pool),
        model(the_model),
        step_tokens(options.step_tokens),
        cache(cache_shape(the_model.config, options), cache_pages(the_model.config, options)),
        operand(the_model.activations),
        own_adapter(options.adapter) {
    const Config& c = model.config;
    lay_out();
    operand.reserve(step_tokens, std::max({c.width, c.q_width(), c.ffn_width}));
    if (c.experts.count != 0) experts.emplace(c, model.activations, step_tokens);
    positions.reserve(step_tokens);
    ids.resize(step_tokens);
    attention_spans.reserve(step_tokens);
  }

  void lay_out() {
    const Config& c = model.config;
    std::vector<std::pair<Rows*, size_t>> places;  // in floats
    size_t end = 0;
    const auto add = [&](size_t rows, size_t cols, std::initializer_list<Rows*> matrices) {
      for (Rows* matrix : matrices) {
        matrix->cols = cols;
        places.emplace_back(matrix, end);
        end += (rows * cols + 15) / 16 * 16;  // each begins a cache line
      }
    };
    add(step_tokens, c.width, {&x, &branch});
    // A branch has joined the stream before the stream is normed, except where both are wanted.
    const bool apart = c.norm_layout == NormLayout::parallel || c.experts.count != 0;
    if (apart) add(step_tokens, c.width, {&norm});
    const size_t shared = end;
    add(step_tokens, c.q_width(), {&q});
    add(step_tokens, c.kv_width(), {&k, &v});
    const size_t attention_end = std::exchange(end, shared);
    add(kLogitRows, c.vocab, {&logits});
    const size_t logits_end = std::exchange(end, shared);
    add(step_tokens, c.ffn_width, {&gate, &up});
    end = std::max({end, attention_end, logits_end});
    memory = PageBuffer(end * sizeof(float));
    for (const auto& [matrix, at] : places) matrix->first = static_cast<float*>(memory.data()) + at;
    if (!apart) norm = branch;
    mixed = q;
  }

  void watch(size_t layer, std::string_view part, const Rows& rows) const {
    if (watcher)
      watcher(fmt::format("blk.{}.{}.weight", layer, part), rows.data(), tokens, rows.cols);
  }

  void norm_rows(Rows& from, const Vector& gain, Rows& to, size_t first, size_t count) {
    const Config& c = model.config;
    const auto norm_of = c.norm == NormKind::layer ? layer_norm_rows : rms_norm_rows;
    norm_of(pool, from.row(first), from.cols, count, from.cols, gain.data(), c.norm_eps,
            to.row(first), to.cols, nullptr);
  }
  void norm_rows(Rows& from, const Vector& gain, Rows& to) { norm_rows(from, gain, to, 0, tokens); }

  // work(row) for all rows; what a row is left as is in the cache of the thread that goes on with
  // it. The work may call row operations for single rows.
  template <typename Work>
  void each_row(Work&& work) {
    constexpr size_t kLeastRows = 4;  // a few microseconds' work
    each_piece(pool, tokens, kLeastRows, [&](size_t begin, size_t end) {
      for (size_t row = begin; row < end; ++row) work(row);
    });
  }

  // x += residual_scale · branch, normed first where the family does: when the stream is next
  // read, by the thread that reads the row.
  void add_branch(const Vector& post_norm) { pending = &post_norm; }
  void join_branch(size_t row) {
    if (!pending->empty()) norm_rows(branch, *pending, branch, row, 1);
    add_rows(pool, branch.row(row), branch.cols, 1, x.cols, model.config.residual_scale, x.row(row),
             x.cols);
  }
  void join_branch() {
    if (pending == nullptr) return;
    each_row([&](size_t row) { join_branch(row); });
    pending = nullptr;
  }

  // What a sub-layer reads: the norm of the stream, or the stream itself where the layout norms
  // results alone. It becomes the operand of products with `w`.
  Rows& set_normed(const Vector& gain, const Matrix& w) {
    if (gain.empty()) {
      join_branch();
      operand.set(x.data(), tokens, x.cols);
      return x;
    }
    operand.make(pool, norm.data(), tokens, norm.cols, w, [&](size_t row) {
      if (pending != nullptr) join_branch(row);
      norm_rows(x, gain, norm, row, 1);
    });
    pending = nullptr;
    return norm;
  }

  // Bias, norm and rotation of a row of queries or keys.
  void place(Rows& rows, size_t row, size_t heads, const Vector& added, const Vector& gain,
             size_t layer) {
    const Config& c = model.config;
    float* at = rows.row(row);
    const auto norm_heads = [&](size_t count, size_t size) {
      for (size_t h = 0; h < count; ++h)
        rms_norm_rows(pool, at + h * size, size, 1, size, gain.data(), c.norm_eps, at + h * size,
                      size);
    };
    bias(rows, row, added);
    if (c.qk_norm == QkNorm::rms_before_rope) norm_heads(heads, c.head_dim);
    if (c.qk_norm == QkNorm::rms_whole_before_rope) norm_heads(1, rows.cols);
    if (c.rotates(layer))
      rope_rows(pool, model.rope_of(layer).view(), std::span(positions).subspan(row, 1), at,
                rows.cols, heads, c.head_dim);
    if (c.qk_norm == QkNorm::rms_after_rope) norm_heads(heads, c.head_dim);
  }
  void bias(Rows& rows, size_t row, const Vector& values) {
    if (!values.empty()) add_bias_rows(pool, rows.row(row), rows.cols, 1, rows.cols, values.data());
  }
  // Queries and keys get their places, keys and values go to the cache.
  void place_all(size_t index) {
    const Layer& w = model.layers[index];
    const Config& c = model.config;
    constexpr size_t kLeastRows = 16;  // keys are written so many at a time
    each_piece(pool, tokens, kLeastRows, [&](size_t begin, size_t end) {
      for (size_t row = begin; row < end; ++row) {
        place(q, row, c.heads, w.q_bias, w.q_norm, index);
        place(k, row, c.kv_heads, w.k_bias, w.k_norm, index);
        bias(v, row, w.v_bias);
      }
      for (const AttentionSpan& span : attention_spans) {
        const size_t from = std::max(begin, span.first_row);
        const size_t to = std::min(end, span.first_row + span.tokens);
        if (from < to)
          cache.write(*span.sequence, index, span.first_position + from - span.first_row, to - from,
                      k.row(from), v.row(from), k.cols);
      }
    });
  }

  // What adapters add to the products of `in`; targets in the group's order.
  void adapt(size_t layer, InputGroup group, Rows& in, std::initializer_list<Rows*> targets) {
    if (adapter_spans.empty()) return;
    std::array<AdapterTarget, 3> to;
    size_t count = 0;
    for (Rows* rows : targets) to[count++] = {rows->data(), rows->cols};
    add_adapters(pool, adapter_spans, layer, group, in.data(), in.cols, std::span(to).first(count),
                 adapter_low);
  }

  // Rows of the spans by adapter.
  void plan_adapters() {
    adapter_spans.clear();
    size_t first = 0;
    bool any = false;
    for (const StepSpan& span : spans) {
      const Adapter* adapter = span.adapter != nullptr ? span.adapter : own_adapter;
      any = any || adapter != nullptr;
      if (!adapter_spans.empty() && adapter_spans.back().adapter == adapter)
        adapter_spans.back().count += span.tokens.size();
      else
        adapter_spans.push_back({adapter, first, span.tokens.size()});
      first += span.tokens.size();
    }
    if (!any) adapter_spans.clear();
  }

  void bias(Rows& rows, const Vector& values) {
    if (!values.empty()) each_row([&](size_t row) { bias(rows, row, values); });
  }

  // Rows that want logits move to the front; the others have left their keys and values and are
  // done.
  void narrow() {
    narrowed = true;
    attention_spans.clear();
    size_t kept = 0, row = 0;
    for (const StepSpan& span : spans) {
      const size_t count = span.tokens.size(), from = std::min(span.logits_from, count);
      if (from < count)
        attention_spans.push_back(
            {kept, count - from, span.sequence->tokens() + from, span.sequence});
      for (size_t i = from; i < count; ++i, ++kept) {
        if (row + i == kept) continue;
        for (Rows* rows : {&x, &q, &norm})
          std::copy_n(rows->row(row + i), rows->cols, rows->row(kept));
      }
      row += count;
    }
    tokens = kept;
  }

  void forward_layer(size_t index) {
    const Layer& w = model.layers[index];
    const Config& c = model.config;

    Rows& attn_in = set_normed(w.attn_norm, w.q);
    watch(index, "attn_q", attn_in);
    operand.multiply(pool,
                     {{&w.q, q.data(), q.cols}, {&w.k, k.data(), k.cols}, {&w.v, v.data(), v.cols}},
                     {&w.attn_out});
    adapt(index, kInputGroups[0], attn_in, {&q, &k, &v});
    place_all(index);
    // Watchers see all rows; spans of adapters are of all.
    if (index + 1 == model.layers.size() && !watcher && adapter_spans.empty()) {
      narrow();
      if (tokens == 0) return;
    }
    attend_cached(pool,
                  {.heads = c.heads,
                   .kv_heads = c.kv_heads,
                   .head_dim = c.head_dim,
                   .scale = c.attn_scale,
                   .softcap = c.attn_softcap,
                   .window = c.is_windowed(index) ? c.window : 0,
                   .sinks = w.sinks.empty() ? nullptr : w.sinks.data()},
                  cache, index, attention_spans, q.data(), q.cols, mixed.data(), mixed.cols);
    watch(index, "attn_output", mixed);
    operand.set(mixed.data(), tokens, mixed.cols);
    operand.multiply(pool, {{&w.attn_out, branch.data(), branch.cols}}, {&w.gate, &w.up});
    adapt(index, kInputGroups[1], mixed, {&branch});
    bias(branch, w.attn_out_bias);
    add_branch(w.attn_post_norm);

    // In a parallel layout `norm` still holds what attention read.
    const bool parallel = c.norm_layout == NormLayout::parallel;
    if (parallel || !w.experts.empty()) join_branch();
    if (w.experts.empty()) {
      if (parallel) operand.set(norm.data(), tokens, norm.cols);
      feed_forward(index, parallel ? norm : set_normed(w.ffn_norm, w.gate));
    } else {
      if (!parallel && !w.ffn_norm.empty()) norm_rows(x, w.ffn_norm, norm);
      Rows& ffn_in = parallel || !w.ffn_norm.empty() ? norm : x;
      ExpertsStep::Watcher watch_experts;
      if (watcher)
        watch_experts = [&](std::string_view part, const float* rows, size_t count, size_t cols) {
          watcher(fmt::format("blk.{}.{}.weight", index, part), rows, count, cols);
        };
      experts->run(pool, w.experts, ffn_in.data(), tokens, branch.data(), watch_experts);
    }
    add_branch(w.ffn_post_norm);
  }

  // `in` is the operand already.
  void feed_forward(size_t index, Rows& in) {
    const Layer& w = model.layers[index];
    watch(index, "ffn_gate", in);
    const Activation act = model.config.activation;
    const bool gated = adapter_spans.empty() &&
                       operand.multiply_gated(pool, w.gate, w.up, act, gate.data(), gate.cols);
    if (!gated) {
      operand.multiply(pool, {{&w.gate, gate.data(), gate.cols}, {&w.up, up.data(), up.cols}},
                       {&w.down});
      adapt(index, kInputGroups[2], in, {&gate, &up});
    }
    operand.make(pool, gate.data(), tokens, gate.cols, w.down, [&](size_t row) {
      if (!gated) gate_elements(act, gate.row(row), up.row(row), gate.cols, gate.row(row));
    });
    watch(index, "ffn_down", gate);
    const LinearProduct down{&w.down, branch.data(), branch.cols};
    if (index + 1 < model.layers.size()) {
      const Layer& next = model.layers[index + 1];
      operand.multiply(pool, {down}, {&next.q, &next.k, &next.v});
    } else {
      operand.multiply(pool, {down}, {&model.output()});
    }
    adapt(index, kInputGroups[3], gate, {&branch});
  }

  // Rows that want logits are normed and meet the head a few at a time.
  void visit_logits(const LogitsVisitor& visit) {
    const Config& c = model.config;
    if (tokens == 0) return;
    const size_t wanted = tokens;
    norm_rows(x, model.final_norm, norm);
    if (watcher) watcher("output.weight", norm.data(), wanted, norm.cols);
    for (size_t first = 0; first < wanted; first += kLogitRows) {
      const size_t count = std::min(kLogitRows, wanted - first);
      operand.set(norm.row(first), count, norm.cols);
      operand.multiply(pool, {{&model.output(), logits.data(), logits.cols}});
      if (c.logit_scale != 1) {
        for (size_t i = 0; i < count * c.vocab; ++i) logits.data()[i] *= c.logit_scale;
      }
      if (c.final_softcap != 0) softcap_rows(pool, logits.data(), count * c.vocab, c.final_softcap);
      visit(first, count, logits.data());
    }
  }

  void step(std::span<const StepSpan> the_spans, const LogitsVisitor& visit) {
    const Config& c = model.config;
    spans = the_spans;
    tokens = 0;
    narrowed = false;
    pending = nullptr;
    positions.clear();
    attention_spans.clear();
    size_t pages = 0, reached = 0;
    for (const StepSpan& span : spans) {
      cache.trim(*span.sequence);
      const size_t first = span.sequence->tokens();
      MORU_CHECK(first + span.tokens.size() <= c.context);
      reached = std::max(reached, first + span.tokens.size());
      attention_spans.push_back({tokens, span.tokens.size(), first, span.sequence});
      for (size_t i = 0; i < span.tokens.size(); ++i)
        positions.push_back(static_cast<int32_t>(first + i));
      tokens += span.tokens.size();
      pages += cache.pages_for(*span.sequence, span.tokens.size());
    }
    MORU_CHECK(tokens <= step_tokens);
    model.rope.reach(reached);
    model.local_rope.reach(reached);
    plan_adapters();
    if (pages > cache.free_pages())
      throw Error(ErrorKind::no_space, {.where = "KV cache",
                                        .what = "has no room for the step",
                                        .cure = "allow more cache or fewer sequences at once"});
    size_t row = 0;
    for (const StepSpan& span : spans) {
      MORU_CHECK(cache.reserve(*span.sequence, span.tokens.size()));
      for (const TokenId id : span.tokens) {
        MORU_CHECK(id >= 0 && static_cast<size_t>(id) < c.vocab);
        ids[row++] = static_cast<size_t>(id);
      }
    }
    each_row([&](size_t at) {
      model.embedding.read_rows(ids[at], 1, x.row(at));
      if (c.embedding_scale != 1)
        for (size_t i = 0; i < x.cols; ++i) x.row(at)[i] *= c.embedding_scale;
    });
    for (size_t i = 0; i < c.layers; ++i) forward_layer(i);
    join_branch();
    if (!narrowed) narrow();
    for (const StepSpan& span : spans) cache.advance(*span.sequence, span.tokens.size());
    visit_logits(visit);
  }
};

Engine::Engine(Pool& pool, const Model& model, const EngineOptions& options)
    : state_(std::make_unique<State>(pool, model, options)) {}
Engine::~Engine() = default;

void Engine::step(std::span<const StepSpan> spans, const LogitsVisitor& visit) {
  state_->step(spans, visit);
}
void Engine::watch_inputs(InputWatcher watcher) { state_->watcher = std::move(watcher); }
KvCache& Engine::cache() { return state_->cache; }
Pool& Engine::pool() { return state_->pool; }
const Model& Engine::model() const { return state_->model; }
size_t Engine::step_tokens() const { return state_->step_tokens; }

}  // namespace moru
