// How sure a score is, and whether two scores on the same questions differ.
//
// All intervals come from inverting a score test: they keep their promise at small counts and at
// 0 % and 100 %, where the textbook "p ± 1.96 √(p(1-p)/n)" does not. Nothing here draws random
// numbers, so a report says the same on every machine.
#pragma once
#include <cstddef>

namespace moru {

inline constexpr double kConfidence = 0.95;

struct Interval {
  double low = 0, high = 1;
};

// z such that a standard normal lies below it with probability p. p in (0, 1).
double normal_quantile(double p);

// Two-sided interval of a proportion (Wilson 1927, JASA 22). [0, 1] if total is 0.
Interval wilson(size_t correct, size_t total, double confidence = kConfidence);

// How two models did on the same questions.
struct PairedCounts {
  size_t both = 0, only_a = 0, only_b = 0, neither = 0;

  size_t total() const { return both + only_a + only_b + neither; }
  size_t correct_a() const { return both + only_a; }
  size_t correct_b() const { return both + only_b; }
};

// Probability, if neither model were better, that the questions on which they disagree split at
// least as unevenly as they do: McNemar's test with the exact binomial distribution, two-sided.
double mcnemar_exact(const PairedCounts& counts);
// The same with half the weight on splits as likely as the one seen: less conservative
// (Fagerland, Lydersen, Laake 2013, BMC Med. Res. Methodol. 13:91).
double mcnemar_mid_p(const PairedCounts& counts);

// Two-sided interval of accuracy a - accuracy b (Tango 1998, Stat. Med. 17:891). [-1, 1] for no
// questions.
Interval paired_difference(const PairedCounts& counts, double confidence = kConfidence);

// Two-sided interval of accuracy a / accuracy b: the ratios that the score test for matched pairs
// (Tang, Tang, Chan 2003, Stat. Med. 22:1217) does not reject; `high` may be infinite. [0, ∞) where
// nothing is known, as when both models have no correct answer.
Interval paired_ratio(const PairedCounts& counts, double confidence = kConfidence);

// Whether a is shown to be at least `ratio` times as accurate as b: the lower end of paired_ratio
// reaches it. ratio in (0, 1).
inline bool not_worse_than(const PairedCounts& counts, double ratio,
                           double confidence = kConfidence) {
  return paired_ratio(counts, confidence).low >= ratio;
}

}  // namespace moru
