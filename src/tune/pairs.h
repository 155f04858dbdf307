// Preference pairs from a model's own answers: rejected is an answer of its own that a check finds
// wrong, chosen is a right one of its own, else the reference. The idea is Rhea's (self-generated
// dataset creation, 2024) and SPIN's (arXiv:2401.01335); own right answers as in Iterative RPO
// (arXiv:2404.19733).
//
//   questions → choose_prompts → samples (tune/samples.h) → make_pairs → pair_row
//
// All of it is a function of its inputs: no clock, no threads, no random numbers beside the
// samples'.
#pragma once
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "prove/questions.h"
#include "tune/contamination.h"
#include "tune/samples.h"

namespace moru {

// ---- which prompts are asked ----

struct PromptRules {
  double near_duplicate = 0.8;     // Jaccard, tune/near_duplicates.h; above 1: only equal prompts
  double validate_fraction = 0.1;  // share of the prompts, by hash, that no pair is made of
};

struct ChosenPrompts {
  std::vector<const Question*> make, validate;  // in the order of the questions
  size_t repeated = 0;                          // prompts that stand before
  size_t near = 0;                              // that nearly repeat one with the same answer
  size_t contaminated = 0;                      // that overlap with evaluation text
  std::vector<std::string> overlaps = {};       // "id: words", the first few
};
ChosenPrompts choose_prompts(std::span<const Question> questions, const EvaluationTexts& evaluation,
                             const PromptRules& rules);

// ---- pairs ----

// Which wrong answers are kept, by their mean log-probability against the mean of all answers.
// Rhea's card has below.
enum class RejectedFilter { all, logp_below_mean, logp_above_mean };
const char* name_of(RejectedFilter filter);
std::optional<RejectedFilter> rejected_filter_named(std::string_view name);

struct PairRules {
  RejectedFilter filter = RejectedFilter::all;
  size_t max_per_prompt = 2;
  size_t max_per_category = 0;  // 0: no quota; else a fixed random sample of so many
  double max_length_ratio = 2;  // of the longer answer's tokens to the shorter's
  double near_duplicate = 0.8;  // among the wrong answers to one prompt
  // Pairs whose chosen answer is already so much more likely (summed log p, nats) are left out.
  std::optional<double> max_margin = {};
};

struct Pair {
  const Question* question = nullptr;
  Sample chosen, rejected;
  std::optional<size_t> chosen_number;  // of the own answer; nullopt: the reference
  size_t rejected_number = 0;
  std::string reason;  // why the rejected one is wrong
};

// Where prompts and answers went. Every wrong answer is counted once in the list after `wrong`.
struct PairCounts {
  size_t prompts = 0, always_right = 0, sometimes_right = 0, never_right = 0;
  size_t answers = 0, right = 0, wrong = 0;
  size_t cut = 0, empty = 0, repeated = 0;  // cut off at the limit, no text, like another one
  size_t without_chosen = 0;                // no right answer and no reference
  size_t by_logp = 0, by_length = 0, by_margin = 0;
  size_t over_prompt = 0, over_category = 0;
  size_t pairs = 0, chosen_own = 0;
};
struct MadePairs {
  std::vector<Pair> pairs;  // in the order of the questions
  PairCounts counts;
  std::map<std::string, PairCounts> by_category;
  double mean_logp = 0;  // of all answers, what the filter compares with
};
// questions[i] has samples[i].
MadePairs make_pairs(std::span<const Question* const> questions,
                     std::span<const PromptSamples> samples, const PairRules& rules);

// Whether a sampled answer is right, by the question's check.
Verdict judge_sample(const Expectation& expected, std::string_view answer);

// TRL's conversational preference row, with where it came from:
//   {"prompt": [messages], "chosen": [message], "rejected": [message], "provenance": {…}}
struct Provenance {
  std::string model_sha256, engine;
  SampleOptions sampling;
};
nlohmann::ordered_json pair_row(const Pair& pair, const Provenance& from);

// Right answers as conversations to learn, one for each prompt: an own one (rejection-sampling
// fine-tuning, arXiv:2308.01825), else the reference; none for a prompt that has neither.
std::vector<nlohmann::ordered_json> right_rows(std::span<const Question* const> questions,
                                               std::span<const PromptSamples> samples);

}  // namespace moru
