// What a run would learn, for people to look at before it learns: the first examples as the model
// will see them, and what may be wrong with the rest.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "tune/examples.h"
#include "tune/objective.h"

namespace moru {

// What a method learns from: of a pair both answers, one after the other.
struct CheckedExamples {
  Method method = Method::sft;
  LoadedExamples data;

  size_t a_row() const { return method == Method::dpo ? 2 : 1; }  // examples of a row
  // "chosen", "not wanted" …; empty for plain ones.
  std::string_view answer(size_t i) const;
};
// Errors: as load_examples, load_pairs and load_labelled.
CheckedExamples load_checked(Pool& pool, const ModelFiles& files, Method method,
                             LoadExamples request);

struct ShowOptions {
  bool colour = false;  // what is learnt on green, control tokens in cyan; else in [[brackets]]
  size_t width = 80;    // columns
  size_t max_ids = 64;  // token ids to list at most, from either end
};
// One example: a heading, its text, its ids. Lines of at most `width` columns.
std::string show_example(const ModelFiles& files, const ExampleView& example,
                         const std::string& file, const ShowOptions& options);

// What is odd about a data set; counts of examples where nothing else is said.
struct DataReport {
  uint64_t tokens = 0, learnt = 0;
  size_t median = 0, p95 = 0, longest = 0;  // tokens of an example
  uint64_t ends_learnt = 0;                 // a token that ends the answer is learnt, last of all
  uint64_t double_bos = 0;
  uint64_t cut_characters = 0;  // a border of what is learnt, or the end, is inside a character
  uint64_t spelled = 0;         // a message spells a control token; it is learnt as text
  uint64_t duplicates = 0;
  double tokens_per_hangul = 0;  // of the syllables; 0 where there are none
};
DataReport report_of(Pool& pool, const ModelFiles& files, const Examples& examples);

// Both, and the rows that were left out and why: lines of at most `width` columns.
std::string show_report(const ModelFiles& files, const LoadedExamples& data,
                        const DataReport& report, size_t width);

}  // namespace moru
