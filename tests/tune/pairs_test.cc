#include "tune/pairs.h"

#include <fmt/format.h>

#include <algorithm>

#include "support.h"

using namespace moru;

namespace {

Question question(const std::string& prompt, const std::string& answer,
                  nlohmann::ordered_json more = nlohmann::ordered_json::object()) {
  nlohmann::ordered_json row = {{"id", prompt}, {"prompt", prompt}, {"answer", answer}};
  row.update(more);
  return question_from_row("q.jsonl", {.line = 1, .value = row});
}

Sample sample(std::string text, double logp = -1, size_t tokens = 0) {
  if (tokens == 0) tokens = text.size();
  return {.text = std::move(text), .logp = logp, .tokens = tokens, .cut = false, .seed = 9};
}

struct Case {
  std::vector<Question> questions;
  std::vector<PromptSamples> samples;

  void add(Question q, std::vector<Sample> answers, std::optional<Sample> reference = {}) {
    samples.push_back({q.prompt_sha256, std::move(answers), std::move(reference)});
    questions.push_back(std::move(q));
  }
  MadePairs make(const PairRules& rules = {}) const {
    std::vector<const Question*> asked;
    for (const Question& q : questions) asked.push_back(&q);
    return make_pairs(asked, samples, rules);
  }
};

// Every wrong answer is a pair or counted once as left out.
void check_balance(const PairCounts& c) {
  CHECK(c.right + c.wrong == c.answers);
  CHECK(c.always_right + c.sometimes_right + c.never_right == c.prompts);
  CHECK(c.cut + c.empty + c.repeated + c.by_logp + c.without_chosen + c.by_length + c.by_margin +
            c.over_prompt + c.over_category + c.pairs ==
        c.wrong);
}

}  // namespace

TEST_CASE("wrong answers are rejected for an own right one, or else for the reference") {
  Case c;
  c.add(question("one", "red"), {sample("blue"), sample("red"), sample("pink")}, sample("red", -3));
  c.add(question("two", "red"), {sample("grey"), sample("blue")}, sample("red", -3));
  c.add(question("three", "red"), {sample("red"), sample(" red")}, sample("red", -3));
  const MadePairs made = c.make();
  REQUIRE(made.pairs.size() == 4);
  CHECK(made.pairs[0].chosen.text == "red");
  CHECK(made.pairs[0].chosen_number == 1);
  CHECK(made.pairs[0].rejected.text == "blue");
  CHECK(made.pairs[0].rejected_number == 0);
  CHECK(made.pairs[1].rejected.text == "pink");
  CHECK_FALSE(made.pairs[2].chosen_number);
  CHECK(made.pairs[2].chosen.logp == -3);
  CHECK(made.counts.always_right == 1);
  CHECK(made.counts.sometimes_right == 1);
  CHECK(made.counts.never_right == 1);
  CHECK(made.counts.chosen_own == 2);
  check_balance(made.counts);
}

TEST_CASE("an answer that was cut off or says nothing is in no pair") {
  Case c;
  Sample cut = sample("blue blue");
  cut.cut = true;
  Sample cut_right = sample("red, and");
  cut_right.cut = true;
  c.add(question("one", "red", {{"check", "contains"}}),
        {cut, sample(" \n"), cut_right, sample("blue")});
  const MadePairs made = c.make();
  CHECK(made.pairs.empty());
  CHECK(made.counts.cut == 1);
  CHECK(made.counts.empty == 1);
  // Neither the cut answer nor the contained word is an answer to choose.
  CHECK(made.counts.without_chosen == 1);
  check_balance(made.counts);
}

TEST_CASE("equal and nearly equal wrong answers make one pair") {
  Case c;
  const std::string story = "The parcel will arrive on Monday because the depot is closed today";
  c.add(question("one", "red"),
        {sample(story), sample("blue"), sample(story + "."), sample("Blue "), sample("blues")},
        sample("red as a story that is as long as the others are"));
  const MadePairs made = c.make({.max_per_prompt = 9, .max_length_ratio = 100});
  REQUIRE(made.pairs.size() == 3);
  CHECK(made.counts.repeated == 2);
  CHECK(made.pairs[2].rejected.text == "blues");
  check_balance(made.counts);
}

TEST_CASE("the log-probability filter compares with the mean of all answers") {
  Case c;
  c.add(question("one", "red"), {sample("aaa", -1), sample("bbb", -3), sample("red", -0.5)});
  c.add(question("two", "red"), {sample("ccc", -2.5), sample("red", -0.5)});
  CHECK(c.make().mean_logp == doctest::Approx(-1.5));
  const auto rejected = [&](RejectedFilter filter) {
    std::string texts;
    const MadePairs made = c.make({.filter = filter});
    check_balance(made.counts);
    for (const Pair& p : made.pairs) texts += p.rejected.text + " ";
    return texts;
  };
  CHECK(rejected(RejectedFilter::all) == "aaa bbb ccc ");
  CHECK(rejected(RejectedFilter::logp_below_mean) == "bbb ccc ");
  CHECK(rejected(RejectedFilter::logp_above_mean) == "aaa ");
  for (const auto filter :
       {RejectedFilter::all, RejectedFilter::logp_below_mean, RejectedFilter::logp_above_mean})
    CHECK(rejected_filter_named(name_of(filter)) == filter);
  CHECK_FALSE(rejected_filter_named("some"));
}

TEST_CASE("lengths that differ too much, and pairs already far apart, are left out") {
  Case c;
  c.add(question("one", "red"), {sample("red", -1, 4), sample("aa", -1, 2), sample("bb", -1, 8),
                                 sample("cc", -1, 9), sample("dd", -1, 1), sample("ee", -9, 4)});
  const MadePairs made = c.make({.max_per_prompt = 9, .max_margin = 20});
  REQUIRE(made.pairs.size() == 2);
  CHECK(made.pairs[0].rejected.text == "aa");
  CHECK(made.pairs[1].rejected.text == "bb");
  CHECK(made.counts.by_length == 2);
  CHECK(made.counts.by_margin == 1);  // −4 against −36
  check_balance(made.counts);
}

TEST_CASE("several pairs of a prompt take its right answers in turns, up to the cap") {
  Case c;
  c.add(question("one", "o", {{"check", "contains"}}),
        {sample("aa"), sample("no"), sample("bb"), sample("go"), sample("cc"), sample("dd")});
  const MadePairs made = c.make({.max_per_prompt = 3});
  REQUIRE(made.pairs.size() == 3);
  CHECK(made.pairs[0].chosen.text == "no");
  CHECK(made.pairs[1].chosen.text == "go");
  CHECK(made.pairs[2].chosen.text == "no");
  CHECK(made.counts.over_prompt == 1);
  check_balance(made.counts);
}

TEST_CASE("a category's quota keeps the same pairs whatever the order of the questions") {
  Case c, reversed;
  for (int i = 0; i < 12; ++i)
    c.add(question(fmt::format("q{}", i), "red", {{"category", i % 3 == 0 ? "a" : "b"}}),
          {sample("blue"), sample("red")});
  for (size_t i = c.questions.size(); i-- > 0;) reversed.add(c.questions[i], c.samples[i].samples);
  const auto prompts = [](const MadePairs& made) {
    std::vector<std::string> ids;
    for (const Pair& p : made.pairs) ids.push_back(p.question->id);
    std::sort(ids.begin(), ids.end());
    return ids;
  };
  const MadePairs made = c.make({.max_per_category = 3});
  CHECK(made.by_category.at("a").pairs == 3);
  CHECK(made.by_category.at("b").pairs == 3);
  CHECK(made.counts.over_category == 6);
  CHECK(prompts(made) == prompts(reversed.make({.max_per_category = 3})));
  for (size_t i = 1; i < made.pairs.size(); ++i)
    CHECK(made.pairs[i - 1].question < made.pairs[i].question);  // order of the questions
  check_balance(made.counts);
}

TEST_CASE("a row is TRL's preference row and says where it came from") {
  Case c;
  c.add(question("카드 분실", "card_lost", {{"system", "분류"}, {"category", "card"}}),
        {sample("card_last", -0.25, 5)}, sample("card_lost", -2, 6));
  const MadePairs made = c.make();
  REQUIRE(made.pairs.size() == 1);
  const auto row =
      pair_row(made.pairs[0], {.model_sha256 = "abc", .engine = "exact", .sampling = {}});
  CHECK(row["prompt"].dump() ==
        R"([{"role":"system","content":"분류"},{"role":"user","content":"카드 분실"}])");
  CHECK(row["chosen"].dump() == R"([{"role":"assistant","content":"card_lost"}])");
  CHECK(row["rejected"].dump() == R"([{"role":"assistant","content":"card_last"}])");
  CHECK(row["category"] == "card");
  const auto& from = row["provenance"];
  CHECK(from["verifier"] == "exact");
  CHECK(from["model_sha256"] == "abc");
  CHECK(from["chosen"]["from"] == "reference");
  CHECK_FALSE(from["chosen"].contains("seed"));
  CHECK(from["rejected"]["seed"] == 9);
  CHECK(from["rejected"]["logp"] == -0.25);
  CHECK(from["rejected"]["reason"].get<std::string>().starts_with("expected"));
}

TEST_CASE("repeated, near and contaminated prompts are not asked") {
  std::vector<Question> questions;
  const std::string long_prompt = "Please tell me how many days it takes until my refund arrives";
  questions.push_back(question(long_prompt, "five"));
  questions.push_back(question(long_prompt + "?", "five"));  // near, same answer
  questions.push_back(question(long_prompt + "!", "six"));   // near, other answer
  questions.push_back(question("Where is my card?", "card"));
  questions.push_back(question("Where is my card?", "card"));    // equal
  questions.push_back(question("What is the weather?", "sun"));  // contaminated
  EvaluationTexts evaluation;
  evaluation.add("what is the WEATHER");
  const ChosenPrompts chosen = choose_prompts(questions, evaluation, {.validate_fraction = 0});
  REQUIRE(chosen.make.size() == 3);
  CHECK(chosen.make[1]->expected.answers[0] == "six");
  CHECK(chosen.repeated == 1);
  CHECK(chosen.near == 1);
  CHECK(chosen.contaminated == 1);
  CHECK(chosen.overlaps == std::vector<std::string>{"What is the weather?: what is the weather"});
  CHECK(choose_prompts(questions, EvaluationTexts(), {.near_duplicate = 2, .validate_fraction = 0})
            .near == 0);
}

TEST_CASE("held-out prompts are the same whatever else the file holds") {
  std::vector<Question> questions;
  for (int i = 0; i < 400; ++i) questions.push_back(question(fmt::format("{} {}", i, i * i), "x"));
  const auto held = [](const std::vector<Question>& set) {
    std::vector<std::string> ids;
    for (const Question* q :
         choose_prompts(set, EvaluationTexts(), {.validate_fraction = 0.2}).validate)
      ids.push_back(q->id);
    return ids;
  };
  const std::vector<std::string> all = held(questions);
  CHECK(all.size() > 50);
  CHECK(all.size() < 110);
  const std::vector<Question> first(questions.begin(), questions.begin() + 200);
  const std::vector<std::string> some = held(first);
  CHECK(std::equal(some.begin(), some.end(), all.begin()));
}

TEST_CASE("a right answer to each prompt becomes a conversation to learn") {
  Case c;
  Sample cut = sample("red red");
  cut.cut = true;
  c.add(question("one", "red", {{"check", "contains"}}), {cut, sample("blue"), sample("so red")});
  c.add(question("two", "red"), {sample("blue")});
  c.add(question("three", "red", {{"check", "contains"}}), {sample("blue")});
  std::vector<const Question*> asked;
  for (const Question& q : c.questions) asked.push_back(&q);
  const auto rows = right_rows(asked, c.samples);
  REQUIRE(rows.size() == 2);
  CHECK(rows[0].dump() == R"({"messages":[{"role":"user","content":"one"},)"
                          R"({"role":"assistant","content":"so red"}]})");
  CHECK(rows[1]["messages"][1]["content"] == "red");
}
