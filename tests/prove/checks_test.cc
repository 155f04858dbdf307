#include "prove/checks.h"

#include <doctest/doctest.h>

#include <string>
#include <vector>

using namespace moru;

namespace {

bool accepts(Check check, std::vector<std::string> answers, std::string_view given,
             bool ignore_case = false) {
  const Expectation expected{
      .check = check, .answers = std::move(answers), .ignore_case = ignore_case};
  REQUIRE_MESSAGE(!problem_with(expected), *problem_with(expected));
  const Verdict verdict = judge(expected, given);
  CHECK(verdict.correct == verdict.reason.empty());
  return verdict.correct;
}

bool accepts_number(std::string wanted, std::string_view given, std::string_view within = "0") {
  const Expectation expected{.check = Check::number,
                             .answers = {std::move(wanted)},
                             .within = parse_tolerance(within).value()};
  REQUIRE(!problem_with(expected));
  return judge(expected, given).correct;
}

std::vector<double> values(std::string_view text) {
  std::vector<double> found;
  for (const Number& n : numbers_in(text)) found.push_back(n.value);
  return found;
}

using List = std::vector<double>;

}  // namespace

TEST_CASE("an exact answer may differ in spaces and in Unicode form, not in words") {
  CHECK(accepts(Check::exact, {"card_lost"}, "card_lost"));
  CHECK(accepts(Check::exact, {"카드 분실"}, "  카드\n 분실\u3000"));
  CHECK(accepts(Check::exact, {"한글"}, "\u1112\u1161\u11AB\u1100\u1173\u11AF"));
  CHECK(accepts(Check::exact, {"no", "nope"}, "nope"));
  CHECK(!accepts(Check::exact, {"card_lost"}, "card_lost."));
  CHECK(!accepts(Check::exact, {"yes"}, "Yes"));
  CHECK(accepts(Check::exact, {"yes"}, "YES", true));
  CHECK(accepts(Check::exact, {"Straße"}, "STRASSE", true));
  CHECK(!accepts(Check::exact, {"yes"}, ""));
  CHECK(!accepts(Check::exact, {"yes"}, "\xFF\xFE"));
}

TEST_CASE("contains looks for the text anywhere") {
  CHECK(accepts(Check::contains, {"3 영업일"}, "환불은  3\n영업일 안에 됩니다."));
  CHECK(accepts(Check::contains, {"refund"}, "You get a Refund.", true));
  CHECK(!accepts(Check::contains, {"refund"}, "You get a Refund."));
}

TEST_CASE("a regex is Unicode-aware and unanchored unless it says so") {
  CHECK(accepts(Check::regex, {R"(#### (-?[0-9.,]+))"}, "so\n#### 18"));
  CHECK(accepts(Check::regex, {R"(^\w+$)"}, "모루"));
  CHECK(!accepts(Check::regex, {R"(^\w+$)"}, "두 단어"));
  CHECK(accepts(Check::regex, {"^yes"}, "YES sir", true));
  CHECK(accepts(Check::regex, {"a(?!b)", "zz"}, "ab zz"));
}

TEST_CASE("a regex that would run for ever is a wrong answer that says so") {
  const Expectation expected{.check = Check::regex, .answers = {"^(a+)+$"}};
  const Verdict verdict = judge(expected, std::string(60, 'a') + "b");
  CHECK(!verdict.correct);
  CHECK(verdict.reason.find("gave up") != std::string::npos);
}

TEST_CASE("numbers are found in running text") {
  CHECK(values("The answer is 1,234,567.50.") == List{1234567.5});
  CHECK(values("from 3 to 5, or 3-5") == List{3, 5, 3, 5});
  CHECK(values("It fell to -7 °C; −3.5 before; $-5 and -$6") == List{-7, -3.5, -5, -6});
  CHECK(values("1,5 and 1234,567 and 12,3456") == List{1, 5, 1234, 567, 12, 3456});
  CHECK(values("A4 paper, GPT4, x_1 and v2.5") == List{});
  CHECK(values("1.5e3 2E-2 3e") == List{1500, 0.02, 3});
  CHECK(values(".5 and 1.2.3") == List{0.5, 1.2, 3});
  CHECK(values("１２３．５％") == List{123.5});
  CHECK(values("**42**, \\boxed{43}") == List{42, 43});
  CHECK(values("총3개") == List{3});
  CHECK(values("") == List{});
  CHECK(values("1e999") == List{});
}

TEST_CASE("Korean units make one number") {
  CHECK(values("3만 5천원") == List{35000});
  CHECK(values("1억 2,000만 원") == List{120'000'000});
  CHECK(values("2.5만") == List{25000});
  CHECK(values("5천만") == List{50'000'000});
  CHECK(values("2천5백") == List{2500});
  CHECK(values("3만 500원") == List{30500});
  CHECK(values("1조 2억 3만 4") == List{1'000'200'030'004});
  CHECK(values("3만, 5만") == List{30000, 50000});
  CHECK(values("3만 5만 2천 3천") == List{30000, 52000, 3000});  // units only fall
  CHECK(values("2천5백 5백") == List{2500, 500});
  CHECK(values("-3만") == List{-30000});
}

TEST_CASE("the last number is compared, within a tolerance") {
  CHECK(accepts_number("42", "6 times 7 is 42."));
  CHECK(!accepts_number("42", "42 is 6 times 7"));
  CHECK(accepts_number("0.3", "0.30000000000000004"));
  CHECK(accepts_number("100", "101", "1%"));
  CHECK(!accepts_number("100", "101.1", "1%"));
  CHECK(accepts_number("-100", "-99", "1%"));
  CHECK(accepts_number("100", "100.5", "0.5"));
  CHECK(!accepts_number("100", "about a hundred"));
  CHECK(accepts_number("35000", "3만 5천원입니다"));
}

TEST_CASE("a percentage may be written with its sign, without it, or as a fraction") {
  CHECK(accepts_number("12.5%", "12.5%"));
  CHECK(accepts_number("12.5%", "12.5"));
  CHECK(accepts_number("12.5%", "0.125"));
  CHECK(accepts_number("12.5%", "12.5 퍼센트"));
  CHECK(accepts_number("0.125", "12.5%"));
  CHECK(!accepts_number("12.5%", "0.125%"));
  CHECK(!accepts_number("12.5", "0.125"));
}

TEST_CASE("JSON is found in the answer and compared by value") {
  CHECK(accepts(Check::json, {R"({"a": 1, "b": [true, null]})"}, R"({"b":[true,null],"a":1.0})"));
  CHECK(accepts(Check::json, {R"({"a": 1})"}, "Here it is:\n```json\n{\"a\": 1}\n```\nBye."));
  CHECK(accepts(Check::json, {R"({"a": 1})"}, "Sure [1]: {not json} {\"a\": 1} and {}") == false);
  CHECK(accepts(Check::json, {R"({"a": "}"})"}, "Result {\"a\": \"}\"}, as asked"));
  CHECK(accepts(Check::json, {"[1, 2]"}, "[1, 2]"));
  CHECK(!accepts(Check::json, {"[1, 2]"}, "[2, 1]"));
  CHECK(!accepts(Check::json, {R"({"a": 1})"}, R"({"a": 1, "b": 2})"));
  CHECK(!accepts(Check::json, {"1"}, "true"));
  CHECK(accepts(Check::json, {R"("한글")"}, "\"\u1112\u1161\u11AB\u1100\u1173\u11AF\""));
  CHECK(!accepts(Check::json, {R"({"a": 1})"}, "```json\n{\"a\": 1"));
  CHECK(!accepts(Check::json, {"[]"}, std::string(100'000, '[')));
  CHECK(!accepts(Check::json, {"{}"}, "\xFF{\x80"));
}

TEST_CASE("the best choice depends on how lengths are paid for") {
  const Expectation expected{
      .check = Check::choice, .answers = {"아니오"}, .choices = {"No", "아니오"}};
  REQUIRE(!problem_with(expected));
  const std::vector<double> logprobs = {-3.0, -4.0};
  CHECK(best_choice(expected, logprobs, ChoiceScore::sum) == 0);
  CHECK(best_choice(expected, logprobs, ChoiceScore::per_character) == 1);   // -1.5, -1.33
  CHECK(best_choice(expected, {{-1.0, -4.0}}, ChoiceScore::per_byte) == 1);  // -0.5, -0.44
  CHECK(best_choice(expected, {{-1.0, -2.0}}, ChoiceScore::per_character) == 0);
  CHECK(best_choice(expected, {{-2.0, -2.0}}, ChoiceScore::sum) == 0);
  CHECK(judge_choice(expected, 1).correct);
  CHECK(judge_choice(expected, 0).reason == "expected “아니오”, chose “No”");
}

TEST_CASE("expectations that cannot be checked are told") {
  const auto problem = [](Check check, std::string answer) {
    return problem_with({.check = check, .answers = {std::move(answer)}, .choices = {"a", "b"}})
        .value_or("");
  };
  CHECK(problem(Check::exact, " \n") == "is empty");
  CHECK(problem(Check::regex, "(a").find("parenthesis") != std::string::npos);
  CHECK(problem(Check::number, "many") == "“many” is not one number");
  CHECK(problem(Check::number, "3 or 4") == "“3 or 4” is not one number");
  CHECK(problem(Check::choice, "c") == "“c” is not one of the choices");
  CHECK(problem(Check::json, "{") == "“{” is not JSON");
  CHECK(problem_with({.answers = {}}) == "has no answer");
}

TEST_CASE("tolerances are numbers or shares") {
  CHECK(parse_tolerance("0.5")->amount == 0.5);
  CHECK(!parse_tolerance("0.5")->relative);
  CHECK(parse_tolerance("2 %")->amount == doctest::Approx(0.02));
  CHECK(parse_tolerance("1%")->relative);
  for (const char* bad : {"", "%", "-1", "1.2.3", "inf", "nan", "one"}) {
    CAPTURE(bad);
    CHECK(!parse_tolerance(bad));
  }
}

TEST_CASE("a similar answer is right from the chosen similarity on") {
  Expectation expected{.check = Check::similarity,
                       .answers = {"Refunds take up to 5 working days.", "환불은 5일 걸립니다"}};
  CHECK(judge(expected, "Refunds take up to five working days").correct);
  CHECK(judge(expected, "환불은  5일 걸립니다.").correct);
  const Verdict far = judge(expected, "We do not know.");
  CHECK_FALSE(far.correct);
  CHECK(far.reason.starts_with("chrF 0."));
  expected.at_least = 1;
  CHECK_FALSE(judge(expected, "Refunds take up to five working days").correct);
  CHECK_FALSE(problem_with(expected));
  expected.at_least = 0;
  CHECK(problem_with(expected));
}

TEST_CASE("a written choice is its text, its letter, or both") {
  const Expectation expected{
      .check = Check::choice, .answers = {"Paris"}, .choices = {"Rome", "Paris", "Bern"}};
  for (const char* right : {"Paris", "paris.", "B", "b", "(B)", "B.", "B) Paris", "B: paris"}) {
    CAPTURE(right);
    CHECK(judge_written_choice(expected, right).correct);
  }
  for (const char* wrong :
       {"", "A", "C) Bern", "Rome", "B) Rome", "Berlin", "Paris or Rome", "BB"}) {
    CAPTURE(wrong);
    CHECK_FALSE(judge_written_choice(expected, wrong).correct);
  }
}
