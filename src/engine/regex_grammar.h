// Regular expressions as grammars (engine/grammar.h): for answers that must match one, and for
// JSON Schema's "pattern".
//
// Taken: literals, ., classes, \d \w \s and their complements (ASCII, \s as in ECMAScript), \p{L}
// \p{M} \p{N} \p{P} \p{S}, groups, alternatives, greedy and lazy repeats, ^ and $ at the ends.
// Refused by name, since no mask can keep them or engines differ: lookaround, back-references,
// word borders, flags, possessive and atomic groups.
#pragma once
#include <cstddef>
#include <functional>
#include <string>
#include <string_view>

#include "engine/grammar.h"

namespace moru {

struct RegexOptions {
  std::string where = "regex";  // of errors
  // A match anywhere in the text counts, unless ^ and $ say otherwise: JSON Schema's "pattern".
  bool anywhere = false;
  // How one character of a set is written; default: as it is, in UTF-8.
  std::function<Grammar::Node(Grammar&, const CodeSet&)> write;
  // The text has so many characters. Error unsupported where the expression does not lend itself:
  // its own lengths must lie within, or it repeats one class of characters.
  size_t min_length = 0, max_length = Grammar::kNoLimit;
};

// Errors: bad_input (no regular expression), unsupported.
Grammar::Node add_regex(Grammar& grammar, std::string_view pattern, const RegexOptions& options);

// The whole text matches. Errors as above, and unsupported where its states would be too many.
Program regex_program(std::string_view pattern);

}  // namespace moru
