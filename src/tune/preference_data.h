// Rows that say which answer is better (rows.h), as token ids. Conversations are rendered and
// tokenised by ExampleMaker; only the last answer is learnt, whatever
// the options say.
#pragma once
#include <cstdint>
#include <filesystem>
#include <vector>

#include "tune/examples.h"

namespace moru {

struct PreferenceExample {
  Example chosen, rejected;  // each with its prompt; `trained` marks the answer
  size_t shared = 0;         // tokens at the start that are the same and stand before both answers

  size_t tokens() const { return chosen.ids.size() + rejected.ids.size() - shared; }
};
struct LabelledExample {
  Example example;
  bool desirable = true;
};

template <typename T>
struct Preferences {
  std::vector<T> examples;
  DataCounts counts;
  std::vector<FileProblem> problems;
};

// Rows of all sources, in order. Pairs whose answers are the same, or of which truncation leaves
// nothing, are dropped and counted. Errors: as load_examples; usage for a source with a weight or a
// number of samples, which pairs do not know.
Preferences<PreferenceExample> load_pairs(const ModelFiles& files, const LoadExamples& request);
Preferences<LabelledExample> load_labelled(const ModelFiles& files, const LoadExamples& request);

// How many tokens two documents can share: their common start, less the token before either's first
// learnt one, which predicts different tokens in each.
size_t shared_tokens(const Example& a, const Example& b);

}  // namespace moru
