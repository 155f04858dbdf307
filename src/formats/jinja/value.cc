#include "formats/jinja/value.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "base/text.h"
#include "formats/jinja/format.h"
#include "formats/jinja/loop.h"
#include "formats/jinja/strings.h"
#include "formats/jinja/value_parts.h"

namespace moru::jinja {

uint32_t depth_of(const Value& v) {
  if (const Sequence* sequence = as_sequence(v)) return sequence->depth;
  if (const Dict* dict = as_dict(v)) return dict->depth;
  if (const Function* function = as_function(v)) return 1 + depth_of(function->self);
  return 0;
}

void fail_on_depth(const Runtime& runtime) {
  runtime.fail(fmt::format("values nested deeper than {}", kMaxDepth));
}

bool is_tuple(const Sequence& sequence) {
  return sequence.kind == Sequence::Kind::tuple || sequence.kind == Sequence::Kind::group;
}

namespace {

constexpr size_t kStepsMin = 20'000'000, kStepsPerByte = 50;
constexpr size_t kBytesMin = size_t{64} << 20, kBytesPerByte = 32;
// What a value costs beside its bytes.
constexpr size_t kOverheadBytes = 64;

const char* kind_name(Sequence::Kind kind) {
  switch (kind) {
    case Sequence::Kind::list:
      return "list";
    case Sequence::Kind::tuple:
    case Sequence::Kind::group:
      return "tuple";
    case Sequence::Kind::range:
      return "range";
    case Sequence::Kind::keys:
      return "dict_keys";
    case Sequence::Kind::values:
      return "dict_values";
    case Sequence::Kind::items:
      return "dict_items";
    case Sequence::Kind::iterator:
      break;
  }
  return "generator";
}

// Whether Python could use the value as a key.
bool is_hashable(const Value& v) {
  if (const Sequence* sequence = as_sequence(v)) {
    if (sequence->kind == Sequence::Kind::list) return false;
    return !is_tuple(*sequence) ||
           std::all_of(sequence->items.begin(), sequence->items.end(), is_hashable);
  }
  return as_dict(v) == nullptr;
}

bool equal_items(Runtime& runtime, const std::vector<Value>& a, const std::vector<Value>& b) {
  if (a.size() != b.size()) return false;
  runtime.step(a.size());
  for (size_t i = 0; i < a.size(); ++i)
    if (!equal(runtime, a[i], b[i])) return false;
  return true;
}

// The number of a value, where it is one: int and bool exactly, float beside it.
struct Number {
  bool is_float = false;
  Int whole = 0;
  double real = 0;
};

std::optional<Number> number_of(const Value& v) {
  if (const auto whole = as_int(v))
    return Number{.is_float = false, .whole = *whole, .real = static_cast<double>(*whole)};
  if (const auto* real = std::get_if<double>(&v))
    return Number{.is_float = true, .whole = 0, .real = *real};
  return std::nullopt;
}

// An int against a float, exactly, as Python compares them.
int compare_exactly(Int whole, double real) {
  if (std::isinf(real)) return real > 0 ? -1 : 1;
  if (std::fabs(real) >= 0x1p126) return real > 0 ? -1 : 1;
  const double floor = std::floor(real);
  const Int below = static_cast<Int>(floor);
  if (whole != below) return whole < below ? -1 : 1;
  return real > floor ? -1 : 0;
}

// <0, 0, >0; nullopt where one is NaN.
std::optional<int> compare_numbers(const Number& a, const Number& b) {
  if (!a.is_float && !b.is_float) return a.whole < b.whole ? -1 : a.whole > b.whole ? 1 : 0;
  if (std::isnan(a.real) || std::isnan(b.real)) return std::nullopt;
  if (a.is_float && b.is_float) return a.real < b.real ? -1 : a.real > b.real ? 1 : 0;
  return a.is_float ? -compare_exactly(b.whole, a.real) : compare_exactly(a.whole, b.real);
}

void add_text_repr(Builder& out, std::string_view text) {
  const bool has_single = text.find('\'') != text.npos, has_double = text.find('"') != text.npos;
  const char quote = has_single && !has_double ? '"' : '\'';
  out.add({&quote, 1});
  for (size_t at = 0; at < text.size();) {
    const CodePoint c = code_point_at(text, at);
    const std::string_view bytes = text.substr(at, c.bytes);
    at += c.bytes;
    if (c.value == static_cast<char32_t>(quote) || c.value == '\\') {
      out.add("\\");
      out.add(bytes);
    } else if (c.value == '\n') {
      out.add("\\n");
    } else if (c.value == '\r') {
      out.add("\\r");
    } else if (c.value == '\t') {
      out.add("\\t");
    } else if (is_printable(c.value)) {
      out.add(bytes);
    } else if (c.value < 0x100) {
      out.add(fmt::format("\\x{:02x}", static_cast<uint32_t>(c.value)));
    } else if (c.value < 0x10000) {
      out.add(fmt::format("\\u{:04x}", static_cast<uint32_t>(c.value)));
    } else {
      out.add(fmt::format("\\U{:08x}", static_cast<uint32_t>(c.value)));
    }
  }
  out.add({&quote, 1});
}

void add_items_repr(Builder& out, const std::vector<Value>& items) {
  for (size_t i = 0; i < items.size(); ++i) {
    if (i > 0) out.add(", ");
    add_repr(out, items[i]);
  }
}

void add_dict_repr(Builder& out, const std::vector<std::pair<Value, Value>>& items) {
  out.add("{");
  for (size_t i = 0; i < items.size(); ++i) {
    if (i > 0) out.add(", ");
    add_repr(out, items[i].first);
    out.add(": ");
    add_repr(out, items[i].second);
  }
  out.add("}");
}

void add_sequence_repr(Builder& out, const Sequence& sequence) {
  if (sequence.label != nullptr) return out.add(sequence.label->bytes);
  switch (sequence.kind) {
    case Sequence::Kind::iterator:
      return out.add("<generator>");
    case Sequence::Kind::tuple:
    case Sequence::Kind::group:
      out.add("(");
      add_items_repr(out, sequence.items);
      return out.add(sequence.items.size() == 1 ? ",)" : ")");
    case Sequence::Kind::list:
    case Sequence::Kind::range:
      out.add("[");
      add_items_repr(out, sequence.items);
      return out.add("]");
    case Sequence::Kind::keys:
    case Sequence::Kind::values:
    case Sequence::Kind::items:
      out.add(kind_name(sequence.kind));
      out.add("([");
      add_items_repr(out, sequence.items);
      return out.add("])");
  }
}

[[noreturn]] void fail_on_operands(const Runtime& runtime, std::string_view op, const Value& a,
                                   const Value& b) {
  for (const Value* v : {&a, &b})
    if (const auto* undefined = std::get_if<Undefined>(v)) fail_on_undefined(runtime, *undefined);
  runtime.fail(fmt::format("{} cannot stand between {} and {}", op, type_name(a), type_name(b)));
}

using Overflow = bool (*)(Int, Int, Int*);
template <typename Real>
Value arithmetic(Runtime& runtime, std::string_view op, const Value& a, const Value& b,
                 Overflow whole, Real real) {
  const auto x = number_of(a), y = number_of(b);
  if (!x || !y) fail_on_operands(runtime, op, a, b);
  if (x->is_float || y->is_float) return real(x->real, y->real);
  Int result = 0;
  if (whole(x->whole, y->whole, &result)) runtime.fail("a whole number of more than 127 bits");
  return result;
}

Value repeat(Runtime& runtime, const Value& v, Int count) {
  const size_t times = count <= 0 ? 0 : static_cast<size_t>(std::min<Int>(count, INT64_MAX));
  if (const Text* text = as_text(v)) {
    Builder out(runtime);
    out.add(times, text->bytes);
    return out.value(text->markup);
  }
  const Sequence& from = *as_sequence(v);
  const SequencePtr list = runtime.sequence(from.kind);
  if (from.items.empty()) return list;
  for (size_t i = 0; i < times; ++i)
    for (const Value& item : from.items) runtime.push(*list, item);
  return list;
}

bool can_repeat(const Value& v) {
  const Sequence* sequence = as_sequence(v);
  return as_text(v) != nullptr ||
         (sequence && (sequence->kind == Sequence::Kind::list || is_tuple(*sequence)));
}

}  // namespace

FloatDivision divide_floats(double a, double b) {
  double remainder = std::fmod(a, b);
  double quotient = (a - remainder) / b;
  if (remainder != 0) {
    if ((b < 0) != (remainder < 0)) {
      remainder += b;
      quotient -= 1;
    }
  } else {
    remainder = std::copysign(0.0, b);
  }
  if (quotient == 0) return {std::copysign(0.0, a / b), remainder};
  double floored = std::floor(quotient);
  if (quotient - floored > 0.5) floored += 1;
  return {floored, remainder};
}

const Value* Dict::find(std::string_view key) const {
  for (const auto& [name, value] : items)
    if (const Text* text = as_text(name); text && text->bytes == key) return &value;
  return nullptr;
}

Runtime::Runtime(std::string where, size_t input_bytes)
    : where_(std::move(where)),
      steps_left_(kStepsMin + kStepsPerByte * input_bytes),
      live_max_(kBytesMin + kBytesPerByte * input_bytes) {}

void Runtime::fail(std::string what, std::string cure) const {
  throw Error(ErrorKind::bad_input, {.where = fmt::format("{}: line {}", where_, line),
                                     .what = std::move(what),
                                     .cure = std::move(cure)});
}

void Runtime::fail_on_steps() const {
  fail("the template runs for too long", "check its loops and macros");
}

void Runtime::fail_on_memory() const {
  fail("the template needs too much memory", "check its loops and macros");
}

Value Runtime::text(std::string bytes, bool markup) {
  step(1 + bytes.size() / 64);
  auto text = std::make_shared<Text>();
  claim(text->claim, bytes.size() + kOverheadBytes);
  text->ascii = is_ascii(bytes);
  text->bytes = std::move(bytes);
  text->markup = markup;
  return TextPtr(std::move(text));
}

SequencePtr Runtime::sequence(Sequence::Kind kind) {
  step();
  auto sequence = std::make_shared<Sequence>();
  claim(sequence->claim, sizeof(Sequence) + kOverheadBytes);
  sequence->kind = kind;
  return sequence;
}

Value Runtime::sequence(Sequence::Kind kind, std::vector<Value> items) {
  SequencePtr made = sequence(kind);
  step(items.size());
  claim(made->claim, items.size() * sizeof(Value));
  for (const Value& item : items) made->depth = std::max(made->depth, 1 + depth_of(item));
  if (made->depth > kMaxDepth) fail_on_depth(*this);
  made->items = std::move(items);
  return made;
}

void Runtime::push(Sequence& sequence, Value item) {
  step();
  claim(sequence.claim, sizeof(Value));
  sequence.depth = std::max(sequence.depth, 1 + depth_of(item));
  if (sequence.depth > kMaxDepth) fail_on_depth(*this);
  sequence.items.push_back(std::move(item));
}

DictPtr Runtime::dict() {
  step();
  auto dict = std::make_shared<Dict>();
  claim(dict->claim, sizeof(Dict) + kOverheadBytes);
  return dict;
}

void Runtime::put(Dict& dict, Value key, Value value) {
  if (!is_hashable(key)) fail(fmt::format("a {} cannot be a key", type_name(key)));
  dict.depth = std::max({dict.depth, 1 + depth_of(key), 1 + depth_of(value)});
  if (dict.depth > kMaxDepth) fail_on_depth(*this);
  if (const Value* old = jinja::find(*this, dict, key)) {
    const_cast<Value&>(*old) = std::move(value);
    return;
  }
  claim(dict.claim, 2 * sizeof(Value));
  dict.items.emplace_back(std::move(key), std::move(value));
}

Namespace* Runtime::make_namespace() {
  own(sizeof(Namespace) + kOverheadBytes);
  return &namespaces_.emplace_back();
}

Value Runtime::undefined(std::string why) {
  return Undefined{Undefined::Why::told, "", std::get<TextPtr>(text(std::move(why)))};
}

Value Runtime::method(const Value& self, std::string_view name) {
  step();
  auto function = std::make_shared<Function>();
  function->kind = Function::Kind::method;
  function->name = name;
  function->self = self;
  return FunctionPtr(std::move(function));
}

void Builder::add(size_t count, std::string_view piece) {
  if (piece.empty()) return;
  if (count > SIZE_MAX / 2 / piece.size()) runtime_.room(SIZE_MAX);
  runtime_.room(text_.size() + count * piece.size());
  runtime_.step(1 + count * piece.size() / 64);
  for (size_t i = 0; i < count; ++i) text_ += piece;
}

void Builder::add_code_point(char32_t c) {
  runtime_.room(text_.size() + 4);
  append_utf8(text_, c);
}

std::optional<Int> as_int(const Value& v) {
  if (const auto* whole = std::get_if<Int>(&v)) return *whole;
  if (const auto* flag = std::get_if<bool>(&v)) return Int{*flag};
  return std::nullopt;
}

std::optional<double> as_number(const Value& v) {
  if (const auto number = number_of(v)) return number->real;
  return std::nullopt;
}

const char* type_name(const Value& v) {
  struct Names {
    const char* operator()(const Undefined&) const { return "Undefined"; }
    const char* operator()(const None&) const { return "None"; }
    const char* operator()(bool) const { return "bool object"; }
    const char* operator()(Int) const { return "int object"; }
    const char* operator()(double) const { return "float object"; }
    const char* operator()(const TextPtr&) const { return "str object"; }
    const char* operator()(const SequencePtr& sequence) const {
      switch (sequence->kind) {
        case Sequence::Kind::list:
          return "list object";
        case Sequence::Kind::tuple:
        case Sequence::Kind::group:
          return "tuple object";
        case Sequence::Kind::range:
          return "range object";
        case Sequence::Kind::iterator:
          return "generator object";
        default:
          return "dict view";
      }
    }
    const char* operator()(const DictPtr&) const { return "dict object"; }
    const char* operator()(const FunctionPtr&) const { return "function object"; }
    const char* operator()(Namespace*) const { return "namespace object"; }
    const char* operator()(Loop*) const { return "loop object"; }
  };
  return std::visit(Names{}, v);
}

std::string reason_of(const Undefined& undefined) {
  const std::string_view name = undefined.name ? std::string_view(undefined.name->bytes) : "it";
  switch (undefined.why) {
    case Undefined::Why::variable:
      return fmt::format("'{}' is undefined", name);
    case Undefined::Why::attribute:
      return fmt::format("'{}' has no attribute '{}'", undefined.owner, name);
    case Undefined::Why::element:
      return fmt::format("{} has no element {}", undefined.owner, name);
    case Undefined::Why::told:
      break;
  }
  return std::string(name);
}

void fail_on_undefined(const Runtime& runtime, const Undefined& undefined) {
  runtime.fail(reason_of(undefined));
}

bool truth(const Value& v) {
  if (const auto* flag = std::get_if<bool>(&v)) return *flag;
  if (const auto* whole = std::get_if<Int>(&v)) return *whole != 0;
  if (const auto* real = std::get_if<double>(&v)) return *real != 0;
  if (const Text* text = as_text(v)) return !text->bytes.empty();
  if (const Sequence* sequence = as_sequence(v))
    return sequence->kind == Sequence::Kind::iterator || !sequence->items.empty();
  if (const Dict* dict = as_dict(v)) return !dict->items.empty();
  return !is_undefined(v) && !is_none(v);
}

bool equal(Runtime& runtime, const Value& a, const Value& b) {
  runtime.step();
  if (const auto x = number_of(a)) {
    const auto y = number_of(b);
    return y && compare_numbers(*x, *y) == 0;
  }
  if (a.index() != b.index()) return false;
  if (is_undefined(a) || is_none(a)) return true;
  if (const Text* x = as_text(a)) {
    const Text* y = as_text(b);
    if (x->bytes.size() != y->bytes.size()) return false;
    runtime.step(x->bytes.size() / 64);
    return x->bytes == y->bytes;
  }
  if (const Sequence* x = as_sequence(a)) {
    const Sequence* y = as_sequence(b);
    if (x == y) return true;
    if (x->kind == Sequence::Kind::iterator || x->kind == Sequence::Kind::values) return false;
    const bool alike = x->kind == y->kind || (is_tuple(*x) && is_tuple(*y));
    return alike && equal_items(runtime, x->items, y->items);
  }
  if (const Dict* x = as_dict(a)) {
    const Dict* y = as_dict(b);
    if (x->items.size() != y->items.size()) return false;
    for (const auto& [key, value] : x->items) {
      const Value* other = find(runtime, *y, key);
      if (other == nullptr || !equal(runtime, value, *other)) return false;
    }
    return true;
  }
  return same(a, b);
}

int compare(Runtime& runtime, const Value& a, const Value& b, std::string_view op) {
  runtime.step();
  const auto x = number_of(a), y = number_of(b);
  if (x && y) {
    const auto order = compare_numbers(*x, *y);
    if (order) return *order;
    return op.starts_with('<') ? 1 : -1;  // nothing holds for NaN
  }
  const Text *s = as_text(a), *t = as_text(b);
  if (s != nullptr && t != nullptr) {
    runtime.step(std::min(s->bytes.size(), t->bytes.size()) / 64);
    return s->bytes.compare(t->bytes);  // the order of UTF-8 is that of code points
  }
  const Sequence *p = as_sequence(a), *q = as_sequence(b);
  if (p != nullptr && q != nullptr &&
      ((p->kind == Sequence::Kind::list && q->kind == Sequence::Kind::list) ||
       (is_tuple(*p) && is_tuple(*q)))) {
    for (size_t i = 0; i < std::min(p->items.size(), q->items.size()); ++i)
      if (!equal(runtime, p->items[i], q->items[i]))
        return compare(runtime, p->items[i], q->items[i], op);
    return p->items.size() < q->items.size() ? -1 : p->items.size() > q->items.size() ? 1 : 0;
  }
  fail_on_operands(runtime, op, a, b);
}

bool same(const Value& a, const Value& b) {
  if (a.index() != b.index()) return false;
  if (is_undefined(a) || is_none(a)) return true;
  if (const Text* text = as_text(a)) return text->bytes == as_text(b)->bytes;
  if (std::holds_alternative<SequencePtr>(a)) return as_sequence(a) == as_sequence(b);
  if (std::holds_alternative<DictPtr>(a)) return as_dict(a) == as_dict(b);
  if (std::holds_alternative<FunctionPtr>(a)) return as_function(a) == as_function(b);
  if (std::holds_alternative<Namespace*>(a)) return as_namespace(a) == as_namespace(b);
  if (std::holds_alternative<Loop*>(a)) return as_loop(a) == as_loop(b);
  if (const auto* real = std::get_if<double>(&a)) return *real == std::get<double>(b);
  return as_int(a) == as_int(b);
}

const Value* find(Runtime& runtime, const Dict& dict, const Value& key) {
  runtime.step(1 + dict.items.size() / 8);
  if (const Text* text = as_text(key)) return dict.find(text->bytes);
  for (const auto& [name, value] : dict.items)
    if (equal(runtime, name, key)) return &value;
  return nullptr;
}

bool contains(Runtime& runtime, const Value& container, const Value& item) {
  if (const Text* text = as_text(container)) {
    const Text* part = as_text(item);
    if (part == nullptr) fail_on_operands(runtime, "in", item, container);
    runtime.step(text->bytes.size() / 16);
    return find_part(text->bytes, part->bytes) != std::string::npos;
  }
  if (const Dict* dict = as_dict(container)) {
    if (!is_hashable(item)) runtime.fail(fmt::format("a {} cannot be a key", type_name(item)));
    return find(runtime, *dict, item) != nullptr;
  }
  if (!is_iterable(container)) fail_on_operands(runtime, "in", item, container);
  Iteration items(runtime, container);
  while (const std::optional<Value> other = items.next())
    if (same(*other, item) || equal(runtime, *other, item)) return true;
  return false;
}

std::optional<size_t> length_of(const Value& v) {
  if (const Text* text = as_text(v))
    return text->ascii ? text->bytes.size() : count_code_points(text->bytes);
  if (const Sequence* sequence = as_sequence(v)) {
    if (sequence->kind == Sequence::Kind::iterator) return std::nullopt;
    return sequence->items.size();
  }
  if (const Dict* dict = as_dict(v)) return dict->items.size();
  if (is_undefined(v)) return 0;
  return std::nullopt;
}

std::string to_text(Runtime& runtime, const Value& v) {
  Builder out(runtime);
  add_text(out, v);
  return out.take();
}

void add_text(Builder& out, const Value& v) {
  if (const Text* text = as_text(v)) return out.add(text->bytes);
  if (is_undefined(v)) return;
  add_repr(out, v);
}

void add_repr(Builder& out, const Value& v) {
  Runtime& runtime = out.runtime();
  runtime.step();
  if (is_undefined(v)) return out.add("Undefined");
  if (is_none(v)) return out.add("None");
  if (const auto* flag = std::get_if<bool>(&v)) return out.add(*flag ? "True" : "False");
  if (const auto* whole = std::get_if<Int>(&v)) return out.add(fmt::format("{}", *whole));
  if (const auto* real = std::get_if<double>(&v)) return out.add(repr_of(*real));
  if (const Text* text = as_text(v)) {
    if (!text->markup) return add_text_repr(out, text->bytes);
    out.add("Markup(");
    add_text_repr(out, text->bytes);
    return out.add(")");
  }
  if (const Sequence* sequence = as_sequence(v)) return add_sequence_repr(out, *sequence);
  if (const Dict* dict = as_dict(v)) return add_dict_repr(out, dict->items);
  if (const Function* function = as_function(v))
    return out.add(fmt::format("<function {}>", function->name));
  if (const Loop* loop = as_loop(v))
    return out.add(fmt::format("<LoopContext {}/{}>", loop->index0 + 1,
                               loop->length ? *loop->length : loop->index0 + 1));
  // A namespace may hold itself, so what it holds is not shown.
  out.add("<Namespace>");
}

std::string repr_of(double v) {
  if (std::isnan(v)) return "nan";
  if (std::isinf(v)) return v > 0 ? "inf" : "-inf";
  // d.ddde±xx, the shortest that reads back; Python writes it plainly for exponents -4 … 15.
  char buffer[32];
  const auto end = std::to_chars(buffer, buffer + sizeof buffer, v, std::chars_format::scientific);
  std::string_view spelled(buffer, static_cast<size_t>(end.ptr - buffer));
  std::string sign;
  if (spelled.starts_with('-')) {
    sign = "-";
    spelled.remove_prefix(1);
  }
  const size_t e = spelled.find('e');
  int exponent = 0;
  const char* digits_of_exponent = spelled.data() + e + (spelled[e + 1] == '+' ? 2 : 1);
  std::from_chars(digits_of_exponent, spelled.data() + spelled.size(), exponent);
  std::string digits(spelled.substr(0, 1));
  if (e > 2) digits += spelled.substr(2, e - 2);
  const int count = static_cast<int>(digits.size());
  if (exponent < -4 || exponent >= 16) {
    std::string mantissa = digits.substr(0, 1);
    if (count > 1) mantissa += "." + digits.substr(1);
    return fmt::format("{}{}e{}{:02}", sign, mantissa, exponent < 0 ? '-' : '+',
                       std::abs(exponent));
  }
  if (exponent < 0)
    return sign + "0." + std::string(static_cast<size_t>(-exponent - 1), '0') + digits;
  if (count <= exponent + 1)
    return sign + digits + std::string(static_cast<size_t>(exponent + 1 - count), '0') + ".0";
  return sign + digits.substr(0, static_cast<size_t>(exponent + 1)) + "." +
         digits.substr(static_cast<size_t>(exponent + 1));
}

bool is_iterable(const Value& v) {
  return is_undefined(v) || as_text(v) || as_sequence(v) || as_dict(v) || as_loop(v);
}

Iteration::Iteration(Runtime& runtime, Value source)
    : runtime_(&runtime), source_(std::move(source)) {
  if (!is_iterable(source_) || as_loop(source_))
    runtime.fail(fmt::format("a {} cannot be iterated over", type_name(source_)));
}

std::optional<Value> Iteration::next() {
  runtime_->step();
  if (Sequence* sequence = as_sequence(source_)) {
    size_t& at = sequence->kind == Sequence::Kind::iterator ? sequence->taken : at_;
    if (at >= sequence->items.size()) return std::nullopt;
    return sequence->items[at++];
  }
  if (const Dict* dict = as_dict(source_)) {
    if (at_ >= dict->items.size()) return std::nullopt;
    return dict->items[at_++].first;
  }
  if (const Text* text = as_text(source_)) {
    if (at_ >= text->bytes.size()) return std::nullopt;
    const size_t begin = at_;
    at_ += code_point_at(text->bytes, at_).bytes;
    return runtime_->text(text->bytes.substr(begin, at_ - begin));
  }
  return std::nullopt;
}

std::vector<Value> items_of(Runtime& runtime, const Value& v) {
  const SequencePtr list = runtime.sequence();  // counts the items while they are gathered
  Iteration items(runtime, v);
  while (std::optional<Value> item = items.next()) runtime.push(*list, std::move(*item));
  return std::move(list->items);
}

Value replace(Runtime& runtime, const Text& text, std::string_view from, std::string_view to,
              Int count) {
  runtime.step(text.bytes.size() / 8);
  const std::string_view bytes = text.bytes;
  Builder out(runtime);
  Int done = 0;
  const auto more = [&] { return count < 0 || done < count; };
  size_t at = 0;
  if (from.empty()) {  // before every code point, and at the end
    for (; more() && at <= bytes.size(); ++done) {
      out.add(to);
      if (at == bytes.size()) return out.value(text.markup);
      const size_t size = code_point_at(bytes, at).bytes;
      out.add(bytes.substr(at, size));
      at += size;
    }
  } else {
    for (size_t next = find_part(bytes, from); more() && next != bytes.npos; ++done) {
      out.add(bytes.substr(at, next - at));
      out.add(to);
      at = next + from.size();
      next = find_part(bytes, from, at);
    }
  }
  out.add(bytes.substr(at));
  return out.value(text.markup);
}

Value add(Runtime& runtime, const Value& a, const Value& b) {
  const Text *s = as_text(a), *t = as_text(b);
  if (s != nullptr && t != nullptr) {
    const bool markup = s->markup || t->markup;
    runtime.room(6 * (s->bytes.size() + t->bytes.size()));
    std::string joined = markup && !s->markup ? escape_html(s->bytes) : s->bytes;
    joined += markup && !t->markup ? escape_html(t->bytes) : t->bytes;
    return runtime.text(std::move(joined), markup);
  }
  const Sequence *p = as_sequence(a), *q = as_sequence(b);
  if (p != nullptr && q != nullptr &&
      ((p->kind == Sequence::Kind::list && q->kind == Sequence::Kind::list) ||
       (is_tuple(*p) && is_tuple(*q)))) {
    runtime.room((p->items.size() + q->items.size()) * sizeof(Value));
    std::vector<Value> items = p->items;
    items.insert(items.end(), q->items.begin(), q->items.end());
    return runtime.sequence(p->kind, std::move(items));
  }
  return arithmetic(
      runtime, "+", a, b, [](Int x, Int y, Int* out) { return __builtin_add_overflow(x, y, out); },
      [](double x, double y) { return x + y; });
}

Value subtract(Runtime& runtime, const Value& a, const Value& b) {
  return arithmetic(
      runtime, "-", a, b, [](Int x, Int y, Int* out) { return __builtin_sub_overflow(x, y, out); },
      [](double x, double y) { return x - y; });
}

Value multiply(Runtime& runtime, const Value& a, const Value& b) {
  if (const auto count = as_int(b); count && can_repeat(a)) return repeat(runtime, a, *count);
  if (const auto count = as_int(a); count && can_repeat(b)) return repeat(runtime, b, *count);
  return arithmetic(
      runtime, "*", a, b, [](Int x, Int y, Int* out) { return __builtin_mul_overflow(x, y, out); },
      [](double x, double y) { return x * y; });
}

Value divide(Runtime& runtime, const Value& a, const Value& b) {
  const auto x = as_number(a), y = as_number(b);
  if (!x || !y) fail_on_operands(runtime, "/", a, b);
  if (*y == 0) runtime.fail("division by zero");
  return *x / *y;
}

Value floor_divide(Runtime& runtime, const Value& a, const Value& b) {
  const auto x = number_of(a), y = number_of(b);
  if (!x || !y) fail_on_operands(runtime, "//", a, b);
  if (y->real == 0) runtime.fail("division by zero");
  if (x->is_float || y->is_float) return divide_floats(x->real, y->real).quotient;
  if (y->whole == -1) return negate(runtime, x->whole);
  const bool rounds_up = x->whole % y->whole != 0 && (x->whole < 0) != (y->whole < 0);
  return x->whole / y->whole - Int{rounds_up};
}

Value modulo(Runtime& runtime, const Value& a, const Value& b) {
  if (as_text(a) != nullptr) return format_percent(runtime, a, b);
  const auto x = number_of(a), y = number_of(b);
  if (!x || !y) fail_on_operands(runtime, "%", a, b);
  if (y->real == 0) runtime.fail("division by zero");
  if (x->is_float || y->is_float) return divide_floats(x->real, y->real).remainder;
  if (y->whole == -1) return Int{0};
  const Int remainder = x->whole % y->whole;
  return remainder != 0 && (remainder < 0) != (y->whole < 0) ? remainder + y->whole : remainder;
}

Value power(Runtime& runtime, const Value& a, const Value& b) {
  const auto x = number_of(a), y = number_of(b);
  if (!x || !y) fail_on_operands(runtime, "**", a, b);
  if (x->is_float || y->is_float || y->whole < 0) {
    if (x->real == 0 && y->real < 0) runtime.fail("zero cannot be raised to a negative power");
    const double result = std::pow(x->real, y->real);
    if (std::isnan(result) && !std::isnan(x->real) && !std::isnan(y->real))
      runtime.fail("the power is a complex number");
    if (std::isinf(result) && std::isfinite(x->real) && std::isfinite(y->real))
      runtime.fail("the power is too large");
    return result;
  }
  Int base = x->whole, result = 1;
  for (Int exponent = y->whole; exponent > 0; exponent >>= 1) {
    if ((exponent & 1) != 0 && __builtin_mul_overflow(result, base, &result))
      runtime.fail("a whole number of more than 127 bits");
    if (exponent > 1 && __builtin_mul_overflow(base, base, &base))
      runtime.fail("a whole number of more than 127 bits");
  }
  return result;
}

Value negate(Runtime& runtime, const Value& v) {
  if (const auto* undefined = std::get_if<Undefined>(&v)) fail_on_undefined(runtime, *undefined);
  if (const auto* real = std::get_if<double>(&v)) return -*real;
  const auto whole = as_int(v);
  if (!whole) runtime.fail(fmt::format("- cannot stand before {}", type_name(v)));
  Int result = 0;
  if (__builtin_sub_overflow(Int{0}, *whole, &result))
    runtime.fail("a whole number of more than 127 bits");
  return result;
}

Value plus(Runtime& runtime, const Value& v) {
  if (const auto* undefined = std::get_if<Undefined>(&v)) fail_on_undefined(runtime, *undefined);
  if (std::holds_alternative<double>(v)) return v;
  const auto whole = as_int(v);
  if (!whole) runtime.fail(fmt::format("+ cannot stand before {}", type_name(v)));
  return *whole;
}

Value slice(Runtime& runtime, const Value& v, const Value& from, const Value& to,
            const Value& step) {
  if (const auto* undefined = std::get_if<Undefined>(&v)) fail_on_undefined(runtime, *undefined);
  const Text* text = as_text(v);
  const Sequence* sequence = as_sequence(v);
  if (text == nullptr &&
      (sequence == nullptr || (sequence->kind != Sequence::Kind::list &&
                               sequence->kind != Sequence::Kind::range && !is_tuple(*sequence))))
    runtime.fail(fmt::format("a {} cannot be sliced", type_name(v)));
  const auto bound = [&](const Value& value) -> std::optional<Int> {
    if (is_none(value)) return std::nullopt;
    if (const auto* undefined = std::get_if<Undefined>(&value))
      fail_on_undefined(runtime, *undefined);
    const auto whole = as_int(value);
    if (!whole) runtime.fail(fmt::format("a {} cannot bound a slice", type_name(value)));
    return std::clamp<Int>(*whole, -INT64_MAX, INT64_MAX);
  };
  const Int stride = bound(step).value_or(1);
  if (stride == 0) runtime.fail("a slice cannot have a step of zero");
  const Int size = static_cast<Int>(*length_of(v));
  // As PySlice_AdjustIndices.
  const auto adjust = [&](std::optional<Int> value, Int otherwise) {
    if (!value) return otherwise;
    Int i = *value < 0 ? *value + size : *value;
    if (i < 0) i = stride < 0 ? -1 : 0;
    if (i >= size) i = stride < 0 ? size - 1 : size;
    return i;
  };
  const Int begin = adjust(bound(from), stride < 0 ? size - 1 : 0);
  const Int end = adjust(bound(to), stride < 0 ? -1 : size);
  const auto index = [](Int i) { return static_cast<size_t>(i); };
  if (text != nullptr) {
    runtime.step(1 + text->bytes.size() / 16);
    if (stride == 1) {
      if (begin >= end) return runtime.text("", text->markup);
      const std::string& bytes = text->bytes;
      if (text->ascii)
        return runtime.text(bytes.substr(index(begin), index(end - begin)), text->markup);
      const size_t first = offset_of(bytes, index(begin));
      const size_t last =
          first + offset_of(std::string_view(bytes).substr(first), index(end - begin));
      return runtime.text(bytes.substr(first, last - first), text->markup);
    }
    runtime.room(8 * text->bytes.size());
    const std::u32string points = utf32_from_utf8(text->bytes);
    std::string picked;
    for (Int i = begin; stride > 0 ? i < end : i > end; i += stride)
      append_utf8(picked, points[index(i)]);
    return runtime.text(std::move(picked), text->markup);
  }
  const SequencePtr picked =
      runtime.sequence(is_tuple(*sequence) ? Sequence::Kind::tuple : Sequence::Kind::list);
  for (Int i = begin; stride > 0 ? i < end : i > end; i += stride)
    runtime.push(*picked, sequence->items[index(i)]);
  return picked;
}

}  // namespace moru::jinja
