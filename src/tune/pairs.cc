#include "tune/pairs.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <unordered_set>

#include "base/error.h"
#include "base/hash.h"
#include "tune/near_duplicates.h"

namespace moru {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::array<const char*, 3> kFilterNames = {"all", "logp-below-mean", "logp-above-mean"};
constexpr size_t kShownOverlaps = 5;

std::string user_text(const Question& question) {
  std::string text;
  for (const Json& message : question.messages)
    if (message.at("role") == "user") text += message.at("content").get<std::string>() + "\n";
  return text;
}

// In the last `fraction` of all hashes, as tune/data.h splits rows.
bool is_held_out(const Question& question, double fraction) {
  const uint64_t hash = std::stoull(question.prompt_sha256.substr(0, 16), nullptr, 16);
  return static_cast<double>(hash >> 11) * 0x1p-53 >= 1 - fraction;
}

// ---- the answers to one prompt ----

struct Judged {
  size_t number;
  const Sample* sample;
  std::string reason;
};

struct JudgedAnswers {
  std::vector<Judged> right, wrong;
};

// Keeps the first of answers that are alike; returns how many went.
size_t keep_distinct(std::vector<Judged>& answers, double threshold) {
  std::vector<std::string> texts;
  for (const Judged& answer : answers) texts.push_back(answer.sample->text);
  const std::vector<size_t> repeats = near_duplicates(texts, threshold);
  std::vector<Judged> distinct;
  for (size_t i = 0; i < answers.size(); ++i)
    if (repeats[i] == kNoDuplicate) distinct.push_back(std::move(answers[i]));
  const size_t gone = answers.size() - distinct.size();
  answers = std::move(distinct);
  return gone;
}

// Judges, counts, and leaves out what no pair should have: an answer that was cut off has no end to
// learn from.
JudgedAnswers judge_all(const Question& question, const PromptSamples& samples,
                        const PairRules& rules, PairCounts& counts) {
  JudgedAnswers answers;
  size_t right = 0;
  for (size_t i = 0; i < samples.samples.size(); ++i) {
    const Sample& sample = samples.samples[i];
    Verdict verdict = judge_sample(question.expected, sample.text);
    ++counts.answers;
    right += verdict.correct;
    if (verdict.correct) {
      if (!sample.cut && sample.tokens > 0) answers.right.push_back({i, &sample, ""});
      continue;
    }
    ++counts.wrong;
    if (sample.cut) {
      ++counts.cut;
    } else if (normalise_answer(sample.text).empty()) {
      ++counts.empty;
    } else {
      answers.wrong.push_back({i, &sample, std::move(verdict.reason)});
    }
  }
  counts.right += right;
  ++counts.prompts;
  counts.always_right += right == samples.samples.size();
  counts.never_right += right == 0;
  counts.sometimes_right += right > 0 && right < samples.samples.size();
  keep_distinct(answers.right, rules.near_duplicate);
  counts.repeated += keep_distinct(answers.wrong, rules.near_duplicate);
  return answers;
}

double length_ratio(const Sample& a, const Sample& b) {
  const auto [shorter, longer] = std::minmax(a.tokens, b.tokens);
  return static_cast<double>(longer) / static_cast<double>(std::max<size_t>(1, shorter));
}

double summed(const Sample& s) { return s.logp * static_cast<double>(s.tokens); }

std::vector<Pair> pairs_of(const Question& question, const PromptSamples& samples,
                           const PairRules& rules, double mean_logp, PairCounts& counts) {
  const JudgedAnswers answers = judge_all(question, samples, rules, counts);
  std::vector<Pair> pairs;
  for (const Judged& wrong : answers.wrong) {
    const bool is_below = wrong.sample->logp < mean_logp;
    if ((rules.filter == RejectedFilter::logp_below_mean && !is_below) ||
        (rules.filter == RejectedFilter::logp_above_mean && is_below)) {
      ++counts.by_logp;
      continue;
    }
    // Right answers take turns, so that several pairs of a prompt show several of them.
    Pair pair;
    pair.question = &question;
    pair.rejected = *wrong.sample;
    pair.rejected_number = wrong.number;
    pair.reason = wrong.reason;
    if (!answers.right.empty()) {
      const Judged& right = answers.right[pairs.size() % answers.right.size()];
      pair.chosen = *right.sample;
      pair.chosen_number = right.number;
    } else if (samples.reference) {
      pair.chosen = *samples.reference;
    } else {
      ++counts.without_chosen;
      continue;
    }
    if (length_ratio(pair.chosen, pair.rejected) > rules.max_length_ratio) {
      ++counts.by_length;
    } else if (rules.max_margin &&
               summed(pair.chosen) - summed(pair.rejected) > *rules.max_margin) {
      ++counts.by_margin;
    } else if (pairs.size() >= rules.max_per_prompt) {
      ++counts.over_prompt;
    } else {
      pairs.push_back(std::move(pair));
    }
  }
  return pairs;
}

// The quota's pairs: those with the smallest hashes, whatever else the category holds.
void keep_quota(std::vector<Pair>& pairs, size_t quota, PairCounts& counts) {
  if (quota == 0 || pairs.size() <= quota) return;
  const auto rank = [](const Pair& p) {
    return sha256(fmt::format("{} {}", p.question->prompt_sha256, p.rejected_number));
  };
  std::vector<std::string> ranks;
  for (const Pair& pair : pairs) ranks.push_back(rank(pair));
  std::nth_element(ranks.begin(), ranks.begin() + static_cast<ptrdiff_t>(quota - 1), ranks.end());
  const std::string last = ranks[quota - 1];
  counts.over_category += std::erase_if(pairs, [&](const Pair& p) { return rank(p) > last; });
}

void add(PairCounts& sum, const PairCounts& c) {
  for (size_t PairCounts::*field :
       {&PairCounts::prompts, &PairCounts::always_right, &PairCounts::sometimes_right,
        &PairCounts::never_right, &PairCounts::answers, &PairCounts::right, &PairCounts::wrong,
        &PairCounts::cut, &PairCounts::empty, &PairCounts::repeated, &PairCounts::without_chosen,
        &PairCounts::by_logp, &PairCounts::by_length, &PairCounts::by_margin,
        &PairCounts::over_prompt, &PairCounts::over_category, &PairCounts::pairs,
        &PairCounts::chosen_own})
    sum.*field += c.*field;
}

double mean_of_logps(std::span<const PromptSamples> samples) {
  double sum = 0;
  size_t count = 0;
  for (const PromptSamples& p : samples)
    for (const Sample& s : p.samples) {
      if (s.tokens == 0) continue;
      sum += s.logp;
      ++count;
    }
  return sum / static_cast<double>(std::max<size_t>(1, count));
}

}  // namespace

ChosenPrompts choose_prompts(std::span<const Question> questions, const EvaluationTexts& evaluation,
                             const PromptRules& rules) {
  ChosenPrompts chosen;
  std::unordered_set<std::string> seen;
  std::vector<const Question*> distinct;
  std::vector<std::string> texts;
  for (const Question& question : questions) {
    if (!seen.insert(question.prompt_sha256).second) {
      ++chosen.repeated;
      continue;
    }
    distinct.push_back(&question);
    texts.push_back(user_text(question));
  }
  std::vector<size_t> repeats(texts.size(), kNoDuplicate);
  if (rules.near_duplicate <= 1) repeats = near_duplicates(texts, rules.near_duplicate);
  for (size_t i = 0; i < distinct.size(); ++i) {
    const Question& question = *distinct[i];
    // What differs in its answer is no repetition: "12 + 30" and "12 + 31".
    if (repeats[i] != kNoDuplicate &&
        distinct[repeats[i]]->expected.answers == question.expected.answers) {
      ++chosen.near;
      continue;
    }
    std::optional<std::string> overlap = evaluation.overlap(texts[i]);
    if (!overlap) overlap = evaluation.overlap(texts[i] + question.reference);
    if (overlap) {
      ++chosen.contaminated;
      if (chosen.overlaps.size() < kShownOverlaps)
        chosen.overlaps.push_back(fmt::format("{}: {}", question.id, *overlap));
      continue;
    }
    const bool held_out = is_held_out(question, rules.validate_fraction);
    (held_out ? chosen.validate : chosen.make).push_back(&question);
  }
  return chosen;
}

const char* name_of(RejectedFilter filter) { return kFilterNames[static_cast<size_t>(filter)]; }

std::optional<RejectedFilter> rejected_filter_named(std::string_view name) {
  for (size_t i = 0; i < kFilterNames.size(); ++i)
    if (name == kFilterNames[i]) return static_cast<RejectedFilter>(i);
  return std::nullopt;
}

MadePairs make_pairs(std::span<const Question* const> questions,
                     std::span<const PromptSamples> samples, const PairRules& rules) {
  MORU_CHECK(questions.size() == samples.size());
  MadePairs made{.pairs = {}, .counts = {}, .by_category = {}, .mean_logp = mean_of_logps(samples)};
  std::map<std::string, std::vector<Pair>> of_category;
  for (size_t i = 0; i < questions.size(); ++i) {
    const std::string& category = questions[i]->category;
    std::vector<Pair> pairs =
        pairs_of(*questions[i], samples[i], rules, made.mean_logp, made.by_category[category]);
    std::vector<Pair>& all = of_category[category];
    std::move(pairs.begin(), pairs.end(), std::back_inserter(all));
  }
  for (auto& [category, pairs] : of_category) {
    PairCounts& counts = made.by_category[category];
    keep_quota(pairs, rules.max_per_category, counts);
    counts.pairs = pairs.size();
    counts.chosen_own = static_cast<size_t>(std::count_if(
        pairs.begin(), pairs.end(), [](const Pair& p) { return p.chosen_number.has_value(); }));
    add(made.counts, counts);
    std::move(pairs.begin(), pairs.end(), std::back_inserter(made.pairs));
  }
  std::map<const Question*, size_t> place;
  for (size_t i = 0; i < questions.size(); ++i) place[questions[i]] = i;
  std::stable_sort(made.pairs.begin(), made.pairs.end(), [&](const Pair& a, const Pair& b) {
    return place[a.question] < place[b.question];
  });
  return made;
}

Verdict judge_sample(const Expectation& expected, std::string_view answer) {
  return expected.check == Check::choice ? judge_written_choice(expected, answer)
                                         : judge(expected, answer);
}

Json pair_row(const Pair& pair, const Provenance& from) {
  const auto message = [](const Sample& s) {
    return Json::array({{{"role", "assistant"}, {"content", s.text}}});
  };
  const auto origin = [](const Sample& s) { return Json{{"logp", s.logp}, {"tokens", s.tokens}}; };
  Json chosen = origin(pair.chosen), rejected = origin(pair.rejected);
  chosen["from"] = pair.chosen_number ? "own" : "reference";
  if (pair.chosen_number) {
    chosen["sample"] = *pair.chosen_number;
    chosen["seed"] = pair.chosen.seed;
  }
  rejected["sample"] = pair.rejected_number;
  rejected["seed"] = pair.rejected.seed;
  rejected["reason"] = pair.reason;
  Json row = {{"prompt", pair.question->messages},
              {"chosen", message(pair.chosen)},
              {"rejected", message(pair.rejected)}};
  if (!pair.question->category.empty()) row["category"] = pair.question->category;
  row["provenance"] = {{"id", pair.question->id},
                       {"verifier", name_of(pair.question->expected.check)},
                       {"model_sha256", from.model_sha256},
                       {"engine", from.engine},
                       {"temperature", from.sampling.temperature},
                       {"top_p", from.sampling.top_p},
                       {"run_seed", from.sampling.seed},
                       {"chosen", std::move(chosen)},
                       {"rejected", std::move(rejected)}};
  return row;
}

std::vector<Json> right_rows(std::span<const Question* const> questions,
                             std::span<const PromptSamples> samples) {
  MORU_CHECK(questions.size() == samples.size());
  std::vector<Json> rows;
  for (size_t i = 0; i < questions.size(); ++i) {
    const Question& question = *questions[i];
    const auto& own = samples[i].samples;
    const auto right = std::find_if(own.begin(), own.end(), [&](const Sample& s) {
      return !s.cut && s.tokens > 0 && judge_sample(question.expected, s.text).correct;
    });
    const std::string& answer = right != own.end() ? right->text : question.reference;
    if (answer.empty()) continue;
    Json messages = question.messages;
    messages.push_back({{"role", "assistant"}, {"content", answer}});
    rows.push_back({{"messages", std::move(messages)}});
  }
  return rows;
}

}  // namespace moru
