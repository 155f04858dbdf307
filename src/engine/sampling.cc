#include "engine/sampling.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/random.h"
#include "engine/float_kernels.h"

namespace moru {
namespace {

constexpr uint64_t kSamplingStream = 0x73616d706c65;  // keeps these draws apart from all others
// Columns whose maximum and sum are taken together: a pass that seeks candidates skips those that
// hold none.
constexpr size_t kColumns = 1024;
// exp(−20) of the best's weight: what lies below cannot move a draw of 24 bits.
constexpr float kDeepest = 20;

std::span<const float> part(Floats x, size_t chunk) {
  const size_t at = chunk * kColumns;
  return x.subspan(at, std::min(kColumns, x.size() - at));
}

// The largest logit, ties to the smaller id. Sixteen running maxima, which the compiler keeps in
// vectors.
TokenId most_likely(Floats logits) {
  constexpr size_t kLanes = 16;
  float lanes[kLanes];
  std::fill(lanes, lanes + kLanes, -INFINITY);
  const size_t whole = logits.size() - logits.size() % kLanes;
  const float* x = logits.data();
  for (size_t i = 0; i < whole; i += kLanes)
    for (size_t j = 0; j < kLanes; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
  float best = *std::max_element(lanes, lanes + kLanes);
  for (size_t i = whole; i < logits.size(); ++i) best = std::max(best, x[i]);
  return static_cast<TokenId>(std::find(logits.begin(), logits.end(), best) - logits.begin());
}

template <typename C>
bool before(const C& a, const C& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

}  // namespace

void check_sampling(const SamplingOptions& o, size_t vocab) {
  const auto refuse = [](const char* field, const std::string& what) {
    throw Error(ErrorKind::usage, {.where = field, .what = what, .cure = ""});
  };
  const auto within = [&](const char* field, float value, float low, float high) {
    if (!(value >= low && value <= high))
      refuse(field, fmt::format("{} is not in [{}, {}]", value, low, high));
  };
  const auto above = [&](const char* field, float value, float low, float high) {
    if (!(value > low && value <= high))
      refuse(field, fmt::format("{} is not in ({}, {}]", value, low, high));
  };
  within("temperature", o.temperature, 0, 100);
  above("top_p", o.top_p, 0, 1);
  within("min_p", o.min_p, 0, 1);
  above("typical_p", o.typical_p, 0, 1);
  above("repetition_penalty", o.repetition_penalty, 0, 100);
  within("presence_penalty", o.presence_penalty, -2, 2);
  within("frequency_penalty", o.frequency_penalty, -2, 2);
  within("dry_multiplier", o.dry_multiplier, 0, 100);
  within("dry_base", o.dry_base, 1, 100);
  for (const auto& [id, bias] : o.logit_bias) {
    if (id < 0 || static_cast<size_t>(id) >= vocab)
      refuse("logit_bias", fmt::format("there is no token {}", id));
    if (!(std::abs(bias) <= 100))
      refuse("logit_bias", fmt::format("{} of token {} is not in [-100, 100]", bias, id));
  }
}

std::vector<TokenId> tokens_holding(const Tokenizer& tokenizer,
                                    std::span<const std::string> texts) {
  std::vector<TokenId> ids;
  for (size_t i = 0; i < tokenizer.vocab_size(); ++i) {
    const std::string bytes = tokenizer.bytes_of(static_cast<TokenId>(i));
    const auto held = [&](const std::string& text) {
      return !text.empty() && bytes.find(text) != std::string::npos;
    };
    if (std::any_of(texts.begin(), texts.end(), held)) ids.push_back(static_cast<TokenId>(i));
  }
  return ids;
}

// In the order that the field applies them: repetition first, then the counted ones.
void Sampler::penalize(std::span<float> logits, const SamplingOptions& o,
                       const SamplingContext& context) {
  counts_.resize(logits.size());
  const auto each_counted = [&](std::span<const TokenId> ids, auto&& change) {
    for (const TokenId id : ids)
      if (counts_[static_cast<size_t>(id)]++ == 0) counted_.push_back(id);
    for (const TokenId id : counted_) {
      change(logits[static_cast<size_t>(id)], static_cast<float>(counts_[static_cast<size_t>(id)]));
      counts_[static_cast<size_t>(id)] = 0;
    }
    counted_.clear();
  };
  if (o.repetition_penalty != 1) {
    each_counted(context.history, [&](float& logit, float) {
      logit = logit > 0 ? logit / o.repetition_penalty : logit * o.repetition_penalty;
    });
  }
  if (o.presence_penalty != 0 || o.frequency_penalty != 0) {
    each_counted(context.history.subspan(context.prompt_tokens), [&](float& logit, float count) {
      logit -= o.presence_penalty + o.frequency_penalty * count;
    });
  }
  if (o.dry_multiplier > 0) penalize_repetitions(logits, o, context);
  for (const auto& [id, bias] : o.logit_bias) logits[static_cast<size_t>(id)] += bias;
}

// For each place i of the history, how many tokens before it are also the history's last ones: the
// Z function of the history read backwards. The token at i would go on with that repetition.
void Sampler::penalize_repetitions(std::span<float> logits, const SamplingOptions& o,
                                   const SamplingContext& context) {
  const std::span<const TokenId> h = context.history;
  const auto breaks = [&](TokenId id) {
    return std::binary_search(context.breakers.begin(), context.breakers.end(), id);
  };
  size_t unbroken = 0;  // no repetition is longer than the tokens since the last breaker
  while (unbroken < h.size() && !breaks(h[h.size() - 1 - unbroken])) ++unbroken;
  if (unbroken < o.dry_allowed_length || h.size() < 2) return;

  const auto back = [&](size_t i) { return h[h.size() - 1 - i]; };
  matches_.assign(h.size(), 0);
  size_t left = 0, right = 0;  // the match that reaches furthest
  counts_.resize(logits.size());
  for (size_t i = 1; i < h.size(); ++i) {
    size_t length = i < right ? std::min<size_t>(matches_[i - left], right - i) : 0;
    while (i + length < h.size() && back(length) == back(i + length)) ++length;
    if (i + length > right) {
      left = i;
      right = i + length;
    }
    matches_[i] = static_cast<uint32_t>(length);
    const TokenId next = back(i - 1);
    const size_t capped = std::min(length, unbroken);
    if (capped == 0 || capped < o.dry_allowed_length || breaks(next)) continue;
    int32_t& longest = counts_[static_cast<size_t>(next)];
    if (longest == 0) counted_.push_back(next);
    longest = std::max(longest, static_cast<int32_t>(capped));
  }
  for (const TokenId id : counted_) {
    const auto at = static_cast<size_t>(id);
    const double over =
        static_cast<double>(counts_[at]) - static_cast<double>(o.dry_allowed_length);
    // Bounded, so that a long repetition does not turn a bias or a mask into a NaN.
    const double penalty = double{o.dry_multiplier} * std::pow(double{o.dry_base}, over);
    logits[at] -= static_cast<float>(std::min(penalty, 1e6));
    counts_[at] = 0;
  }
  counted_.clear();
}

TokenId Sampler::choose(std::span<float> logits, const SamplingOptions& o,
                        const SamplingContext& context) {
  penalize(logits, o, context);
  if (o.temperature == 0) return most_likely(logits);

  const FloatKernels& kernels = float_kernels();
  if (o.temperature != 1)
    kernels.scale(logits.data(), logits.size(), 1 / std::max(o.temperature, 1e-5f), logits.data());
  masses_.resize((logits.size() + kColumns - 1) / kColumns);
  float best = -INFINITY;
  for (size_t c = 0; c < masses_.size(); ++c) {
    const Floats x = part(logits, c);
    kernels.exp_sum(x.data(), x.size(), nullptr, &masses_[c].max, &masses_[c].sum);
    best = std::max(best, masses_[c].max);
  }
  double total = 0;
  for (const Mass& m : masses_) total += double{m.sum} * std::exp(double{m.max} - double{best});

  const double uniform = double{Random(o.seed, kSamplingStream, context.history.size()).uniform()};
  if (o.top_k == 0 && o.top_p == 1 && o.min_p == 0 && o.typical_p == 1)
    return draw_from_all(logits, best, total, uniform);
  gather_candidates(logits, o, best, total);
  double left = uniform * keep_candidates(o, total);
  for (const Candidate& c : candidates_) {
    left -= c.weight;
    if (left < 0) return c.id;
  }
  return candidates_.back().id;
}

// In the order of ids: nothing is sorted, and only the part that the draw falls into is looked at
// twice.
TokenId Sampler::draw_from_all(Floats logits, float best, double total, double uniform) const {
  double left = uniform * total;
  size_t chunk = 0, last = 0;  // last: the last part that has weight, for what rounding leaves over
  for (; chunk < masses_.size(); ++chunk) {
    const double weight =
        double{masses_[chunk].sum} * std::exp(double{masses_[chunk].max} - double{best});
    if (weight > 0) last = chunk;
    if (left < weight) break;
    left -= weight;
  }
  if (chunk == masses_.size()) chunk = last;
  const Floats x = part(logits, chunk);
  size_t chosen = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double weight = std::exp(double{x[i]} - double{best});
    if (weight <= 0) continue;
    chosen = i;
    left -= weight;
    if (left < 0) break;
  }
  return static_cast<TokenId>(chunk * kColumns + chosen);
}

// All that may be kept, and often little more: looks ever deeper below the best until enough is
// found.
void Sampler::gather_candidates(Floats logits, const SamplingOptions& o, float best, double total) {
  // What min-p cuts off still counts where shares are taken of the candidates alone.
  const bool cut = o.min_p > 0 && o.typical_p == 1 && (o.top_p == 1 || o.top_k == 0);
  const float deepest = cut ? std::min(kDeepest, -std::log(o.min_p) + 1e-3f) : kDeepest;
  float weights[kColumns];
  // What is typical is a matter of all of them.
  for (float depth = o.typical_p < 1 && o.top_k == 0 ? deepest : std::min(4.0f, deepest);;
       depth = std::min(2 * depth, deepest)) {
    candidates_.clear();
    double mass = 0;
    for (size_t c = 0; c < masses_.size(); ++c) {
      if (masses_[c].max < best - depth) continue;
      const Floats x = part(logits, c);
      Mass again;
      float_kernels().exp_sum(x.data(), x.size(), weights, &again.max, &again.sum);
      const double factor = std::exp(double{again.max} - double{best});
      for (size_t i = 0; i < x.size(); ++i) {
        if (x[i] < best - depth) continue;
        const double weight = double{weights[i]} * factor;
        candidates_.push_back({x[i], static_cast<TokenId>(c * kColumns + i), weight});
        mass += weight;
      }
    }
    if (depth >= deepest) break;
    if (o.top_k != 0 && candidates_.size() >= o.top_k) break;
    if (o.top_k == 0 && o.typical_p == 1 && mass >= double{o.top_p} * total) break;
  }
}

// Keeps the first candidates in the order of `less` whose weights reach `wanted`, at least one;
// returns their weight. Nothing is sorted but a last few: halves are split off, each time around
// the middle one, and the kept ones stay in the order of ids.
template <typename Less>
double Sampler::keep_first(double wanted, const Less& less) {
  constexpr size_t kFew = 32;
  ranked_ = candidates_;
  auto begin = ranked_.begin(), end = ranked_.end();
  double sum = 0;
  while (static_cast<size_t>(end - begin) > kFew) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, less);
    double half = 0;
    for (auto c = begin; c != middle; ++c) half += c->weight;
    if (sum + half >= wanted) {
      end = middle;
    } else {
      sum += half;
      begin = middle;
    }
  }
  std::sort(begin, end, less);
  auto last = begin;
  for (sum += last->weight; sum < wanted && last + 1 != end; sum += last->weight) ++last;
  keep_until(*last, less);
  return sum;
}

template <typename Less>
void Sampler::keep_until(Candidate last, const Less& less) {
  std::erase_if(candidates_, [&](const Candidate& c) { return less(last, c); });
}

// Applies top-k, typical, top-p and min-p; returns the weight of what is left.
double Sampler::keep_candidates(const SamplingOptions& o, double total) {
  const auto weigh = [&] {
    double sum = 0;
    for (const Candidate& c : candidates_) sum += c.weight;
    return sum;
  };
  if (o.top_k != 0 && o.top_k < candidates_.size()) {
    ranked_ = candidates_;
    const auto last = ranked_.begin() + static_cast<ptrdiff_t>(o.top_k) - 1;
    std::nth_element(ranked_.begin(), last, ranked_.end(), before<Candidate>);
    keep_until(*last, before<Candidate>);
  }
  if (o.top_k != 0 || o.typical_p < 1) total = weigh();
  if (o.typical_p < 1) {
    // The surprise of a token is center − logit above the expected one, in nats.
    double center = 0;
    for (const Candidate& c : candidates_) center += c.weight / total * double{c.logit};
    const auto distance = [&](const Candidate& c) { return std::abs(double{c.logit} - center); };
    total = keep_first(double{o.typical_p} * total, [&](const Candidate& a, const Candidate& b) {
      const double to_a = distance(a), to_b = distance(b);
      return to_a != to_b ? to_a < to_b : before(a, b);
    });
  }
  if (o.top_p < 1) total = keep_first(double{o.top_p} * total, before<Candidate>);
  if (o.min_p > 0) {
    double most = 0;
    for (const Candidate& c : candidates_) most = std::max(most, c.weight);
    std::erase_if(candidates_,
                  [&](const Candidate& c) { return c.weight < double{o.min_p} * most; });
  }
  return weigh();
}

std::vector<std::pair<TokenId, float>> top_logits(Floats logits, size_t count) {
  count = std::min(count, logits.size());
  const auto better = [](const auto& a, const auto& b) {
    return a.second != b.second ? a.second > b.second : a.first < b.first;
  };
  std::vector<std::pair<TokenId, float>> best;  // a heap with the worst in front
  for (size_t i = 0; i < logits.size() && count > 0; ++i) {
    const std::pair<TokenId, float> entry(static_cast<TokenId>(i), logits[i]);
    if (best.size() == count) {
      if (!better(entry, best.front())) continue;
      std::pop_heap(best.begin(), best.end(), better);
      best.pop_back();
    }
    best.push_back(entry);
    std::push_heap(best.begin(), best.end(), better);
  }
  std::sort_heap(best.begin(), best.end(), better);
  return best;
}

}  // namespace moru
