#include "engine/decimal_grammar.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace moru {
namespace {

using Node = Grammar::Node;
constexpr size_t kWholeDigits = 18;
constexpr long kMostDigits = 40;

// −1, 0 or 1: how |a| and |b| compare.
int compare_magnitudes(const Decimal& a, const Decimal& b) {
  if (a.whole.size() != b.whole.size()) return a.whole.size() < b.whole.size() ? -1 : 1;
  if (const int c = a.whole.compare(b.whole); c != 0) return c < 0 ? -1 : 1;
  const int c = a.fraction.compare(b.fraction);  // a shorter one is as if zeros followed
  return c == 0 ? 0 : c < 0 ? -1 : 1;
}

// The next whole number above.
Decimal incremented(Decimal d) {
  d.fraction.clear();
  size_t i = d.whole.size();
  while (i > 0 && d.whole[i - 1] == '9') d.whole[--i] = '0';
  if (i == 0) {
    d.whole.insert(d.whole.begin(), '1');
  } else {
    ++d.whole[i - 1];
  }
  return d;
}
// The next whole number below; not of 0.
Decimal decremented(Decimal d) {
  size_t i = d.whole.size();
  while (d.whole[i - 1] == '0') d.whole[--i] = '9';
  --d.whole[i - 1];
  if (d.whole.size() > 1 && d.whole[0] == '0') d.whole.erase(0, 1);
  return d;
}

// Magnitudes: decimals ≥ 0 between two bounds, both of which may be left out.
class Magnitudes {
 public:
  Magnitudes(Grammar& grammar, size_t fraction_digits)
      : g_(grammar), fraction_digits_(fraction_digits) {}

  Node between(const Decimal& low, bool low_excluded, const std::optional<Decimal>& high,
               bool high_excluded) {
    if (high) {
      const int order = compare_magnitudes(low, *high);
      if (order > 0 || (order == 0 && (low_excluded || high_excluded))) return g_.nothing();
    }
    low_ = low;
    low_excluded_ = low_excluded;
    high_ = high;
    high_excluded_ = high_excluded;
    std::vector<Node> ways;
    const size_t shortest = low.whole.size();
    const size_t longest = high ? high->whole.size() : std::max(kWholeDigits, shortest);
    for (length_ = shortest; length_ <= longest; ++length_) {
      const bool at_low = length_ == shortest, at_high = high && length_ == longest;
      if (at_low || at_high) {
        ways.push_back(whole_digits(0, at_low, at_high));
        continue;
      }
      // All lengths in between at once: nothing is near a bound.
      const size_t last = high ? longest - 1 : longest;
      ways.push_back(g_.sequence(
          {digit('1', '9'), g_.repeat(digit('0', '9'), length_ - 1, last - 1), free_fraction(0)}));
      length_ = last;
    }
    return g_.choice(std::move(ways));
  }

 private:
  Node digit(char first, char last) {
    return g_.one_of({{static_cast<char32_t>(first), static_cast<char32_t>(last)}});
  }

  // What may follow `at` digits after the point where no bound is near.
  Node free_fraction(size_t at) {
    if (fraction_digits_ <= at) return g_.empty();
    if (at > 0) return g_.repeat(digit('0', '9'), 0, fraction_digits_ - at);
    return g_.optional(
        g_.sequence({g_.text("."), g_.repeat(digit('0', '9'), 1, fraction_digits_)}));
  }

  // Digits from low to high, each with what follows it: those that equal a bound's digit stay near
  // that bound.
  template <typename Near, typename Free>
  void add_digits(std::vector<Node>& ways, char low, char high, bool at_low, bool at_high,
                  Near&& near, Free&& free) {
    if (low > high) return;
    if (at_low && at_high && low == high) {
      ways.push_back(g_.sequence({digit(low, low), near(true, true)}));
      return;
    }
    if (at_low) {
      ways.push_back(g_.sequence({digit(low, low), near(true, false)}));
      ++low;
    }
    if (at_high) {
      if (low <= high) ways.push_back(g_.sequence({digit(high, high), near(false, true)}));
      --high;
    }
    if (low <= high) ways.push_back(g_.sequence({digit(low, high), free()}));
  }

  Node whole_digits(size_t at, bool at_low, bool at_high) {
    if (at == length_) return fraction(0, at_low, at_high);
    if (!at_low && !at_high) {
      const size_t left = length_ - at;
      return g_.sequence({g_.repeat(digit('0', '9'), left, left), free_fraction(0)});
    }
    const char least = at == 0 && length_ > 1 ? '1' : '0';
    std::vector<Node> ways;
    add_digits(
        ways, at_low ? low_.whole[at] : least, at_high ? high_->whole[at] : '9', at_low, at_high,
        [&](bool low, bool high) { return whole_digits(at + 1, low, high); },
        [&] { return whole_digits(at + 1, false, false); });
    return g_.choice(std::move(ways));
  }

  Node fraction(size_t at, bool at_low, bool at_high) {
    const bool low_done = at >= low_.fraction.size();
    const bool high_done = !high_ || at >= high_->fraction.size();
    // At the lower bound with all its digits read: whatever follows is not less.
    if (at_low && low_done && !low_excluded_) at_low = false;
    if (!at_low && !at_high) return free_fraction(at);
    std::vector<Node> ways;
    if ((!at_low || (low_done && !low_excluded_)) && (!at_high || !high_done || !high_excluded_))
      ways.push_back(g_.empty());
    if (at < fraction_digits_ && !(at_high && high_done)) {
      std::vector<Node> digits;
      add_digits(
          digits, at_low && !low_done ? low_.fraction[at] : '0',
          at_high ? high_->fraction[at] : '9', at_low, at_high,
          [&](bool low, bool high) { return fraction(at + 1, low, high); },
          [&] { return free_fraction(at + 1); });
      if (!digits.empty()) {
        const Node more = g_.choice(std::move(digits));
        ways.push_back(at == 0 ? g_.sequence({g_.text("."), more}) : more);
      }
    }
    return ways.empty() ? g_.nothing() : g_.choice(std::move(ways));
  }

  Grammar& g_;
  size_t fraction_digits_;
  Decimal low_;
  std::optional<Decimal> high_;
  bool low_excluded_ = false, high_excluded_ = false;
  size_t length_ = 0;
};

// A bound of integers: the nearest whole number within, then not excluded. A number in sign and
// magnitude; `upward`: the bound is a lower one.
Decimal whole_bound(Decimal d, bool excluded, bool upward) {
  const bool away = d.negative != upward;  // rounding away from zero
  if (!d.fraction.empty()) {
    d = away ? incremented(d) : Decimal{d.negative, d.whole, ""};
  } else if (excluded) {
    if (d.is_zero()) return {!upward, "1", ""};
    d = away ? incremented(d) : decremented(d);
  }
  if (d.is_zero()) d.negative = false;
  return d;
}

}  // namespace

std::optional<Decimal> Decimal::parse(std::string_view json) {
  Decimal d;
  size_t at = 0;
  if (json.starts_with('-')) {
    d.negative = true;
    at = 1;
  }
  std::string digits;
  long point = 0;
  bool after_point = false;
  for (; at < json.size() && json[at] != 'e' && json[at] != 'E'; ++at) {
    if (json[at] == '.') {
      after_point = true;
    } else {
      digits += json[at];
      point += !after_point;
    }
  }
  if (at < json.size()) {
    const std::string exponent(json.substr(at + 1));
    if (exponent.size() > 5) return std::nullopt;
    point += std::stol(exponent);
  }
  if (point > kMostDigits || point < -kMostDigits || digits.size() > size_t{kMostDigits})
    return std::nullopt;
  if (point < 0) {
    digits.insert(0, static_cast<size_t>(-point), '0');
    point = 0;
  }
  while (digits.size() < static_cast<size_t>(point)) digits += '0';
  d.whole = digits.substr(0, static_cast<size_t>(point));
  d.fraction = digits.substr(static_cast<size_t>(point));
  d.whole.erase(0, std::min(d.whole.find_first_not_of('0'), d.whole.size()));
  if (d.whole.empty()) d.whole = "0";
  while (d.fraction.ends_with('0')) d.fraction.pop_back();
  if (d.is_zero()) d.negative = false;
  return d;
}

bool Decimal::operator<(const Decimal& other) const {
  if (negative != other.negative) return negative;
  const int order = compare_magnitudes(*this, other);
  return negative ? order > 0 : order < 0;
}

Grammar::Node add_decimals(Grammar& g, const DecimalBounds& given) {
  DecimalBounds b = given;
  const Node sign = g.optional(g.text("-"));
  const auto digits = [&](size_t min, size_t max) {
    return g.repeat(g.one_of({{'0', '9'}}), min, max);
  };
  if (!b.low && !b.high) {
    const Node whole =
        g.choice({g.text("0"), g.sequence({g.one_of({{'1', '9'}}), digits(0, kWholeDigits - 1)})});
    std::vector<Node> parts = {sign, whole};
    if (!b.integer && b.fraction_digits > 0) {
      parts.push_back(g.optional(g.sequence({g.text("."), digits(1, b.fraction_digits)})));
      // A bound on the digits after the point leaves no room for an exponent.
      if (b.fraction_digits == DecimalBounds{}.fraction_digits)
        parts.push_back(
            g.optional(g.sequence({g.one_of({{'E', 'E'}, {'e', 'e'}}),
                                   g.optional(g.one_of({{'+', '+'}, {'-', '-'}})), digits(1, 2)})));
    }
    return g.sequence(std::move(parts));
  }
  if (b.integer) {
    if (b.low) b.low = whole_bound(*b.low, std::exchange(b.low_excluded, false), true);
    if (b.high) b.high = whole_bound(*b.high, std::exchange(b.high_excluded, false), false);
    b.fraction_digits = 0;
  }
  Magnitudes magnitudes(g, b.fraction_digits);
  const Decimal zero;
  std::vector<Node> ways;
  if (!b.high || !b.high->negative) {  // 0 and above
    const bool from_low = b.low && !b.low->negative;
    ways.push_back(magnitudes.between(from_low ? *b.low : zero, from_low && b.low_excluded, b.high,
                                      b.high_excluded));
  }
  if (!b.low || b.low->negative) {  // below 0, which is excluded: the bounds change places
    const bool from_high = b.high && b.high->negative;
    const Node magnitude = magnitudes.between(
        from_high ? *b.high : zero, from_high ? b.high_excluded : true, b.low, b.low_excluded);
    ways.push_back(g.sequence({g.text("-"), magnitude}));
  }
  return g.choice(std::move(ways));
}

}  // namespace moru
