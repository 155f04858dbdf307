// Rows that say which answer is better, as token ids.
//
// Pairs: {prompt, chosen, rejected}, texts or message lists; chosen and rejected lists alone, whose
// common turns are the prompt; {instruction, input, chosen, rejected}; {conversations, chosen,
// rejected} with single turns; {instruction, input, output: [chosen, rejected]}.
// Labelled answers (KTO): {prompt, completion, label}, or kto_tag for the label.
//
// Conversations are rendered and tokenised by ExampleMaker; only the last answer is learnt.
#pragma once
#include <cstdint>
#include <filesystem>
#include <vector>

#include "tune/data.h"

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
  std::vector<RowProblem> problems;
};

// Pairs whose answers are the same, or of which truncation leaves nothing, are dropped and counted.
// Errors: as load_dataset.
Preferences<PreferenceExample> load_pairs(const std::filesystem::path& path,
                                          const ModelFiles& files, const DataOptions& options);
Preferences<LabelledExample> load_labelled(const std::filesystem::path& path,
                                           const ModelFiles& files, const DataOptions& options);

// How many tokens two documents can share: their common start, less the token before either's first
// learnt one, which predicts different tokens in each.
size_t shared_tokens(const Example& a, const Example& b);

}  // namespace moru
