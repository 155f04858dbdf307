#include "forge/choose.h"

#include <fmt/format.h>

#include <algorithm>
#include <tuple>

#include "base/error.h"
#include "forge/report.h"

namespace moru {
namespace {

constexpr double kSignificance = 0.05;
constexpr double kCostTie = 1.1;

void check_share(const char* flag, const std::optional<double>& share, const char* example) {
  if (!share || (*share > 0 && *share < 1)) return;
  throw Error(ErrorKind::usage, {.where = flag,
                                 .what = fmt::format("{} is not between 0 and 1", *share),
                                 .cure = fmt::format("write a share such as {}", example)});
}

// Three places, or as many as it takes to see the difference: "0.8497 < 0.8500".
std::string less_than(double low, double bound) {
  int places = 3;
  while (places < 6 && fmt::format("{:.{}f}", low, places) == fmt::format("{:.{}f}", bound, places))
    ++places;
  return fmt::format("{:.{}f} < {:.{}f}", low, places, bound, places);
}

Judgement judge_contender(const Tally& score, std::optional<Comparison> against_best,
                          const Goal& goal) {
  std::vector<std::string> faults;
  if (goal.at_least && score.interval.low < *goal.at_least)
    faults.push_back(fmt::format("lower end {}", less_than(score.interval.low, *goal.at_least)));
  if (goal.keep && against_best && against_best->ratio.low < *goal.keep)
    faults.push_back(fmt::format("keeps {} of the best, lower end",
                                 less_than(against_best->ratio.low, *goal.keep)));
  const bool is_worse = against_best && against_best->p < kSignificance &&
                        against_best->newly_wrong.size() > against_best->newly_right.size();
  if (!goal.at_least && !goal.keep && is_worse)
    faults.push_back(fmt::format("worse than the best ({} newly wrong, {} newly right, p = {:.2g})",
                                 against_best->newly_wrong.size(), against_best->newly_right.size(),
                                 against_best->p));
  Judgement judgement{.good_enough = faults.empty(),
                      .verdict = "good enough",
                      .against_best = std::move(against_best)};
  if (!faults.empty())
    judgement.verdict = fmt::format("not good enough: {}", fmt::join(faults, "; "));
  return judgement;
}

// The fewest questions with which a perfect score would reach the goal.
size_t questions_needed(double at_least) {
  size_t n = 1;
  while (n < 1'000'000 && wilson(n, n).low < at_least) n += 1 + n / 100;
  return n;
}

std::string outcome_without_choice(const Contender& best, const Tally& score, const Goal& goal) {
  std::string outcome = fmt::format(
      "No candidate is good enough. The best, {}, answers {} of {} questions "
      "(95 % interval {}).",
      best.name, format_score(score.accuracy()), score.total, format_interval(score.interval));
  if (goal.at_least && wilson(score.total, score.total).low < *goal.at_least)
    outcome +=
        fmt::format(" With {} questions not even a perfect score could show {}: ask at least {}.",
                    score.total, format_score(*goal.at_least), questions_needed(*goal.at_least));
  else if (goal.at_least && score.accuracy() >= *goal.at_least)
    outcome += " Its score reaches the goal but its interval does not: more questions may show it.";
  else
    outcome += " More or better pairs, a larger model, or a lower goal would change that.";
  return outcome;
}

// Why the chosen one of `good` good-enough candidates is it: of those whose costs tie, that is, not
// always the one that cost least in this run.
struct Reason {
  std::string verdict, outcome;
};

Reason reason_of(size_t candidates, size_t good, size_t tied, bool is_cheapest) {
  if (good == 1)
    return {"the only one that is good enough",
            fmt::format("of {} candidates the only one that is good enough", candidates)};
  if (is_cheapest)
    return {"the cheapest that is good enough",
            fmt::format("the cheapest of {} candidates that are good enough", good)};
  const double percent = 100 * (kCostTie - 1);
  return {fmt::format("the best of {} good enough that cost within {:.0f} % of the cheapest", tied,
                      percent),
          fmt::format("of {} candidates that are good enough, {} cost within {:.0f} % of the "
                      "cheapest, which another run may order otherwise, and it is the best of them",
                      good, tied, percent)};
}

}  // namespace

void check_goal(const Goal& goal) {
  check_share("--at-least", goal.at_least, "0.85");
  check_share("--keep", goal.keep, "0.98");
}

std::string describe_goal(const Goal& goal) {
  std::vector<std::string> parts;
  if (goal.at_least)
    parts.push_back(
        fmt::format("lower end of the 95 % interval ≥ {}", format_score(*goal.at_least)));
  if (goal.keep)
    parts.push_back(fmt::format("score ≥ {} × the best candidate’s, with 95 % confidence interval",
                                *goal.keep));
  if (parts.empty()) return "not shown worse than the best candidate (McNemar, 5 %)";
  return fmt::format("{}", fmt::join(parts, ", and "));
}

Choice choose(std::span<const Contender> contenders, const Goal& goal) {
  MORU_CHECK(!contenders.empty());
  check_goal(goal);
  std::vector<Tally> scores;
  for (const Contender& c : contenders) scores.push_back(tally(c.results->items));

  Choice choice;
  for (size_t i = 1; i < contenders.size(); ++i) {
    const bool is_better = scores[i].correct > scores[choice.best].correct ||
                           (scores[i].correct == scores[choice.best].correct &&
                            contenders[i].usd_per_1000 < contenders[choice.best].usd_per_1000);
    if (is_better) choice.best = i;
  }
  const Contender& best = contenders[choice.best];
  double cheapest = 0;
  size_t good = 0;
  for (size_t i = 0; i < contenders.size(); ++i) {
    std::optional<Comparison> against_best;
    if (i != choice.best) against_best = compare(*contenders[i].results, *best.results);
    choice.judgements.push_back(judge_contender(scores[i], std::move(against_best), goal));
    if (!choice.judgements[i].good_enough) continue;
    const double usd = contenders[i].usd_per_1000;
    if (good == 0 || usd < cheapest) cheapest = usd;
    ++good;
  }

  const auto rank = [&](size_t i) {  // lower is better
    return std::tuple(-static_cast<double>(scores[i].correct), contenders[i].file_bytes, i);
  };
  size_t tied = 0;
  for (size_t i = 0; i < contenders.size(); ++i) {
    if (!choice.judgements[i].good_enough) continue;
    if (contenders[i].usd_per_1000 > cheapest * kCostTie) continue;
    ++tied;
    if (!choice.chosen || rank(i) < rank(*choice.chosen)) choice.chosen = i;
  }
  if (!choice.chosen) {
    choice.outcome = outcome_without_choice(best, scores[choice.best], goal);
    return choice;
  }
  const Contender& winner = contenders[*choice.chosen];
  const Tally& score = scores[*choice.chosen];
  const Reason reason = reason_of(contenders.size(), good, tied, winner.usd_per_1000 <= cheapest);
  choice.judgements[*choice.chosen].verdict = "chosen: " + reason.verdict;
  choice.outcome = fmt::format(
      "{} is chosen: {}. It answers {} of {} questions (95 % interval {}) at {} per 1,000 answers.",
      winner.name, reason.outcome, format_score(score.accuracy()), score.total,
      format_interval(score.interval), format_usd(winner.usd_per_1000));
  return choice;
}

}  // namespace moru
