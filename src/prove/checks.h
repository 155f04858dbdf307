// Whether an answer is right: the seven ways in which a question can be checked, all by rule, none
// by another model's opinion.
//
//   exact     the answer is one of the expected texts, after NFC, trimming and collapsing of spaces
//   contains  an expected text stands somewhere in the answer (same normalisation)
//   regex     a pattern (PCRE2, Unicode) is found in the answer
//   number    the answer's last number is the expected one, within a tolerance
//   choice    the model gives the right one of several continuations the highest probability
//   json      the answer holds a JSON value equal to the expected one
//   similarity  the answer is close to an expected text: chrF (prove/chrf.h) reaches `at_least`
#pragma once
#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace moru {

enum class Check { exact, contains, regex, number, choice, json, similarity };
const char* name_of(Check check);
std::optional<Check> check_named(std::string_view name);
// "exact, contains, …", for messages.
std::string names_of_checks();

// How far a number may be off: "1%" is relative to the expected one, "0.5" absolute.
struct Tolerance {
  double amount = 0;
  bool relative = false;
};
std::optional<Tolerance> parse_tolerance(std::string_view text);

// What counts as a right answer.
struct Expectation {
  Check check = Check::exact;
  std::vector<std::string> answers = {};  // any of these; patterns for regex; JSON texts for json
  std::vector<std::string> choices = {};  // what `choice` scores; answers then name the right ones
  Tolerance within = {};                  // for number
  bool ignore_case = false;               // for exact, contains, regex
  double at_least = 0.5;                  // for similarity, in (0, 1]
};

// What keeps an expectation from being checked (a broken pattern, no answer …), in words; nullopt
// if it is sound. judge() must only see sound ones.
std::optional<std::string> problem_with(const Expectation& expected);

struct Verdict {
  bool correct = false;
  std::string reason;  // empty if correct
};
// Not for Check::choice. Never throws for any `answer`, however hostile: a pattern that takes too
// many steps is a wrong answer with that reason.
Verdict judge(const Expectation& expected, std::string_view answer);

// How the log-probabilities of choices are compared: as they are, or divided by the length of the
// choice, which keeps short choices from winning by being short.
enum class ChoiceScore { sum, per_character, per_byte };
// Index of the best choice; the first one wins a tie. One log-probability for each choice, ≥ 1.
size_t best_choice(const Expectation& expected, std::span<const double> logprobs,
                   ChoiceScore score);
// For Check::choice.
Verdict judge_choice(const Expectation& expected, size_t chosen);
// Check::choice where the model wrote its answer: right if it is the text of a right choice, its
// letter (B, "(b)", "B."), or both ("B) text"). Case does not matter.
Verdict judge_written_choice(const Expectation& expected, std::string_view answer);

// NFC, spaces (any of Unicode's, line ends too) trimmed and collapsed to one; optionally
// case-folded.
std::string normalise_answer(std::string_view text, bool fold_case = false);

// Numbers of a text in order. Understood are signs, thousands separators (1,234,567), decimals,
// exponents (1.5e6), full-width digits, a percent sign, and Korean units (3만 5천, 1억 2,000만).
// Digits that a Latin letter touches on the left are part of a name (A4, GPT4) and left out.
struct Number {
  double value;
  bool percent;
};
std::vector<Number> numbers_in(std::string_view text);

}  // namespace moru
