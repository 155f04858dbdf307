#include "prove/checks.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <fmt/format.h>
#include <pcre2.h>
#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/text.h"
#include "prove/chrf.h"

namespace moru {
namespace {

using Json = nlohmann::json;

constexpr std::array<const char*, 7> kCheckNames = {"exact",  "contains", "regex",     "number",
                                                    "choice", "json",     "similarity"};

// Bounds on what an answer may cost. A pattern of everyday use takes some hundred steps.
constexpr uint32_t kRegexSteps = 1'000'000;
constexpr uint32_t kRegexKibibytes = 64 * 1024;
constexpr size_t kJsonDepth = 64;
// How many places of an answer are tried as the start of a JSON value.
constexpr size_t kJsonStarts = 256;
// Relative slack of numbers that should be equal: decimal digits are not exact in binary.
constexpr double kSameNumber = 1e-9;

// `text` in quotes, short enough for a line of a table.
std::string excerpt(std::string_view text) {
  return fmt::format("“{}”", truncate_to_width(normalise_answer(text), 60));
}

std::string expected_list(const std::vector<std::string>& answers) {
  std::string list;
  for (size_t i = 0; i < std::min<size_t>(answers.size(), 3); ++i)
    list += fmt::format("{}{}", i == 0 ? "" : " or ", excerpt(answers[i]));
  if (answers.size() > 3) list += fmt::format(" or {} others", answers.size() - 3);
  return list;
}

Verdict wrong(std::string reason) { return {false, std::move(reason)}; }

// ---- text ----

bool is_space(char32_t c) {
  if (c == ' ' || (c >= '\t' && c <= '\r') || c == 0x85) return true;
  if (c < 0x80) return false;
  const utf8proc_category_t category = utf8proc_category(static_cast<utf8proc_int32_t>(c));
  return category == UTF8PROC_CATEGORY_ZS || category == UTF8PROC_CATEGORY_ZL ||
         category == UTF8PROC_CATEGORY_ZP;
}

std::string fold(const std::string& text) {
  utf8proc_uint8_t* folded = nullptr;
  const auto options = static_cast<utf8proc_option_t>(UTF8PROC_CASEFOLD | UTF8PROC_COMPOSE);
  const utf8proc_ssize_t bytes =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                   static_cast<utf8proc_ssize_t>(text.size()), &folded, options);
  MORU_CHECK(bytes >= 0);  // text is well-formed UTF-8 by now
  std::string result(reinterpret_cast<const char*>(folded), static_cast<size_t>(bytes));
  std::free(folded);
  return result;
}

Verdict judge_text(const Expectation& expected, std::string_view answer) {
  const std::string given = normalise_answer(answer, expected.ignore_case);
  for (const std::string& text : expected.answers) {
    const std::string wanted = normalise_answer(text, expected.ignore_case);
    if (expected.check == Check::exact ? given == wanted : given.find(wanted) != std::string::npos)
      return {true, ""};
  }
  const char* verb = expected.check == Check::exact ? "expected" : "expected to contain";
  return wrong(
      fmt::format("{} {}, got {}", verb, expected_list(expected.answers), excerpt(answer)));
}

Verdict judge_similarity(const Expectation& expected, std::string_view answer) {
  double best = 0;
  for (const std::string& text : expected.answers) best = std::max(best, chrf(answer, text));
  if (best >= expected.at_least) return {true, ""};
  return wrong(fmt::format("chrF {:.2f} against {}, got {}", best, expected_list(expected.answers),
                           excerpt(answer)));
}

// ---- regex ----

struct PcreDelete {
  void operator()(pcre2_code* p) const { pcre2_code_free(p); }
  void operator()(pcre2_match_data* p) const { pcre2_match_data_free(p); }
  void operator()(pcre2_match_context* p) const { pcre2_match_context_free(p); }
};

std::string pcre_message(int code) {
  std::array<PCRE2_UCHAR, 160> text{};
  pcre2_get_error_message(code, text.data(), text.size());
  return reinterpret_cast<const char*>(text.data());
}

struct Pattern {
  std::unique_ptr<pcre2_code, PcreDelete> code;  // null: `problem` says why
  std::string problem;
};

Pattern compile(const std::string& pattern, bool ignore_case) {
  int code = 0;
  PCRE2_SIZE offset = 0;
  const uint32_t options =
      PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C | (ignore_case ? PCRE2_CASELESS : 0u);
  Pattern compiled;
  compiled.code.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                                    options, &code, &offset, nullptr));
  if (!compiled.code)
    compiled.problem = fmt::format("{} at byte {} of the pattern", pcre_message(code), offset);
  return compiled;
}

Verdict judge_regex(const Expectation& expected, std::string_view answer) {
  const std::string subject = nfc(answer);
  const std::unique_ptr<pcre2_match_context, PcreDelete> limits(
      pcre2_match_context_create(nullptr));
  pcre2_set_match_limit(limits.get(), kRegexSteps);
  pcre2_set_heap_limit(limits.get(), kRegexKibibytes);
  for (const std::string& pattern : expected.answers) {
    const Pattern compiled = compile(pattern, expected.ignore_case);
    MORU_CHECK(compiled.code != nullptr);
    const std::unique_ptr<pcre2_match_data, PcreDelete> match(
        pcre2_match_data_create_from_pattern(compiled.code.get(), nullptr));
    const int found = pcre2_match(compiled.code.get(), reinterpret_cast<PCRE2_SPTR>(subject.data()),
                                  subject.size(), 0, 0, match.get(), limits.get());
    if (found >= 0) return {true, ""};
    if (found != PCRE2_ERROR_NOMATCH)
      return wrong(
          fmt::format("the pattern {} gave up: {}", excerpt(pattern), pcre_message(found)));
  }
  return wrong(fmt::format("expected to match {}, got {}", expected_list(expected.answers),
                           excerpt(answer)));
}

// ---- numbers ----

// What the number reader sees: code points with full-width forms (U+FF01 … U+FF5E) and the minus
// sign brought to ASCII.
std::u32string plain_points(std::string_view text) {
  std::u32string points = utf32_from_utf8(nfc(text));
  for (char32_t& c : points) {
    if (c >= 0xFF01 && c <= 0xFF5E) c -= 0xFF01 - '!';
    if (c == 0x2212) c = '-';
  }
  return points;
}

bool is_digit(char32_t c) { return c >= '0' && c <= '9'; }
bool is_latin(char32_t c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }
bool is_currency(char32_t c) {
  return c == '$' || c == 0xA3 || c == 0xA5 || (c >= 0x20A0 && c <= 0x20CF);
}

// Korean units: those below 만 multiply the digits before them, those from 만 on the whole section.
double unit_of(char32_t c) {
  switch (c) {
    case U'백':
      return 1e2;
    case U'천':
      return 1e3;
    case U'만':
      return 1e4;
    case U'억':
      return 1e8;
    case U'조':
      return 1e12;
    default:
      return 0;
  }
}

class NumberReader {
 public:
  explicit NumberReader(std::string_view text) : text_(plain_points(text)) {}

  std::vector<Number> all() {
    std::vector<Number> numbers;
    while (at_ < text_.size()) {
      if (!starts_number(at_)) {
        ++at_;
      } else if (at_ > 0 && is_latin(text_[at_ - 1])) {
        digits();  // part of a name
      } else if (const std::optional<Number> number = signed_number()) {
        numbers.push_back(*number);
      }
    }
    return numbers;
  }

 private:
  char32_t peek(size_t at) const { return at < text_.size() ? text_[at] : 0; }
  bool starts_number(size_t at) const {
    return is_digit(peek(at)) ||
           (peek(at) == '.' && is_digit(peek(at + 1)) && (at == 0 || !is_digit(text_[at - 1])));
  }

  // A minus counts where it cannot be a hyphen or a range: at the start, after a space or a sign,
  // also before a currency sign (-$5) or after one ($-5).
  bool is_negative(size_t start) const {
    size_t before = start;
    if (before > 0 && is_currency(text_[before - 1])) --before;
    if (before == 0 || text_[before - 1] != '-') return false;
    if (before == 1) return true;
    const char32_t c = text_[before - 2];
    return !is_digit(c) && !is_latin(c) && c != '-' && c != ')' && c < 0x1100;
  }

  // Digits with separators, a fraction and an exponent, as characters for from_chars.
  std::string digits() {
    std::string number;
    const auto take = [&] { number += static_cast<char>(text_[at_++]); };
    const auto group_follows = [&] {  // ",234" and no fourth digit
      return peek(at_) == ',' && is_digit(peek(at_ + 1)) && is_digit(peek(at_ + 2)) &&
             is_digit(peek(at_ + 3)) && !is_digit(peek(at_ + 4));
    };
    while (is_digit(peek(at_))) take();
    const bool may_group = !number.empty() && number.size() <= 3;
    while (may_group && group_follows()) {
      ++at_;
      for (int i = 0; i < 3; ++i) take();
    }
    if (peek(at_) == '.' && is_digit(peek(at_ + 1))) {
      take();
      while (is_digit(peek(at_))) take();
    }
    const size_t sign = peek(at_ + 1) == '-' || peek(at_ + 1) == '+' ? 1 : 0;
    if ((peek(at_) == 'e' || peek(at_) == 'E') && is_digit(peek(at_ + 1 + sign))) {
      take();
      if (peek(at_) == '+')
        ++at_;
      else if (sign == 1)
        take();
      while (is_digit(peek(at_))) take();
    }
    return number;
  }

  std::optional<double> plain_number() {
    const std::string text = digits();
    double value = 0;
    const auto result = std::from_chars(text.data(), text.data() + text.size(), value);
    if (result.ec != std::errc()) return std::nullopt;  // past what a double can hold
    return value;
  }

  // One number with its Korean units: "3만 5천" is one, "3 5" are two.
  std::optional<Number> signed_number() {
    const bool negative = is_negative(at_);
    double total = 0, section = 0, last_unit = 1e16, last_small = 1e4;
    bool any_unit = false;
    for (;;) {
      const size_t start = at_;
      const std::optional<double> value = plain_number();
      if (!value) return std::nullopt;
      const double unit = unit_of(peek(at_));
      const bool is_small = unit > 0 && unit < 1e4;
      if (unit >= (is_small ? last_small : last_unit)) {
        // Units fall within a number: this part begins the next one.
        if (any_unit) at_ = start;
        break;
      }
      section += is_small ? *value * unit : *value;
      if (is_small) {
        last_small = unit;
        ++at_;
      }
      const double big = unit_of(peek(at_));
      const bool closes_section = big >= 1e4 && big < last_unit;
      if (closes_section) {
        total += section * big;
        section = 0;
        last_unit = big;
        last_small = 1e4;
        ++at_;
      }
      // Only after a unit can the number go on, at once or after one space.
      if (!closes_section && !is_small) break;
      any_unit = true;
      const size_t next = peek(at_) == ' ' ? at_ + 1 : at_;
      if (!is_digit(peek(next))) break;
      at_ = next;
    }
    double result = total + section;
    if (negative) result = -result;
    return Number{result, !any_unit && takes_percent()};
  }

  bool takes_percent() {
    const size_t next = peek(at_) == ' ' ? at_ + 1 : at_;
    if (peek(next) == '%') {
      at_ = next + 1;
      return true;
    }
    for (const std::u32string_view word : {U"퍼센트", U"percent"})
      if (text_.compare(next, word.size(), word) == 0) {
        at_ = next + word.size();
        return true;
      }
    return false;
  }

  std::u32string text_;
  size_t at_ = 0;
};

bool is_near(double given, double wanted, const Tolerance& within) {
  const double slack = kSameNumber * std::abs(wanted);
  const double allowed = within.relative ? within.amount * std::abs(wanted) : within.amount;
  return std::abs(given - wanted) <= allowed + slack;
}

// "12.5%" and "12.5" are the same answer where the question asks for a percentage, and so is
// "0.125": a reader would take each.
bool is_same_number(const Number& given, const Number& wanted, const Tolerance& within) {
  if (is_near(given.value, wanted.value, within)) return true;
  if (given.percent == wanted.percent) return false;
  const double fraction = given.percent ? given.value / 100 : given.value;
  const double wanted_fraction = wanted.percent ? wanted.value / 100 : wanted.value;
  Tolerance scaled = within;
  if (wanted.percent && !within.relative) scaled.amount /= 100;
  return is_near(fraction, wanted_fraction, scaled);
}

Verdict judge_number(const Expectation& expected, std::string_view answer) {
  const std::vector<Number> given = numbers_in(answer);
  if (given.empty())
    return wrong(fmt::format("expected {}, got no number in {}", expected_list(expected.answers),
                             excerpt(answer)));
  for (const std::string& text : expected.answers)
    if (is_same_number(given.back(), numbers_in(text).back(), expected.within)) return {true, ""};
  return wrong(fmt::format("expected {}, got {}{}", expected_list(expected.answers),
                           given.back().value, given.back().percent ? "%" : ""));
}

// ---- JSON ----

// The end of the JSON value that could begin at text[0]: brackets balanced, strings skipped. npos
// if it does not end, or nests deeper than this program wants to follow.
size_t bracketed_length(std::string_view text) {
  size_t depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      if (++depth > kJsonDepth) return std::string_view::npos;
    } else if (c == '}' || c == ']') {
      if (depth == 0) return std::string_view::npos;
      if (--depth == 0) return i + 1;
    }
  }
  return std::string_view::npos;
}

std::optional<Json> parse_json(std::string_view text) {
  const size_t first = text.find_first_not_of(" \t\r\n");
  if (first == std::string_view::npos) return std::nullopt;
  const bool nested = text[first] == '{' || text[first] == '[';
  if (nested && bracketed_length(text.substr(first)) == std::string_view::npos) return std::nullopt;
  Json value = Json::parse(text, nullptr, false);
  if (value.is_discarded()) return std::nullopt;
  return value;
}

// The whole answer, or the first ``` fence that holds JSON, or the first bracketed part that does.
std::optional<Json> find_json(std::string_view answer) {
  if (std::optional<Json> whole = parse_json(answer)) return whole;
  size_t open = answer.find("```");
  while (open != std::string_view::npos) {
    const size_t line_end = answer.find('\n', open);
    if (line_end == std::string_view::npos) break;
    const size_t close = answer.find("```", line_end);
    const std::string_view inside = answer.substr(line_end + 1, close - line_end - 1);
    if (std::optional<Json> fenced = parse_json(inside)) return fenced;
    if (close == std::string_view::npos) break;
    open = answer.find("```", close + 3);
  }
  size_t start = answer.find_first_of("{[");
  for (size_t tries = 0; start != std::string_view::npos && tries < kJsonStarts; ++tries) {
    const std::string_view rest = answer.substr(start);
    const size_t length = bracketed_length(rest);
    if (length != std::string_view::npos)
      if (std::optional<Json> part = parse_json(rest.substr(0, length))) return part;
    start = answer.find_first_of("{[", start + 1);
  }
  return std::nullopt;
}

// Depth is bounded by kJsonDepth. Numbers compare by value (1 == 1.0) as nlohmann::json does.
bool same_json(const Json& a, const Json& b) {
  if (a.is_string() && b.is_string())
    return nfc(a.get_ref<const std::string&>()) == nfc(b.get_ref<const std::string&>());
  if (a.is_array() && b.is_array())
    return std::equal(a.begin(), a.end(), b.begin(), b.end(), same_json);
  if (a.is_object() && b.is_object()) {
    if (a.size() != b.size()) return false;
    for (const auto& [key, value] : a.items()) {
      const auto other = b.find(key);
      if (other == b.end() || !same_json(value, *other)) return false;
    }
    return true;
  }
  return a == b;
}

Verdict judge_json(const Expectation& expected, std::string_view answer) {
  const std::string text = repair_utf8(answer);
  const std::optional<Json> given = find_json(text);
  if (!given) return wrong(fmt::format("no JSON in {}", excerpt(answer)));
  for (const std::string& wanted : expected.answers)
    if (same_json(*given, parse_json(wanted).value())) return {true, ""};
  return wrong(
      fmt::format("expected {}, got {}", expected_list(expected.answers), excerpt(given->dump())));
}

// ---- choices ----

bool is_right_choice(const Expectation& expected, size_t index) {
  return std::find(expected.answers.begin(), expected.answers.end(), expected.choices[index]) !=
         expected.answers.end();
}

}  // namespace

const char* name_of(Check check) { return kCheckNames[static_cast<size_t>(check)]; }

std::optional<Check> check_named(std::string_view name) {
  for (size_t i = 0; i < kCheckNames.size(); ++i)
    if (name == kCheckNames[i]) return static_cast<Check>(i);
  return std::nullopt;
}

std::string names_of_checks() { return fmt::format("{}", fmt::join(kCheckNames, ", ")); }

std::optional<Tolerance> parse_tolerance(std::string_view text) {
  Tolerance within;
  std::string_view digits = text;
  if (digits.ends_with('%')) {
    within.relative = true;
    digits.remove_suffix(1);
  }
  while (digits.ends_with(' ')) digits.remove_suffix(1);
  const auto result = std::from_chars(digits.data(), digits.data() + digits.size(), within.amount);
  if (result.ec != std::errc() || result.ptr != digits.data() + digits.size()) return std::nullopt;
  if (!std::isfinite(within.amount) || within.amount < 0) return std::nullopt;
  if (within.relative) within.amount /= 100;
  return within;
}

std::optional<std::string> problem_with(const Expectation& expected) {
  if (expected.answers.empty()) return "has no answer";
  for (const std::string& answer : expected.answers) {
    if (normalise_answer(answer).empty()) return "is empty";
    switch (expected.check) {
      case Check::exact:
      case Check::contains:
        break;
      case Check::regex:
        if (Pattern pattern = compile(answer, expected.ignore_case); !pattern.code)
          return pattern.problem;
        break;
      case Check::number:
        if (numbers_in(answer).size() != 1)
          return fmt::format("{} is not one number", excerpt(answer));
        break;
      case Check::choice:
        if (std::find(expected.choices.begin(), expected.choices.end(), answer) ==
            expected.choices.end())
          return fmt::format("{} is not one of the choices", excerpt(answer));
        break;
      case Check::json:
        if (!parse_json(answer)) return fmt::format("{} is not JSON", excerpt(answer));
        break;
      case Check::similarity:
        if (!(expected.at_least > 0 && expected.at_least <= 1))
          return fmt::format("wants a similarity of {}, which is not in (0, 1]", expected.at_least);
        break;
    }
  }
  return std::nullopt;
}

Verdict judge(const Expectation& expected, std::string_view answer) {
  switch (expected.check) {
    case Check::exact:
    case Check::contains:
      return judge_text(expected, answer);
    case Check::regex:
      return judge_regex(expected, answer);
    case Check::number:
      return judge_number(expected, answer);
    case Check::json:
      return judge_json(expected, answer);
    case Check::similarity:
      return judge_similarity(expected, answer);
    case Check::choice:
      break;
  }
  MORU_CHECK(false && "choices are judged by judge_choice");
  return {};
}

size_t best_choice(const Expectation& expected, std::span<const double> logprobs,
                   ChoiceScore score) {
  MORU_CHECK(!logprobs.empty() && logprobs.size() == expected.choices.size());
  const auto scored = [&](size_t i) {
    const std::string& text = expected.choices[i];
    switch (score) {
      case ChoiceScore::sum:
        break;
      case ChoiceScore::per_character:
        return logprobs[i] / static_cast<double>(std::max<size_t>(1, count_code_points(text)));
      case ChoiceScore::per_byte:
        return logprobs[i] / static_cast<double>(std::max<size_t>(1, text.size()));
    }
    return logprobs[i];
  };
  size_t best = 0;
  for (size_t i = 1; i < logprobs.size(); ++i)
    if (scored(i) > scored(best)) best = i;
  return best;
}

Verdict judge_choice(const Expectation& expected, size_t chosen) {
  if (is_right_choice(expected, chosen)) return {true, ""};
  return wrong(fmt::format("expected {}, chose {}", expected_list(expected.answers),
                           excerpt(expected.choices[chosen])));
}

Verdict judge_written_choice(const Expectation& expected, std::string_view answer) {
  const auto bare = [](std::string text) {  // without the dress of a letter: "(B)." is "b"
    while (!text.empty() && std::string_view("().: ").find(text.back()) != std::string_view::npos)
      text.pop_back();
    return text.substr(std::min(text.find_first_not_of("( "), text.size()));
  };
  const std::string given = bare(normalise_answer(answer, true));
  for (size_t i = 0; i < expected.choices.size(); ++i) {
    const std::string text = bare(normalise_answer(expected.choices[i], true));
    bool named = given == text;
    if (i < 26 && !given.empty() && given[0] == static_cast<char>('a' + i)) {
      const std::string_view rest = std::string_view(given).substr(1);
      named |= rest.empty();
      if (!rest.empty() && std::string_view("). :").find(rest[0]) != std::string_view::npos)
        named |= rest.ends_with(text) &&
                 rest.substr(0, rest.size() - text.size()).find_first_not_of("). :") ==
                     std::string_view::npos;
    }
    if (named) return judge_choice(expected, i);
  }
  return wrong(
      fmt::format("expected {}, got {}", expected_list(expected.answers), excerpt(answer)));
}

std::string normalise_answer(std::string_view text, bool fold_case) {
  std::string folded;
  const std::string composed = nfc(text);
  bool space_before = false;
  for (const CodePoint c : CodePoints(composed)) {
    if (is_space(c.value)) {
      space_before = !folded.empty();
      continue;
    }
    if (space_before) folded += ' ';
    space_before = false;
    append_utf8(folded, c.value);
  }
  return fold_case ? fold(folded) : folded;
}

std::vector<Number> numbers_in(std::string_view text) { return NumberReader(text).all(); }

}  // namespace moru
