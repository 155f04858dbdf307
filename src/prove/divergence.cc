#include "prove/divergence.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/error.h"
#include "base/files.h"
#include "engine/prompt.h"
#include "engine/row_ops.h"

namespace moru {
namespace {

// Logits of positions [from, ids.size()) of one chunk, [ids.size() − from, vocab].
std::vector<float> chunk_logits(Engine& engine, std::span<const TokenId> ids, size_t from) {
  const size_t vocab = engine.model().config.vocab;
  std::vector<float> all((ids.size() - from) * vocab);
  KvSequence sequence = engine.cache().make_sequence();
  size_t filled = 0;
  for (size_t at = 0; at < ids.size();) {
    const size_t count = std::min(engine.step_tokens(), ids.size() - at);
    const size_t wanted = from > at ? std::min(count, from - at) : 0;
    const StepSpan span{&sequence, ids.subspan(at, count), wanted};
    engine.step({&span, 1}, [&](size_t, size_t rows, float* logits) {
      std::copy_n(logits, rows * vocab, all.data() + filled * vocab);
      filled += rows;
    });
    at += count;
  }
  return all;
}

struct Position {
  double kld, nll, reference_nll;
  bool same_top;
};

Position compare_rows(Floats model, Floats reference, TokenId next) {
  const double lse = double{log_sum_exp(model)}, reference_lse = double{log_sum_exp(reference)};
  double kld = 0;
  for (size_t i = 0; i < model.size(); ++i) {
    const double log_p = double{reference[i]} - reference_lse;
    kld += std::exp(log_p) * (log_p - (double{model[i]} - lse));
  }
  const auto top = [](Floats row) {
    return std::max_element(row.begin(), row.end()) - row.begin();
  };
  const auto target = static_cast<size_t>(next);
  return {.kld = kld,
          .nll = lse - double{model[target]},
          .reference_nll = reference_lse - double{reference[target]},
          .same_top = top(model) == top(reference)};
}

double quantile(const std::vector<double>& sorted, double share) {
  const double at = share * static_cast<double>(sorted.size() - 1);
  const auto low = static_cast<size_t>(at);
  const size_t high = std::min(low + 1, sorted.size() - 1);
  return sorted[low] + (at - static_cast<double>(low)) * (sorted[high] - sorted[low]);
}

}  // namespace

Divergence divergence(Engine& model, Engine& reference, const ModelFiles& files,
                      const std::filesystem::path& text, const DivergenceOptions& options) {
  const size_t vocab = model.model().config.vocab;
  if (reference.model().config.vocab != vocab)
    throw Error(ErrorKind::bad_input, {.where = "--reference",
                                       .what = fmt::format("has {} tokens, not {}",
                                                           reference.model().config.vocab, vocab),
                                       .cure = "compare models of one vocabulary"});
  const std::vector<TokenId> ids = encode_text(files, read_file(text));
  const size_t chunks = std::min(options.chunks, ids.size() / options.chunk);
  if (chunks == 0)
    throw Error(
        ErrorKind::bad_input,
        {.where = text.string(),
         .what = fmt::format("has {} tokens, less than one chunk of {}", ids.size(), options.chunk),
         .cure = "give a longer text"});

  const size_t first = options.chunk / 2, scored = options.chunk - 1 - first;
  std::vector<Position> positions(chunks * scored);
  for (size_t c = 0; c < chunks; ++c) {
    const std::span<const TokenId> stored(ids.data() + c * options.chunk, options.chunk);
    std::vector<TokenId> fed(stored.begin(), stored.end());
    if (files.tokenizer.adds_bos() && files.tokenizer.bos()) fed[0] = *files.tokenizer.bos();
    const std::vector<float> a = chunk_logits(model, fed, first);
    const std::vector<float> b = chunk_logits(reference, fed, first);
    model.pool().each(scored, [&](size_t i) {
      positions[c * scored + i] = compare_rows(
          {a.data() + i * vocab, vocab}, {b.data() + i * vocab, vocab}, stored[first + i + 1]);
    });
  }

  Divergence result{.positions = positions.size()};
  const double n = static_cast<double>(positions.size());
  std::vector<double> klds;
  double square = 0, nll = 0, reference_nll = 0, same = 0;
  for (const Position& p : positions) {
    klds.push_back(p.kld);
    result.mean += p.kld / n;
    square += p.kld * p.kld / n;
    nll += p.nll / n;
    reference_nll += p.reference_nll / n;
    same += p.same_top ? 1 / n : 0;
  }
  std::sort(klds.begin(), klds.end());
  result.mean_error = std::sqrt(std::max(0.0, square - result.mean * result.mean) / (n - 1));
  result.median = quantile(klds, 0.5);
  result.p99 = quantile(klds, 0.99);
  result.max = klds.back();
  result.same_top = same;
  result.perplexity = std::exp(nll);
  result.reference_perplexity = std::exp(reference_nll);
  return result;
}

}  // namespace moru
