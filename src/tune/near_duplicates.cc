#include "tune/near_duplicates.h"

#include <algorithm>
#include <array>
#include <unordered_map>

#include "base/error.h"
#include "base/text.h"
#include "prove/checks.h"

namespace moru {
namespace {

constexpr size_t kShingle = 5;  // characters
constexpr size_t kBands = 16, kRows = 4;
constexpr size_t kCommonFrom = 20;  // texts, from which on what a tenth of them share is left out

// The finaliser of SplitMix64 (Steele et al. 2014): every bit of x moves half of the result's.
uint64_t mixed(uint64_t x) {
  x += 0x9E3779B97F4A7C15;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
  x = (x ^ x >> 27) * 0x94D049BB133111EB;
  return x ^ x >> 31;
}

// Sorted hashes of the shingles, each once; a text shorter than one is its own.
std::vector<uint64_t> shingles_of(std::u32string_view letters) {
  std::vector<uint64_t> shingles;
  const size_t length = std::min(kShingle, letters.size());
  for (size_t at = 0; at + length <= letters.size() && length > 0; ++at) {
    uint64_t hash = 0;
    for (size_t i = 0; i < length; ++i) hash = mixed(hash ^ letters[at + i]);
    shingles.push_back(hash);
  }
  std::sort(shingles.begin(), shingles.end());
  shingles.erase(std::unique(shingles.begin(), shingles.end()), shingles.end());
  return shingles;
}

void leave_out_common(std::vector<std::vector<uint64_t>>& sets) {
  if (sets.size() < kCommonFrom) return;
  std::unordered_map<uint64_t, size_t> texts_with;
  for (const auto& set : sets)
    for (const uint64_t shingle : set) ++texts_with[shingle];
  for (auto& set : sets)
    std::erase_if(set, [&](uint64_t shingle) { return texts_with[shingle] > sets.size() / 10; });
}

double jaccard(const std::vector<uint64_t>& a, const std::vector<uint64_t>& b) {
  size_t both = 0;
  for (size_t i = 0, j = 0; i < a.size() && j < b.size();) {
    if (a[i] == b[j]) {
      ++both, ++i, ++j;
    } else {
      a[i] < b[j] ? ++i : ++j;
    }
  }
  return static_cast<double>(both) / static_cast<double>(a.size() + b.size() - both);
}

// One key for each band of the signature.
std::array<uint64_t, kBands> bands_of(const std::vector<uint64_t>& shingles) {
  std::array<uint64_t, kBands> bands{};
  for (size_t band = 0; band < kBands; ++band) {
    bands[band] = band;
    for (size_t row = 0; row < kRows; ++row) {
      const uint64_t seed = mixed(band * kRows + row);
      uint64_t least = UINT64_MAX;
      for (const uint64_t shingle : shingles) least = std::min(least, mixed(shingle ^ seed));
      bands[band] = mixed(bands[band] ^ least);
    }
  }
  return bands;
}

}  // namespace

std::vector<size_t> near_duplicates(std::span<const std::string> texts, double threshold) {
  MORU_CHECK(threshold > 0 && threshold <= 1);
  std::vector<size_t> repeats(texts.size(), kNoDuplicate);
  std::vector<std::vector<uint64_t>> sets;
  std::unordered_map<std::string, size_t> first_with;
  for (size_t i = 0; i < texts.size(); ++i) {
    std::string text = normalise_answer(texts[i], true);
    sets.push_back(shingles_of(utf32_from_utf8(text)));
    const auto [first, is_new] = first_with.try_emplace(std::move(text), i);
    if (!is_new) repeats[i] = first->second;
  }
  leave_out_common(sets);
  std::unordered_map<uint64_t, std::vector<size_t>> with_band;
  for (size_t i = 0; i < texts.size(); ++i) {
    if (repeats[i] != kNoDuplicate || sets[i].empty()) continue;
    const auto bands = bands_of(sets[i]);
    std::vector<size_t> candidates;
    for (const uint64_t band : bands)
      if (const auto found = with_band.find(band); found != with_band.end())
        candidates.insert(candidates.end(), found->second.begin(), found->second.end());
    std::sort(candidates.begin(), candidates.end());
    candidates.erase(std::unique(candidates.begin(), candidates.end()), candidates.end());
    const auto alike = std::find_if(candidates.begin(), candidates.end(), [&](size_t earlier) {
      return jaccard(sets[i], sets[earlier]) >= threshold;
    });
    if (alike != candidates.end()) {
      repeats[i] = *alike;
      continue;
    }
    for (const uint64_t band : bands) with_band[band].push_back(i);
  }
  // An equal text came before its first one was found to be near another.
  for (size_t i = 0; i < texts.size(); ++i)
    if (repeats[i] != kNoDuplicate && repeats[repeats[i]] != kNoDuplicate)
      repeats[i] = repeats[repeats[i]];
  return repeats;
}

}  // namespace moru
