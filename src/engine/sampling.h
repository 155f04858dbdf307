// From logits to the next token.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "engine/row_ops.h"  // Floats
#include "formats/tokenizer.h"

namespace moru {

struct SamplingOptions {
  float temperature = 0;         // 0: the most likely token, ties to the smaller id
  size_t top_k = 0;              // keep the k most likely; 0: all
  float top_p = 1;               // keep the smallest set with this probability   arXiv:1904.09751
  float min_p = 0;               // keep those with at least min_p of the best's probability
  float repetition_penalty = 1;  // arXiv:1909.05858
  float presence_penalty = 0, frequency_penalty = 0;  // as OpenAI's API defines them
  std::vector<std::pair<TokenId, float>> logit_bias;
  uint64_t seed = 0;
};

// Error usage names the option that is out of range.
void check_sampling(const SamplingOptions& options, size_t vocab);

// Chooses tokens; keeps its scratch memory between calls.
class Sampler {
 public:
  // `history`: prompt and answer so far, `prompt_tokens` of it the prompt; penalties look at it
  // (presence and frequency at the answer alone). The draw depends on the seed and the history's
  // length alone. `logits` is overwritten where penalties or biases apply.
  TokenId choose(std::span<float> logits, const SamplingOptions& options,
                 std::span<const TokenId> history, size_t prompt_tokens);

 private:
  struct Candidate {
    float logit;
    TokenId id;
  };
  std::vector<Candidate> candidates_;
};

// The `count` most likely tokens with their logits, best first.
std::vector<std::pair<TokenId, float>> top_logits(Floats logits, size_t count);

}  // namespace moru
