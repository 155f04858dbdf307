// The `loop` variable of a {% for %}.
#pragma once
#include <functional>
#include <optional>
#include <vector>

#include "formats/jinja/value.h"

namespace moru::jinja {

struct Loop {
  size_t index0 = 0;
  size_t depth0 = 0;  // how many recursive loops it stands in
  Value previous, current;
  std::optional<Value> peeked;   // the next item, where a template asked ahead
  std::optional<size_t> length;  // once asked for, or known
  std::optional<Value> changed;  // what loop.changed() was last called with
  // The next item that passes the loop's condition; empty when the loop is over.
  std::function<std::optional<Value>()> advance;
  // Renders the body over other items, for {% for … recursive %}.
  std::function<Value(const Value&)> recurse;
};

}  // namespace moru::jinja
