// Which candidate to ship: the cheapest one that is good enough with confidence.
//
// Good enough means, as the user asked:
//   at_least X   the lower end of the score's 95 % interval reaches X
//   keep R       the score is at least R times the best candidate's, the lower end of the 95 %
//                interval of their paired ratio reaching R (prove/statistics.h: paired_ratio)
//   both         both
//   neither      it has not been shown worse than the best: McNemar's exact test does not reject at
//                5 %. This asks least: few questions show little.
//
// Each candidate is judged alone: with many near the border, one of them may pass by luck more
// often than one time in 40. The report says how many were judged.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "prove/prove.h"

namespace moru {

struct Goal {
  std::optional<double> at_least = {};  // in (0, 1)
  std::optional<double> keep = {};      // in (0, 1)
};
// Error usage for a number outside its range, naming the flag.
void check_goal(const Goal& goal);
// "lower end of the 95 % interval ≥ 0.850".
std::string describe_goal(const Goal& goal);

struct Contender {
  std::string name;
  const Results* results = nullptr;  // of all contenders on the same questions
  double usd_per_1000 = 0;
  uint64_t file_bytes = 0;
};

struct Judgement {
  bool good_enough = false;
  std::string verdict;  // "good enough", "not good enough: lower end 0.810 < 0.850", "chosen: …"
  std::optional<Comparison> against_best;  // absent for the best one
};

struct Choice {
  size_t best = 0;               // highest score; of equal ones the cheapest
  std::optional<size_t> chosen;  // nullopt: none is good enough
  std::vector<Judgement> judgements;
  std::string outcome;  // what was chosen and why, or what to do if nothing was
};

// At least one contender. Costs within a tenth of the cheapest good-enough one are a tie: two
// measurements of one file differed by up to 6 % on a busy machine. Of those the better score wins,
// then the smaller file, then the earlier one, none of which a second run changes. Error bad_input
// unless all answered the same questions.
Choice choose(std::span<const Contender> contenders, const Goal& goal);

}  // namespace moru
