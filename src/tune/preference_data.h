// Rows that say which answer is better (rows.h), as token ids. Conversations are rendered and
// tokenised by ExampleMaker; only the last answer is learnt, whatever the options say.
//
// They are kept as other examples are (examples.h), a pair as two that follow each other. Lists of
// them stay whole when they are split: both have the prompt's hash.
#pragma once
#include <cstdint>
#include <utility>

#include "tune/examples.h"

namespace moru {

// A pair of a list; lives as long as its store.
struct PreferenceView {
  ExampleView chosen, rejected;  // each with its prompt; `trained` marks the answer
  size_t shared = 0;  // tokens at the start that are the same and stand before both answers

  size_t tokens() const { return chosen.ids.size() + rejected.ids.size() - shared; }
};
class PreferenceList {
 public:
  PreferenceList() = default;
  explicit PreferenceList(Examples examples) : examples_(std::move(examples)) {}

  const Examples& examples() const { return examples_; }
  size_t size() const { return examples_.size() / 2; }
  PreferenceView operator[](size_t i) const;
  // Of whole pairs: what they take in a batch.
  ExampleStats stats() const;

 private:
  Examples examples_;
};

// An answer that is wanted or not.
struct LabelledView {
  ExampleView example;
  bool desirable = true;
  size_t prompt = 0;  // tokens before the answer
};
class LabelledList {
 public:
  LabelledList() = default;
  explicit LabelledList(Examples examples) : examples_(std::move(examples)) {}

  const Examples& examples() const { return examples_; }
  size_t size() const { return examples_.size(); }
  LabelledView operator[](size_t i) const;
  // The prompt of a row with the answer of the row before, the last one's for the first: what KTO
  // estimates the divergence on. At most `max_length` tokens.
  Example mismatched(size_t i, size_t max_length) const;
  // Tokens of the longest row, mismatched ones too.
  size_t longest(size_t max_length) const;

 private:
  Examples examples_;
};

// Rows of all sources, in order: of a pair the chosen answer and then the other. Pairs whose
// answers are the same, or of which truncation leaves nothing, are dropped and counted. Errors: as
// load_examples; usage for a source with a weight or a number of samples, which pairs do not know.
LoadedExamples load_pairs(Pool& pool, const ModelFiles& files, const LoadExamples& request);
LoadedExamples load_labelled(Pool& pool, const ModelFiles& files, const LoadExamples& request);

// How many tokens two documents can share: their common start, less the token before either's first
// learnt one, which predicts different tokens in each.
size_t shared_tokens(const Example& a, const Example& b);

}  // namespace moru
