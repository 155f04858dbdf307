#include "engine/grammar.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <map>
#include <unordered_map>

#include "base/error.h"
#include "base/text.h"

namespace moru {

CodeSet::CodeSet(std::initializer_list<std::pair<char32_t, char32_t>> ranges) : ranges_(ranges) {
  normalize();
}

CodeSet::CodeSet(std::vector<std::pair<char32_t, char32_t>> ranges) : ranges_(std::move(ranges)) {
  normalize();
}

CodeSet CodeSet::all() { return {{0, 0xD7FF}, {0xE000, 0x10FFFF}}; }

void CodeSet::normalize() {
  std::sort(ranges_.begin(), ranges_.end());
  std::vector<std::pair<char32_t, char32_t>> merged;
  for (auto [first, last] : ranges_) {
    if (!merged.empty() && first <= merged.back().second + 1) {
      merged.back().second = std::max(merged.back().second, last);
    } else {
      merged.emplace_back(first, last);
    }
  }
  ranges_ = std::move(merged);
}

void CodeSet::add(char32_t first, char32_t last) {
  if (first <= last) ranges_.emplace_back(first, last);
  normalize();
  if (last >= 0xD800 && first <= 0xDFFF) *this = without({{0xD800, 0xDFFF}});
}

void CodeSet::add(const CodeSet& other) {
  ranges_.insert(ranges_.end(), other.ranges_.begin(), other.ranges_.end());
  normalize();
}

CodeSet CodeSet::without(const CodeSet& other) const {
  CodeSet out;
  size_t o = 0;
  for (auto [first, last] : ranges_) {
    while (o < other.ranges_.size() && other.ranges_[o].second < first) ++o;
    for (size_t i = o; i < other.ranges_.size() && other.ranges_[i].first <= last; ++i) {
      const auto [cut_first, cut_last] = other.ranges_[i];
      if (first < cut_first) out.ranges_.emplace_back(first, cut_first - 1);
      first = cut_last + 1;
    }
    if (first <= last) out.ranges_.emplace_back(first, last);
  }
  return out;
}

bool CodeSet::contains(char32_t code) const {
  return std::any_of(ranges_.begin(), ranges_.end(),
                     [&](const auto& r) { return r.first <= code && code <= r.second; });
}

const CodeSet& plain_characters() {
  static const CodeSet plain =
      CodeSet{{0x20, 0xD7FF}, {0xE000, 0x10FFFF}}.without({{U'"', U'"'}, {U'\\', U'\\'}});
  return plain;
}

Grammar::Node Grammar::add(Part part) {
  const auto empty_one = [&](Node n) { return parts_[n].can_be_empty; };
  part.can_be_empty =
      (part.kind == Kind::text && part.text.empty()) ||
      (part.kind == Kind::sequence &&
       std::all_of(part.parts.begin(), part.parts.end(), empty_one)) ||
      (part.kind == Kind::choice && std::any_of(part.parts.begin(), part.parts.end(), empty_one)) ||
      (part.kind == Kind::repeat && part.min == 0);
  parts_.push_back(std::move(part));
  return static_cast<Node>(parts_.size() - 1);
}

Grammar::Node Grammar::nothing() { return add({.kind = Kind::nothing}); }
Grammar::Node Grammar::empty() { return text(""); }
Grammar::Node Grammar::text(std::string_view bytes) {
  return add({.kind = Kind::text, .text = std::string(bytes)});
}
Grammar::Node Grammar::one_of(CodeSet characters) {
  if (characters.empty()) return nothing();
  return add({.kind = Kind::one_of, .characters = std::move(characters)});
}
Grammar::Node Grammar::sequence(std::vector<Node> parts) {
  if (parts.size() == 1) return parts.front();
  return add({.kind = Kind::sequence, .parts = std::move(parts)});
}
Grammar::Node Grammar::choice(std::vector<Node> parts) {
  if (parts.size() == 1) return parts.front();
  return add({.kind = Kind::choice, .parts = std::move(parts)});
}

Grammar::Node Grammar::repeat(Node part, size_t min, size_t max) {
  if (max == 0) return empty();
  if (min == 1 && max == 1) return part;
  // A counter must not run without a byte read.
  if (parts_[part].can_be_empty) {
    part = without_empty(part);
    min = 0;
  }
  return add({.kind = Kind::repeat, .parts = {part}, .min = min, .max = max});
}

size_t Grammar::add_rule() {
  rules_.push_back(UINT32_MAX);
  return rules_.size() - 1;
}
void Grammar::set_rule(size_t rule, Node node) {
  MORU_CHECK(!parts_[node].can_be_empty);
  rules_[rule] = node;
}
Grammar::Node Grammar::reference(size_t rule) {
  return add({.kind = Kind::reference, .rule = rule});
}

// The same language but for the empty text. Copies: adding parts moves those that are there.
Grammar::Node Grammar::without_empty(Node node) {
  if (!parts_[node].can_be_empty) return node;
  const Part p = parts_[node];
  switch (p.kind) {
    case Kind::sequence: {
      // What is not empty begins with the first part that is not.
      std::vector<Node> ways;
      for (size_t i = 0; i < p.parts.size(); ++i) {
        std::vector<Node> rest = {without_empty(p.parts[i])};
        rest.insert(rest.end(), p.parts.begin() + static_cast<ptrdiff_t>(i) + 1, p.parts.end());
        ways.push_back(sequence(std::move(rest)));
      }
      return choice(std::move(ways));
    }
    case Kind::choice: {
      std::vector<Node> ways;
      for (const Node way : p.parts) ways.push_back(without_empty(way));
      return choice(std::move(ways));
    }
    case Kind::repeat:
      return repeat(p.parts[0], 1, p.max);
    default:
      return nothing();
  }
}

namespace {

using Node = Grammar::Node;
using Kind = Grammar::Kind;
using Op = Program::Op;
constexpr uint32_t kNowhere = Program::kNowhere;

// UTF-8 encodings of a range of code points, as sequences of byte ranges.
struct ByteRange {
  uint8_t low, high;
  bool operator==(const ByteRange&) const = default;
  auto operator<=>(const ByteRange&) const = default;
};
using Encoding = std::vector<ByteRange>;

void append_encodings(char32_t first, char32_t last, std::vector<Encoding>& out) {
  constexpr std::array<char32_t, 3> kLastOfLength = {0x7F, 0x7FF, 0xFFFF};
  for (const char32_t border : kLastOfLength) {
    if (first <= border && last > border) {
      append_encodings(first, border, out);
      append_encodings(border + 1, last, out);
      return;
    }
  }
  // Split until the last bytes run over all continuations.
  for (size_t bits = 6; bits <= 18; bits += 6) {
    if (last <= 0x7F) break;
    const char32_t mask = (char32_t{1} << bits) - 1;
    if ((first & ~mask) == (last & ~mask)) continue;
    if ((first & mask) != 0) {
      append_encodings(first, first | mask, out);
      append_encodings((first | mask) + 1, last, out);
      return;
    }
    if ((last & mask) != mask) {
      append_encodings(first, (last & ~mask) - 1, out);
      append_encodings(last & ~mask, last, out);
      return;
    }
  }
  std::string low, high;
  append_utf8(low, first);
  append_utf8(high, last);
  Encoding encoding;
  for (size_t i = 0; i < low.size(); ++i)
    encoding.push_back({static_cast<uint8_t>(low[i]), static_cast<uint8_t>(high[i])});
  out.push_back(std::move(encoding));
}

class Compiler {
 public:
  Compiler(const Grammar& grammar, std::string_view where) : g_(grammar), where_(where) {}

  Program run(Node root) {
    find_productive();
    find_left_recursion();
    if (!productive_[root]) refuse("no text can satisfy it");
    out_.accept = add({.op = Op::accept});
    ret_ = add({.op = Op::ret});
    // Rules are compiled where they are first called: one that nothing calls costs nothing.
    rule_start_.assign(g_.rules(), kNowhere);
    out_.start = compile(root, out_.accept);
    while (!waiting_.empty()) {
      const size_t rule = waiting_.back();
      waiting_.pop_back();
      rule_start_[rule] = compile(g_.rule(rule), ret_);
    }
    for (Program::Instruction& i : out_.code)
      if (i.op == Op::call) i.first = rule_start_[i.first];
    out_.reads_plain.resize(out_.code.size());
    find_classes();
    return std::move(out_);
  }

 private:
  [[noreturn]] void refuse(std::string what, std::string cure = "") const {
    throw Error(ErrorKind::unsupported,
                {.where = std::string(where_), .what = std::move(what), .cure = std::move(cure)});
  }

  uint32_t add(Program::Instruction instruction) {
    if (out_.code.size() >= kMaxInstructions)
      refuse(fmt::format("needs more than {} instructions", kMaxInstructions), "make it smaller");
    out_.code.push_back(instruction);
    return static_cast<uint32_t>(out_.code.size() - 1);
  }

  // A node is productive if some finite text is of its language.
  void find_productive() {
    productive_.assign(g_.size(), false);
    for (bool changed = true; changed;) {
      changed = false;
      for (Node n = 0; n < g_.size(); ++n) {
        if (productive_[n] || !is_productive(g_.part(n))) continue;
        productive_[n] = changed = true;
      }
    }
  }
  bool is_productive(const Grammar::Part& p) const {
    const auto is = [&](Node n) { return productive_[n]; };
    switch (p.kind) {
      case Kind::nothing:
        return false;
      case Kind::sequence:
        return std::all_of(p.parts.begin(), p.parts.end(), is);
      case Kind::choice:
        return std::any_of(p.parts.begin(), p.parts.end(), is);
      case Kind::repeat:
        return p.min == 0 || is(p.parts[0]);
      case Kind::reference:
        return is(g_.rule(p.rule));
      default:
        return true;
    }
  }

  // Rules that a rule may begin with; a cycle of them would never read a byte.
  void first_rules(Node node, std::vector<size_t>& out) const {
    const Grammar::Part& p = g_.part(node);
    if (p.kind == Kind::reference) {
      out.push_back(p.rule);
    } else if (p.kind == Kind::sequence) {
      for (const Node part : p.parts) {
        first_rules(part, out);
        if (!g_.part(part).can_be_empty) break;
      }
    } else {
      for (const Node part : p.parts) first_rules(part, out);
    }
  }
  void find_left_recursion() {
    enum class Mark : uint8_t { fresh, open, done };
    std::vector<Mark> marks(g_.rules(), Mark::fresh);
    struct Visit {
      size_t rule;
      std::vector<size_t> firsts;
      size_t at = 0;
    };
    for (size_t root = 0; root < g_.rules(); ++root) {
      std::vector<Visit> path;
      const auto enter = [&](size_t rule) {
        if (marks[rule] == Mark::open)
          refuse("refers to itself with nothing between", "put it inside an object or an array");
        if (marks[rule] == Mark::done) return;
        marks[rule] = Mark::open;
        path.push_back({.rule = rule});
        first_rules(g_.rule(rule), path.back().firsts);
      };
      enter(root);
      while (!path.empty()) {
        Visit& top = path.back();
        if (top.at < top.firsts.size()) {
          enter(top.firsts[top.at++]);
        } else {
          marks[top.rule] = Mark::done;
          path.pop_back();
        }
      }
    }
  }

  // The instruction at which `node` begins, if `then` follows it.
  uint32_t compile(Node node, uint32_t then) {
    const uint64_t key = uint64_t{node} << 32 | then;
    if (const auto found = compiled_.find(key); found != compiled_.end()) return found->second;
    const uint32_t start = compile_new(node, then);
    compiled_.emplace(key, start);
    return start;
  }

  uint32_t compile_new(Node node, uint32_t then) {
    const Grammar::Part& p = g_.part(node);
    switch (p.kind) {
      case Kind::nothing:
        return fork({});
      case Kind::text:
        for (size_t i = p.text.size(); i-- > 0;) {
          const auto byte = static_cast<uint8_t>(p.text[i]);
          then = bytes({{byte, byte, then}});
        }
        return then;
      case Kind::one_of: {
        std::vector<Encoding> encodings;
        for (const auto& [first, last] : p.characters.ranges())
          append_encodings(first, last, encodings);
        return characters(encodings, then);
      }
      case Kind::sequence:
        if (!productive_[node]) return fork({});
        for (size_t i = p.parts.size(); i-- > 0;) then = compile(p.parts[i], then);
        return then;
      case Kind::choice: {
        std::vector<uint32_t> ways;
        for (const Node way : p.parts)
          if (productive_[way]) ways.push_back(compile(way, then));
        std::sort(ways.begin(), ways.end());
        ways.erase(std::unique(ways.begin(), ways.end()), ways.end());
        return ways.size() == 1 ? ways[0] : fork(ways);
      }
      case Kind::repeat:
        return productive_[p.parts[0]] ? repeat(p, then) : then;
      case Kind::reference:
        if (std::exchange(rule_wanted_[p.rule], true) == false) waiting_.push_back(p.rule);
        return add({.op = Op::call,
                    .first = static_cast<uint32_t>(p.rule),
                    .last = then == ret_ ? kNowhere : then});
    }
    return then;
  }

  uint32_t repeat(const Grammar::Part& p, uint32_t then) {
    const Node body = p.parts[0];
    if (p.min == 0 && p.max == 1) return fork({compile(body, then), then});
    if (p.min <= 1 && p.max == Grammar::kNoLimit) {
      const uint32_t again = fork({kNowhere, then});
      const uint32_t start = compile(body, again);
      out_.targets[out_.code[again].first] = start;
      if (const uint32_t plain = plain_start(body, again); plain != kNowhere) {
        out_.reads_plain.resize(out_.code.size());
        out_.reads_plain[plain] = true;
      }
      return p.min == 0 ? again : start;
    }
    constexpr size_t kMost = UINT32_MAX - 1;
    if (p.min > kMost || (p.max > kMost && p.max != Grammar::kNoLimit))
      refuse(fmt::format("a repeat counts beyond {}", kMost));
    const auto loop = static_cast<uint32_t>(out_.loops.size());
    out_.loops.push_back(
        {.min = static_cast<uint32_t>(p.min),
         .max = p.max == Grammar::kNoLimit ? UINT32_MAX : static_cast<uint32_t>(p.max),
         .exit = then});
    const uint32_t next = add({.op = Op::next, .first = loop});
    const uint32_t start = compile(body, next), plain = plain_start(body, next);
    out_.loops[loop].body = start;
    out_.loops[loop].plain = plain;
    return add({.op = Op::enter, .first = loop});
  }

  // Where one of the body's ways is a character and any plain one will do: that way's start.
  uint32_t plain_start(Node body, uint32_t then) {
    const Grammar::Part& p = g_.part(body);
    if (p.kind == Kind::one_of)
      return p.characters.contains(plain_characters()) ? compile(body, then) : kNowhere;
    if (p.kind != Kind::choice) return kNowhere;
    for (const Node way : p.parts)
      if (g_.part(way).kind == Kind::one_of && plain_start(way, then) != kNowhere)
        return compile(way, then);
    return kNowhere;
  }

  uint32_t fork(const std::vector<uint32_t>& ways) {
    const auto first = static_cast<uint32_t>(out_.targets.size());
    out_.targets.insert(out_.targets.end(), ways.begin(), ways.end());
    return add(
        {.op = Op::fork, .first = first, .last = static_cast<uint32_t>(out_.targets.size())});
  }

  uint32_t bytes(const std::vector<Program::Range>& ranges) {
    const auto first = static_cast<uint32_t>(out_.ranges.size());
    out_.ranges.insert(out_.ranges.end(), ranges.begin(), ranges.end());
    return add(
        {.op = Op::bytes, .first = first, .last = static_cast<uint32_t>(out_.ranges.size())});
  }

  // Encodings of disjoint code points: those that begin with the same bytes share an instruction,
  // and so do those that end alike.
  uint32_t characters(const std::vector<Encoding>& encodings, uint32_t then) {
    const auto key = std::pair(encodings, then);
    if (const auto found = tails_.find(key); found != tails_.end()) return found->second;
    std::map<ByteRange, std::vector<Encoding>> by_first;
    for (const Encoding& e : encodings) by_first[e[0]].emplace_back(e.begin() + 1, e.end());
    std::vector<Program::Range> ranges;
    for (const auto& [first, tails] : by_first)
      ranges.push_back({first.low, first.high, tails[0].empty() ? then : characters(tails, then)});
    const uint32_t start = bytes(ranges);
    tails_.emplace(key, start);
    return start;
  }

  void find_classes() {
    std::array<bool, 257> begins{};
    for (const Program::Range& r : out_.ranges) begins[r.low] = begins[size_t{r.high} + 1] = true;
    size_t classes = 0;
    for (size_t b = 0; b < 256; ++b) {
      if (b == 0 || begins[b]) {
        ++classes;
        out_.byte_of_class.push_back(static_cast<uint8_t>(b));
      }
      out_.class_of[b] = static_cast<uint8_t>(classes - 1);
    }
  }

  const Grammar& g_;
  std::string_view where_;
  Program out_;
  uint32_t ret_ = 0;
  std::vector<bool> productive_;
  std::vector<uint32_t> rule_start_;
  std::unordered_map<size_t, bool> rule_wanted_;
  std::vector<size_t> waiting_;
  std::unordered_map<uint64_t, uint32_t> compiled_;
  std::map<std::pair<std::vector<Encoding>, uint32_t>, uint32_t> tails_;
};

}  // namespace

Program compile(const Grammar& grammar, Grammar::Node root, std::string_view where) {
  return Compiler(grammar, where).run(root);
}

}  // namespace moru
