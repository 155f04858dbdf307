// From logits to the next token.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "engine/row_ops.h"  // Floats
#include "formats/tokenizer.h"

namespace moru {

struct SamplingOptions {
  float temperature = 0;  // 0: the most likely token, ties to the smaller id
  size_t top_k = 0;       // keep the k most likely; 0: all
  float top_p = 1;        // keep the smallest set with this probability   arXiv:1904.09751
  float min_p = 0;        // keep those with at least min_p of the best's probability
  float typical_p = 1;    // keep those whose surprise is near the expected   arXiv:2202.00666
  float repetition_penalty = 1;                       // arXiv:1909.05858
  float presence_penalty = 0, frequency_penalty = 0;  // as OpenAI's API defines them
  // DRY: a token that would go on with a repetition of L tokens, L ≥ dry_allowed_length, loses
  // dry_multiplier · dry_base^(L − dry_allowed_length). Repetitions end at tokens whose text holds
  // one of the breakers.
  float dry_multiplier = 0, dry_base = 1.75f;  // multiplier 0: off
  size_t dry_allowed_length = 2;
  std::vector<std::string> dry_sequence_breakers = {"\n", ":", "\"", "*"};
  std::vector<std::pair<TokenId, float>> logit_bias;
  uint64_t seed = 0;
};

// Error usage names the option that is out of range.
void check_sampling(const SamplingOptions& options, size_t vocab);

// Tokens whose text holds one of `texts`, in order: what options.dry_sequence_breakers means in a
// vocabulary.
std::vector<TokenId> tokens_holding(const Tokenizer& tokenizer, std::span<const std::string> texts);

// What a choice looks back at.
struct SamplingContext {
  std::span<const TokenId> history;  // prompt and answer so far
  size_t prompt_tokens = 0;          // of the history; presence and frequency count the answer
  std::span<const TokenId> breakers = {};  // in order; for DRY
};

// Chooses tokens; keeps its scratch memory between calls.
class Sampler {
 public:
  // The order: penalties and biases, temperature, top-k, typical, top-p, min-p, then the draw,
  // which depends on the seed and the history's length alone. `logits` is overwritten. Those of −∞
  // are never chosen; one must be more.
  TokenId choose(std::span<float> logits, const SamplingOptions& options,
                 const SamplingContext& context);

 private:
  struct Candidate {
    float logit;  // over the temperature
    TokenId id;
    double weight;  // exp(logit − the best's)
  };
  // Max and Σ exp(x − max) of a part of a row.
  struct Mass {
    float max, sum;
  };

  void penalize(std::span<float> logits, const SamplingOptions& o, const SamplingContext& context);
  void penalize_repetitions(std::span<float> logits, const SamplingOptions& o,
                            const SamplingContext& context);
  TokenId draw_from_all(Floats logits, float best, double total, double uniform) const;
  void gather_candidates(Floats logits, const SamplingOptions& o, float best, double total);
  double keep_candidates(const SamplingOptions& o, double total);
  template <typename Less>
  double keep_first(double wanted, const Less& less);
  template <typename Less>
  void keep_until(Candidate last, const Less& less);

  std::vector<Candidate> candidates_;  // in the order of ids
  std::vector<Candidate> ranked_;
  std::vector<Mass> masses_;
  std::vector<int32_t> counts_;  // by token; all 0 between calls
  std::vector<TokenId> counted_;
  std::vector<uint32_t> matches_;  // DRY's, by place of the history
};

// The `count` most likely tokens with their logits, best first.
std::vector<std::pair<TokenId, float>> top_logits(Floats logits, size_t count);

}  // namespace moru
