// JSON numbers between bounds, as a grammar: which digits may follow which is arithmetic on the
// bounds' own digits.
#pragma once
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

#include "engine/grammar.h"

namespace moru {

// An exact decimal number.
struct Decimal {
  bool negative = false;
  std::string whole = "0";  // digits, no zeros in front
  std::string fraction;     // digits, no zeros at the end

  // Of a JSON number; nullopt if it has an exponent that asks for more than 40 digits.
  static std::optional<Decimal> parse(std::string_view json);
  bool is_zero() const { return whole == "0" && fraction.empty(); }
  bool operator<(const Decimal& other) const;
};

struct DecimalBounds {
  std::optional<Decimal> low, high;
  bool low_excluded = false, high_excluded = false;
  bool integer = false;
  size_t fraction_digits = 15;  // most digits after the point
};

// Numbers without an exponent within the bounds; without bounds, also with one. Up to 18 digits
// before the point where nothing bounds them. An empty range gives Grammar::nothing().
Grammar::Node add_decimals(Grammar& grammar, const DecimalBounds& bounds);

}  // namespace moru
