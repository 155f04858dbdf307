// Texts that say almost the same: their sets of five-character shingles overlap (Jaccard's
// measure). MinHash finds the few that are worth comparing: 64 minima in 16 bands of 4, so that a
// pair of similarity 0.8 is missed once in ten thousand (Broder 1997, "On the resemblance and
// containment of documents"; Leskovec et al., Mining of Massive Datasets, chapter 3). What it finds
// is compared exactly.
//
// Prompts often share an instruction that would make all of them alike. So shingles that stand in
// more than a tenth of the texts do not count, from twenty texts on.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace moru {

inline constexpr size_t kNoDuplicate = SIZE_MAX;

// For each text the place of an earlier one that it repeats, itself no repetition, or kNoDuplicate.
// Case, spaces and Unicode form do not count. threshold in (0, 1]; at 1 only equal sets of shingles
// are alike.
std::vector<size_t> near_duplicates(std::span<const std::string> texts, double threshold = 0.8);

}  // namespace moru
