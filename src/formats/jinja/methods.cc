// What Python's values can be asked: the methods of str, dict, list and tuple, and the attributes
// of loops and namespaces. Each type is a table.
#include <fmt/format.h>

#include <algorithm>

#include "base/text.h"
#include "formats/jinja/format.h"
#include "formats/jinja/interpreter.h"
#include "formats/jinja/strings.h"

namespace moru::jinja {
namespace {

template <typename Self>
struct Method {
  std::string_view name;
  Value (*call)(Interpreter&, const Self&, const CallArguments&);
};

// Text.

// A method without arguments that makes a text from a text.
template <std::string (*kMake)(std::string_view)>
Value map_text(Interpreter& in, const Text& self, const CallArguments& arguments) {
  Bound(in.runtime(), "the method", arguments, {});
  in.runtime().step(self.bytes.size() / 8);
  in.runtime().room(8 * self.bytes.size());
  return in.runtime().text(kMake(self.bytes), self.markup);
}

// A method without arguments that asks something of a text.
template <bool (*kAsk)(std::string_view)>
Value ask_text(Interpreter& in, const Text& self, const CallArguments& arguments) {
  Bound(in.runtime(), "the method", arguments, {});
  in.runtime().step(self.bytes.size() / 8);
  return kAsk(self.bytes);
}

// Whether all code points are of a class, and there is one.
template <bool (*kIs)(char32_t)>
bool all_are(std::string_view text) {
  for (const CodePoint c : CodePoints(text))
    if (!kIs(c.value)) return false;
  return !text.empty();
}
bool is_alphanumeric(char32_t c) { return is_alpha(c) || is_numeric(c); }
bool is_printable_text(std::string_view text) {
  return text.empty() || all_are<is_printable>(text);
}
bool is_identifier(std::string_view text) {
  if (text.empty() || (text[0] >= '0' && text[0] <= '9')) return false;
  for (const CodePoint c : CodePoints(text))
    if (c.value != '_' && !is_alphanumeric(c.value)) return false;
  return true;
}

template <Side kSide>
Value strip_text(Interpreter& in, const Text& self, const CallArguments& arguments) {
  const Bound bound(in.runtime(), "strip", arguments, {"chars"});
  std::optional<std::string_view> chars;
  if (bound.has_value(0)) chars = bound.text(0);
  return in.runtime().text(std::string(strip(self.bytes, kSide, chars)), self.markup);
}

Value list_of(Runtime& runtime, const std::vector<std::string_view>& pieces, bool markup,
              Sequence::Kind kind = Sequence::Kind::list) {
  const SequencePtr list = runtime.sequence(kind);
  for (const std::string_view piece : pieces)
    runtime.push(*list, runtime.text(std::string(piece), markup));
  return list;
}

template <Side kFrom>
Value split_text(Interpreter& in, const Text& self, const CallArguments& arguments) {
  Runtime& runtime = in.runtime();
  const Bound bound(runtime, "split", arguments, {"sep", "maxsplit"});
  const auto limit = static_cast<long long>(std::clamp<Int>(bound.whole(1, -1), -1, INT64_MAX));
  runtime.step(self.bytes.size() / 8);
  runtime.room(sizeof(std::string_view) * self.bytes.size());
  if (!bound.has_value(0))
    return list_of(runtime, split_at_space(self.bytes, limit, kFrom), self.markup);
  const std::string_view separator = bound.text(0);
  if (separator.empty()) runtime.fail("split: an empty separator");
  return list_of(runtime, split(self.bytes, separator, limit, kFrom), self.markup);
}

Value split_lines_of(Interpreter& in, const Text& self, const CallArguments& arguments) {
  const Bound bound(in.runtime(), "splitlines", arguments, {"keepends"});
  in.runtime().step(self.bytes.size() / 8);
  in.runtime().room(sizeof(std::string_view) * self.bytes.size());
  return list_of(in.runtime(), split_lines(self.bytes, bound.truth(0, false)), self.markup);
}

template <Side kFrom>
Value partition(Interpreter& in, const Text& self, const CallArguments& arguments) {
  Runtime& runtime = in.runtime();
  const std::string_view separator = Bound(runtime, "partition", arguments, {"sep"}, 1).text(0);
  if (separator.empty()) runtime.fail("partition: an empty separator");
  const std::string_view text = self.bytes;
  const size_t at =
      kFrom == Side::left ? find_part(text, separator) : find_last_part(text, separator);
  std::vector<std::string_view> parts = {text, "", ""};
  if (at != text.npos) {
    parts = {text.substr(0, at), separator, text.substr(at + separator.size())};
  } else if (kFrom == Side::right) {
    parts = {"", "", text};
  }
  return list_of(runtime, parts, self.markup, Sequence::Kind::tuple);
}

// The part of a text that a method's start and end arguments name, in bytes.
struct Range {
  size_t begin = 0, end = 0;
  bool valid = true;  // start is not past end
};
Range range_of(Runtime& runtime, const Text& self, const Bound& bound, size_t start, size_t end) {
  if (!bound.has_value(start) && !bound.has_value(end)) return {0, self.bytes.size()};
  runtime.step(self.bytes.size() / 8);
  const Int size = static_cast<Int>(count_code_points(self.bytes));
  const auto adjust = [&](size_t i, Int otherwise) {
    const Int at = bound.has_value(i) ? bound.whole(i, 0) : otherwise;
    return std::max<Int>(at < 0 ? at + size : at, 0);
  };
  const Int from = adjust(start, 0), to = std::min(adjust(end, size), size);
  if (from > to) return {0, 0, false};
  return {offset_of(self.bytes, static_cast<size_t>(from)),
          offset_of(self.bytes, static_cast<size_t>(to))};
}

enum class Missing { minus_one, error };
template <Side kFrom, Missing kMissing>
Value find_text(Interpreter& in, const Text& self, const CallArguments& arguments) {
  Runtime& runtime = in.runtime();
  const Bound bound(runtime, "find", arguments, {"sub", "start", "end"}, 1);
  const std::string_view part = bound.text(0);
  const Range range = range_of(runtime, self, bound, 1, 2);
  runtime.step(self.bytes.size() / 16);
  const std::string_view text =
      std::string_view(self.bytes).substr(range.begin, range.end - range.begin);
  const size_t at = kFrom == Side::left ? find_part(text, part) : find_last_part(text, part);
  if (range.valid && at != text.npos)
    return static_cast<Int>(
        count_code_points(std::string_view(self.bytes).substr(0, range.begin + at)));
  if (kMissing == Missing::error) runtime.fail("the text does not contain what was looked for");
  return Int{-1};
}

Value count_text(Interpreter& in, const Text& self, const CallArguments& arguments) {
  Runtime& runtime = in.runtime();
  const Bound bound(runtime, "count", arguments, {"sub", "start", "end"}, 1);
  const std::string_view part = bound.text(0);
  const Range range = range_of(runtime, self, bound, 1, 2);
  if (!range.valid) return Int{0};
  runtime.step(self.bytes.size() / 8);
  const std::string_view text =
      std::string_view(self.bytes).substr(range.begin, range.end - range.begin);
  if (part.empty()) return static_cast<Int>(count_code_points(text) + 1);
  Int count = 0;
  for (size_t at = find_part(text, part); at != text.npos;
       at = find_part(text, part, at + part.size()))
    ++count;
  return count;
}

enum class End { first, last };
template <End kEnd>
Value matches_end(Interpreter& in, const Text& self, const CallArguments& arguments) {
  Runtime& runtime = in.runtime();
  const Bound bound(runtime, kEnd == End::first ? "startswith" : "endswith", arguments,
                    {"affix", "start", "end"}, 1);
  const Range range = range_of(runtime, self, bound, 1, 2);
  const std::string_view text =
      std::string_view(self.bytes).substr(range.begin, range.end - range.begin);
  const auto matches = [&](std::string_view affix) {
    return range.valid && (kEnd == End::first ? text.starts_with(affix) : text.ends_with(affix));
  };
  const Sequence* affixes = as_sequence(*bound[0]);
  if (affixes == nullptr || affixes->kind != Sequence::Kind::tuple) return matches(bound.text(0));
  for (const Value& affix : affixes->items) {
    const Text* one = as_text(affix);
    if (one == nullptr) runtime.fail("the tuple holds what is not a text");
    if (matches(one->bytes)) return true;
  }
  return false;
}

template <End kEnd>
Value remove_affix(Interpreter& in, const Text& self, const CallArguments& arguments) {
  const std::string_view affix = Bound(in.runtime(), "the method", arguments, {"affix"}, 1).text(0);
  std::string_view text = self.bytes;
  if (kEnd == End::first && text.starts_with(affix)) text.remove_prefix(affix.size());
  if (kEnd == End::last && text.ends_with(affix)) text.remove_suffix(affix.size());
  return in.runtime().text(std::string(text), self.markup);
}

Value join_text(Interpreter& in, const Text& self, const CallArguments& arguments) {
  Runtime& runtime = in.runtime();
  const Bound bound(runtime, "join", arguments, {"iterable"}, 1);
  Builder out(runtime);
  Iteration items(runtime, *bound[0]);
  bool any = false;
  while (const std::optional<Value> item = items.next()) {
    const Text* text = as_text(*item);
    if (text == nullptr)
      runtime.fail(fmt::format("join: a {} where a text belongs", type_name(*item)));
    if (std::exchange(any, true)) out.add(self.bytes);
    out.add(self.markup && !text->markup ? escape_html(text->bytes) : text->bytes);
  }
  return out.value(self.markup);
}

Value replace_text(Interpreter& in, const Text& self, const CallArguments& arguments) {
  Runtime& runtime = in.runtime();
  const Bound bound(runtime, "replace", arguments, {"old", "new", "count"}, 2);
  bound.text(0);
  const Text& with = (bound.text(1), *as_text(*bound[1]));
  const std::string substitute = self.markup && !with.markup ? escape_html(with.bytes) : with.bytes;
  return replace(runtime, self, bound.text(0), substitute, bound.whole(2, -1));
}

// Spaces, or a character, on one or both sides up to a width.
enum class Justify { left, right, center };
template <Justify kJustify>
Value justify(Interpreter& in, const Text& self, const CallArguments& arguments) {
  Runtime& runtime = in.runtime();
  const Bound bound(runtime, "the method", arguments, {"width", "fillchar"}, 1);
  const std::string_view fill = bound.text(1, " ");
  if (count_code_points(fill) != 1) runtime.fail("the fill is not one character");
  const Int width = std::min<Int>(bound.whole(0, 0), INT64_MAX);
  const Int size = static_cast<Int>(count_code_points(self.bytes));
  const size_t missing = width > size ? static_cast<size_t>(width - size) : 0;
  size_t before = kJustify == Justify::right ? missing : 0;
  // As CPython: an odd column goes left where the width is odd too.
  if (kJustify == Justify::center)
    before = missing / 2 + (missing & static_cast<size_t>(width) & 1);
  Builder out(runtime);
  out.add(before, fill);
  out.add(self.bytes);
  out.add(missing - before, fill);
  return out.value(self.markup);
}

Value zero_fill(Interpreter& in, const Text& self, const CallArguments& arguments) {
  Runtime& runtime = in.runtime();
  const Int width =
      std::min<Int>(Bound(runtime, "zfill", arguments, {"width"}, 1).whole(0, 0), INT64_MAX);
  const Int size = static_cast<Int>(count_code_points(self.bytes));
  const bool has_sign = self.bytes.starts_with('-') || self.bytes.starts_with('+');
  Builder out(runtime);
  out.add(std::string_view(self.bytes).substr(0, has_sign));
  out.add(width > size ? static_cast<size_t>(width - size) : 0, "0");
  out.add(std::string_view(self.bytes).substr(has_sign));
  return out.value(self.markup);
}

Value expand_tabs(Interpreter& in, const Text& self, const CallArguments& arguments) {
  Runtime& runtime = in.runtime();
  const Int size = std::clamp<Int>(Bound(runtime, "expandtabs", arguments, {"tabsize"}).whole(0, 8),
                                   0, INT32_MAX);
  Builder out(runtime);
  size_t column = 0;
  for (const CodePoint c : CodePoints(self.bytes)) {
    if (c.value == '\t') {
      if (size > 0) {
        const size_t spaces = static_cast<size_t>(size) - column % static_cast<size_t>(size);
        out.add(spaces, " ");
        column += spaces;
      }
    } else {
      out.add_code_point(c.value);
      column = c.value == '\n' || c.value == '\r' ? 0 : column + 1;
    }
  }
  return out.value(self.markup);
}

Value format_text(Interpreter& in, const Text& self, const CallArguments& arguments) {
  return format_braces(in, self, arguments);
}

Value format_from_map(Interpreter& in, const Text& self, const CallArguments& arguments) {
  const Bound bound(in.runtime(), "format_map", arguments, {"mapping"}, 1);
  const Dict* dict = as_dict(*bound[0]);
  if (dict == nullptr) in.runtime().fail("format_map wants a dict");
  CallArguments named;
  for (const auto& [key, value] : dict->items)
    if (const Text* name = as_text(key)) named.named.emplace_back(name->bytes, value);
  return format_braces(in, self, named);
}

constexpr Method<Text> kTextMethods[] = {
    {"capitalize", map_text<capitalize>},
    {"casefold", map_text<lower>},
    {"center", justify<Justify::center>},
    {"count", count_text},
    {"endswith", matches_end<End::last>},
    {"expandtabs", expand_tabs},
    {"find", find_text<Side::left, Missing::minus_one>},
    {"format", format_text},
    {"format_map", format_from_map},
    {"index", find_text<Side::left, Missing::error>},
    {"isalnum", ask_text<all_are<is_alphanumeric>>},
    {"isalpha", ask_text<all_are<is_alpha>>},
    {"isascii", ask_text<is_ascii>},
    {"isdecimal", ask_text<all_are<is_decimal>>},
    {"isdigit", ask_text<all_are<is_digit>>},
    {"isidentifier", ask_text<is_identifier>},
    {"islower", ask_text<is_lower_text>},
    {"isnumeric", ask_text<all_are<is_numeric>>},
    {"isprintable", ask_text<is_printable_text>},
    {"isspace", ask_text<all_are<is_space>>},
    {"istitle", ask_text<is_title_text>},
    {"isupper", ask_text<is_upper_text>},
    {"join", join_text},
    {"ljust", justify<Justify::left>},
    {"lower", map_text<lower>},
    {"lstrip", strip_text<Side::left>},
    {"partition", partition<Side::left>},
    {"removeprefix", remove_affix<End::first>},
    {"removesuffix", remove_affix<End::last>},
    {"replace", replace_text},
    {"rfind", find_text<Side::right, Missing::minus_one>},
    {"rindex", find_text<Side::right, Missing::error>},
    {"rjust", justify<Justify::right>},
    {"rpartition", partition<Side::right>},
    {"rsplit", split_text<Side::right>},
    {"rstrip", strip_text<Side::right>},
    {"split", split_text<Side::left>},
    {"splitlines", split_lines_of},
    {"startswith", matches_end<End::first>},
    {"strip", strip_text<Side::both>},
    {"swapcase", map_text<swap_case>},
    {"title", map_text<title>},
    {"upper", map_text<upper>},
    {"zfill", zero_fill},
};

// Dicts and sequences.

enum class Part { keys, values, items };
template <Part kPart>
Value view_of(Interpreter& in, const Dict& self, const CallArguments& arguments) {
  Runtime& runtime = in.runtime();
  Bound(runtime, "the method", arguments, {});
  const SequencePtr view = runtime.sequence(kPart == Part::keys     ? Sequence::Kind::keys
                                            : kPart == Part::values ? Sequence::Kind::values
                                                                    : Sequence::Kind::items);
  for (const auto& [key, value] : self.items) {
    if (kPart == Part::items) {
      runtime.push(*view, runtime.sequence(Sequence::Kind::tuple, {key, value}));
    } else {
      runtime.push(*view, kPart == Part::keys ? key : value);
    }
  }
  return view;
}

Value get_item(Interpreter& in, const Dict& self, const CallArguments& arguments) {
  const Bound bound(in.runtime(), "get", arguments, {"key", "default"}, 1);
  if (const Value* value = find(in.runtime(), self, *bound[0])) return *value;
  return bound.has(1) ? *bound[1] : Value(None{});
}

Value copy_dict(Interpreter& in, const Dict& self, const CallArguments& arguments) {
  Bound(in.runtime(), "copy", arguments, {});
  const DictPtr copy = in.runtime().dict();
  in.runtime().claim(copy->claim, 2 * sizeof(Value) * self.items.size());
  copy->depth = self.depth;
  copy->items = self.items;
  return copy;
}

constexpr Method<Dict> kDictMethods[] = {
    {"copy", copy_dict},
    {"get", get_item},
    {"items", view_of<Part::items>},
    {"keys", view_of<Part::keys>},
    {"values", view_of<Part::values>},
};

Value count_item(Interpreter& in, const Sequence& self, const CallArguments& arguments) {
  const Bound bound(in.runtime(), "count", arguments, {"value"}, 1);
  Int count = 0;
  for (const Value& item : self.items) count += equal(in.runtime(), item, *bound[0]);
  return count;
}

Value index_of_item(Interpreter& in, const Sequence& self, const CallArguments& arguments) {
  Runtime& runtime = in.runtime();
  const Bound bound(runtime, "index", arguments, {"value", "start", "end"}, 1);
  const Int size = static_cast<Int>(self.items.size());
  const auto adjust = [&](Int at) { return std::clamp<Int>(at < 0 ? at + size : at, 0, size); };
  for (Int i = adjust(bound.whole(1, 0)); i < adjust(bound.whole(2, size)); ++i)
    if (equal(runtime, self.items[static_cast<size_t>(i)], *bound[0])) return i;
  runtime.fail("the list does not contain what was looked for");
}

Value copy_list(Interpreter& in, const Sequence& self, const CallArguments& arguments) {
  Bound(in.runtime(), "copy", arguments, {});
  return in.runtime().sequence(self.kind, self.items);
}

constexpr Method<Sequence> kListMethods[] = {
    {"copy", copy_list},
    {"count", count_item},
    {"index", index_of_item},
};
constexpr Method<Sequence> kTupleMethods[] = {
    {"count", count_item},
    {"index", index_of_item},
};

// What would change a value that others hold: Jinja2's immutable sandbox refuses it.
constexpr std::string_view kForbiddenOfDict[] = {"clear", "pop", "popitem", "setdefault", "update"};
constexpr std::string_view kForbiddenOfList[] = {"append", "clear",  "extend",  "insert",
                                                 "pop",    "remove", "reverse", "sort"};

// Loops.

Value cycle(Interpreter& in, Loop& self, const CallArguments& arguments) {
  if (arguments.positional.empty()) in.runtime().fail("loop.cycle needs something to cycle");
  return arguments.positional[self.index0 % arguments.positional.size()];
}

Value changed(Interpreter& in, Loop& self, const CallArguments& arguments) {
  Value now = in.runtime().sequence(Sequence::Kind::tuple, arguments.positional);
  const bool is_new = !self.changed || !equal(in.runtime(), *self.changed, now);
  if (is_new) self.changed = std::move(now);
  return is_new;
}

const std::optional<Value>& peek(Loop& loop) {
  if (!loop.peeked && loop.advance) loop.peeked = loop.advance();
  return loop.peeked;
}

// Takes what is left of an iteration that does not know its length.
size_t length_of_loop(Runtime& runtime, Loop& loop) {
  if (loop.length) return *loop.length;
  auto rest = std::make_shared<std::vector<Value>>();
  if (loop.peeked) rest->push_back(*std::exchange(loop.peeked, std::nullopt));
  while (loop.advance) {
    std::optional<Value> item = loop.advance();
    if (!item) break;
    runtime.room(rest->size() * sizeof(Value));
    rest->push_back(std::move(*item));
  }
  loop.length = loop.index0 + 1 + rest->size();
  loop.advance = [rest, at = size_t{0}]() mutable -> std::optional<Value> {
    if (at == rest->size()) return std::nullopt;
    return (*rest)[at++];
  };
  return *loop.length;
}

std::optional<Value> find_loop_attribute(Runtime& runtime, Loop& loop, std::string_view name) {
  const auto whole = [](size_t n) { return Value(static_cast<Int>(n)); };
  if (name == "index") return whole(loop.index0 + 1);
  if (name == "index0") return whole(loop.index0);
  if (name == "first") return loop.index0 == 0;
  if (name == "last") return !peek(loop).has_value();
  if (name == "length") return whole(length_of_loop(runtime, loop));
  if (name == "revindex") return whole(length_of_loop(runtime, loop) - loop.index0);
  if (name == "revindex0") return whole(length_of_loop(runtime, loop) - loop.index0 - 1);
  if (name == "depth") return whole(loop.depth0 + 1);
  if (name == "depth0") return whole(loop.depth0);
  if (name == "previtem")
    return loop.index0 == 0 ? runtime.undefined("there is no previous item") : loop.previous;
  if (name == "nextitem") {
    const std::optional<Value>& item = peek(loop);
    return item ? *item : runtime.undefined("there is no next item");
  }
  if (name == "cycle") return runtime.method(&loop, "cycle");
  if (name == "changed") return runtime.method(&loop, "changed");
  return std::nullopt;
}

template <typename Table>
auto find_row(const Table& table, std::string_view name) {
  const auto* row = std::find_if(std::begin(table), std::end(table),
                                 [&](const auto& candidate) { return candidate.name == name; });
  return row == std::end(table) ? nullptr : row;
}

template <typename Table>
std::optional<Value> method_of(Runtime& runtime, const Table& table, const Value& self,
                               std::string_view name) {
  const auto* row = find_row(table, name);
  if (row == nullptr) return std::nullopt;
  return runtime.method(self, row->name);  // the row's name outlives the value
}

Value forbidden(Runtime& runtime, const Value& of, std::string_view name) {
  return runtime.undefined(fmt::format(
      "'{}' of a {} is not for templates: they cannot change values", name, type_name(of)));
}

template <typename Names>
bool is_one_of(const Names& names, std::string_view name) {
  return std::find(std::begin(names), std::end(names), name) != std::end(names);
}

bool is_list(const Sequence& sequence) { return sequence.kind == Sequence::Kind::list; }

}  // namespace

std::optional<Value> find_attribute(Runtime& runtime, const Value& of, std::string_view name) {
  if (name.size() > 4 && name.starts_with("__") && name.ends_with("__") && !as_namespace(of))
    return runtime.undefined(fmt::format("'{}' of a {} is not for templates", name, type_name(of)));
  if (as_text(of)) return method_of(runtime, kTextMethods, of, name);
  if (as_dict(of)) {
    if (is_one_of(kForbiddenOfDict, name)) return forbidden(runtime, of, name);
    return method_of(runtime, kDictMethods, of, name);
  }
  if (const Sequence* sequence = as_sequence(of)) {
    if (is_list(*sequence)) {
      if (is_one_of(kForbiddenOfList, name)) return forbidden(runtime, of, name);
      return method_of(runtime, kListMethods, of, name);
    }
    if (sequence->kind == Sequence::Kind::group && name == "grouper") return sequence->items[0];
    if (sequence->kind == Sequence::Kind::group && name == "list") return sequence->items[1];
    if (sequence->kind == Sequence::Kind::tuple || sequence->kind == Sequence::Kind::group ||
        sequence->kind == Sequence::Kind::range)
      return method_of(runtime, kTupleMethods, of, name);
    return std::nullopt;
  }
  if (Loop* loop = as_loop(of)) return find_loop_attribute(runtime, *loop, name);
  if (const Namespace* space = as_namespace(of)) {
    for (const auto& [key, value] : space->attributes)
      if (key->bytes == name) return value;
    return std::nullopt;
  }
  if (const Function* function = as_function(of)) {
    if (function->kind == Function::Kind::macro && name == "name")
      return runtime.text(std::string(function->name));
  }
  return std::nullopt;
}

Value call_method(Interpreter& interpreter, const Value& self, std::string_view name,
                  const CallArguments& arguments) {
  if (const Text* text = as_text(self))
    return find_row(kTextMethods, name)->call(interpreter, *text, arguments);
  if (const Dict* dict = as_dict(self))
    return find_row(kDictMethods, name)->call(interpreter, *dict, arguments);
  if (const Sequence* sequence = as_sequence(self))
    return find_row(kListMethods, name)->call(interpreter, *sequence, arguments);
  Loop& loop = *as_loop(self);
  return name == "cycle" ? cycle(interpreter, loop, arguments)
                         : changed(interpreter, loop, arguments);
}

}  // namespace moru::jinja
