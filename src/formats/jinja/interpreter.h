// Runs a parsed template: statements write text, expressions make values. Scoping is Jinja2's: a
// loop's pass, a macro's call and a {% with %} have variables of their own, an {% if %} has not.
#pragma once
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "formats/jinja/loop.h"
#include "formats/jinja/syntax.h"
#include "formats/jinja/value.h"

namespace moru::jinja {

class Interpreter;

// The arguments of one call.
struct CallArguments {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> named;
};

// Arguments by the names of their parameters. Fails for too many, unknown or missing ones.
class Bound {
 public:
  Bound(Runtime& runtime, std::string_view function, const CallArguments& arguments,
        std::initializer_list<std::string_view> parameters, size_t required = 0);

  // nullptr where it is not given.
  const Value* operator[](size_t i) const { return values_[i]; }
  bool has(size_t i) const { return values_[i] != nullptr; }
  bool has_value(size_t i) const { return has(i) && !is_none(*values_[i]); }
  bool truth(size_t i, bool otherwise) const;
  Int whole(size_t i, Int otherwise) const;
  // Fails where it is not a text.
  std::string_view text(size_t i, std::string_view otherwise = {}) const;

 private:
  Runtime& runtime_;
  std::string_view function_;
  std::vector<std::string_view> parameters_;
  std::vector<const Value*> values_;
};

struct Scope {
  std::shared_ptr<Scope> outer;
  std::vector<std::pair<NameId, Value>> variables;
};
using ScopePtr = std::shared_ptr<Scope>;

// A macro where it was defined.
struct MacroObject {
  const Macro* macro;
  ScopePtr scope;
};

class Interpreter {
 public:
  struct Variable {
    std::string_view name;
    Value value;
  };
  Interpreter(const Program& program, Runtime& runtime, int64_t now);
  // What the template prints.
  std::string run(std::span<const Variable> inputs);

  Runtime& runtime() { return runtime_; }
  int64_t now() const { return now_; }

  // What filters, tests and methods call back.
  Value attribute(const Value& of, const TextPtr& name);  // of.name
  Value element(const Value& of, const Value& index);     // of[index]
  Value call(const Value& callee, const CallArguments& arguments);
  Value call_filter(std::string_view name, const Value& value, const CallArguments& arguments);
  bool call_test(std::string_view name, const Value& value, const CallArguments& arguments);

 private:
  enum class Flow { next, leave_pass, leave_loop };
  class Depth;

  Value eval(Expr expression, const ScopePtr& scope);
  Value eval_node(const Constant& node, const ScopePtr& scope);
  Value eval_node(const Name& node, const ScopePtr& scope);
  Value eval_node(const ListLiteral& node, const ScopePtr& scope);
  Value eval_node(const DictLiteral& node, const ScopePtr& scope);
  Value eval_node(const Attribute& node, const ScopePtr& scope);
  Value eval_node(const Element& node, const ScopePtr& scope);
  Value eval_node(const Slice& node, const ScopePtr& scope);
  Value eval_node(const Call& node, const ScopePtr& scope);
  Value eval_node(const Filter& node, const ScopePtr& scope);
  Value eval_node(const Test& node, const ScopePtr& scope);
  Value eval_node(const Unary& node, const ScopePtr& scope);
  Value eval_node(const Binary& node, const ScopePtr& scope);
  Value eval_node(const Not& node, const ScopePtr& scope);
  Value eval_node(const Logic& node, const ScopePtr& scope);
  Value eval_node(const Concat& node, const ScopePtr& scope);
  Value eval_node(const Comparison& node, const ScopePtr& scope);
  Value eval_node(const Conditional& node, const ScopePtr& scope);
  CallArguments eval_arguments(const Arguments& arguments, const ScopePtr& scope);
  // A filter, or a chain of them, over `value`, for filter blocks.
  Value filter_text(Expr filter, Value value, const ScopePtr& scope);

  Flow run_body(const Body& body, const ScopePtr& scope, Builder& out);
  Flow run_node(const Data& node, const ScopePtr& scope, Builder& out);
  Flow run_node(const Print& node, const ScopePtr& scope, Builder& out);
  Flow run_node(const Set& node, const ScopePtr& scope, Builder& out);
  Flow run_node(const SetBlock& node, const ScopePtr& scope, Builder& out);
  Flow run_node(const If& node, const ScopePtr& scope, Builder& out);
  Flow run_node(const For& node, const ScopePtr& scope, Builder& out);
  Flow run_node(const Macro& node, const ScopePtr& scope, Builder& out);
  Flow run_node(const CallBlock& node, const ScopePtr& scope, Builder& out);
  Flow run_node(const FilterBlock& node, const ScopePtr& scope, Builder& out);
  Flow run_node(const With& node, const ScopePtr& scope, Builder& out);
  Flow run_node(const Generation& node, const ScopePtr& scope, Builder& out);
  Flow run_node(const Break& node, const ScopePtr& scope, Builder& out);
  Flow run_node(const Continue& node, const ScopePtr& scope, Builder& out);
  Flow run_loop(const For& node, const Value& items, const ScopePtr& scope, size_t depth0,
                Builder& out);

  ScopePtr inner(const ScopePtr& scope);
  const Value* find(NameId name, const ScopePtr& scope) const;
  void assign(const Target& target, Value value, const ScopePtr& scope);
  static void set(Scope& scope, NameId name, Value value);
  Value call_macro(const MacroObject& macro, const CallArguments& arguments);
  Value make_macro(const Macro& macro, const ScopePtr& scope);

  const Program& program_;
  Runtime& runtime_;
  int64_t now_;
  int depth_ = 0;
  // Names with a meaning of their own, where the template uses them at all.
  std::optional<NameId> loop_, caller_, rest_, named_rest_;
  std::deque<MacroObject> macros_;
  std::deque<Loop> loops_;
};

// filters.cc, tests.cc: whether Jinja2 as transformers sets it up has the filter or test, and what
// to say where not.
bool has_filter(std::string_view name);
bool has_test(std::string_view name);
std::string no_filter_message(std::string_view name);
std::string no_test_message(std::string_view name);

// methods.cc: what Python's getattr finds on a value: a method, an attribute of a loop or a
// namespace. nullopt where there is none; an Undefined that tells why where the sandbox forbids it.
std::optional<Value> find_attribute(Runtime& runtime, const Value& of, std::string_view name);
Value call_method(Interpreter& interpreter, const Value& self, std::string_view name,
                  const CallArguments& arguments);

// globals.cc: range, dict, namespace, raise_exception, strftime_now …
std::optional<Value> find_global(std::string_view name);
Value call_global(Interpreter& interpreter, std::string_view name, const CallArguments& arguments);

}  // namespace moru::jinja
