// Languages of bytes, built from parts: what an answer may be.
//
// Regular expressions and JSON Schemas become a Grammar (engine/regex_grammar.h,
// engine/json_schema.h); a Program is the same as instructions, which engine/automaton.h runs.
// Counted repeats stay counted: "at most 1,000" is a number, not a thousand copies.
#pragma once
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace moru {

// A set of code points: sorted ranges, both ends included, surrogates left out.
class CodeSet {
 public:
  CodeSet() = default;
  CodeSet(std::initializer_list<std::pair<char32_t, char32_t>> ranges);
  explicit CodeSet(std::vector<std::pair<char32_t, char32_t>> ranges);
  static CodeSet all();

  void add(char32_t first, char32_t last);
  void add(const CodeSet& other);
  CodeSet without(const CodeSet& other) const;
  CodeSet inverted() const { return all().without(*this); }
  bool contains(char32_t code) const;
  bool contains(const CodeSet& other) const { return other.without(*this).empty(); }
  bool empty() const { return ranges_.empty(); }
  const std::vector<std::pair<char32_t, char32_t>>& ranges() const { return ranges_; }

 private:
  void normalize();
  std::vector<std::pair<char32_t, char32_t>> ranges_;
};

// Characters that JSON strings hold as they are: all but ", \ and U+0000 to U+001F. Most tokens of
// a vocabulary consist of them.
const CodeSet& plain_characters();

class Grammar {
 public:
  using Node = uint32_t;
  static constexpr size_t kNoLimit = SIZE_MAX;

  Node nothing();  // no text at all, not even the empty one
  Node empty();    // the empty text
  Node text(std::string_view bytes);
  Node one_of(CodeSet characters);  // one character, in UTF-8
  Node sequence(std::vector<Node> parts);
  Node choice(std::vector<Node> parts);
  Node repeat(Node part, size_t min, size_t max = kNoLimit);
  Node optional(Node part) { return repeat(part, 0, 1); }
  // A rule can be referred to before it is set; so grammars recurse.
  size_t add_rule();
  void set_rule(size_t rule, Node node);
  Node reference(size_t rule);

  enum class Kind : uint8_t { nothing, text, one_of, sequence, choice, repeat, reference };
  struct Part {
    Kind kind;
    std::string text;
    CodeSet characters;
    std::vector<Node> parts;
    size_t min = 0, max = 0;  // of repeats
    size_t rule = 0;
    bool can_be_empty = false;  // rules never are
  };
  const Part& part(Node node) const { return parts_[node]; }
  Node rule(size_t index) const { return rules_[index]; }
  size_t rules() const { return rules_.size(); }
  size_t size() const { return parts_.size(); }

 private:
  Node add(Part part);
  Node without_empty(Node node);

  std::vector<Part> parts_;
  std::vector<Node> rules_;
};

// A grammar as instructions. What runs them keeps places in the program, each with a stack of
// callers and counters.
struct Program {
  enum class Op : uint8_t {
    bytes,   // one byte of ranges[first, last), then on at the range's target
    fork,    // on at each of targets[first, last)
    call,    // push `last` as the place to return to, on at `first`; a call at the end of a rule
             // pushes nothing (last = kNowhere)
    ret,     // pop a place, on there
    enter,   // push a counter of loops[first], then its head: the body if it may be repeated once
             // more, what follows (and pop) if it has been repeated often enough
    next,    // count, then the head of loops[first]
    accept,  // a text of the language ends here
  };
  static constexpr uint32_t kNowhere = UINT32_MAX;
  struct Instruction {
    Op op;
    uint32_t first = 0, last = 0;
  };
  struct Range {
    uint8_t low, high;
    uint32_t target;
  };
  struct Loop {
    uint32_t min, max;  // max UINT32_MAX: none
    uint32_t body, exit;
    uint32_t plain = kNowhere;  // what reads such a character for the body
  };
  std::vector<Instruction> code;
  std::vector<Range> ranges;
  std::vector<uint32_t> targets;
  std::vector<Loop> loops;
  // By instruction: reads a character, among which all plain ones are, and then comes here again,
  // without end.
  std::vector<bool> reads_plain;
  uint32_t start = 0, accept = 0;
  // Bytes that no range tells apart are of one class.
  uint8_t class_of[256] = {};
  std::vector<uint8_t> byte_of_class;  // one member of each
};

// The program of `root`. Errors: unsupported, where `where` names the source: a rule that begins
// with itself, no text at all, more instructions than `kMaxInstructions`.
inline constexpr size_t kMaxInstructions = 200'000;
Program compile(const Grammar& grammar, Grammar::Node root, std::string_view where);

}  // namespace moru
