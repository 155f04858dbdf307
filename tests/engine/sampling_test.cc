#include "engine/sampling.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <set>

#include "base/random.h"
#include "support.h"

using namespace moru;

namespace {

uint64_t fresh_seed() {
  return static_cast<uint64_t>(std::chrono::system_clock::now().time_since_epoch().count());
}

std::vector<float> random_logits(size_t vocab, float spread, Random& random) {
  std::vector<float> logits(vocab);
  for (float& x : logits) x = random.normal() * spread;
  return logits;
}

TokenId draw(std::vector<float> logits, SamplingOptions o, uint64_t seed) {
  static Sampler sampler;
  o.seed = seed;
  return sampler.choose(logits, o, {});
}

// The definition, slowly: probabilities of what each option leaves, in the sampler's order.
std::map<TokenId, double> kept(const std::vector<float>& logits, const SamplingOptions& o) {
  std::vector<std::pair<double, TokenId>> all;  // probability, id; best first
  double total = 0;
  const float best = *std::max_element(logits.begin(), logits.end());
  for (size_t i = 0; i < logits.size(); ++i) {
    all.emplace_back(std::exp(double{logits[i] - best} / double{o.temperature}),
                     static_cast<TokenId>(i));
    total += all.back().first;
  }
  std::stable_sort(all.begin(), all.end(),
                   [](const auto& a, const auto& b) { return a.first > b.first; });
  const auto normalize = [&] {
    double sum = 0;
    for (const auto& entry : all) sum += entry.first;
    for (auto& entry : all) entry.first /= sum;
  };
  const auto cut_at = [&](double share) {
    double sum = 0;
    size_t n = 0;
    while (n < all.size() && (n == 0 || sum < share)) sum += all[n++].first;
    all.resize(n);
    normalize();
  };
  if (o.top_k != 0 && o.top_k < all.size()) all.resize(o.top_k);
  normalize();
  if (o.typical_p < 1) {
    double entropy = 0;
    for (const auto& [p, id] : all)
      if (p > 0) entropy -= p * std::log(p);
    std::stable_sort(all.begin(), all.end(), [&](const auto& a, const auto& b) {
      return std::abs(entropy + std::log(a.first)) < std::abs(entropy + std::log(b.first));
    });
    cut_at(double{o.typical_p});
    std::stable_sort(all.begin(), all.end(),
                     [](const auto& a, const auto& b) { return a.first > b.first; });
  }
  const double least = double{o.min_p} * all.front().first;
  std::erase_if(all, [&](const auto& entry) { return entry.first < least; });
  double sum = 0;
  size_t n = 0;
  // min-p and top-p both look at the same distribution: neither renormalizes for the other.
  while (n < all.size() && (n == 0 || sum < double{o.top_p})) sum += all[n++].first;
  all.resize(n);
  normalize();
  std::map<TokenId, double> out;
  for (const auto& [p, id] : all) out[id] = p;
  return out;
}

}  // namespace

TEST_CASE("at temperature 0 the most likely token is chosen, ties to the smaller id") {
  for (const size_t vocab : {1, 15, 16, 17, 33, 1000}) {
    for (size_t at = 0; at < vocab; ++at) {
      std::vector<float> logits(vocab, -3.0f);
      logits[at] = logits.back() = -1;
      CHECK(draw(logits, {}, 0) == static_cast<TokenId>(at));
    }
  }
}

TEST_CASE("draws follow the distribution that the options leave") {
  const uint64_t seed = fresh_seed();
  MESSAGE("seed " << seed);
  Random random(seed);
  for (const size_t vocab : {3, 40, 1023, 2049}) {
    for (int round = 0; round < 12; ++round) {
      CAPTURE(vocab);
      CAPTURE(round);
      const std::vector<float> logits = random_logits(vocab, 3, random);
      SamplingOptions o;
      o.temperature = round % 3 == 0 ? 1.0f : 0.3f + random.uniform();
      if (round & 1) o.top_k = 1 + random.below(20);
      if (round & 2) o.top_p = 0.3f + 0.65f * random.uniform();
      if (round & 4) o.min_p = 0.2f * random.uniform();
      if (round & 8) o.typical_p = 0.3f + 0.65f * random.uniform();
      const std::map<TokenId, double> expected = kept(logits, o);
      constexpr size_t kDraws = 1000;
      std::map<TokenId, size_t> seen;
      for (size_t i = 0; i < kDraws; ++i) ++seen[draw(logits, o, seed + i)];
      for (const auto& [id, count] : seen) REQUIRE(expected.contains(id));
      for (const auto& [id, p] : expected) {
        // Six standard deviations of a binomial count, and one for small means.
        const double mean = p * kDraws, bound = 6 * std::sqrt(mean) + 3;
        CHECK(std::abs(static_cast<double>(seen[id]) - mean) < bound);
      }
    }
  }
}

TEST_CASE("a token of −∞ is never chosen, whatever its bias or penalty") {
  std::vector<float> logits(3000, -INFINITY);
  logits[2999] = -4;
  SamplingOptions o;
  o.logit_bias = {{5, 100.0f}};
  o.repetition_penalty = 2;
  const std::vector<TokenId> history = {5, 6, 2999, 5};
  Sampler sampler;
  for (const float temperature : {0.0f, 0.01f, 1.0f, 50.0f}) {
    for (const float top_p : {1.0f, 0.5f}) {
      o.temperature = temperature;
      o.top_p = top_p;
      std::vector<float> row = logits;
      CHECK(sampler.choose(row, o, {.history = history, .prompt_tokens = 1}) == 2999);
    }
  }
}

TEST_CASE("penalties: repetition by sign, presence and frequency in the answer alone") {
  const std::vector<TokenId> history = {0, 1, 2, 2, 1, 3};
  SamplingOptions o;
  o.repetition_penalty = 2;
  o.presence_penalty = 0.5f;
  o.frequency_penalty = 0.25f;
  o.logit_bias = {{4, 3.0f}};
  std::vector<float> logits = {4, -4, 4, 4, 4, 4};
  Sampler sampler;
  sampler.choose(logits, o, {.history = history, .prompt_tokens = 2});
  CHECK(logits == std::vector<float>{2, -8 - 0.75f, 2 - 1.0f, 2 - 0.75f, 7, 4});
}

TEST_CASE("DRY is its definition: the longest repetition that a token would go on with") {
  const uint64_t seed = fresh_seed();
  MESSAGE("seed " << seed);
  Random random(seed);
  constexpr size_t kVocab = 6;
  for (int round = 0; round < 300; ++round) {
    CAPTURE(round);
    std::vector<TokenId> h(random.below(60));
    for (TokenId& id : h) id = static_cast<TokenId>(random.below(2 + random.below(kVocab - 1)));
    SamplingOptions o;
    o.dry_multiplier = 0.5f;
    o.dry_base = 1.5f;
    o.dry_allowed_length = random.below(4);
    std::vector<TokenId> breakers;
    if (round % 2 == 1) breakers = {5};
    std::vector<float> expected(kVocab, 1.0f);
    const auto breaks = [&](TokenId id) { return !breakers.empty() && id == breakers[0]; };
    for (size_t t = 0; t < kVocab; ++t) {
      size_t longest = 0;
      for (size_t i = 0; i < h.size(); ++i) {
        if (h[i] != static_cast<TokenId>(t) || breaks(h[i])) continue;
        size_t n = 0;
        while (n < i && h[i - 1 - n] == h[h.size() - 1 - n] && !breaks(h[i - 1 - n])) ++n;
        longest = std::max(longest, n);
      }
      if (longest > 0 && longest >= o.dry_allowed_length)
        expected[t] -= 0.5f * std::pow(1.5f, static_cast<float>(longest) -
                                                 static_cast<float>(o.dry_allowed_length));
    }
    std::vector<float> logits(kVocab, 1.0f);
    Sampler sampler;
    sampler.choose(logits, o, {.history = h, .prompt_tokens = 0, .breakers = breakers});
    for (size_t t = 0; t < kVocab; ++t) {
      CAPTURE(t);
      CHECK(logits[t] == doctest::Approx(expected[t]).epsilon(1e-5));
    }
  }
}

TEST_CASE("the best logits come in order, ties to the smaller id") {
  const std::vector<float> logits = {1, 5, 5, -2, 7, 5};
  using Top = std::vector<std::pair<TokenId, float>>;
  CHECK(top_logits(logits, 3) == Top{{4, 7.0f}, {1, 5.0f}, {2, 5.0f}});
  CHECK(top_logits(logits, 0).empty());
  CHECK(top_logits(logits, 99).size() == 6);
}

TEST_CASE("an option out of range is refused by name") {
  const auto refused = [](auto&& change) {
    SamplingOptions o;
    change(o);
    return error_from([&] { check_sampling(o, 10); }).where();
  };
  CHECK(refused([](auto& o) { o.typical_p = 0; }) == "typical_p");
  CHECK(refused([](auto& o) { o.dry_multiplier = -1; }) == "dry_multiplier");
  CHECK(refused([](auto& o) { o.dry_base = 0.5f; }) == "dry_base");
  CHECK(refused([](auto& o) { o.temperature = NAN; }) == "temperature");
  CHECK(refused([](auto& o) { o.logit_bias = {{10, 1.0f}}; }) == "logit_bias");
}
