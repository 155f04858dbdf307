#include "engine/regex_grammar.h"

#include <fmt/format.h>

#include <algorithm>
#include <deque>
#include <map>
#include <optional>

#include "base/error.h"
#include "base/text.h"
#include "engine/automaton.h"
#include "formats/unicode.h"

namespace moru {
namespace {

using Node = Grammar::Node;
constexpr size_t kNoLimit = Grammar::kNoLimit;

constexpr size_t kMaxPatternBytes = 16 << 10;
constexpr int kMaxDepth = 100;
constexpr size_t kMaxCount = 1'000'000;
// An expression is tried with its counts cut down to kTrialCount; one that then has more states
// than kTrialStates would have them at every step with the true counts. ".*x.{50}" is the usual
// one: it must remember which of the last fifty characters was an x.
constexpr size_t kTrialCount = 12, kTrialStates = 3'000;

size_t sum(size_t a, size_t b) { return a > kNoLimit - b ? kNoLimit : a + b; }
size_t product(size_t a, size_t b) { return a != 0 && b > kNoLimit / a ? kNoLimit : a * b; }

// A part of an expression: kept as a tree, so that anchors are known before it is written.
struct Piece {
  enum class Kind { set, sequence, choice, repeat, line_start, line_end };
  Kind kind = Kind::sequence;
  CodeSet set;
  std::vector<Piece> parts;
  size_t min = 1, max = 1;

  // Characters of the texts that it matches.
  size_t shortest() const {
    switch (kind) {
      case Kind::set:
        return 1;
      case Kind::repeat:
        return product(min, parts[0].shortest());
      case Kind::choice: {
        size_t least = kNoLimit;
        for (const Piece& p : parts) least = std::min(least, p.shortest());
        return least;
      }
      default: {
        size_t total = 0;
        for (const Piece& p : parts) total = sum(total, p.shortest());
        return total;
      }
    }
  }
  size_t longest() const {
    switch (kind) {
      case Kind::set:
        return 1;
      case Kind::repeat:
        return parts[0].longest() == 0 ? 0 : product(max, parts[0].longest());
      case Kind::choice: {
        size_t most = 0;
        for (const Piece& p : parts) most = std::max(most, p.longest());
        return most;
      }
      default: {
        size_t total = 0;
        for (const Piece& p : parts) total = sum(total, p.longest());
        return total;
      }
    }
  }
};

Piece piece_of(CodeSet set) { return {.kind = Piece::Kind::set, .set = std::move(set)}; }

const CodeSet& digits() {
  static const CodeSet set = {{U'0', U'9'}};
  return set;
}
const CodeSet& word_characters() {
  static const CodeSet set = {{U'0', U'9'}, {U'A', U'Z'}, {U'_', U'_'}, {U'a', U'z'}};
  return set;
}
// White space and line ends of ECMAScript.
const CodeSet& spaces() {
  static const CodeSet set = {
      {0x9, 0xD},       {0x20, 0x20},     {0xA0, 0xA0},     {0x1680, 0x1680}, {0x2000, 0x200A},
      {0x2028, 0x2029}, {0x202F, 0x202F}, {0x205F, 0x205F}, {0x3000, 0x3000}, {0xFEFF, 0xFEFF}};
  return set;
}

CodeSet characters_of_class(uint16_t mask) {
  std::vector<std::pair<char32_t, char32_t>> ranges;
  const CodeSet all = CodeSet::all();
  for (const auto& [first, last] : all.ranges()) {
    for (char32_t c = first; c <= last; ++c) {
      if ((class_of(c) & mask) == 0) continue;
      if (!ranges.empty() && ranges.back().second + 1 == c) {
        ranges.back().second = c;
      } else {
        ranges.emplace_back(c, c);
      }
    }
  }
  return CodeSet(std::move(ranges));
}

class Parser {
 public:
  Parser(std::string_view pattern, const std::string& where) : where_(where), pattern_(pattern) {
    if (pattern.size() > kMaxPatternBytes)
      refuse(ErrorKind::unsupported, fmt::format("is longer than {} bytes", kMaxPatternBytes));
    if (find_invalid_utf8(pattern)) refuse(ErrorKind::bad_input, "is not UTF-8");
    in_ = utf32_from_utf8(pattern);
  }

  Piece run() {
    Piece whole = alternatives(0);
    if (at_ < in_.size()) refuse(ErrorKind::bad_input, "has a ) without (");
    return whole;
  }

 private:
  [[noreturn]] void refuse(ErrorKind kind, std::string what) const {
    throw Error(kind,
                {.where = where_,
                 .what = fmt::format("the pattern {} {}", truncate_to_width(pattern_, 200), what),
                 .cure = ""});
  }
  [[noreturn]] void unsupported(std::string_view what) const {
    refuse(ErrorKind::unsupported, fmt::format("has {}, which is not supported", what));
  }

  bool done() const { return at_ == in_.size(); }
  char32_t peek(size_t ahead = 0) const { return at_ + ahead < in_.size() ? in_[at_ + ahead] : 0; }
  bool take(std::u32string_view text) {
    if (std::u32string_view(in_).substr(at_).substr(0, text.size()) != text) return false;
    at_ += text.size();
    return true;
  }

  Piece alternatives(int depth) {
    if (depth > kMaxDepth) unsupported(fmt::format("groups nested deeper than {}", kMaxDepth));
    std::vector<Piece> ways = {sequence(depth)};
    while (take(U"|")) ways.push_back(sequence(depth));
    if (ways.size() == 1) return std::move(ways[0]);
    return {.kind = Piece::Kind::choice, .parts = std::move(ways)};
  }

  Piece sequence(int depth) {
    Piece out;
    while (!done() && peek() != '|' && peek() != ')') {
      Piece atom = one(depth);
      if (std::optional<std::pair<size_t, size_t>> counts = quantifier()) {
        if (atom.kind == Piece::Kind::line_start || atom.kind == Piece::Kind::line_end)
          refuse(ErrorKind::bad_input, "repeats an anchor");
        Piece repeated{.kind = Piece::Kind::repeat, .min = counts->first, .max = counts->second};
        repeated.parts.push_back(std::move(atom));
        atom = std::move(repeated);
        if (quantifier()) refuse(ErrorKind::bad_input, "repeats a repeat");
      }
      out.parts.push_back(std::move(atom));
    }
    if (out.parts.size() == 1) {
      Piece only = std::move(out.parts[0]);
      return only;
    }
    return out;
  }

  // Greedy or lazy is the same language.
  std::optional<std::pair<size_t, size_t>> quantifier() {
    std::pair<size_t, size_t> counts;
    if (take(U"*")) {
      counts = {0, kNoLimit};
    } else if (take(U"+")) {
      counts = {1, kNoLimit};
    } else if (take(U"?")) {
      counts = {0, 1};
    } else if (peek() != '{' || !braces(counts)) {
      return std::nullopt;
    }
    if (peek() == '+') unsupported("a possessive repeat");
    take(U"?");
    return counts;
  }

  // {2}, {2,} or {2,5}; anything else is literal braces, as engines have it.
  bool braces(std::pair<size_t, size_t>& counts) {
    const size_t start = at_;
    ++at_;
    const std::optional<size_t> min = number();
    std::optional<size_t> max = min;
    if (min && take(U",")) max = peek() == '}' ? kNoLimit : number();
    if (!min || !max || !take(U"}")) {
      at_ = start;
      return false;
    }
    counts = {*min, *max};
    if (*min > *max) refuse(ErrorKind::bad_input, fmt::format("repeats {{{},{}}}", *min, *max));
    if (*min > kMaxCount || (*max > kMaxCount && *max != kNoLimit))
      unsupported(fmt::format("a count beyond {}", kMaxCount));
    return true;
  }
  std::optional<size_t> number() {
    size_t value = 0, length = 0;
    for (; peek() >= '0' && peek() <= '9' && length < 9; ++length)
      value = value * 10 + (in_[at_++] - '0');
    return length == 0 ? std::nullopt : std::optional(value);
  }

  Piece one(int depth) {
    const char32_t c = in_[at_++];
    switch (c) {
      case '(':
        return group(depth);
      case '[':
        return piece_of(bracket());
      case '.':
        return piece_of(CodeSet::all().without({{'\n', '\n'}}));
      case '^':
        return {.kind = Piece::Kind::line_start};
      case '$':
        return {.kind = Piece::Kind::line_end};
      case '\\':
        return piece_of(escape(false));
      case '*':
      case '+':
      case '?':
        refuse(ErrorKind::bad_input, "repeats nothing");
      default:
        return piece_of({{c, c}});
    }
  }

  Piece group(int depth) {
    if (take(U"?:")) {
    } else if (take(U"?P<") || (peek() == '?' && peek(1) == '<' && peek(2) != '=' &&
                                peek(2) != '!' && take(U"?<"))) {
      while (!done() && peek() != '>') ++at_;
      if (!take(U">")) refuse(ErrorKind::bad_input, "has a group's name without >");
    } else if (peek() == '?') {
      const char32_t kind = peek(1);
      if (kind == '=' || kind == '!' || kind == '<') unsupported("lookaround");
      if (kind == '>') unsupported("an atomic group");
      unsupported("a flag or an unknown kind of group");
    } else if (peek() == '*') {
      unsupported("a verb");
    }
    Piece inside = alternatives(depth + 1);
    if (!take(U")")) refuse(ErrorKind::bad_input, "has a ( without )");
    // A group of its own, so that "(^a)" is seen to have its anchor inside.
    Piece out;
    out.parts.push_back(std::move(inside));
    return out;
  }

  CodeSet escape(bool in_class) {
    if (done()) refuse(ErrorKind::bad_input, "ends in \\");
    const char32_t c = in_[at_++];
    switch (c) {
      case 'd':
        return digits();
      case 'D':
        return digits().inverted();
      case 'w':
        return word_characters();
      case 'W':
        return word_characters().inverted();
      case 's':
        return spaces();
      case 'S':
        return spaces().inverted();
      case 'n':
        return {{'\n', '\n'}};
      case 'r':
        return {{'\r', '\r'}};
      case 't':
        return {{'\t', '\t'}};
      case 'f':
        return {{'\f', '\f'}};
      case 'v':
        return {{'\v', '\v'}};
      case '0':
        return {{0, 0}};
      case 'x':
        return hex(2);
      case 'u':
        return hex(4);
      case 'p':
      case 'P':
        return property(c == 'P');
      case 'b':
        if (in_class) return {{'\b', '\b'}};
        unsupported("a word border");
      case 'B':
        unsupported("a word border");
      default:
        break;
    }
    if (c >= '1' && c <= '9') unsupported("a back-reference");
    if (c < 128 && ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z')))
      unsupported(fmt::format("\\{}", static_cast<char>(c)));
    return {{c, c}};
  }

  // \xHH, \uHHHH, or either with {…}.
  CodeSet hex(size_t length) {
    const bool braced = take(U"{");
    char32_t value = 0;
    size_t read = 0;
    for (; read < (braced ? 8 : length); ++read) {
      const char32_t c = peek();
      const char32_t digit = c >= '0' && c <= '9'   ? c - '0'
                             : c >= 'a' && c <= 'f' ? c - 'a' + 10
                             : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                                    : 99;
      if (digit == 99) break;
      value = value * 16 + digit;
      ++at_;
    }
    if (read == 0 || (!braced && read != length) || (braced && !take(U"}")))
      refuse(ErrorKind::bad_input, "has an escape without its digits");
    if (value > 0x10FFFF || (value >= 0xD800 && value <= 0xDFFF))
      unsupported("an escape of half a character");
    return {{value, value}};
  }

  CodeSet property(bool negated) {
    static const std::map<std::u32string_view, uint16_t> kClasses = {{U"{L}", kLetter},
                                                                     {U"{M}", kMark},
                                                                     {U"{N}", kNumber},
                                                                     {U"{P}", kPunctuation},
                                                                     {U"{S}", kSymbol}};
    const std::u32string_view name = std::u32string_view(in_).substr(at_, 3);
    const auto found = kClasses.find(name);
    if (found == kClasses.end()) unsupported("a property other than L, M, N, P and S");
    at_ += 3;
    const CodeSet set = characters_of_class(found->second);
    return negated ? set.inverted() : set;
  }

  CodeSet bracket() {
    const bool negated = take(U"^");
    CodeSet set;
    // A ] right at the start is a member, as everywhere but in ECMAScript.
    for (bool first = true; first || peek() != ']'; first = false) {
      if (done()) refuse(ErrorKind::bad_input, "has a [ without ]");
      if (peek() == '[' && (peek(1) == ':' || peek(1) == '.' || peek(1) == '='))
        unsupported("a POSIX class");
      const CodeSet low = member();
      const bool single =
          low.ranges().size() == 1 && low.ranges()[0].first == low.ranges()[0].second;
      if (peek() != '-' || peek(1) == ']' || peek(1) == 0 || !single) {
        set.add(low);
        continue;
      }
      ++at_;
      const CodeSet high = member();
      const char32_t from = low.ranges()[0].first;
      if (high.ranges().size() != 1 || high.ranges()[0].first != high.ranges()[0].second ||
          high.ranges()[0].first < from)
        refuse(ErrorKind::bad_input, "has a range without order");
      set.add(from, high.ranges()[0].first);
    }
    ++at_;
    return negated ? set.inverted() : set;
  }
  CodeSet member() {
    const char32_t c = in_[at_++];
    if (c == '\\') return escape(true);
    return {{c, c}};
  }

  const std::string& where_;
  std::string_view pattern_;
  std::u32string in_;
  size_t at_ = 0;
};

// Writes pieces as nodes of a grammar.
class Writer {
 public:
  Writer(Grammar& grammar, const RegexOptions& options, std::string_view pattern,
         size_t most_counted)
      : g_(grammar), options_(options), pattern_(pattern), most_counted_(most_counted) {}

  // The whole expression: each alternative with its anchors, or with any text about it.
  Node whole(const Piece& piece) {
    const std::vector<Piece> alone = {piece};
    std::vector<Node> ways;
    for (const Piece& way : piece.kind == Piece::Kind::choice ? piece.parts : alone)
      ways.push_back(alternative(way));
    return g_.choice(std::move(ways));
  }

 private:
  [[noreturn]] void refuse(std::string what) const {
    throw Error(ErrorKind::unsupported,
                {.where = options_.where,
                 .what = fmt::format("the pattern {} {}", truncate_to_width(pattern_, 200), what),
                 .cure = ""});
  }

  Node alternative(Piece way) {
    if (way.kind != Piece::Kind::sequence) {
      Piece alone;
      alone.parts.push_back(std::move(way));
      way = std::move(alone);
    }
    bool from_start = false, to_end = false;
    while (!way.parts.empty() && way.parts.front().kind == Piece::Kind::line_start) {
      from_start = true;
      way.parts.erase(way.parts.begin());
    }
    while (!way.parts.empty() && way.parts.back().kind == Piece::Kind::line_end) {
      to_end = true;
      way.parts.pop_back();
    }
    const bool open = options_.anywhere && !(from_start && to_end);
    if (options_.min_length > 0 || options_.max_length != kNoLimit) {
      const Piece* only = way.parts.size() == 1 ? &way.parts[0] : nullptr;
      while (only != nullptr && only->kind == Piece::Kind::sequence && only->parts.size() == 1)
        only = &only->parts[0];
      const size_t longest = open ? kNoLimit : way.longest();
      if (way.shortest() < options_.min_length || longest > options_.max_length) {
        // One class of characters, repeated: its counts meet the lengths.
        if (open || only == nullptr || only->kind != Piece::Kind::repeat ||
            only->parts[0].kind != Piece::Kind::set)
          refuse("can match texts whose length minLength and maxLength forbid");
        const size_t min = std::max(only->min, options_.min_length);
        const size_t max = std::min(only->max, options_.max_length);
        return min > max ? g_.nothing() : g_.repeat(character(only->parts[0].set), min, max);
      }
    }
    const Node any = g_.repeat(character(CodeSet::all()), 0);
    std::vector<Node> parts;
    if (options_.anywhere && !from_start) parts.push_back(any);
    for (const Piece& part : way.parts) parts.push_back(inside(part));
    if (options_.anywhere && !to_end) parts.push_back(any);
    return g_.sequence(std::move(parts));
  }

  Node inside(const Piece& piece) {
    switch (piece.kind) {
      case Piece::Kind::set:
        return character(piece.set);
      case Piece::Kind::repeat: {
        const bool endless = piece.max == kNoLimit;
        const size_t min = std::min(piece.min, most_counted_);
        return g_.repeat(inside(piece.parts[0]), min,
                         endless ? kNoLimit : std::min(piece.max, most_counted_));
      }
      case Piece::Kind::sequence:
      case Piece::Kind::choice: {
        std::vector<Node> parts;
        for (const Piece& part : piece.parts) parts.push_back(inside(part));
        return piece.kind == Piece::Kind::choice ? g_.choice(std::move(parts))
                                                 : g_.sequence(std::move(parts));
      }
      default:
        refuse("has an anchor that is not at an end of the whole expression");
    }
  }

  Node character(const CodeSet& set) {
    return options_.write ? options_.write(g_, set) : g_.one_of(set);
  }

  Grammar& g_;
  const RegexOptions& options_;
  std::string_view pattern_;
  size_t most_counted_;
};

size_t largest_count(const Piece& piece) {
  size_t most =
      piece.kind == Piece::Kind::repeat ? (piece.max == kNoLimit ? piece.min : piece.max) : 0;
  for (const Piece& part : piece.parts) most = std::max(most, largest_count(part));
  return most;
}

// Refuses an expression whose states would be too many, before anything is built on it.
void try_out(const Piece& piece, std::string_view pattern, const RegexOptions& options) {
  Grammar trial;
  RegexOptions plain = options;
  plain.min_length = 0;
  plain.max_length = kNoLimit;
  plain.write = nullptr;
  const Node node = Writer(trial, plain, pattern, kTrialCount).whole(piece);
  const Program program = compile(trial, node, options.where);
  Automaton automaton(program);
  std::deque<Automaton::State> waiting = {automaton.start()};
  size_t seen = automaton.states();
  while (!waiting.empty()) {
    const Automaton::State state = waiting.front();
    waiting.pop_front();
    for (const uint8_t byte : program.byte_of_class) {
      automaton.next(state, byte);
      for (; seen < automaton.states(); ++seen)
        waiting.push_back(static_cast<Automaton::State>(seen));
    }
    const bool many_counters =
        automaton.widest_stack() > kTrialCount / 2 && largest_count(piece) > 16 * kTrialCount;
    if (automaton.states() <= kTrialStates && !many_counters) continue;
    throw Error(ErrorKind::unsupported,
                {.where = options.where,
                 .what = fmt::format("the pattern {} would need too many states: one place of a "
                                     "text can be reached in very many ways",
                                     truncate_to_width(pattern, 200)),
                 .cure = "let a repeat and what follows it differ in their first character"});
  }
}

}  // namespace

Grammar::Node add_regex(Grammar& grammar, std::string_view pattern, const RegexOptions& options) {
  const Piece piece = Parser(pattern, options.where).run();
  try_out(piece, pattern, options);
  return Writer(grammar, options, pattern, kNoLimit).whole(piece);
}

Program regex_program(std::string_view pattern) {
  Grammar grammar;
  const RegexOptions options;
  const Node node = add_regex(grammar, pattern, options);
  return compile(grammar, node, options.where);
}

}  // namespace moru
