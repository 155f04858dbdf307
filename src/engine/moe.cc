#include "engine/moe.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "engine/float_kernels.h"
#include "engine/row_ops.h"

namespace moru {
namespace {

// Rows of the router or of a copy that one thread takes at a time.
constexpr size_t kTokensPerItem = 8;

template <typename Work>
void each_token(Pool& pool, size_t tokens, Work&& work) {
  pool.each((tokens + kTokensPerItem - 1) / kTokensPerItem, [&](size_t item) {
    const size_t end = std::min(tokens, (item + 1) * kTokensPerItem);
    for (size_t t = item * kTokensPerItem; t < end; ++t) work(t);
  });
}

}  // namespace

ExpertsStep::ExpertsStep(const Config& config, Activations activations, size_t tokens)
    : width_(config.width),
      count_(config.experts.count),
      chosen_(config.experts.chosen),
      shared_width_(config.experts.shared_width),
      renormalise_(config.experts.renormalise),
      activation_(config.activation),
      operand_(activations) {
  const auto rows = [](size_t count, size_t cols) {
    return Rows{PageBuffer(count * cols * sizeof(float)), cols};
  };
  const size_t all = std::max(tokens * chosen_, shared_width_ == 0 ? 0 : tokens);
  const size_t hidden = std::max(config.experts.width, shared_width_);
  gathered_ = rows(all, width_);
  gate_ = rows(all, hidden);
  up_ = rows(all, hidden);
  down_ = rows(all, width_);
  scores_ = rows(tokens, count_);
  choices_.resize(tokens * chosen_);
  first_row_.resize(count_ + 1);
  operand_.reserve(tokens, std::max(width_, hidden));
}

// The largest scores of one token, the first of equals first; then in the order of their numbers.
void ExpertsStep::choose(const float* scores, Choice* chosen) const {
  size_t taken = 0;
  for (uint32_t e = 0; e < count_; ++e) {
    size_t at = taken;
    while (at > 0 && scores[e] > chosen[at - 1].weight) --at;
    if (at == chosen_) continue;
    taken = std::min(taken + 1, chosen_);
    std::move_backward(chosen + at, chosen + taken - 1, chosen + taken);
    chosen[at] = {e, 0, scores[e]};
  }
  double top = double{chosen[0].weight}, sum = 0;
  if (renormalise_) {
    for (size_t i = 0; i < chosen_; ++i) sum += std::exp(double{chosen[i].weight} - top);
  } else {
    for (size_t e = 0; e < count_; ++e) sum += std::exp(double{scores[e]} - top);
  }
  for (size_t i = 0; i < chosen_; ++i)
    chosen[i].weight = static_cast<float>(std::exp(double{chosen[i].weight} - top) / sum);
  std::sort(chosen, chosen + chosen_,
            [](const Choice& a, const Choice& b) { return a.expert < b.expert; });
}

// Scores, choices, and the rows of each expert.
void ExpertsStep::route(Pool& pool, const Experts& experts, const float* x, size_t tokens) {
  each_token(pool, tokens, [&](size_t t) {
    float* scores = scores_.row(t);
    for (size_t e = 0; e < count_; ++e) {
      scores[e] = float_kernels().dot(x + t * width_, experts.router.data() + e * width_, width_);
      if (!experts.router_bias.empty()) scores[e] += experts.router_bias[e];
    }
    choose(scores, &choices_[t * chosen_]);
  });
  const std::span<Choice> all = std::span(choices_).first(tokens * chosen_);
  std::fill(first_row_.begin(), first_row_.end(), 0);
  for (const Choice& c : all) ++first_row_[c.expert + 1];
  for (size_t e = 0; e < count_; ++e) first_row_[e + 1] += first_row_[e];
  for (Choice& c : all) c.row = static_cast<uint32_t>(first_row_[c.expert]++);
  std::move_backward(first_row_.begin(), first_row_.end() - 1, first_row_.end());
  first_row_[0] = 0;
  each_token(pool, tokens, [&](size_t t) {
    for (size_t i = 0; i < chosen_; ++i)
      std::memcpy(gathered_.row(choices_[t * chosen_ + i].row), x + t * width_,
                  width_ * sizeof(float));
  });
}

// gate = act(gate) · up, [rows, hidden], which becomes the operand of products with `down`.
void ExpertsStep::make_hidden(Pool& pool, float* gate, const float* up, size_t rows, size_t hidden,
                              const Matrix& down) {
  operand_.make(pool, gate, rows, hidden, down, [&](size_t row) {
    float* g = gate + row * hidden;
    gate_rows(pool, activation_, g, hidden, up + row * hidden, hidden, 1, hidden, g, hidden);
  });
}

// gathered rows → down rows, expert by expert.
void ExpertsStep::compute(Pool& pool, const Experts& experts, const Watcher& watch) {
  for (size_t e = 0; e < count_; ++e) {
    const size_t first = first_row_[e], rows = first_row_[e + 1] - first;
    if (rows == 0) continue;
    const size_t hidden = experts.gate[e].rows();
    // Hidden rows stand without gaps whatever the buffers' width.
    float* gate = gate_.row(0);
    float* up = up_.row(0);
    float* out = down_.row(first);
    const auto bias = [&](const Vector& values, float* y, size_t n) {
      if (!values.empty()) add_bias_rows(pool, y, n, rows, n, values.data() + e * n);
    };
    if (watch) watch("ffn_gate_exps", gathered_.row(first), rows, width_);
    operand_.set(gathered_.row(first), rows, width_);
    operand_.multiply(pool, {{&experts.gate[e], gate, hidden}, {&experts.up[e], up, hidden}});
    bias(experts.gate_bias, gate, hidden);
    bias(experts.up_bias, up, hidden);
    make_hidden(pool, gate, up, rows, hidden, experts.down[e]);
    if (watch) watch("ffn_down_exps", gate, rows, hidden);
    operand_.multiply(pool, {{&experts.down[e], out, width_}});
    bias(experts.down_bias, out, width_);
  }
}

void ExpertsStep::add_shared(Pool& pool, const Experts& experts, const float* x, size_t tokens,
                             float* out, const Watcher& watch) {
  const size_t hidden = shared_width_;
  if (watch) watch("ffn_gate_shexp", x, tokens, width_);
  operand_.set(x, tokens, width_);
  operand_.multiply(pool, {{&experts.shared_gate, gate_.row(0), hidden},
                           {&experts.shared_up, up_.row(0), hidden}});
  make_hidden(pool, gate_.row(0), up_.row(0), tokens, hidden, experts.shared_down);
  if (watch) watch("ffn_down_shexp", gate_.row(0), tokens, hidden);
  operand_.multiply(pool, {{&experts.shared_down, down_.row(0), width_}});
  each_token(pool, tokens, [&](size_t t) {
    float share = 1;
    if (!experts.shared_router.empty()) {
      const float score = float_kernels().dot(x + t * width_, experts.shared_router.data(), width_);
      share = static_cast<float>(1 / (1 + std::exp(-double{score})));
    }
    float_kernels().add_scaled(down_.row(t), width_, share, out + t * width_);
  });
}

void ExpertsStep::run(Pool& pool, const Experts& experts, const float* x, size_t tokens, float* out,
                      const Watcher& watch) {
  MORU_DCHECK(tokens * chosen_ <= choices_.size());
  route(pool, experts, x, tokens);
  compute(pool, experts, watch);
  each_token(pool, tokens, [&](size_t t) {
    std::fill_n(out + t * width_, width_, 0.0f);
    for (size_t i = 0; i < chosen_; ++i) {
      const Choice& c = choices_[t * chosen_ + i];
      float_kernels().add_scaled(down_.row(c.row), width_, c.weight, out + t * width_);
    }
  });
  if (shared_width_ != 0) add_shared(pool, experts, x, tokens, out, watch);
}

}  // namespace moru
