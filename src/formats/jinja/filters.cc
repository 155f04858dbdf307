// Jinja2's filters, `value | name(arguments)`, and tojson as transformers replaces it.
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <functional>

#include "base/text.h"
#include "formats/jinja/format.h"
#include "formats/jinja/interpreter.h"
#include "formats/jinja/strings.h"

namespace moru::jinja {
namespace {

using In = Interpreter;
using Args = CallArguments;

Value iterator_of(Runtime& runtime, std::vector<Value> items) {
  return runtime.sequence(Sequence::Kind::iterator, std::move(items));
}

// soft_str: a text as it is, anything else printed.
Value soft_text(Runtime& runtime, const Value& v) {
  return as_text(v) ? v : runtime.text(to_text(runtime, v));
}

template <std::string (*kMake)(std::string_view)>
Value map_text(In& in, const Value& v, const Args& a) {
  Runtime& runtime = in.runtime();
  Bound(runtime, "the filter", a, {});
  const Value text = soft_text(runtime, v);
  runtime.step(as_text(text)->bytes.size() / 8);
  runtime.room(8 * as_text(text)->bytes.size());
  return runtime.text(kMake(as_text(text)->bytes), as_text(text)->markup);
}

// The title filter, unlike str.title, breaks words at hyphens, brackets and space alone.
std::string title_words(std::string_view text) {
  std::string out;
  size_t begin = 0;
  const auto is_break = [](char32_t c) {
    return is_space(c) || c == '-' || c == '(' || c == '{' || c == '[' || c == '<';
  };
  while (begin < text.size()) {
    const bool breaks = is_break(code_point_at(text, begin).value);
    size_t end = begin;
    while (end < text.size() && is_break(code_point_at(text, end).value) == breaks)
      end += code_point_at(text, end).bytes;
    const std::string_view word = text.substr(begin, end - begin);
    const size_t first = code_point_at(word, 0).bytes;
    out += upper(word.substr(0, first));
    out += lower(word.substr(first));
    begin = end;
  }
  return out;
}

// int(text, base) of Python: white space around, a sign, a prefix of the base, single underscores.
std::optional<Int> parse_whole(std::string_view text, Int base) {
  text = strip(text, Side::both);
  const bool negative = text.starts_with('-');
  if (negative || text.starts_with('+')) text.remove_prefix(1);
  if (base != 0 && (base < 2 || base > 36)) return std::nullopt;
  Int radix = base;
  if (text.size() > 1 && text[0] == '0') {
    const char letter = static_cast<char>(text[1] | 0x20);
    const Int prefixed = letter == 'x' ? 16 : letter == 'o' ? 8 : letter == 'b' ? 2 : 0;
    if (prefixed != 0 && (base == prefixed || base == 0)) {
      radix = prefixed;
      text.remove_prefix(2);
      if (text.starts_with('_')) text.remove_prefix(1);
    }
  }
  if (radix == 0) radix = 10;
  if (text.empty()) return std::nullopt;
  Int value = 0;
  bool after_digit = false;
  for (const char c : text) {
    if (c == '_' && after_digit) {
      after_digit = false;
      continue;
    }
    const char letter = static_cast<char>(c | 0x20);
    const int digit = c >= '0' && c <= '9'             ? c - '0'
                      : letter >= 'a' && letter <= 'z' ? letter - 'a' + 10
                                                       : 99;
    if (digit >= radix || __builtin_mul_overflow(value, radix, &value) ||
        __builtin_add_overflow(value, Int{digit}, &value))
      return std::nullopt;
    after_digit = true;
  }
  if (!after_digit) return std::nullopt;
  return negative ? -value : value;
}

// float(text) of Python.
std::optional<double> parse_real(std::string_view text) {
  text = strip(text, Side::both);
  const bool negative = text.starts_with('-');
  if (negative || text.starts_with('+')) text.remove_prefix(1);
  std::string digits;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto is_digit_at = [&](size_t at) {
      return at < text.size() && text[at] >= '0' && text[at] <= '9';
    };
    if (text[i] == '_') {
      if (i == 0 || !is_digit_at(i - 1) || !is_digit_at(i + 1)) return std::nullopt;
      continue;
    }
    digits += text[i];
  }
  if (digits.empty() || digits[0] == '-' || digits[0] == '+') return std::nullopt;
  double value = 0;
  const char* end = digits.data() + digits.size();
  const auto read = std::from_chars(digits.data(), end, value);
  if (read.ptr != end || digits.find('(') != std::string::npos) return std::nullopt;
  if (read.ec == std::errc::result_out_of_range) value = std::strtod(digits.c_str(), nullptr);
  return negative ? -value : value;
}

std::optional<Int> whole_of(double value) {
  if (!std::isfinite(value) || std::fabs(value) >= 0x1p126) return std::nullopt;
  return static_cast<Int>(value);
}

Value to_whole(In& in, const Value& v, const Args& a) {
  Runtime& runtime = in.runtime();
  const Bound bound(runtime, "int", a, {"default", "base"});
  if (const auto* undefined = std::get_if<Undefined>(&v)) fail_on_undefined(runtime, *undefined);
  if (const auto whole = as_int(v)) return *whole;
  std::optional<Int> result;
  if (const auto* real = std::get_if<double>(&v)) {
    result = whole_of(*real);
    if (!result && std::isinf(*real)) runtime.fail("infinity has no whole number");
  } else if (const Text* text = as_text(v)) {
    result = parse_whole(text->bytes, bound.whole(1, 10));
    if (!result) {
      const std::optional<double> parsed = parse_real(text->bytes);
      if (parsed) result = whole_of(*parsed);
    }
  }
  if (result) return *result;
  return bound.has(0) ? *bound[0] : Value(Int{0});
}

Value to_real(In& in, const Value& v, const Args& a) {
  Runtime& runtime = in.runtime();
  const Bound bound(runtime, "float", a, {"default"});
  if (const auto* undefined = std::get_if<Undefined>(&v)) fail_on_undefined(runtime, *undefined);
  if (const auto number = as_number(v)) return *number;
  if (const Text* text = as_text(v))
    if (const auto real = parse_real(text->bytes)) return *real;
  return bound.has(0) ? *bound[0] : Value(0.0);
}

Value absolute(In& in, const Value& v, const Args& a) {
  Bound(in.runtime(), "abs", a, {});
  if (const auto* real = std::get_if<double>(&v)) return std::fabs(*real);
  return as_int(v).value_or(0) < 0 ? negate(in.runtime(), v) : plus(in.runtime(), v);
}

// round() of Python: to even where the binary value lies exactly between.
double round_real(double value, int digits) {
  if (!std::isfinite(value) || digits > 22) return value;
  if (digits >= 0) {
    const std::string text = fmt::format("{:.{}f}", value, digits);
    double rounded = 0;
    std::from_chars(text.data(), text.data() + text.size(), rounded);
    return rounded;
  }
  const double unit = std::pow(10.0, -digits);
  return std::nearbyint(value / unit) * unit;
}

Value round_number(In& in, const Value& v, const Args& a) {
  Runtime& runtime = in.runtime();
  const Bound bound(runtime, "round", a, {"precision", "method"});
  const std::string_view method = bound.text(1, "common");
  const int digits = static_cast<int>(std::clamp<Int>(bound.whole(0, 0), -400, 400));
  if (method != "common" && method != "ceil" && method != "floor")
    runtime.fail("round: the method is common, ceil or floor");
  const auto number = as_number(v);
  if (!number) {
    plus(runtime, v);  // says what is wrong
    return None{};
  }
  if (method == "common") {
    const auto whole = as_int(v);
    if (!whole) return round_real(*number, digits);
    if (digits >= 0) return *whole;
    return whole_of(round_real(*number, digits)).value_or(0);
  }
  const double unit = std::pow(10.0, digits);
  return (method == "ceil" ? std::ceil(*number * unit) : std::floor(*number * unit)) / unit;
}

Value length(In& in, const Value& v, const Args& a) {
  Bound(in.runtime(), "length", a, {});
  const auto size = length_of(v);
  if (!size) in.runtime().fail(fmt::format("a {} has no length", type_name(v)));
  return static_cast<Int>(*size);
}

Value first(In& in, const Value& v, const Args& a) {
  Bound(in.runtime(), "first", a, {});
  Iteration items(in.runtime(), v);
  if (std::optional<Value> item = items.next()) return *item;
  return in.runtime().undefined("No first item, sequence was empty.");
}

void fail_unless_reversible(Runtime& runtime, const Value& v) {
  const Sequence* sequence = as_sequence(v);
  if (is_undefined(v) || (sequence && sequence->kind == Sequence::Kind::iterator))
    runtime.fail(fmt::format("a {} cannot be reversed", type_name(v)));
}

Value last(In& in, const Value& v, const Args& a) {
  Runtime& runtime = in.runtime();
  Bound(runtime, "last", a, {});
  fail_unless_reversible(runtime, v);
  const std::vector<Value> items = items_of(runtime, v);
  if (items.empty()) return runtime.undefined("No last item, sequence was empty.");
  return items.back();
}

Value list(In& in, const Value& v, const Args& a) {
  Bound(in.runtime(), "list", a, {});
  return in.runtime().sequence(Sequence::Kind::list, items_of(in.runtime(), v));
}

Value reversed(In& in, const Value& v, const Args& a) {
  Runtime& runtime = in.runtime();
  Bound(runtime, "reverse", a, {});
  if (const Text* text = as_text(v)) {
    runtime.step(text->bytes.size() / 8);
    runtime.room(8 * text->bytes.size());
    return runtime.text(reverse(text->bytes), text->markup);
  }
  std::vector<Value> items = items_of(runtime, v);
  std::reverse(items.begin(), items.end());
  const Sequence* sequence = as_sequence(v);
  if (sequence != nullptr && sequence->kind == Sequence::Kind::iterator)
    return runtime.sequence(Sequence::Kind::list, std::move(items));
  return iterator_of(runtime, std::move(items));
}

Value default_of(In& in, const Value& v, const Args& a) {
  const Bound bound(in.runtime(), "default", a, {"default_value", "boolean"});
  if (!is_undefined(v) && !(bound.truth(1, false) && !truth(v))) return v;
  return bound.has(0) ? *bound[0] : in.runtime().text("");
}

Value trim(In& in, const Value& v, const Args& a) {
  Runtime& runtime = in.runtime();
  const Bound bound(runtime, "trim", a, {"chars"});
  const Value text = soft_text(runtime, v);
  std::optional<std::string_view> chars;
  if (bound.has_value(0)) chars = bound.text(0);
  return runtime.text(std::string(strip(as_text(text)->bytes, Side::both, chars)),
                      as_text(text)->markup);
}

Value replace_all(In& in, const Value& v, const Args& a) {
  Runtime& runtime = in.runtime();
  const Bound bound(runtime, "replace", a, {"old", "new", "count"}, 2);
  const Int count = bound.has_value(2) ? bound.whole(2, -1) : -1;
  Text plain;  // str() drops what marks a text as safe
  plain.bytes = to_text(runtime, v);
  return replace(runtime, plain, to_text(runtime, *bound[0]), to_text(runtime, *bound[1]), count);
}

Value indent(In& in, const Value& v, const Args& a) {
  Runtime& runtime = in.runtime();
  const Bound bound(runtime, "indent", a, {"width", "first", "blank"});
  const Value whole_text = add(runtime, v, runtime.text("\n"));  // so that no line is lost
  const Text& text = *as_text(whole_text);
  std::string unit = "    ";
  if (bound.has(0)) {
    if (const Text* given = as_text(*bound[0])) {
      unit = given->bytes;
    } else {
      const Int width = std::clamp<Int>(bound.whole(0, 4), 0, INT64_MAX);
      runtime.room(static_cast<size_t>(width));
      unit.assign(static_cast<size_t>(width), ' ');
    }
  }
  runtime.room(sizeof(std::string_view) * text.bytes.size());
  Builder out(runtime);
  bool is_first = true;
  for (const std::string_view line : split_lines(text.bytes, false)) {
    if (!is_first) out.add("\n");
    const bool indents = is_first ? bound.truth(1, false) : bound.truth(2, false) || !line.empty();
    if (indents) out.add(unit);
    out.add(line);
    is_first = false;
  }
  return out.value(text.markup);
}

Value center(In& in, const Value& v, const Args& a) {
  Runtime& runtime = in.runtime();
  const Bound bound(runtime, "center", a, {"width"});
  Args width;
  width.positional.push_back(bound.whole(0, 80));
  return call_method(in, soft_text(runtime, v), "center", width);
}

Value word_count(In& in, const Value& v, const Args& a) {
  Bound(in.runtime(), "wordcount", a, {});
  const Value text = soft_text(in.runtime(), v);
  in.runtime().step(as_text(text)->bytes.size() / 8);
  return static_cast<Int>(count_words(as_text(text)->bytes));
}

Value mark_safe(In& in, const Value& v, const Args& a) {
  Bound(in.runtime(), "safe", a, {});
  return in.runtime().text(to_text(in.runtime(), v), true);
}

Value escape(In& in, const Value& v, const Args& a) {
  Runtime& runtime = in.runtime();
  Bound(runtime, "escape", a, {});
  if (as_text(v) && as_text(v)->markup) return v;
  const std::string text = to_text(runtime, v);
  runtime.room(6 * text.size());
  return runtime.text(escape_html(text), true);
}

Value force_escape(In& in, const Value& v, const Args& a) {
  Bound(in.runtime(), "forceescape", a, {});
  const std::string text = to_text(in.runtime(), v);
  in.runtime().room(6 * text.size());
  return in.runtime().text(escape_html(text), true);
}

Value string(In& in, const Value& v, const Args& a) {
  Bound(in.runtime(), "string", a, {});
  return soft_text(in.runtime(), v);
}

Value format(In& in, const Value& v, const Args& a) {
  Runtime& runtime = in.runtime();
  if (!a.named.empty() && !a.positional.empty())
    runtime.fail("format takes positional or named values, not both");
  const Value text = soft_text(runtime, v);
  if (a.named.empty())
    return modulo(runtime, text, runtime.sequence(Sequence::Kind::tuple, a.positional));
  const DictPtr named = runtime.dict();
  for (const auto& [name, value] : a.named) runtime.put(*named, runtime.text(name), value);
  return modulo(runtime, text, named);
}

Value to_json_text(In& in, const Value& v, const Args& a) {
  Runtime& runtime = in.runtime();
  const Bound bound(runtime, "tojson", a, {"ensure_ascii", "indent", "separators", "sort_keys"});
  JsonStyle style;
  style.ascii = bound.truth(0, false);
  style.sort_keys = bound.truth(3, false);
  if (bound.has_value(1)) {
    if (const Text* unit = as_text(*bound[1])) {
      style.indent = unit->bytes;
    } else {
      const Int width = std::clamp<Int>(bound.whole(1, 0), 0, INT64_MAX);
      runtime.room(static_cast<size_t>(width));
      style.indent = std::string(static_cast<size_t>(width), ' ');
    }
  }
  if (bound.has_value(2)) {
    const std::vector<Value> separators = items_of(runtime, *bound[2]);
    if (separators.size() != 2 || !as_text(separators[0]) || !as_text(separators[1]))
      runtime.fail("tojson: the separators are two texts");
    style.item_separator = as_text(separators[0])->bytes;
    style.key_separator = as_text(separators[1])->bytes;
  }
  return runtime.text(to_json(runtime, v, style));
}

// Dicts.

Value items(In& in, const Value& v, const Args& a) {
  Runtime& runtime = in.runtime();
  Bound(runtime, "items", a, {});
  if (is_undefined(v)) return iterator_of(runtime, {});
  const Dict* dict = as_dict(v);
  if (dict == nullptr) runtime.fail(fmt::format("a {} has no items", type_name(v)));
  const SequencePtr pairs = runtime.sequence(Sequence::Kind::iterator);
  for (const auto& [key, value] : dict->items)
    runtime.push(*pairs, runtime.sequence(Sequence::Kind::tuple, {key, value}));
  return pairs;
}

Value fold_case(Runtime& runtime, const Value& v) {
  const Text* text = as_text(v);
  if (text == nullptr) return v;
  runtime.step(text->bytes.size() / 8);
  runtime.room(8 * text->bytes.size());
  return runtime.text(lower(text->bytes));
}

// Items in the order of their keys; equal ones stay as they stand.
std::vector<Value> sort_by(Runtime& runtime, std::vector<Value> values,
                           const std::function<Value(const Value&)>& key_of, bool reverse) {
  const SequencePtr keys = runtime.sequence();
  for (const Value& value : values) runtime.push(*keys, key_of(value));
  std::vector<size_t> order(values.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](size_t i, size_t j) {
    const Value &a = keys->items[i], &b = keys->items[j];
    return reverse ? compare(runtime, b, a) < 0 : compare(runtime, a, b) < 0;
  });
  std::vector<Value> sorted;
  sorted.reserve(values.size());
  for (const size_t i : order) sorted.push_back(std::move(values[i]));
  return sorted;
}

Value dict_sort(In& in, const Value& v, const Args& a) {
  Runtime& runtime = in.runtime();
  const Bound bound(runtime, "dictsort", a, {"case_sensitive", "by", "reverse"});
  const std::string_view by = bound.text(1, "key");
  if (by != "key" && by != "value") runtime.fail("dictsort: by is key or value");
  const bool case_sensitive = bound.truth(0, false);
  if (!as_dict(v)) runtime.fail(fmt::format("a {} is not a dict to sort", type_name(v)));
  const Value pairs = items(in, v, {});
  const auto key_of = [&](const Value& pair) {
    const Value& key = as_sequence(pair)->items[by == "key" ? 0 : 1];
    return case_sensitive ? key : fold_case(runtime, key);
  };
  return runtime.sequence(Sequence::Kind::list, sort_by(runtime, items_of(runtime, pairs), key_of,
                                                        bound.truth(2, false)));
}

// Sequences and what lies in their items.

// An attribute like "a.b.0", or a number, as a function of an item.
class Getter {
 public:
  Getter(In& in, const Value* attribute, bool folds_case = false, const Value* otherwise = nullptr)
      : in_(in), folds_case_(folds_case), otherwise_(otherwise) {
    if (attribute == nullptr || is_none(*attribute)) return;
    const Text* path = as_text(*attribute);
    if (path == nullptr) {
      parts_.push_back(*attribute);
      return;
    }
    for (const std::string_view part : split(path->bytes, ".", -1)) {
      const auto whole =
          part.find_first_not_of("0123456789") == part.npos ? parse_whole(part, 10) : std::nullopt;
      parts_.push_back(whole ? Value(*whole) : in.runtime().text(std::string(part)));
    }
  }

  Value operator()(Value item) const {
    for (const Value& part : parts_) {
      item = in_.element(item, part);
      if (is_undefined(item) && otherwise_ != nullptr && !is_none(*otherwise_)) item = *otherwise_;
    }
    return folds_case_ ? fold_case(in_.runtime(), item) : item;
  }

 private:
  In& in_;
  bool folds_case_;
  const Value* otherwise_;
  std::vector<Value> parts_;
};

Value join(In& in, const Value& v, const Args& a) {
  Runtime& runtime = in.runtime();
  const Bound bound(runtime, "join", a, {"d", "attribute"});
  const std::string separator = bound.has(0) ? to_text(runtime, *bound[0]) : "";
  const Getter getter(in, bound[1]);
  Builder out(runtime);
  Iteration values(runtime, v);
  bool any = false;
  while (std::optional<Value> item = values.next()) {
    if (std::exchange(any, true)) out.add(separator);
    add_text(out, getter(std::move(*item)));
  }
  return out.value();
}

Value sum(In& in, const Value& v, const Args& a) {
  Runtime& runtime = in.runtime();
  const Bound bound(runtime, "sum", a, {"attribute", "start"});
  const Getter getter(in, bound[0]);
  Value total = bound.has(1) ? *bound[1] : Value(Int{0});
  if (as_text(total)) runtime.fail("sum: texts are joined, not summed");
  Iteration values(runtime, v);
  while (std::optional<Value> item = values.next())
    total = add(runtime, total, getter(std::move(*item)));
  return total;
}

template <int kSign>
Value extreme(In& in, const Value& v, const Args& a) {
  Runtime& runtime = in.runtime();
  const Bound bound(runtime, kSign < 0 ? "min" : "max", a, {"case_sensitive", "attribute"});
  const Getter getter(in, bound[1], !bound.truth(0, false));
  Iteration values(runtime, v);
  std::optional<Value> best = values.next();
  if (!best) return runtime.undefined("No aggregated item, sequence was empty.");
  Value best_key = getter(*best);
  while (std::optional<Value> item = values.next()) {
    Value key = getter(*item);
    if (compare(runtime, key, best_key) * kSign <= 0) continue;
    best = std::move(item);
    best_key = std::move(key);
  }
  return *best;
}

Value sort(In& in, const Value& v, const Args& a) {
  Runtime& runtime = in.runtime();
  const Bound bound(runtime, "sort", a, {"reverse", "case_sensitive", "attribute"});
  const bool folds_case = !bound.truth(1, false);
  std::vector<Getter> getters;
  const Text* attributes = bound.has(2) ? as_text(*bound[2]) : nullptr;
  if (attributes != nullptr) {
    for (const std::string_view name : split(attributes->bytes, ",", -1)) {
      const Value attribute = runtime.text(std::string(name));
      getters.emplace_back(in, &attribute, folds_case);
    }
  } else {
    getters.emplace_back(in, bound[2], folds_case);
  }
  const auto key_of = [&](const Value& item) {
    std::vector<Value> key;
    for (const Getter& getter : getters) key.push_back(getter(item));
    return runtime.sequence(Sequence::Kind::list, std::move(key));
  };
  return runtime.sequence(Sequence::Kind::list,
                          sort_by(runtime, items_of(runtime, v), key_of, bound.truth(0, false)));
}

Value unique(In& in, const Value& v, const Args& a) {
  Runtime& runtime = in.runtime();
  const Bound bound(runtime, "unique", a, {"case_sensitive", "attribute"});
  const Getter getter(in, bound[1], !bound.truth(0, false));
  const DictPtr seen = runtime.dict();
  const SequencePtr kept = runtime.sequence(Sequence::Kind::iterator);
  Iteration values(runtime, v);
  while (std::optional<Value> item = values.next()) {
    Value key = getter(*item);
    if (find(runtime, *seen, key) != nullptr) continue;
    runtime.put(*seen, std::move(key), None{});
    runtime.push(*kept, std::move(*item));
  }
  return kept;
}

Value group_by(In& in, const Value& v, const Args& a) {
  Runtime& runtime = in.runtime();
  const Bound bound(runtime, "groupby", a, {"attribute", "default", "case_sensitive"}, 1);
  const Getter key_of(in, bound[0], !bound.truth(2, false), bound[1]);
  const Getter name_of(in, bound[0], false, bound[1]);
  const std::vector<Value> sorted = sort_by(runtime, items_of(runtime, v), key_of, false);
  const SequencePtr groups = runtime.sequence();
  for (size_t i = 0; i < sorted.size();) {
    const Value key = key_of(sorted[i]);
    const SequencePtr members = runtime.sequence();
    const Value name = name_of(sorted[i]);
    for (; i < sorted.size() && equal(runtime, key_of(sorted[i]), key); ++i)
      runtime.push(*members, sorted[i]);
    runtime.push(*groups, runtime.sequence(Sequence::Kind::group, {name, members}));
  }
  return groups;
}

Value batch(In& in, const Value& v, const Args& a) {
  Runtime& runtime = in.runtime();
  const Bound bound(runtime, "batch", a, {"linecount", "fill_with"}, 1);
  const Int size = bound.whole(0, 1);
  const SequencePtr batches = runtime.sequence(Sequence::Kind::iterator);
  SequencePtr now = runtime.sequence();
  Iteration values(runtime, v);
  while (std::optional<Value> item = values.next()) {
    if (static_cast<Int>(now->items.size()) == size) {
      runtime.push(*batches, now);
      now = runtime.sequence();
    }
    runtime.push(*now, std::move(*item));
  }
  if (now->items.empty()) return batches;
  if (bound.has_value(1))
    while (static_cast<Int>(now->items.size()) < size) runtime.push(*now, *bound[1]);
  runtime.push(*batches, now);
  return batches;
}

Value slices(In& in, const Value& v, const Args& a) {
  Runtime& runtime = in.runtime();
  const Bound bound(runtime, "slice", a, {"slices", "fill_with"}, 1);
  const Int count = bound.whole(0, 1);
  if (count <= 0) runtime.fail("slice: the number of slices is at least one");
  const std::vector<Value> values = items_of(runtime, v);
  const Int size = static_cast<Int>(values.size());
  const SequencePtr made = runtime.sequence(Sequence::Kind::iterator);
  size_t at = 0;
  for (Int i = 0; i < count; ++i) {
    const bool is_long = i < size % count;
    const SequencePtr part = runtime.sequence();
    for (Int n = 0; n < size / count + Int{is_long}; ++n) runtime.push(*part, values[at++]);
    if (bound.has_value(1) && !is_long) runtime.push(*part, *bound[1]);
    runtime.push(*made, part);
  }
  return made;
}

Value attribute_of(In& in, const Value& v, const Args& a) {
  Runtime& runtime = in.runtime();
  const Bound bound(runtime, "attr", a, {"name"}, 1);
  if (const auto* undefined = std::get_if<Undefined>(&v)) fail_on_undefined(runtime, *undefined);
  const std::string name(bound.text(0));
  if (std::optional<Value> found = find_attribute(runtime, v, name)) return *found;
  return Undefined{Undefined::Why::attribute, type_name(v), std::get<TextPtr>(*bound[0])};
}

Value map_items(In& in, const Value& v, const Args& a) {
  Runtime& runtime = in.runtime();
  const SequencePtr mapped = runtime.sequence(Sequence::Kind::iterator);
  if (!truth(v)) return mapped;
  Iteration values(runtime, v);
  const bool by_attribute =
      a.positional.empty() && std::any_of(a.named.begin(), a.named.end(), [](const auto& named) {
        return named.first == "attribute";
      });
  if (by_attribute) {
    const Bound bound(runtime, "map", a, {"attribute", "default"});
    const Getter getter(in, bound[0], false, bound[1]);
    while (std::optional<Value> item = values.next())
      runtime.push(*mapped, getter(std::move(*item)));
    return mapped;
  }
  const Text* name = a.positional.empty() ? nullptr : as_text(a.positional[0]);
  if (name == nullptr) runtime.fail("map needs the name of a filter, or attribute=");
  const Args rest{{a.positional.begin() + 1, a.positional.end()}, a.named};
  while (const std::optional<Value> item = values.next())
    runtime.push(*mapped, in.call_filter(name->bytes, *item, rest));
  return mapped;
}

// select, reject and their attr forms: keeps the items for which a test, by default their truth,
// gives `kWanted`.
template <bool kWanted, bool kByAttribute>
Value select_items(In& in, const Value& v, const Args& a) {
  Runtime& runtime = in.runtime();
  const SequencePtr kept = runtime.sequence(Sequence::Kind::iterator);
  if (!truth(v)) return kept;
  size_t at = 0;
  const Value* attribute = nullptr;
  if (kByAttribute) {
    if (a.positional.empty()) runtime.fail("the filter needs the name of an attribute");
    attribute = &a.positional[at++];
  }
  const Getter getter(in, attribute);
  const Text* test = nullptr;
  if (at < a.positional.size()) {
    test = as_text(a.positional[at++]);
    if (test == nullptr) runtime.fail("the filter wants the name of a test");
  }
  const Args rest{{a.positional.begin() + static_cast<ptrdiff_t>(at), a.positional.end()}, a.named};
  Iteration values(runtime, v);
  while (std::optional<Value> item = values.next()) {
    const Value tested = getter(*item);
    const bool passes = test ? in.call_test(test->bytes, tested, rest) : truth(tested);
    if (passes == kWanted) runtime.push(*kept, std::move(*item));
  }
  return kept;
}

struct FilterRow {
  std::string_view name;
  Value (*filter)(In&, const Value&, const Args&);
};
constexpr FilterRow kFilters[] = {
    {"abs", absolute},
    {"attr", attribute_of},
    {"batch", batch},
    {"capitalize", map_text<capitalize>},
    {"center", center},
    {"count", length},
    {"d", default_of},
    {"default", default_of},
    {"dictsort", dict_sort},
    {"e", escape},
    {"escape", escape},
    {"first", first},
    {"float", to_real},
    {"forceescape", force_escape},
    {"format", format},
    {"groupby", group_by},
    {"indent", indent},
    {"int", to_whole},
    {"items", items},
    {"join", join},
    {"last", last},
    {"length", length},
    {"list", list},
    {"lower", map_text<lower>},
    {"map", map_items},
    {"max", extreme<1>},
    {"min", extreme<-1>},
    {"reject", select_items<false, false>},
    {"rejectattr", select_items<false, true>},
    {"replace", replace_all},
    {"reverse", reversed},
    {"round", round_number},
    {"safe", mark_safe},
    {"select", select_items<true, false>},
    {"selectattr", select_items<true, true>},
    {"slice", slices},
    {"sort", sort},
    {"string", string},
    {"sum", sum},
    {"title", map_text<title_words>},
    {"tojson", to_json_text},
    {"trim", trim},
    {"unique", unique},
    {"upper", map_text<upper>},
    {"wordcount", word_count},
};

// What Jinja2 has for web pages, and what would make a prompt differ from run to run.
constexpr std::string_view kOthers[] = {"filesizeformat", "pprint",   "random",
                                        "striptags",      "truncate", "urlencode",
                                        "urlize",         "wordwrap", "xmlattr"};

const FilterRow* find_row(std::string_view name) {
  const auto* row =
      std::find_if(std::begin(kFilters), std::end(kFilters),
                   [&](const FilterRow& candidate) { return candidate.name == name; });
  return row == std::end(kFilters) ? nullptr : row;
}

}  // namespace

bool has_filter(std::string_view name) { return find_row(name) != nullptr; }

std::string no_filter_message(std::string_view name) {
  const bool is_known =
      std::find(std::begin(kOthers), std::end(kOthers), name) != std::end(kOthers);
  return is_known ? fmt::format("Jinja2's filter '{}' is not one that chat templates use", name)
                  : fmt::format("there is no filter '{}'", name);
}

Value Interpreter::call_filter(std::string_view name, const Value& value,
                               const CallArguments& arguments) {
  runtime_.step();
  const FilterRow* row = find_row(name);
  if (row == nullptr) runtime_.fail(no_filter_message(name));
  return row->filter(*this, value, arguments);
}

}  // namespace moru::jinja
