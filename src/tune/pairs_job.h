// Files of questions in, a file of preference pairs out: what `moru pairs` does.
//
//   pairs.jsonl            the pairs, one row each (tune/pairs.h)
//   pairs.samples.jsonl    every sampled answer; a killed run goes on from it to the same pairs
//   pairs.right.jsonl      a right answer to each prompt, as conversations for supervised tuning
//   pairs.validate.jsonl   the questions that no pair was made of, to validate on
#pragma once
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tune/pairs.h"

namespace moru {

struct PairsJob {
  std::vector<std::filesystem::path> questions;   // at least one
  std::vector<std::filesystem::path> evaluation;  // what pairs must not overlap with
  std::filesystem::path out;                      // pairs.jsonl
  QuestionOptions rows = {};
  PromptStyle style = {};
  PromptRules prompts = {};
  SampleOptions sampling = {};
  PairRules rules = {};
  size_t overlap_words = 13;
};

struct PairsSummary {
  size_t questions = 0;
  ChosenPrompts prompts;  // its pointers are empty: only counts and overlaps are kept
  size_t made_of = 0, held_out = 0;
  MadePairs made;                                         // likewise without the pairs
  std::filesystem::path pairs, right, samples, validate;  // validate: empty if nothing is held out
  std::string pairs_sha256;
  double seconds = 0;  // of this run
};

// All questions of several files, ids prefixed by the file's name where there is more than one.
// Errors: those of read_questions.
std::vector<Question> read_all_questions(const std::vector<std::filesystem::path>& paths,
                                         const QuestionOptions& rows);

// Errors: those of reading, sampling and writing; bad_input if no prompt is left to ask.
PairsSummary write_pairs(const PairsJob& job, Engine& engine, const ModelFiles& files,
                         const std::string& model_sha256,
                         const std::function<void(const SampleProgress&)>& progress = {});

nlohmann::ordered_json to_json(const PairsSummary& summary);
// The same as a table of at most 80 columns.
std::string table_of(const PairsSummary& summary);

}  // namespace moru
