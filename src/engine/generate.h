// Generates answers to many requests at once (continuous batching): each step carries one token of
// every answer under way and as much of the waiting prompts as fits.
//
// Prompts that begin like one seen before take its keys and values instead of computing them, and
// wait for one that is just being computed. Under the exact profile none of this changes an answer.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/constraint.h"
#include "engine/forward.h"
#include "engine/sampling.h"
#include "formats/tokenizer.h"

namespace moru {

struct GenerationRequest {
  std::vector<TokenId> prompt;  // not empty
  size_t max_tokens = 256;
  SamplingOptions sampling;
  std::vector<TokenId> stop_ids;        // end the answer and are not part of it
  std::vector<std::string> stop_texts;  // likewise, wherever token borders fall
  // The answer is a text of this language: it ends where one does, or cut short at max_tokens.
  // Tokens that nothing else could stand for are added without asking the model, unless
  // log-probabilities are wanted.
  std::shared_ptr<const Language> language;
  const Adapter* adapter = nullptr;  // nullptr: the engine's; must outlive the generator
  // Guess at what comes from the text so far (engine/draft.h): faster where an answer repeats its
  // prompt. Takes effect under the exact profile alone, where it changes no answer.
  bool drafts = true;
  std::optional<size_t> top_logprobs;  // report each token's log-probability and this many others
};

struct TokenLogprob {
  TokenId id;
  float logprob;
  std::vector<std::pair<TokenId, float>> top;
};

enum class Finish { stop, length };

// News of one request: text that has become whole, and in the last one why it ended.
struct GenerationEvent {
  uint64_t request;
  std::string text;
  std::vector<TokenLogprob> logprobs;
  std::optional<Finish> finish;
  size_t prompt_tokens = 0, cached_tokens = 0, completion_tokens = 0;
};

struct GeneratorOptions {
  size_t sequences = 32;  // answers under way at once; others wait
  // What a step should take at most, so that a long prompt does not hold up the answers and a short
  // one gets its turn: prompts then share what the answers leave, in parts sized by what steps have
  // taken so far. 0: prompts run in order, as many tokens a step as the engine takes.
  double step_seconds = 0;
  std::function<double()> now;  // seconds; empty: the steady clock
};

// Totals since the generator was made, and what is under way.
struct GeneratorLoad {
  size_t running = 0, waiting = 0;
  size_t steps = 0, prompt_tokens = 0, cached_tokens = 0, completion_tokens = 0;
  size_t sent_back = 0;  // times that a request lost its cache to an older one
  double step_seconds = 0;
  size_t pages_used = 0, pages = 0;  // of the cache; also those kept for later prompts alone
};

class Generator {
 public:
  // Both must outlive it.
  Generator(Engine& engine, const Tokenizer& tokenizer, GeneratorOptions options = {});
  ~Generator();
  Generator(const Generator&) = delete;
  Generator& operator=(const Generator&) = delete;

  // Returns the request's number. Errors: usage (an empty prompt, one that does not fit the
  // context or the cache, sampling options out of range).
  uint64_t submit(GenerationRequest request);
  // Drops a request; no further event comes. Unknown numbers are ignored.
  void cancel(uint64_t request);
  bool busy() const;
  // Tokens guessed at so far, and how many of them the model said too.
  struct Drafted {
    size_t tokens = 0, right = 0;
  };
  Drafted drafted() const;
  GeneratorLoad load() const;
  // Gives back the cache that ended sequences hold for prompts that begin alike.
  void forget();
  // One step of the engine. Events are given in the order of submission.
  void step(const std::function<void(const GenerationEvent&)>& emit);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// All requests, to the end: answers in the order of the requests.
struct GenerationResult {
  std::string text;
  std::vector<TokenLogprob> logprobs;
  Finish finish = Finish::stop;
  size_t prompt_tokens = 0, cached_tokens = 0, completion_tokens = 0;
};
std::vector<GenerationResult> generate_all(
    Generator& generator, std::vector<GenerationRequest> requests,
    const std::function<void(size_t finished, const GenerationResult&)>& progress = {});

// Log-probability of each continuation after its prefix; equal prefixes in a row are computed once.
struct Continuation {
  std::vector<TokenId> prefix;  // not empty
  std::vector<TokenId> tokens;  // not empty
};
struct ContinuationScore {
  double logprob = 0;  // natural, summed over the continuation's tokens
  bool greedy = true;  // each token was the most likely one
};
std::vector<ContinuationScore> score_continuations(Engine& engine,
                                                   std::span<const Continuation> requests);

}  // namespace moru
