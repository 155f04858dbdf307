// Asks a model every question, judges the answers, and keeps each of them in a file that survives a
// kill: run again, what is answered is not asked again.
//
// The results file is JSON Lines: a header that says what was asked of which model, then one line
// for each answer as it came. A partial last line is what a kill leaves, and is dropped.
#pragma once
#include <cstddef>
#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "prove/questions.h"
#include "prove/statistics.h"

namespace moru {

// ---- the model under test ----

struct AnswerLimits {
  size_t max_tokens = 256;
  std::vector<std::string> stop = {};  // an answer ends before the first of these
};

struct Reply {
  std::string text;
  size_t tokens_in = 0, tokens_out = 0;
  bool cut = false;  // it reached max_tokens
};

// Log-probability of each choice as the whole answer to the question: natural logarithm, summed
// over the choice's tokens, the end of the answer included where the model's template has one.
struct ChoiceReply {
  std::vector<double> logprobs;
  size_t tokens_in = 0, tokens_out = 0;
};

using QuestionBatch = std::span<const Question* const>;

// How prove() reaches a model. Both calls answer every question of the batch, in its order, and
// deterministically (greedy).
struct Answerer {
  std::string name;  // "base", "Q4_K": for messages and reports
  std::string model_sha256;
  std::string engine;  // all else that decides answers: numeric profile, template's hash …
  size_t batch = 32;   // questions in one call
  size_t threads = 0;  // that answer in this process; 0: the answers come from elsewhere
  std::function<std::vector<Reply>(QuestionBatch, const AnswerLimits&)> generate;
  std::function<std::vector<ChoiceReply>(QuestionBatch)> score;
};

// ---- results ----

// What a results file is the result of. Answers are taken up again only if all of it is equal.
struct ResultsKey {
  std::string model_sha256, engine, asked_sha256;
  AnswerLimits limits = {};
  ChoiceScore choice_score = ChoiceScore::sum;
};

struct ItemResult {
  std::string id, prompt_sha256;
  std::string answer;  // the text, or the chosen choice
  bool correct = false;
  std::string reason = {};  // why not
  std::vector<double> logprobs = {};
  size_t tokens_in = 0, tokens_out = 0;
  bool cut = false;
  double seconds = 0;  // its share of its batch's time of the machine (base/clock.h)
};

struct Results {
  std::string name;  // the model's
  ResultsKey key;
  std::vector<ItemResult> items;
};

struct ProveProgress {
  size_t done = 0, total = 0, correct = 0;
  size_t tokens = 0;   // in and out, of this run
  double seconds = 0;  // wall time of this run
};

struct ProveOptions {
  AnswerLimits limits = {};
  ChoiceScore choice_score = ChoiceScore::sum;
  // Where the answers are kept; empty: nowhere.
  std::filesystem::path results = {};
  // What to do with a results file of another model, other questions or other settings: begin anew
  // or refuse.
  bool replace_other = false;
  // Called after each batch; may throw to stop, and what was answered is kept.
  std::function<void(const ProveProgress&)> progress = {};
};

// Items come in the order of the questions. Errors: those of reading and writing the results file;
// usage if it belongs to something else.
Results prove(const QuestionSet& questions, const Answerer& model, const ProveOptions& options);

// Errors: not_found, io; bad_input naming file and line.
Results read_results(const std::filesystem::path& path);

// ---- what results say ----

struct Tally {
  size_t correct = 0, total = 0;
  Interval interval;  // Wilson, 95 %
  size_t tokens_in = 0, tokens_out = 0;
  size_t cut = 0;      // answers that reached max_tokens
  double seconds = 0;  // of the machine, answering

  double accuracy() const;           // 0 if there are no questions, as are the rates
  double tokens_per_second() const;  // in and out
  double answers_per_second() const;
  // What 1,000 answers cost on a machine of this price, one after another as measured. An
  // unmeasured (zero) time costs nothing.
  double usd_per_1000(double machine_usd_per_hour) const;
};
Tally tally(std::span<const ItemResult> items);

// Two models on the same questions.
struct Comparison {
  PairedCounts counts;                           // a: the candidate, b: the reference
  double p = 1;                                  // McNemar, exact
  Interval difference;                           // of accuracies, candidate - reference
  Interval ratio;                                // candidate / reference
  std::vector<size_t> newly_wrong, newly_right;  // places in the candidate's items
};
// Error bad_input unless both answered the same questions.
Comparison compare(const Results& candidate, const Results& reference);

}  // namespace moru
