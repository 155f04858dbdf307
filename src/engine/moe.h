// The feed-forward part of a layer with many experts (arXiv:1701.06538): a router scores them for
// each token, the best few compute, and their outputs are added by weight.
//
//   scores = softmax(x · Rᵀ + b)                     one token's row [experts]
//   chosen = the largest few; w = their scores, divided by their sum if renormalised
//   y      = Σ w_e · down_e(act(gate_e(x)) · up_e(x)) + σ(x · s) · shared(x)
//
// Rows are gathered by expert, so that an expert's matrices meet all their tokens at once, and
// added back in the order of the experts' numbers. The router's dots have a fixed order of their
// own: which tokens share a step changes no bit that the products do not change.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string_view>
#include <vector>

#include "base/memory.h"
#include "base/threads.h"
#include "engine/linear.h"
#include "engine/model.h"

namespace moru {

// Memory for one step's experts, reused by one layer after the other.
class ExpertsStep {
 public:
  // Room for steps of `tokens` tokens. Error: no_space.
  ExpertsStep(const Config& config, Activations activations, size_t tokens);

  // What enters a product, for calibration: part ("ffn_down_exps"), rows [count, cols].
  using Watcher =
      std::function<void(std::string_view part, const float* x, size_t count, size_t cols)>;

  // x, out: [tokens, width]; out is overwritten and may not be x. Allocates nothing.
  void run(Pool& pool, const Experts& experts, const float* x, size_t tokens, float* out,
           const Watcher& watch);

 private:
  struct Choice {
    uint32_t expert, row;  // row: of the gathered rows
    float weight;
  };
  struct Rows {
    PageBuffer buffer;
    size_t cols = 0;
    float* row(size_t r) { return static_cast<float*>(buffer.data()) + r * cols; }
  };

  void route(Pool& pool, const Experts& experts, const float* x, size_t tokens);
  void choose(const float* scores, Choice* chosen) const;
  void make_hidden(Pool& pool, float* gate, const float* up, size_t rows, size_t hidden,
                   const Matrix& down);
  void compute(Pool& pool, const Experts& experts, const Watcher& watch);
  void add_shared(Pool& pool, const Experts& experts, const float* x, size_t tokens, float* out,
                  const Watcher& watch);

  size_t width_, count_, chosen_, shared_width_;
  bool renormalise_;
  Activation activation_;
  Rows gathered_, gate_, up_, down_;  // [tokens · chosen, …]
  Rows scores_;                       // [tokens, experts]
  std::vector<Choice> choices_;       // [tokens, chosen], by number of the expert
  std::vector<size_t> first_row_;     // [experts + 1]: where each expert's rows begin
  Operand operand_;
};

}  // namespace moru
