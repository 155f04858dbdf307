#include "engine/draft.h"

#include <algorithm>
#include <bit>

namespace moru {

LookupDraft::LookupDraft(size_t most_tokens) {
  constexpr size_t kMostSlots = 1 << 16;
  ends_.resize(std::min(std::bit_ceil(2 * most_tokens + 1), kMostSlots));
}

size_t LookupDraft::slot_of(const TokenId* gram) const {
  uint64_t hash = 0;
  for (size_t i = 0; i < kGram; ++i) {
    hash = (hash ^ static_cast<uint64_t>(gram[i])) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 32;
  }
  return hash & (ends_.size() - 1);
}

std::span<const TokenId> LookupDraft::find(std::span<const TokenId> text, size_t most) {
  // All grams but the last, which is what is looked for.
  for (size_t end = std::max(indexed_ + 1, kGram); end < text.size(); ++end) {
    ends_[slot_of(&text[end - kGram])] = static_cast<uint32_t>(end);
    indexed_ = end;
  }
  if (text.size() < kGram || most == 0) return {};
  const std::span<const TokenId> last = text.last(kGram);
  const size_t at = ends_[slot_of(last.data())];
  if (at == 0 || !std::equal(last.begin(), last.end(), &text[at - kGram])) return {};
  return text.subspan(at, std::min(most, text.size() - at));
}

void RowCost::learn(size_t rows, double seconds) {
  if (rows == 0 || rows > kMostRows) return;
  // Follows the context's growth slowly, and a machine that has become free at once.
  double& known = seconds_[rows];
  known = known == 0 || seconds < known ? seconds : 0.9 * known + 0.1 * seconds;
}

double RowCost::seconds(size_t rows) const {
  if (rows > kMostRows) return 0;
  size_t below = rows, above = rows;
  while (below > 0 && seconds_[below] == 0) --below;
  while (above <= kMostRows && seconds_[above] == 0) ++above;
  if (below == 0 || above > kMostRows) return 0;
  if (below == above) return seconds_[rows];
  const double share = static_cast<double>(rows - below) / static_cast<double>(above - below);
  return seconds_[below] + share * (seconds_[above] - seconds_[below]);
}

double RowCost::of_more(size_t rows, size_t more) const {
  constexpr double kGuess = 0.1;  // of a step, a row
  const double without = seconds(rows), with = seconds(rows + more);
  if (without == 0 || with == 0) return kGuess * static_cast<double>(more);
  return std::max(with / without - 1, 0.0);
}

void DraftAccount::settle(size_t drafted, size_t right, double cost) {
  balance_ += drafted == 0 ? kEarned : static_cast<double>(right) - cost;
  balance_ = std::min(balance_, kMost);
  if (drafted > 0) length_ = right == drafted ? kLongest : kShortest;
}

}  // namespace moru
