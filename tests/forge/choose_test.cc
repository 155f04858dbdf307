#include "forge/choose.h"

#include <fmt/format.h>

#include <deque>

#include "support.h"

using namespace moru;

namespace {

// Results on `total` questions, of which those in [from, from + correct) are right.
Results results(size_t total, size_t correct, size_t from = 0) {
  Results r{
      .name = "r", .key = {.model_sha256 = "m", .engine = "e", .asked_sha256 = "q"}, .items = {}};
  for (size_t i = 0; i < total; ++i)
    r.items.push_back({.id = std::to_string(i),
                       .prompt_sha256 = "",
                       .answer = "",
                       .correct = i >= from && i < from + correct});
  return r;
}

struct Field {
  std::deque<Results> kept;  // contenders point into it
  std::vector<Contender> contenders;

  void add(std::string name, size_t total, size_t correct, double usd, uint64_t bytes = 100,
           size_t from = 0) {
    kept.push_back(results(total, correct, from));
    contenders.push_back({std::move(name), &kept.back(), usd, bytes});
  }
  std::string chosen(const Goal& goal) const {
    const Choice choice = choose(contenders, goal);
    return choice.chosen ? contenders[*choice.chosen].name : "none";
  }
};

// A ladder as lightening gives it: cheaper and a little worse each step.
Field ladder() {
  Field field;
  field.add("base", 1000, 300, 0.002);
  field.add("tuned", 1000, 920, 0.005);
  field.add("Q8", 1000, 919, 0.0022);
  field.add("Q5", 1000, 905, 0.0018);
  field.add("Q4", 1000, 880, 0.0016);
  field.add("Q2", 1000, 600, 0.0010);
  return field;
}

}  // namespace

TEST_CASE("at least: the cheapest whose interval's lower end reaches the goal") {
  const Field field = ladder();
  CHECK(field.chosen({.at_least = 0.85}) == "Q4");  // 0.880: lower end 0.858
  CHECK(field.chosen({.at_least = 0.87}) == "Q5");  // 0.905: 0.885
  CHECK(field.chosen({.at_least = 0.89}) == "Q8");
  CHECK(field.chosen({.at_least = 0.29}) == "Q2");
  CHECK(field.chosen({.at_least = 0.95}) == "none");
}

TEST_CASE("keep: paired with the best, so that few disagreements show much") {
  const Field field = ladder();
  CHECK(field.chosen({.keep = 0.97}) == "Q5");  // 905 / 920, all within those
  CHECK(field.chosen({.keep = 0.94}) == "Q4");
  CHECK(field.chosen({.keep = 0.99}) == "Q8");
  CHECK(field.chosen({.keep = 0.9999}) == "tuned");  // the best keeps all of itself
  CHECK(field.chosen({.at_least = 0.87, .keep = 0.94}) == "Q5");
}

TEST_CASE("without a goal: the cheapest that was not shown worse than the best") {
  Field field;
  field.add("best", 100, 80, 0.005);
  field.add("as good", 100, 77, 0.003);  // 3 newly wrong, none right: p = 0.25
  field.add("worse", 100, 60, 0.001);
  field.add("other", 100, 78, 0.002, 100, /*from=*/10);  // wrong and right on other questions
  CHECK(field.chosen({}) == "other");
  const Choice choice = choose(field.contenders, {});
  CHECK(choice.judgements[2].verdict.find("worse than the best (20 newly wrong, 0 newly right") !=
        std::string::npos);
  CHECK(!choice.judgements[0].against_best);
  CHECK(choice.judgements[1].against_best->counts.only_b == 3);
}

TEST_CASE("verdicts say what was missed") {
  const Choice choice = choose(ladder().contenders, {.at_least = 0.87, .keep = 0.97});
  CHECK(choice.best == 1);
  CHECK(choice.judgements[4].verdict.starts_with(
      "not good enough: lower end 0.858 < 0.870; keeps 0.9"));
  CHECK(choice.judgements[1].verdict == "good enough");
  CHECK(choice.judgements[3].verdict == "chosen: the cheapest that is good enough");
  CHECK(choice.outcome.starts_with("Q5 is chosen: the cheapest of 3 candidates"));
  CHECK(choice.outcome.find("0.905 of 1000 questions (95 % interval 0.885–0.922) at $0.0018 per") !=
        std::string::npos);
}

TEST_CASE("costs within a tenth are a tie that quality, then size, then order decide") {
  Field field;
  field.add("first", 1000, 900, 0.00100, 200);
  field.add("better", 1000, 903, 0.00108, 300);
  field.add("dear", 1000, 950, 0.00111, 100);
  CHECK(field.chosen({.at_least = 0.85}) == "better");
  const Choice choice = choose(field.contenders, {.at_least = 0.85});
  CHECK(choice.judgements[1].verdict ==
        "chosen: the best of 2 good enough that cost within 10 % of the cheapest");
  CHECK(
      choice.outcome.starts_with("better is chosen: of 3 candidates that are good enough, 2 cost "
                                 "within 10 % of the cheapest, which another run may order "
                                 "otherwise, and it is the best of them. It answers 0.903"));
  field.add("smaller", 1000, 903, 0.00109, 250);
  CHECK(field.chosen({.at_least = 0.85}) == "smaller");
  field.add("twin", 1000, 903, 0.00100, 250);
  CHECK(field.chosen({.at_least = 0.85}) == "smaller");
}

TEST_CASE("of equally good ones the cheapest is the best") {
  Field field;
  field.add("dear", 100, 90, 2);
  field.add("cheap", 100, 90, 1);
  CHECK(choose(field.contenders, {}).best == 1);
}

TEST_CASE("that nothing is good enough is said, with what would help") {
  const auto outcome = [](size_t total, size_t correct, const Goal& goal) {
    Field field;
    field.add("only", total, correct, 1);
    const Choice choice = choose(field.contenders, goal);
    CHECK(!choice.chosen);
    CHECK(choice.outcome.starts_with("No candidate is good enough. The best, only, answers "));
    return choice.outcome;
  };
  CHECK(outcome(1000, 500, {.at_least = 0.85}).find("More or better pairs") != std::string::npos);
  CHECK(outcome(100, 88, {.at_least = 0.85}).find("more questions may show it") !=
        std::string::npos);
  CHECK(outcome(20, 20, {.at_least = 0.85})
            .find("not even a perfect score could show 0.850: ask at least 22.") !=
        std::string::npos);
}

TEST_CASE("a lower end just under the goal shows its difference") {
  Field field;
  field.add("only", 1000, 900, 1);
  const double low = wilson(900, 1000).low;
  const Choice choice = choose(field.contenders, {.at_least = low + 0.00002});
  CHECK(choice.judgements[0].verdict == "not good enough: lower end 0.8798 < 0.8799");
}

TEST_CASE("a goal outside 0 and 1 is refused by its flag") {
  CHECK(error_from([] { check_goal({.at_least = 85}); }).where() == "--at-least");
  CHECK(error_from([] { check_goal({.keep = 0}); }).where() == "--keep");
  CHECK(
      describe_goal({.at_least = 0.85, .keep = 0.98}) ==
      "lower end of the 95 % interval ≥ 0.850, and score ≥ 0.98 × the best candidate’s, with 95 % "
      "confidence interval");
  CHECK(describe_goal({}).find("McNemar") != std::string::npos);
}

TEST_CASE("contenders that answered other questions cannot be compared") {
  Field field;
  field.add("a", 10, 5, 1);
  field.add("b", 11, 5, 1);
  CHECK(error_from([&] { choose(field.contenders, {}); }).kind() == ErrorKind::bad_input);
}
