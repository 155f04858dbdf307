#include "engine/sampling.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <unordered_map>

#include "base/error.h"
#include "base/random.h"

namespace moru {
namespace {

constexpr uint64_t kSamplingStream = 0x73616d706c65;  // keeps these draws apart from all others

TokenId most_likely(Floats logits) {
  return static_cast<TokenId>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

// Penalties, in the order that the field applies them: repetition first, then the counted ones.
void apply_penalties(std::span<float> logits, const SamplingOptions& o,
                     std::span<const TokenId> history, size_t prompt_tokens) {
  if (o.repetition_penalty != 1) {
    std::unordered_map<TokenId, bool> seen;
    for (const TokenId id : history) {
      if (!seen.emplace(id, true).second) continue;
      float& logit = logits[static_cast<size_t>(id)];
      logit = logit > 0 ? logit / o.repetition_penalty : logit * o.repetition_penalty;
    }
  }
  if (o.presence_penalty != 0 || o.frequency_penalty != 0) {
    std::unordered_map<TokenId, int> counts;
    for (const TokenId id : history.subspan(prompt_tokens)) ++counts[id];
    for (const auto& [id, count] : counts)
      logits[static_cast<size_t>(id)] -=
          o.presence_penalty + o.frequency_penalty * static_cast<float>(count);
  }
  for (const auto& [id, bias] : o.logit_bias) logits[static_cast<size_t>(id)] += bias;
}

}  // namespace

void check_sampling(const SamplingOptions& o, size_t vocab) {
  const auto refuse = [](const char* field, const std::string& what) {
    throw Error(ErrorKind::usage, {.where = field, .what = what, .cure = ""});
  };
  if (!(o.temperature >= 0 && o.temperature <= 100))
    refuse("temperature", fmt::format("{} is not 0 to 100", o.temperature));
  if (!(o.top_p > 0 && o.top_p <= 1)) refuse("top_p", fmt::format("{} is not in (0, 1]", o.top_p));
  if (!(o.min_p >= 0 && o.min_p <= 1)) refuse("min_p", fmt::format("{} is not in [0, 1]", o.min_p));
  if (!(o.repetition_penalty > 0 && o.repetition_penalty <= 100))
    refuse("repetition_penalty", fmt::format("{} is not in (0, 100]", o.repetition_penalty));
  if (!(std::abs(o.presence_penalty) <= 2))
    refuse("presence_penalty", fmt::format("{} is not in [-2, 2]", o.presence_penalty));
  if (!(std::abs(o.frequency_penalty) <= 2))
    refuse("frequency_penalty", fmt::format("{} is not in [-2, 2]", o.frequency_penalty));
  for (const auto& [id, bias] : o.logit_bias) {
    if (id < 0 || static_cast<size_t>(id) >= vocab)
      refuse("logit_bias", fmt::format("there is no token {}", id));
    if (!(std::abs(bias) <= 100))
      refuse("logit_bias", fmt::format("{} of token {} is not in [-100, 100]", bias, id));
  }
}

TokenId Sampler::choose(std::span<float> logits, const SamplingOptions& o,
                        std::span<const TokenId> history, size_t prompt_tokens) {
  apply_penalties(logits, o, history, prompt_tokens);
  if (o.temperature == 0) return most_likely(logits);

  // Sorted candidates: all of them only if nothing bounds their number.
  candidates_.clear();
  const float best = *std::max_element(logits.begin(), logits.end());
  // exp(-20 / T) of the best's weight: what lies below cannot move a draw of 24 bits.
  const float floor = best - 20 * std::max(o.temperature, 0.05f);
  for (size_t i = 0; i < logits.size(); ++i)
    if (logits[i] >= floor) candidates_.push_back({logits[i], static_cast<TokenId>(i)});
  const auto before = [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
  };
  size_t kept = candidates_.size();
  if (o.top_k != 0 && o.top_k < kept) {
    std::nth_element(candidates_.begin(), candidates_.begin() + static_cast<ptrdiff_t>(o.top_k),
                     candidates_.end(), before);
    kept = o.top_k;
  }
  candidates_.resize(kept);
  std::sort(candidates_.begin(), candidates_.end(), before);

  double total = 0;
  const auto weight = [&](const Candidate& c) {
    return std::exp(double{c.logit - best} / double{o.temperature});
  };
  for (const Candidate& c : candidates_) total += weight(c);
  if (o.top_p < 1 || o.min_p > 0) {
    double sum = 0;
    kept = 0;
    for (const Candidate& c : candidates_) {
      if (kept > 0 && (sum >= double{o.top_p} * total || weight(c) < double{o.min_p})) break;
      sum += weight(c);
      ++kept;
    }
    candidates_.resize(kept);
    total = sum;
  }

  double left = double{Random(o.seed, kSamplingStream, history.size()).uniform()} * total;
  for (const Candidate& c : candidates_) {
    left -= weight(c);
    if (left < 0) return c.id;
  }
  return candidates_.back().id;
}

std::vector<std::pair<TokenId, float>> top_logits(Floats logits, size_t count) {
  std::vector<std::pair<TokenId, float>> all;
  for (size_t i = 0; i < logits.size(); ++i) all.emplace_back(static_cast<TokenId>(i), logits[i]);
  count = std::min(count, all.size());
  std::partial_sort(all.begin(), all.begin() + static_cast<ptrdiff_t>(count), all.end(),
                    [](const auto& a, const auto& b) {
                      return a.second != b.second ? a.second > b.second : a.first < b.first;
                    });
  all.resize(count);
  return all;
}

}  // namespace moru
