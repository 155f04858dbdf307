// Training data: rows of a file become token ids and a mask of what is to be learnt, through the
// very template and tokenizer that serve the model.
//
// What a row may look like says rows.h. A conversation's answers are found by rendering it up to
// each answer and taking what the answer adds, so templates need no marks. The token that ends a
// turn is learnt too: a model that never learns it never stops.
#pragma once
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/permutation.h"
#include "engine/model_files.h"
#include "engine/prompt.h"  // kPlainTemplate
#include "engine/training.h"
#include "formats/records.h"
#include "tune/rows.h"

namespace moru {

enum class Truncation {
  keep_start,  // the end is cut off
  keep_end,    // the start is, after BOS: answers stay whole
};

struct DataOptions {
  // "{prompt}\n{completion}": a plain rendering instead of the model's chat template. Empty: the
  // chat template, or kPlainTemplate for a model that has none.
  std::string plain_template;
  std::string system;  // put before conversations that have no system message
  std::string prompt_column, completion_column;  // both or neither: the columns of a pair
  RowFormat format;                              // where no columns are named
  bool nfc =
      false;  // texts are brought to Unicode's composed form; else they are taken as they are
  size_t max_length = 1024;  // tokens
  Truncation truncation = Truncation::keep_start;
  bool last_turn_only = false;  // learn the last answer of a conversation, not all
  // Learn prompts too: all of a conversation as the template renders it at its end, whatever
  // last_turn_only says.
  bool train_on_prompt = false;
};

// One document, ready to be learnt.
struct Example {
  std::vector<TokenId> ids;
  std::vector<uint8_t> trained;  // 1: this token is learnt from those before it
  uint64_t line = 0;             // of the file
  size_t source = 0;             // which of the data sources
  uint64_t hash = 0;             // of the prompt's text: equal prompts stay on one side of a split
  uint64_t content = 0;          // of ids and mask; 0: not taken yet
  uint32_t mark = 0;             // what its method says of it: preference_data.h

  size_t trained_tokens() const;  // those with something before them
};

struct DataCounts {
  uint64_t rows = 0;            // read
  uint64_t truncated = 0;       // cut to max_length
  uint64_t without_answer = 0;  // nothing left to learn: dropped
  uint64_t bad = 0;             // not understood: dropped; see problems
  uint64_t split_by_turn = 0;   // conversations whose template rewrites earlier turns
  uint64_t without_end = 0;     // no stop token after the answer: EOS was added
  uint64_t duplicates = 0;      // examples left out because an earlier one equals them
  uint64_t not_nfc = 0;         // rows with a text that is not in composed form (Korean as jamo)
};

struct Dataset {
  std::vector<Example> examples;
  DataCounts counts;
  std::vector<RowProblem> problems;

  uint64_t tokens() const;
  uint64_t trained_tokens() const;
};

// `row` as it is learnt: with `nfc` in composed form, kept in `room` where it was not. `counts` has
// the rows that were not.
const nlohmann::ordered_json& composed_row(const nlohmann::ordered_json& row, bool nfc,
                                           nlohmann::ordered_json& room, DataCounts& counts);

// By id: whether it ends an answer.
std::vector<bool> stops_of(const ModelFiles& files);

// Renders and tokenises. Makes examples of single rows, for files and for callers with rows in
// hand.
class ExampleMaker {
 public:
  // `files` must outlive it. Error: usage, for a template without {completion}.
  ExampleMaker(const ModelFiles& files, DataOptions options);
  // Appends the examples of one row to `into`, or a problem.
  void add(const Row& row, Dataset& into) const;
  // Of one conversation in OpenAI's shape. Throws UnusableRow, and what the template throws.
  void add_conversation(const nlohmann::ordered_json& messages, const nlohmann::ordered_json& tools,
                        uint64_t line, Dataset& into) const;

 private:
  // What of a piece is learnt. An answer is, up to the token that ends it; what a template adds
  // after that is not.
  enum class Learnt { nothing, answer, all };
  // A piece of a rendering, up to byte `end` of it.
  struct Segment {
    size_t end;
    Learnt learnt;
  };
  void add_segments(const PromptText& whole, std::span<const Segment> segments, uint64_t line,
                    uint64_t hash, Dataset& into) const;
  const ModelFiles* files_;
  DataOptions options_;
  std::vector<bool> stops_;  // by id
};

// Errors: those of RecordReader; bad_input when no row of the file can be used.
Dataset load_dataset(const std::filesystem::path& path, const ModelFiles& files,
                     const DataOptions& options);

// Error bad_input: nothing of the file can be used, because of `first` or because nothing is left.
[[noreturn]] void refuse_unusable(const std::filesystem::path& path, const DataCounts& counts,
                                  const RowProblem* first);

// The order of one epoch, a permutation of [0, count).
Permutation epoch_order(size_t count, uint64_t seed, uint64_t epoch);

// Deals documents of these lengths to as few batches as best-fit decreasing finds, each at most
// `capacity` tokens (longer documents get a batch of their own). Lists indices into `lengths`.
std::vector<std::vector<uint32_t>> pack(std::span<const size_t> lengths, size_t capacity);

}  // namespace moru
