// Answers that a model samples to questions, several for each, kept in a file that survives a kill:
// what `moru pairs` makes pairs of.
//
// The prompt is computed once for all answers to it, and answers to many prompts are under way at
// once. Each answer's seed is a function of the run's seed, the prompt and the answer's number, so
// under the exact profile neither batching, threads nor a resumed run change an answer.
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/forward.h"
#include "engine/model_files.h"
#include "engine/prompt.h"
#include "prove/prove.h"
#include "prove/questions.h"

namespace moru {

struct SampleOptions {
  size_t answers = 8;  // for each prompt
  double temperature = 0.8, top_p = 0.95;
  uint64_t seed = 42;
  AnswerLimits limits = {};
  size_t sequences = 32;  // under way at once: speed, not results
};

struct Sample {
  std::string text;
  double logp = 0;    // natural logarithm, mean over its tokens; the end of the turn is not counted
  size_t tokens = 0;  // of the text
  bool cut = false;   // it reached the limit
  uint64_t seed = 0;  // below 2^53, so that every reader of JSON keeps it whole
};

struct PromptSamples {
  std::string prompt_sha256;
  std::vector<Sample> samples;
  // The question's reference as this model sees it, if it has one; `seed` and `cut` say nothing.
  std::optional<Sample> reference;
};

struct SampleProgress {
  size_t prompts = 0, of = 0, answers = 0, tokens = 0;  // done; answers and tokens of this run
  double seconds = 0;                                   // of this run
};

uint64_t sample_seed(uint64_t run_seed, const std::string& prompt_sha256, size_t number);

// One entry for each question, in their order. `kept` is the file of answers; answers that it holds
// of this very model, prompts and options are not sampled again. Errors: those of prompts and of
// the file; what `progress` throws stops it, and whole windows of prompts are kept.
std::vector<PromptSamples> sample_answers(
    std::span<const Question* const> questions, Engine& engine, const ModelFiles& files,
    const std::string& model_sha256, const PromptStyle& style, const SampleOptions& options,
    const std::filesystem::path& kept,
    const std::function<void(const SampleProgress&)>& progress = {});

}  // namespace moru
