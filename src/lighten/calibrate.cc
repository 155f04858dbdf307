#include "lighten/calibrate.h"

#include <algorithm>
#include <array>
#include <optional>

#include "base/error.h"

namespace moru {
namespace {

// Weights that meet the same input as the one that the engine names.
constexpr std::array<std::array<std::string_view, 2>, 6> kSharedInputs = {{
    {".attn_q.weight", ".attn_k.weight"},
    {".attn_q.weight", ".attn_v.weight"},
    {".attn_q.weight", ".attn_qkv.weight"},
    {".ffn_gate.weight", ".ffn_up.weight"},
    {".ffn_gate_exps.weight", ".ffn_up_exps.weight"},
    {".ffn_gate_shexp.weight", ".ffn_up_shexp.weight"},
}};

// Tokens at the end of a sequence whose final state is counted for the head: the head is the
// dearest product of a small model, and answers stand at the end.
constexpr size_t kHeadTokens = 8;

struct Sums {
  std::map<std::string, std::vector<double>, std::less<>> squares;

  // Columns are split over the pool; each is summed over rows in order.
  void add(Pool& pool, std::string_view weight, const float* x, size_t rows, size_t cols,
           const std::vector<bool>& skip) {
    auto& sums = squares.try_emplace(std::string(weight), cols, 0.0).first->second;
    constexpr size_t kColumns = 64;
    pool.each((cols + kColumns - 1) / kColumns, [&](size_t item) {
      const size_t end = std::min(cols, (item + 1) * kColumns);
      for (size_t r = 0; r < rows; ++r) {
        if (r < skip.size() && skip[r]) continue;
        for (size_t c = item * kColumns; c < end; ++c) {
          const double v = x[r * cols + c];
          sums[c] += v * v;
        }
      }
    });
  }
};

}  // namespace

std::span<const float> Importance::of(std::string_view weight) const {
  const auto found = mean_square.find(weight);
  return found == mean_square.end() ? std::span<const float>() : found->second;
}

Importance collect_importance(Engine& engine, std::span<const std::vector<TokenId>> sequences,
                              size_t max_tokens,
                              const std::function<void(size_t, size_t)>& progress) {
  size_t total = 0;
  for (const auto& sequence : sequences) total += sequence.size();
  total = std::min(total, max_tokens);

  Sums sums;
  std::vector<bool> first_rows;  // rows of the step that open a sequence
  std::vector<bool> none;
  engine.watch_inputs([&](std::string_view weight, const float* x, size_t rows, size_t cols) {
    // Rows of an expert are those of the tokens that chose it.
    const bool in_order = weight != "output.weight" && weight.find("_exps.") == weight.npos;
    sums.add(engine.pool(), weight, x, rows, cols, in_order ? first_rows : none);
  });
  size_t done = 0, counted = 0, head_rows = 0;
  const size_t longest = std::min(engine.step_tokens(), engine.model().config.context);
  std::vector<KvSequence> held;
  std::vector<StepSpan> spans;
  size_t rows = 0;
  const auto run = [&] {
    if (spans.empty()) return;
    engine.step(spans, [&](size_t, size_t count, float*) { head_rows += count; });
    counted += rows - spans.size();
    spans.clear();
    held.clear();
    first_rows.clear();
    rows = 0;
    if (progress) progress(done, total);
  };
  held.reserve(engine.step_tokens());
  for (const auto& sequence : sequences) {
    const size_t take = std::min({sequence.size(), longest, total - done});
    if (take < 2) continue;
    if (rows + take > engine.step_tokens()) run();
    held.push_back(engine.cache().make_sequence());
    spans.push_back(
        {&held.back(), std::span(sequence).first(take), take - std::min(take - 1, kHeadTokens)});
    first_rows.resize(rows + take, false);
    first_rows[rows] = true;
    rows += take;
    done += take;
  }
  run();
  engine.watch_inputs({});
  if (counted == 0)
    throw Error(ErrorKind::bad_input, {.where = "calibration",
                                       .what = "has no text of two tokens or more",
                                       .cure = "give pairs or text that the model will work on"});

  Importance importance{.tokens = counted};
  for (auto& [weight, squares] : sums.squares) {
    const double n = static_cast<double>(weight == "output.weight" ? head_rows : counted);
    std::vector<float> means(squares.size());
    for (size_t c = 0; c < means.size(); ++c) means[c] = static_cast<float>(squares[c] / n);
    importance.mean_square[weight] = std::move(means);
  }
  for (size_t i = 0; i < engine.model().layers.size(); ++i) {
    const std::string block = "blk." + std::to_string(i);
    for (const auto& [from, to] : kSharedInputs)
      if (const auto found = importance.mean_square.find(block + std::string(from));
          found != importance.mean_square.end())
        importance.mean_square[block + std::string(to)] = found->second;
  }
  if (engine.model().config.tied_head)
    importance.mean_square["token_embd.weight"] = importance.mean_square["output.weight"];
  return importance;
}

}  // namespace moru
