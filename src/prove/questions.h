// A company's own questions: JSON Lines, a JSON array or CSV, one question a row.
//
//   field        meaning
//   prompt       what the user says; or
//   messages     a whole conversation, [{"role": "user", "content": "…"}, …]
//   system       the system message that stands before them
//   answer       the expected answer (text, number, boolean; for json any value), or
//   answers      several, any of which is right
//   check        exact (default) | contains | regex | number | choice (default where there are
//                choices) | json | similarity: see prove/checks.h
//   choices      the continuations that `choice` scores
//   within       for number: 0.5, or "1%"
//   ignore_case  for exact, contains, regex
//   at_least     for similarity: 0.5 unless said
//   id           names the question in results; the row's number where absent
//   category     the kind it belongs to, for quotas of pairs (tune/pairs.h)
//   reference    a good answer in full, for pairs; where absent, the first of the answers if a
//                model could give it as it stands (all checks but contains and regex)
//
// In a CSV, answers and choices are JSON arrays or texts separated by "|", messages is JSON. Other
// fields are left alone.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "formats/records.h"
#include "prove/checks.h"

namespace moru {

struct Question {
  std::string id;
  uint64_t line = 0;                // where it stands in its file
  nlohmann::ordered_json messages;  // OpenAI's shape; the last one is not the assistant's
  Expectation expected;
  std::string prompt_sha256;                  // of `messages`: equal prompts have equal hashes
  std::string category = {}, reference = {};  // may be empty
};

struct QuestionOptions {
  // Which fields to read, for files that name them otherwise.
  std::string prompt_column = "prompt", answer_column = "answer", system_column = "system";
  std::string choices_column = "choices", id_column = "id";
  // For rows that do not say it themselves.
  std::string system = {};
  std::optional<Check> check = {};
  std::string within = {};
  bool ignore_case = false;
  // At most so many questions, the ones whose prompts have the smallest hashes: a fixed random
  // sample, whatever the order of the file. 0: all.
  size_t limit = 0;
};

struct QuestionSet {
  std::string where;            // the file
  std::vector<Question> items;  // in the order of the file
  std::string file_sha256;      // of the file's bytes, for provenance
  std::string asked_sha256;  // of what is asked and expected, whatever file and flags it came from
  size_t repeated = 0;       // questions whose prompt stands in an earlier one too
};

// Error bad_input naming file, line, field and cure for the first row that is no sound question,
// for an id that stands twice, and for a file without questions; usage for bad options.
QuestionSet read_questions(const std::filesystem::path& path, const QuestionOptions& options = {});

// One row of a file. `where` names it in errors. Leaves `id` empty where the row has none.
Question question_from_row(const std::string& where, const Row& row,
                           const QuestionOptions& options = {});

// The row that question_from_row reads as this question.
nlohmann::ordered_json row_of(const Question& question);

}  // namespace moru
