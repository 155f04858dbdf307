// The regression gate: a changed model against the one before it, and a refusal where it lost more
// than its tolerance. A model tuned to win on one task may stop following instructions or ending
// its answers; the model that led the Open LLM Leaderboard in March 2024 followed 1 % of them.
//
//   what is measured                                   refused when it
//   share of right answers to each file of questions   falls
//   share of instructions followed (instructions.h)    falls
//   share of answers that end by themselves            falls
//   mean tokens of answers to instructions             is another by more than a factor
//   loss on plain text, nats per token                 rises
//
// by more than the tolerance and by more than so many standard errors of the paired difference, so
// that few questions do not refuse by chance.
#pragma once
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "prove/engine_answerer.h"

namespace moru {

struct GateOptions {
  double tolerance = 0.01;  // of a share: one point
  double standard_errors = 2;
  double loss_tolerance = 0.05;  // nats per token
  double length_factor = 2;
  AnswerLimits limits = {};
  size_t instruction_tokens = 128;  // longest answer to an instruction
  std::filesystem::path text = {};  // plain text for the loss; empty: general_passages()
  size_t text_chunks = 64;          // of 256 tokens, at most
};
// Error usage for a tolerance that cannot be meant.
void check(const GateOptions& options);

// One model, as far as the gate looks.
struct GateMeasures {
  std::string name, model_sha256;
  std::vector<Results> scores;  // one for each set of questions
  Results instructions;
  std::vector<double> losses;  // mean −log p of each passage, nats per token
  double seconds = 0;
};
// `kept`: a folder for the answers, from which a killed run goes on; empty: none.
GateMeasures measure_for_gate(const std::vector<QuestionSet>& questions, std::string name,
                              std::string model_sha256, Engine& engine, const ModelFiles& files,
                              const PromptStyle& style, const GateOptions& options,
                              const std::filesystem::path& kept = {},
                              const std::function<void(const ProveProgress&)>& progress = {});

struct GateRow {
  enum class Kind { share, tokens, nats } kind = Kind::share;
  std::string name;
  size_t count = 0;  // questions, answers or passages
  double before = 0, after = 0;
  Interval change;     // 95 %, paired
  double allowed = 0;  // the largest loss that passes: of share, a factor, of nats
  bool refused = false;
};
struct GateVerdict {
  std::string before, after;  // names
  std::vector<GateRow> rows;
  bool accepted = true;
  std::vector<std::string> reasons = {};  // one for each refused row
};
// Error bad_input if the two were not asked the same.
GateVerdict judge_gate(const GateMeasures& before, const GateMeasures& after,
                       const std::vector<QuestionSet>& questions, const GateOptions& options);

nlohmann::ordered_json to_json(const GateVerdict& verdict);
// At most 80 columns.
std::string table_of(const GateVerdict& verdict);

// A model at the end of a chain of accepted ones: against the one before it, and against the one
// that the chain began with, since losses that each pass may add up. Both must hold.
struct ChainVerdict {
  GateVerdict last;
  std::optional<GateVerdict> base;  // where that is another model than the last

  bool accepted() const { return last.accepted && (!base || base->accepted); }
  std::vector<std::string> reasons() const;  // those of `base` say so
};
ChainVerdict judge_chain(const GateMeasures& base, const GateMeasures& last,
                         const GateMeasures& after, const std::vector<QuestionSet>& questions,
                         const GateOptions& options);
// {"accepted", "reasons", "gate", "gate_since_base"}; the last is null where nothing was between.
nlohmann::ordered_json to_json(const ChainVerdict& verdict);
// One table, or two with headings.
std::string table_of(const ChainVerdict& verdict);

}  // namespace moru
