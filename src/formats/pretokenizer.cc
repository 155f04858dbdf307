#include "formats/pretokenizer.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "base/error.h"

namespace moru {
namespace {

using Contractions = WordShape::Contractions;
using Words = WordShape::Words;
using Digits = WordShape::Digits;

// --- Patterns: data of the models' tokenizer.json files, by which they are recognized. ---

constexpr std::string_view kGpt2 =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr std::string_view kLlama3 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kQwen2 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kQwen35 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kMiniCpm5 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kTekken =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kGpt4o =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
// DeepSeek V3 writes real carriage returns and line feeds into its last pattern.
constexpr std::string_view kDeepSeek3 =
    "[!\"#$%&'()*+,\\-./"
    ":;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+";
constexpr std::string_view kDeepSeekCjk = "[一-龥\u3040-ゟ゠-ヿ]+";
constexpr std::string_view kDigit = R"(\p{N})";
constexpr std::string_view kDigits = R"(\p{N}+)";
constexpr std::string_view kThreeDigits = R"(\p{N}{1,3})";

constexpr std::pair<char32_t, char32_t> kCjkRanges[] = {{0x4e00, 0x9fa5}, {0x3040, 0x30ff}};

struct KnownPattern {
  std::string_view regex, name;
  std::variant<WordShape, Run> pattern;
  bool covers_all;
};

const std::vector<KnownPattern>& known_patterns() {
  static const std::vector<KnownPattern> table = {
      {kGpt2, "gpt-2",
       WordShape{.contractions = Contractions::lower_first,
                 .words = Words::after_space,
                 .digits = Digits::after_space,
                 .punctuation_tail = "",
                 .newlines = false},
       true},
      {kLlama3, "llama-3", WordShape{.contractions = Contractions::any_case_first}, true},
      {kQwen2, "qwen-2",
       WordShape{.contractions = Contractions::any_case_first, .digits = Digits::up_to_1}, true},
      {kQwen35, "qwen-3.5",
       WordShape{.contractions = Contractions::any_case_first,
                 .letters = kLetter | kMark,
                 .digits = Digits::up_to_1,
                 .not_punctuation = kSpace | kLetter | kMark | kNumber},
       true},
      {kMiniCpm5, "minicpm-5",
       WordShape{.contractions = Contractions::any_case_first, .digits = Digits::any}, true},
      {kTekken, "tekken",
       WordShape{
           .words = Words::after_any_cased, .digits = Digits::up_to_1, .punctuation_tail = "\r\n/"},
       true},
      {kGpt4o, "gpt-4o",
       WordShape{.contractions = Contractions::any_case_suffix,
                 .words = Words::after_any_cased,
                 .punctuation_tail = "\r\n/"},
       true},
      {kDeepSeek3, "deepseek-3",
       WordShape{.letters = kLetter | kMark,
                 .not_before = kLetter | kPunctuation | kSymbol | kNewline,
                 .ascii_punctuation_first = true,
                 .no_digits = true,
                 .punctuation = kPunctuation | kSymbol},
       false},
      {kDeepSeekCjk, "deepseek-cjk", Run{.ranges = kCjkRanges}, false},
      {kDigit, "digit", Run{.classes = kNumber, .at_most = 1}, false},
      {kDigits, "digits", Run{.classes = kNumber}, false},
      {kThreeDigits, "3-digits", Run{.classes = kNumber, .at_most = 3}, false},
  };
  return table;
}

// --- Scanners: how many bytes match at the start of `text` (not empty), 0 for none. ---

// Bytes of the longest run of characters of `classes` at the start.
size_t run_of(std::string_view text, unsigned classes) {
  size_t at = 0;
  while (at < text.size()) {
    const Character c = first_character(text.substr(at));
    if ((class_of(c.code) & classes) == 0) break;
    at += c.bytes;
  }
  return at;
}

// 's 't 're 've 'm 'll 'd. Without regard to case, ſ (U+017F) is an s too, as Unicode folds it.
size_t contraction(std::string_view text, bool any_case) {
  if (text.size() < 2 || text[0] != '\'') return 0;
  const auto letter = [&](size_t i) {
    if (i >= text.size()) return '\0';
    const char c = text[i];
    return any_case && c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  };
  switch (letter(1)) {
    case 's':
    case 't':
    case 'm':
    case 'd':
      return 2;
    case 'r':
    case 'v':
      return letter(2) == 'e' ? 3 : 0;
    case 'l':
      return letter(2) == 'l' ? 3 : 0;
    default:
      return any_case && text.substr(1).starts_with("\u017f") ? 3 : 0;
  }
}

// U*W+ or else U+W*, with U upper-like and W lower-like: greedy, giving characters back as a
// backtracking engine would.
size_t cased_word(std::string_view text, bool lower_needed) {
  const size_t upper = run_of(text, kUpperLike);
  const size_t lower = run_of(text.substr(upper), kLowerLike);
  if (!lower_needed) return upper == 0 ? 0 : upper + lower;
  if (lower > 0) return upper + lower;
  // W+ has to come out of U*'s run: it takes the run's last character that is both.
  for (size_t end = upper; end > 0;) {
    const Character c = last_character(text.substr(0, end));
    if (class_of(c.code) & kLowerLike) return end;
    end -= c.bytes;
  }
  return 0;
}

size_t words(const WordShape& shape, std::string_view text, Character first, unsigned bits) {
  switch (shape.words) {
    case Words::after_space: {
      const size_t space = first.code == ' ' ? 1 : 0;
      const size_t run = run_of(text.substr(space), shape.letters);
      return run == 0 ? 0 : space + run;
    }
    case Words::after_any: {
      if (bits & shape.letters) return run_of(text, shape.letters);
      if (bits & shape.not_before) return 0;
      const size_t run = run_of(text.substr(first.bytes), shape.letters);
      return run == 0 ? 0 : first.bytes + run;
    }
    case Words::after_any_cased: {
      const size_t before = bits & shape.not_before ? 0 : first.bytes;
      size_t length = 0;
      for (const bool lower_needed : {true, false}) {
        if (before > 0) {
          const size_t word = cased_word(text.substr(before), lower_needed);
          if (word > 0) length = before + word;
        }
        if (length == 0) length = cased_word(text, lower_needed);
        if (length > 0) break;
      }
      if (length > 0 && shape.contractions == Contractions::any_case_suffix)
        length += contraction(text.substr(length), true);
      return length;
    }
  }
  return 0;
}

size_t digits(Digits kind, std::string_view text, Character first, unsigned bits) {
  if (kind == Digits::after_space) {
    const size_t space = first.code == ' ' ? 1 : 0;
    const size_t run = run_of(text.substr(space), kNumber);
    return run == 0 ? 0 : space + run;
  }
  if ((bits & kNumber) == 0) return 0;
  if (kind == Digits::any) return run_of(text, kNumber);
  size_t at = first.bytes;
  for (int more = kind == Digits::up_to_3 ? 2 : 0; more > 0 && at < text.size(); --more) {
    const Character c = first_character(text.substr(at));
    if ((class_of(c.code) & kNumber) == 0) break;
    at += c.bytes;
  }
  return at;
}

size_t punctuation(const WordShape& shape, std::string_view text) {
  const auto is = [&](unsigned bits) {
    return shape.punctuation != 0 ? (bits & shape.punctuation) != 0
                                  : (bits & shape.not_punctuation) == 0;
  };
  const size_t start = text[0] == ' ' ? 1 : 0;
  size_t at = start;
  while (at < text.size()) {
    const Character c = first_character(text.substr(at));
    if (!is(class_of(c.code))) break;
    at += c.bytes;
  }
  if (at == start) return 0;
  while (at < text.size() && shape.punctuation_tail.find(text[at]) != std::string_view::npos) ++at;
  return at;
}

// \s*[\r\n]+ | \s+(?!\S) | \s+, at a white-space character.
size_t white_space(bool newlines, std::string_view text) {
  size_t at = 0, before_last = 0, after_newline = 0;
  while (at < text.size()) {
    const Character c = first_character(text.substr(at));
    const unsigned bits = class_of(c.code);
    if ((bits & kSpace) == 0) break;
    before_last = at;
    at += c.bytes;
    if (bits & kNewline) after_newline = at;
  }
  if (newlines && after_newline > 0) return after_newline;
  // The last space stays with what follows, unless it is the only one.
  return at == text.size() || before_last == 0 ? at : before_last;
}

bool is_ascii_letter(char c) { return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z'); }

size_t scan(const WordShape& shape, std::string_view text) {
  const Character first = first_character(text);
  const unsigned bits = class_of(first.code);
  size_t length = 0;
  if (first.code == '\'' && (shape.contractions == Contractions::lower_first ||
                             shape.contractions == Contractions::any_case_first)) {
    length = contraction(text, shape.contractions == Contractions::any_case_first);
    if (length > 0) return length;
  }
  if (shape.ascii_punctuation_first && first.code < 0x80 && (bits & (kPunctuation | kSymbol))) {
    size_t end = 1;
    while (end < text.size() && is_ascii_letter(text[end])) ++end;
    if (end > 1) return end;
  }
  if ((length = words(shape, text, first, bits)) > 0) return length;
  if (!shape.no_digits && (length = digits(shape.digits, text, first, bits)) > 0) return length;
  if ((length = punctuation(shape, text)) > 0) return length;
  return bits & kSpace ? white_space(shape.newlines, text) : 0;
}

size_t scan(const Run& run, std::string_view text) {
  size_t at = 0, count = 0;
  while (at < text.size() && count < run.at_most) {
    const Character c = first_character(text.substr(at));
    const bool in_range = std::any_of(run.ranges.begin(), run.ranges.end(), [&](const auto& r) {
      return c.code >= r.first && c.code <= r.second;
    });
    if (!in_range && (class_of(c.code) & run.classes) == 0) break;
    at += c.bytes;
    ++count;
  }
  return at;
}

// The leftmost match of a scanner.
template <typename Pattern>
std::optional<Regex::Match> search(const Pattern& pattern, std::string_view text, size_t from) {
  while (from < text.size()) {
    const size_t length = scan(pattern, text.substr(from));
    if (length > 0) return Regex::Match{from, from + length};
    from += first_character(text.substr(from)).bytes;
  }
  return std::nullopt;
}

// --- What GGUF names stand for. ---

constexpr std::string_view kGpt2Steps[] = {kGpt2};
constexpr std::string_view kDigitGpt2Steps[] = {kDigit, kGpt2};
constexpr std::string_view kLlama3Steps[] = {kLlama3};
constexpr std::string_view kQwen2Steps[] = {kQwen2};
constexpr std::string_view kQwen35Steps[] = {kQwen35};
constexpr std::string_view kTekkenSteps[] = {kTekken};
constexpr std::string_view kGpt4oSteps[] = {kGpt4o};
constexpr std::string_view kMiniCpm5Steps[] = {kThreeDigits, kMiniCpm5};
constexpr std::string_view kDeepSeek3Steps[] = {kThreeDigits, kDeepSeekCjk, kDeepSeek3};
constexpr std::string_view kDeepSeekCoderSteps[] = {"[\r\n]", R"(\s?\p{L}+)", R"(\s?\p{P}+)",
                                                    "[一-龥ࠀ-一가-퟿]+", kDigit};
constexpr KnownPre kPres[] = {
    {.name = "gpt-2", .patterns = kGpt2Steps},
    {.name = "phi-2", .patterns = kGpt2Steps},
    {.name = "a.x-4.0", .patterns = kGpt2Steps},
    {.name = "exaone4", .patterns = kGpt2Steps},
    {.name = "trillion", .patterns = kGpt2Steps},
    {.name = "jais", .patterns = kGpt2Steps},
    {.name = "olmo", .patterns = kGpt2Steps, .nfc = true},
    {.name = "mpt", .patterns = kGpt2Steps, .nfc = true},
    {.name = "smollm", .patterns = kDigitGpt2Steps},
    {.name = "starcoder", .patterns = kDigitGpt2Steps},
    {.name = "refact", .patterns = kDigitGpt2Steps},
    {.name = "exaone", .patterns = kDigitGpt2Steps},
    {.name = "minerva-7b", .patterns = kDigitGpt2Steps},
    {.name = "command-r", .patterns = kDigitGpt2Steps, .nfc = true},
    {.name = "llama-bpe", .patterns = kLlama3Steps, .ignore_merges = true, .adds_bos = true},
    {.name = "llama3", .patterns = kLlama3Steps, .ignore_merges = true, .adds_bos = true},
    {.name = "llama-v3", .patterns = kLlama3Steps, .ignore_merges = true, .adds_bos = true},
    {.name = "falcon3", .patterns = kLlama3Steps, .ignore_merges = true, .adds_bos = true},
    {.name = "falcon-h1", .patterns = kLlama3Steps, .ignore_merges = true, .adds_bos = true},
    {.name = "pixtral", .patterns = kLlama3Steps, .ignore_merges = true, .adds_bos = true},
    {.name = "midm-2.0", .patterns = kLlama3Steps, .ignore_merges = true, .adds_bos = true},
    {.name = "lfm2", .patterns = kLlama3Steps, .ignore_merges = true, .adds_bos = true},
    {.name = "dbrx", .patterns = kLlama3Steps},
    {.name = "smaug-bpe", .patterns = kLlama3Steps},
    {.name = "chatglm-bpe", .patterns = kLlama3Steps},
    {.name = "glm4", .patterns = kLlama3Steps, .ignore_merges = true},
    {.name = "qwen2", .patterns = kQwen2Steps, .nfc = true},
    {.name = "stablelm2", .patterns = kQwen2Steps},
    {.name = "deepseek-r1-qwen", .patterns = kQwen2Steps},
    {.name = "megrez", .patterns = kQwen2Steps},
    {.name = "kormo", .patterns = kQwen2Steps},
    {.name = "hunyuan", .patterns = kQwen2Steps},
    {.name = "solar-open", .patterns = kQwen2Steps},
    {.name = "grok-2", .patterns = kQwen2Steps},
    {.name = "qwen35", .patterns = kQwen35Steps, .nfc = true},
    {.name = "tekken", .patterns = kTekkenSteps, .ignore_merges = true, .adds_bos = true},
    {.name = "gpt-4o", .patterns = kGpt4oSteps, .ignore_merges = true},
    {.name = "llama4", .patterns = kGpt4oSteps, .ignore_merges = true},
    {.name = "kanana2", .patterns = kGpt4oSteps, .ignore_merges = true},
    {.name = "minimax-m2", .patterns = kGpt4oSteps},
    {.name = "minicpm5", .patterns = kMiniCpm5Steps, .ignore_merges = true},
    {.name = "deepseek-v3", .patterns = kDeepSeek3Steps},
    {.name = "hunyuan-dense", .patterns = kDeepSeek3Steps},
    {.name = "deepseek-coder", .patterns = kDeepSeekCoderSteps},
};

}  // namespace

Matcher Matcher::of_regex(const std::string& where, std::string_view pattern) {
  Matcher matcher;
  for (const KnownPattern& known : known_patterns())
    if (known.regex == pattern) {
      matcher.name_ = known.name;
      matcher.covers_all_ = known.covers_all;
      std::visit([&](const auto& p) { matcher.pattern_ = p; }, known.pattern);
      return matcher;
    }
  matcher.name_ = fmt::format("/{}/", pattern);
  matcher.pattern_.emplace<Regex>(where, pattern);
  return matcher;
}

Matcher Matcher::of_text(std::string text) {
  MORU_CHECK(!text.empty());
  Matcher matcher;
  matcher.name_ = fmt::format("\"{}\"", text);
  matcher.pattern_ = Literal{std::move(text)};
  return matcher;
}

std::optional<Regex::Match> Matcher::find(std::string_view text, size_t from) const {
  if (const auto* shape = std::get_if<WordShape>(&pattern_)) return search(*shape, text, from);
  if (const auto* run = std::get_if<Run>(&pattern_)) return search(*run, text, from);
  if (const auto* regex = std::get_if<Regex>(&pattern_)) return regex->find(text, from);
  const std::string& literal = std::get<Literal>(pattern_).text;
  const size_t at = text.find(literal, from);
  if (at == std::string_view::npos) return std::nullopt;
  return Regex::Match{at, at + literal.size()};
}

void PreTokenizer::add(PreTokenizerStep step) { steps_.push_back(std::move(step)); }

void PreTokenizer::run(size_t step, std::string_view text, bool starts_text, Sink emit) const {
  if (text.empty()) return;
  if (step == steps_.size()) return emit(text, starts_text);
  if (step + 1 == steps_.size()) return apply(steps_[step], text, starts_text, emit);
  auto next = [&](std::string_view piece, bool starts) { run(step + 1, piece, starts, emit); };
  apply(steps_[step], text, starts_text, Sink(next));
}

namespace {

struct Part {
  size_t begin, end;
  bool is_match;
};

// Matches and the gaps between them, in order, empty ones left out.
template <typename Take>
void cut(const Matcher& matcher, std::string_view text, bool invert, Take&& take) {
  size_t done = 0, from = 0;
  while (from <= text.size()) {
    const std::optional<Regex::Match> match = matcher.find(text, from);
    if (!match) break;
    if (match->begin > done) take(Part{done, match->begin, invert});
    if (match->end > match->begin) take(Part{match->begin, match->end, !invert});
    done = match->end;
    from = match->end;
    if (match->end == match->begin) {  // empty: it cuts, and the search moves on a character
      if (from == text.size()) break;
      from += first_character(text.substr(from)).bytes;
    }
  }
  if (done < text.size()) take(Part{done, text.size(), invert});
}

}  // namespace

void PreTokenizer::apply(const PreTokenizerStep& step, std::string_view text, bool starts_text,
                         Sink emit) {
  const auto give = [&](size_t begin, size_t end) {
    emit(text.substr(begin, end - begin), starts_text && begin == 0);
  };
  switch (step.kind) {
    case PreTokenizerStep::Kind::prefix_space: {
      if (text.front() == ' ') return emit(text, starts_text);
      const std::string prefixed = fmt::format(" {}", text);
      return emit(prefixed, starts_text);
    }
    case PreTokenizerStep::Kind::metaspace: {
      constexpr std::string_view mark = "▁";
      std::string marked;
      marked.reserve(text.size() * 2);
      for (const char c : text)
        if (c == ' ')
          marked += mark;
        else
          marked += c;
      const bool wanted = step.prepend == PreTokenizerStep::Prepend::always ||
                          (step.prepend == PreTokenizerStep::Prepend::first && starts_text);
      if (wanted && !marked.starts_with(mark)) marked.insert(0, mark);
      if (!step.split_at_spaces) return emit(marked, starts_text);
      for (size_t begin = 0; begin < marked.size();) {
        const size_t end = std::min(marked.find(mark, begin + 1), marked.size());
        emit(std::string_view(marked).substr(begin, end - begin), starts_text && begin == 0);
        begin = end;
      }
      return;
    }
    case PreTokenizerStep::Kind::split:
      break;
  }
  switch (step.behavior) {
    case SplitBehavior::isolated:
      return cut(*step.matcher, text, step.invert, [&](Part p) { give(p.begin, p.end); });
    case SplitBehavior::removed:
      return cut(*step.matcher, text, step.invert, [&](Part p) {
        if (!p.is_match) give(p.begin, p.end);
      });
    case SplitBehavior::contiguous:
    case SplitBehavior::merged_with_previous:
    case SplitBehavior::merged_with_next:
      break;
  }
  // The merging behaviours hold one part back until its neighbour is known.
  std::optional<Part> held;
  cut(*step.matcher, text, step.invert, [&](Part p) {
    const bool joins =
        held &&
        (step.behavior == SplitBehavior::contiguous             ? held->is_match == p.is_match
         : step.behavior == SplitBehavior::merged_with_previous ? p.is_match && !held->is_match
                                                                : held->is_match && !p.is_match);
    if (joins) {
      held->end = p.end;
      // A part that took its match is full: the next match stands alone.
      if (step.behavior != SplitBehavior::contiguous)
        held->is_match = step.behavior == SplitBehavior::merged_with_previous;
      return;
    }
    if (held) give(held->begin, held->end);
    held = p;
  });
  if (held) give(held->begin, held->end);
}

std::string PreTokenizer::description() const {
  std::string all;
  for (const PreTokenizerStep& step : steps_) {
    if (step.kind == PreTokenizerStep::Kind::prefix_space) {
      all += "prefix-space;";
    } else if (step.kind == PreTokenizerStep::Kind::metaspace) {
      all += fmt::format("metaspace {} {};", static_cast<int>(step.prepend), step.split_at_spaces);
    } else {
      // Where matches leave no gap, removing the gaps changes nothing.
      const bool whole =
          step.matcher->covers_all() && (step.behavior == SplitBehavior::isolated ||
                                         (step.behavior == SplitBehavior::removed && step.invert));
      all += whole ? fmt::format("{};", step.matcher->name())
                   : fmt::format("{} {} {};", step.matcher->name(), static_cast<int>(step.behavior),
                                 step.invert);
    }
  }
  return all;
}

std::span<const KnownPre> known_pres() { return kPres; }

PreTokenizer pre_tokenizer_of(const KnownPre& pre) {
  PreTokenizer result;
  for (const std::string_view pattern : pre.patterns)
    result.add({.matcher = Matcher::of_regex(std::string(pre.name), pattern)});
  return result;
}

}  // namespace moru
