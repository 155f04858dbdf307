// Drafts without a draft model: answers often repeat what stands in their prompt. Where an answer's
// last tokens stood before, what followed them there is computed along with the next token; the
// logits then tell how much of it the model says too.
//
// The tokens chosen are those that would be chosen without, since logits are the same bits beside
// any others (exact profile). What changes is time, so a draft must pay: each answer has an account
// of the steps that its drafts saved and cost, by the measured times of steps.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "formats/tokenizer.h"

namespace moru {

// What followed the last tokens of a text when they stood there before.
class LookupDraft {
 public:
  // For a text of at most so many tokens; longer ones forget some of what they had.
  explicit LookupDraft(size_t most_tokens);
  // At most `most` tokens to come after `text`, which has grown since the last call; views `text`.
  std::span<const TokenId> find(std::span<const TokenId> text, size_t most);

 private:
  static constexpr size_t kGram = 3;  // tokens that must be the same
  size_t slot_of(const TokenId* gram) const;

  // By gram: where its last occurrence ended. Grams that fall together overwrite each other.
  std::vector<uint32_t> ends_;
  size_t indexed_ = 0;
};

// Seconds of steps by the rows that they compute, as measured; for small steps of answers alone.
class RowCost {
 public:
  static constexpr size_t kMostRows = 32;
  void learn(size_t rows, double seconds);
  // What `more` rows add to a step of `rows`, as a share of that step. Before anything is known, a
  // guess.
  double of_more(size_t rows, size_t more) const;

 private:
  double seconds(size_t rows) const;  // 0: not known
  std::array<double, kMostRows + 1> seconds_{};
};

// How long an answer's next draft may be.
class DraftAccount {
 public:
  static constexpr size_t kShortest = 4, kLongest = 8;
  // `cost` of a draft of kShortest tokens, in steps. 0: none yet.
  size_t length(double cost) const { return balance_ >= cost ? length_ : 0; }
  // After a step: of `drafted` tokens, `right` were what the model said; they cost `cost` steps.
  void settle(size_t drafted, size_t right, double cost);

 private:
  // Steps without a draft earn 2 % of a step each: the most that drafts which never come true can
  // cost. A first try is free.
  static constexpr double kEarned = 0.02, kStart = 1, kMost = 4;
  double balance_ = kStart;
  size_t length_ = kShortest;
};

}  // namespace moru
