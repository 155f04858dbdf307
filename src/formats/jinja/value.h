// The values that a chat template computes with: Python's, as far as templates can reach them, and
// the bounds of one render, which every value is made under.
//
// Texts, sequences and dicts are immutable once a template can see them and are counted references,
// so they cannot form cycles. What can (namespaces, macros, loops) belongs to the Runtime and goes
// away with it.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace moru::jinja {

__extension__ typedef __int128 Int;  // Python's are longer, JSON's are not

struct Text;
struct Sequence;
struct Dict;
struct Function;
struct Namespace;
struct Loop;
class Runtime;
using TextPtr = std::shared_ptr<const Text>;
using SequencePtr = std::shared_ptr<Sequence>;
using DictPtr = std::shared_ptr<Dict>;
using FunctionPtr = std::shared_ptr<const Function>;

// What a look-up that finds nothing gives: it prints as nothing, is false and empty, and anything
// else that is done with it fails, saying why it is there.
struct Undefined {
  enum class Why : uint8_t { variable, attribute, element, told };
  Why why = Why::told;
  const char* owner = "";  // attribute, element: the type that lacks it
  TextPtr name;            // or the whole reason, where it is told
};
struct None {};

using Value = std::variant<Undefined, None, bool, Int, double, TextPtr, SequencePtr, DictPtr,
                           FunctionPtr, Namespace*, Loop*>;

// Bytes that something holds against the render's bound; it gives them back when it dies.
class Claim {
 public:
  Claim() = default;
  ~Claim() {
    if (live_ != nullptr) *live_ -= bytes_;
  }
  Claim(const Claim&) = delete;
  Claim& operator=(const Claim&) = delete;
  void add(size_t* live, size_t bytes) {
    live_ = live;
    bytes_ += bytes;
    *live += bytes;
  }

 private:
  size_t* live_ = nullptr;
  size_t bytes_ = 0;
};

struct Text {
  std::string bytes;    // well-formed UTF-8
  bool ascii = false;   // then a code point is a byte
  bool markup = false;  // marked safe: joining it to other text escapes that
  Claim claim;
};

struct Sequence {
  enum class Kind : uint8_t { list, tuple, range, keys, values, items, group, iterator };
  Kind kind = Kind::list;
  uint32_t depth = 1;  // 1 + the deepest item
  size_t taken = 0;    // iterator: how many of its items have been used up
  TextPtr label;       // how it prints, where that is not its items
  std::vector<Value> items;
  Claim claim;
};

struct Dict {
  uint32_t depth = 1;
  std::vector<std::pair<Value, Value>> items;  // in order of insertion
  Claim claim;

  // Of a text key; nullptr if absent.
  const Value* find(std::string_view key) const;
};

struct MacroObject;

// Something that can be called.
struct Function {
  enum class Kind : uint8_t { global, method, macro };
  Kind kind;
  std::string_view name;  // of a global or a method: a literal
  Value self;             // method: of what
  MacroObject* macro = nullptr;
};

struct Namespace {
  std::vector<std::pair<TextPtr, Value>> attributes;
};

// The bounds of one render, where it is in the template, and the values that it owns.
class Runtime {
 public:
  // The bounds grow with what goes in, so that a long conversation renders and a short one cannot
  // be made to run for long.
  Runtime(std::string where, size_t input_bytes);
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  // Counts work that is about to be done: one unit is about what one expression costs.
  void step(size_t cost = 1) {
    if (cost > steps_left_) fail_on_steps();
    steps_left_ -= cost;
  }
  // Refuses to go on if `bytes` more would pass the bound on memory.
  void room(size_t bytes) {
    if (bytes > live_max_ || live_ > live_max_ - bytes) fail_on_memory();
  }
  void claim(Claim& claim, size_t bytes) {
    room(bytes);
    claim.add(&live_, bytes);
  }
  // Counts bytes that stay until the render ends.
  void own(size_t bytes) { claim(owned_, bytes); }
  // Error bad_input at the current line.
  [[noreturn]] void fail(std::string what, std::string cure = {}) const;

  Value text(std::string bytes, bool markup = false);
  SequencePtr sequence(Sequence::Kind kind = Sequence::Kind::list);
  Value sequence(Sequence::Kind kind, std::vector<Value> items);
  void push(Sequence& sequence, Value item);
  DictPtr dict();
  // Replaces the value of `key` or appends it. Fails for a key that cannot be hashed.
  void put(Dict& dict, Value key, Value value);
  Namespace* make_namespace();
  Value undefined(std::string why);
  Value method(const Value& self, std::string_view name);

  int line = 1;  // of the construct being evaluated

 private:
  [[noreturn]] void fail_on_steps() const;
  [[noreturn]] void fail_on_memory() const;

  std::string where_;
  size_t steps_left_;
  size_t live_ = 0, live_max_;
  std::deque<Namespace> namespaces_;
  Claim owned_;
};

// Text built piece by piece under the bound on memory.
class Builder {
 public:
  explicit Builder(Runtime& runtime) : runtime_(runtime) {}
  void add(std::string_view piece) {
    runtime_.room(text_.size() + piece.size());
    text_ += piece;
  }
  void add(size_t count, std::string_view piece);
  void add_code_point(char32_t c);
  const std::string& text() const { return text_; }
  Value value(bool markup = false) { return runtime_.text(std::move(text_), markup); }
  std::string take() { return std::move(text_); }
  Runtime& runtime() { return runtime_; }

 private:
  Runtime& runtime_;
  std::string text_;
};

inline bool is_undefined(const Value& v) { return std::holds_alternative<Undefined>(v); }
inline bool is_none(const Value& v) { return std::holds_alternative<None>(v); }
inline const Text* as_text(const Value& v) {
  const auto* text = std::get_if<TextPtr>(&v);
  return text ? text->get() : nullptr;
}
inline Sequence* as_sequence(const Value& v) {
  const auto* sequence = std::get_if<SequencePtr>(&v);
  return sequence ? sequence->get() : nullptr;
}
inline Dict* as_dict(const Value& v) {
  const auto* dict = std::get_if<DictPtr>(&v);
  return dict ? dict->get() : nullptr;
}
inline const Function* as_function(const Value& v) {
  const auto* function = std::get_if<FunctionPtr>(&v);
  return function ? function->get() : nullptr;
}
inline Namespace* as_namespace(const Value& v) {
  const auto* space = std::get_if<Namespace*>(&v);
  return space ? *space : nullptr;
}
inline Loop* as_loop(const Value& v) {
  const auto* loop = std::get_if<Loop*>(&v);
  return loop ? *loop : nullptr;
}
// An int or a bool, which counts as one.
std::optional<Int> as_int(const Value& v);
// An int, a bool or a float.
std::optional<double> as_number(const Value& v);

// "dict object", "None" …, as messages name it.
const char* type_name(const Value& v);
// Why the value is undefined: "'x' is undefined".
std::string reason_of(const Undefined& undefined);
[[noreturn]] void fail_on_undefined(const Runtime& runtime, const Undefined& undefined);

bool truth(const Value& v);
bool equal(Runtime& runtime, const Value& a, const Value& b);
// <0, 0, >0; fails where Python has no order, naming the operator.
int compare(Runtime& runtime, const Value& a, const Value& b, std::string_view op = "<");
bool same(const Value& a, const Value& b);  // Python's `is`
const Value* find(Runtime& runtime, const Dict& dict, const Value& key);
bool contains(Runtime& runtime, const Value& container, const Value& item);
// len(v); nullopt where it has none.
std::optional<size_t> length_of(const Value& v);

// str(v) and repr(v).
std::string to_text(Runtime& runtime, const Value& v);
void add_text(Builder& out, const Value& v);
void add_repr(Builder& out, const Value& v);
// repr of a float: the shortest digits that read back as the same number.
std::string repr_of(double v);

struct JsonStyle {
  bool ascii = false;
  bool sort_keys = false;
  std::optional<std::string> indent;  // of one level
  std::optional<std::string> item_separator, key_separator;
};
// json.dumps(v).
std::string to_json(Runtime& runtime, const Value& v, const JsonStyle& style);
Value from_json(Runtime& runtime, const nlohmann::ordered_json& json);

// One pass over what can be iterated: items, keys of a dict, code points of a text. Fails for what
// cannot be.
class Iteration {
 public:
  Iteration(Runtime& runtime, Value source);
  std::optional<Value> next();
  // What is left, where that is known without taking it.
  std::optional<size_t> length() const { return length_of(source_); }

 private:
  Runtime* runtime_;
  Value source_;
  size_t at_ = 0;  // of the next item, or byte of a text
};
bool is_iterable(const Value& v);
std::vector<Value> items_of(Runtime& runtime, const Value& v);

// Floor division of floats as CPython's: the remainder has the sign of the divisor, b ≠ 0.
struct FloatDivision {
  double quotient, remainder;
};
FloatDivision divide_floats(double a, double b);

// text.replace(from, to, count); no limit where count is negative.
Value replace(Runtime& runtime, const Text& text, std::string_view from, std::string_view to,
              Int count);

// The operators. Each fails where Python raises TypeError or ZeroDivisionError.
Value add(Runtime& runtime, const Value& a, const Value& b);
Value subtract(Runtime& runtime, const Value& a, const Value& b);
Value multiply(Runtime& runtime, const Value& a, const Value& b);
Value divide(Runtime& runtime, const Value& a, const Value& b);
Value floor_divide(Runtime& runtime, const Value& a, const Value& b);
Value modulo(Runtime& runtime, const Value& a, const Value& b);  // also text % values
Value power(Runtime& runtime, const Value& a, const Value& b);
Value negate(Runtime& runtime, const Value& v);
Value plus(Runtime& runtime, const Value& v);
// v[from:to:step]; each bound may be None.
Value slice(Runtime& runtime, const Value& v, const Value& from, const Value& to,
            const Value& step);

}  // namespace moru::jinja
