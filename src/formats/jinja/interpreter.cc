#include "formats/jinja/interpreter.h"

#include <fmt/format.h>

#include <algorithm>

#include "formats/jinja/strings.h"

namespace moru::jinja {
namespace {

// How deep evaluation may recurse: through the tree, macros and recursive loops. Python stops at a
// thousand frames, some two hundred macros deep; this is no less, and fits any thread's stack.
constexpr int kMaxDepth = 800;

const char* op_name(Comparison::Op op) {
  switch (op) {
    case Comparison::Op::lt:
      return "<";
    case Comparison::Op::le:
      return "<=";
    case Comparison::Op::gt:
      return ">";
    default:
      return ">=";
  }
}

bool holds(Runtime& runtime, Comparison::Op op, const Value& a, const Value& b) {
  switch (op) {
    case Comparison::Op::eq:
      return equal(runtime, a, b);
    case Comparison::Op::ne:
      return !equal(runtime, a, b);
    case Comparison::Op::in:
      return contains(runtime, b, a);
    case Comparison::Op::not_in:
      return !contains(runtime, b, a);
    default:
      break;
  }
  const int order = compare(runtime, a, b, op_name(op));
  switch (op) {
    case Comparison::Op::lt:
      return order < 0;
    case Comparison::Op::le:
      return order <= 0;
    case Comparison::Op::gt:
      return order > 0;
    default:
      return order >= 0;
  }
}

}  // namespace

// Counts recursion while it lives.
class Interpreter::Depth {
 public:
  explicit Depth(Interpreter& interpreter) : interpreter_(interpreter) {
    if (++interpreter_.depth_ > kMaxDepth)
      interpreter_.runtime_.fail("the template recurses too deeply", "check its macros");
  }
  ~Depth() { --interpreter_.depth_; }
  Depth(const Depth&) = delete;
  Depth& operator=(const Depth&) = delete;

 private:
  Interpreter& interpreter_;
};

Bound::Bound(Runtime& runtime, std::string_view function, const CallArguments& arguments,
             std::initializer_list<std::string_view> parameters, size_t required)
    : runtime_(runtime),
      function_(function),
      parameters_(parameters),
      values_(parameters.size(), nullptr) {
  if (arguments.positional.size() > parameters.size())
    runtime.fail(fmt::format("{} takes at most {} arguments", function, parameters.size()));
  for (size_t i = 0; i < arguments.positional.size(); ++i) values_[i] = &arguments.positional[i];
  for (const auto& [name, value] : arguments.named) {
    const auto* at = std::find(parameters.begin(), parameters.end(), name);
    if (at == parameters.end()) runtime.fail(fmt::format("{} takes no '{}'", function, name));
    const auto i = static_cast<size_t>(at - parameters.begin());
    if (values_[i] != nullptr) runtime.fail(fmt::format("{} is given '{}' twice", function, name));
    values_[i] = &value;
  }
  for (size_t i = 0; i < required; ++i)
    if (values_[i] == nullptr) runtime.fail(fmt::format("{} needs '{}'", function, parameters_[i]));
}

bool Bound::truth(size_t i, bool otherwise) const {
  return has(i) ? jinja::truth(*values_[i]) : otherwise;
}

Int Bound::whole(size_t i, Int otherwise) const {
  if (!has(i)) return otherwise;
  const auto whole = as_int(*values_[i]);
  if (!whole)
    runtime_.fail(fmt::format("{}: '{}' is a {} and not a whole number", function_, parameters_[i],
                              type_name(*values_[i])));
  return *whole;
}

std::string_view Bound::text(size_t i, std::string_view otherwise) const {
  if (!has(i)) return otherwise;
  const Text* text = as_text(*values_[i]);
  if (text == nullptr)
    runtime_.fail(fmt::format("{}: '{}' is a {} and not a text", function_, parameters_[i],
                              type_name(*values_[i])));
  return text->bytes;
}

Interpreter::Interpreter(const Program& program, Runtime& runtime, int64_t now)
    : program_(program), runtime_(runtime), now_(now) {
  for (NameId id = 0; id < program.names.size(); ++id) {
    if (program.names[id] == "loop") loop_ = id;
    if (program.names[id] == "caller") caller_ = id;
    if (program.names[id] == "varargs") rest_ = id;
    if (program.names[id] == "kwargs") named_rest_ = id;
  }
}

std::string Interpreter::run(std::span<const Variable> inputs) {
  const auto context = std::make_shared<Scope>();
  for (NameId id = 0; id < program_.names.size(); ++id) {
    for (const Variable& input : inputs)
      if (input.name == program_.names[id]) set(*context, id, input.value);
  }
  Builder out(runtime_);
  run_body(program_.body, inner(context), out);
  return out.take();
}

ScopePtr Interpreter::inner(const ScopePtr& scope) {
  runtime_.step();
  auto made = std::make_shared<Scope>();
  made->outer = scope;
  return made;
}

const Value* Interpreter::find(NameId name, const ScopePtr& scope) const {
  for (const Scope* at = scope.get(); at != nullptr; at = at->outer.get())
    for (const auto& [id, value] : at->variables)
      if (id == name) return &value;
  return nullptr;
}

void Interpreter::set(Scope& scope, NameId name, Value value) {
  for (auto& [id, old] : scope.variables) {
    if (id != name) continue;
    old = std::move(value);
    return;
  }
  scope.variables.emplace_back(name, std::move(value));
}

void Interpreter::assign(const Target& target, Value value, const ScopePtr& scope) {
  if (target.is_tuple) {
    const std::vector<Value> items = items_of(runtime_, value);
    if (items.size() != target.elements.size())
      runtime_.fail(fmt::format("{} values for {} names", items.size(), target.elements.size()));
    for (size_t i = 0; i < items.size(); ++i) assign(target.elements[i], items[i], scope);
    return;
  }
  if (target.attribute == nullptr) return set(*scope, target.name, std::move(value));
  const Value* owner = find(target.name, scope);
  Namespace* space = owner == nullptr ? nullptr : as_namespace(*owner);
  if (space == nullptr)
    runtime_.fail(fmt::format("'{}' is not a namespace, so its '{}' cannot be set",
                              program_.names[target.name], target.attribute->bytes));
  if (target.attribute->bytes.starts_with('_'))
    runtime_.fail("a namespace cannot hold attributes that begin with an underscore");
  for (auto& [name, old] : space->attributes) {
    if (name->bytes != target.attribute->bytes) continue;
    old = std::move(value);
    return;
  }
  space->attributes.emplace_back(target.attribute, std::move(value));
}

// Expressions.

Value Interpreter::eval(Expr expression, const ScopePtr& scope) {
  const Depth depth(*this);
  runtime_.step();
  runtime_.line = expression->line;
  return std::visit([&](const auto& node) { return eval_node(node, scope); }, expression->node);
}

Value Interpreter::eval_node(const Constant& node, const ScopePtr&) { return node.value; }

Value Interpreter::eval_node(const Name& node, const ScopePtr& scope) {
  if (const Value* value = find(node.id, scope)) return *value;
  const std::string& name = program_.names[node.id];
  if (std::optional<Value> global = find_global(name)) return *global;
  return Undefined{Undefined::Why::variable, "", std::get<TextPtr>(runtime_.text(name))};
}

Value Interpreter::eval_node(const ListLiteral& node, const ScopePtr& scope) {
  const SequencePtr list =
      runtime_.sequence(node.is_tuple ? Sequence::Kind::tuple : Sequence::Kind::list);
  for (const Expr item : node.items) runtime_.push(*list, eval(item, scope));
  return list;
}

Value Interpreter::eval_node(const DictLiteral& node, const ScopePtr& scope) {
  const DictPtr dict = runtime_.dict();
  for (const auto& [key, value] : node.items) {
    Value k = eval(key, scope);
    runtime_.put(*dict, std::move(k), eval(value, scope));
  }
  return dict;
}

Value Interpreter::eval_node(const Attribute& node, const ScopePtr& scope) {
  return attribute(eval(node.of, scope), node.name);
}

Value Interpreter::eval_node(const Element& node, const ScopePtr& scope) {
  const Value of = eval(node.of, scope);
  return element(of, eval(node.index, scope));
}

Value Interpreter::eval_node(const Slice& node, const ScopePtr& scope) {
  const Value of = eval(node.of, scope);
  const auto bound = [&](Expr e) { return e == nullptr ? Value(None{}) : eval(e, scope); };
  const Value from = bound(node.from), to = bound(node.to), step = bound(node.step);
  return slice(runtime_, of, from, to, step);
}

Value Interpreter::eval_node(const Call& node, const ScopePtr& scope) {
  const int line = runtime_.line;
  const Value callee = eval(node.callee, scope);
  const CallArguments arguments = eval_arguments(node.arguments, scope);
  runtime_.line = line;
  return call(callee, arguments);
}

Value Interpreter::eval_node(const Filter& node, const ScopePtr& scope) {
  const int line = runtime_.line;
  const Value value = eval(node.value, scope);
  const CallArguments arguments = eval_arguments(node.arguments, scope);
  runtime_.line = line;
  return call_filter(node.name, value, arguments);
}

Value Interpreter::eval_node(const Test& node, const ScopePtr& scope) {
  const int line = runtime_.line;
  const Value value = eval(node.value, scope);
  const CallArguments arguments = eval_arguments(node.arguments, scope);
  runtime_.line = line;
  return call_test(node.name, value, arguments);
}

Value Interpreter::eval_node(const Unary& node, const ScopePtr& scope) {
  return node.apply(runtime_, eval(node.value, scope));
}

Value Interpreter::eval_node(const Binary& node, const ScopePtr& scope) {
  const int line = runtime_.line;
  const Value left = eval(node.left, scope);
  const Value right = eval(node.right, scope);
  runtime_.line = line;
  return node.apply(runtime_, left, right);
}

Value Interpreter::eval_node(const Not& node, const ScopePtr& scope) {
  return !truth(eval(node.value, scope));
}

Value Interpreter::eval_node(const Logic& node, const ScopePtr& scope) {
  Value left = eval(node.left, scope);
  return truth(left) == node.is_and ? eval(node.right, scope) : left;
}

Value Interpreter::eval_node(const Concat& node, const ScopePtr& scope) {
  Builder out(runtime_);
  for (const Expr part : node.parts) add_text(out, eval(part, scope));
  return out.value();
}

Value Interpreter::eval_node(const Comparison& node, const ScopePtr& scope) {
  Value left = eval(node.first, scope);
  for (const auto& [op, expression] : node.rest) {
    Value right = eval(expression, scope);
    if (!holds(runtime_, op, left, right)) return false;
    left = std::move(right);
  }
  return true;
}

Value Interpreter::eval_node(const Conditional& node, const ScopePtr& scope) {
  const int line = runtime_.line;
  if (truth(eval(node.test, scope))) return eval(node.then, scope);
  if (node.otherwise != nullptr) return eval(node.otherwise, scope);
  return runtime_.undefined(
      fmt::format("the if without else on line {} is false, so it has no value", line));
}

CallArguments Interpreter::eval_arguments(const Arguments& arguments, const ScopePtr& scope) {
  CallArguments values;
  values.positional.reserve(arguments.positional.size());
  for (const Expr e : arguments.positional) values.positional.push_back(eval(e, scope));
  for (const auto& [name, e] : arguments.named) values.named.emplace_back(name, eval(e, scope));
  if (arguments.rest != nullptr) {
    for (Value& item : items_of(runtime_, eval(arguments.rest, scope)))
      values.positional.push_back(std::move(item));
  }
  if (arguments.named_rest != nullptr) {
    const Value rest = eval(arguments.named_rest, scope);
    const Dict* dict = as_dict(rest);
    if (dict == nullptr) runtime_.fail(fmt::format("** wants a dict, not a {}", type_name(rest)));
    for (const auto& [key, value] : dict->items) {
      const Text* name = as_text(key);
      if (name == nullptr) runtime_.fail("** wants a dict whose keys are texts");
      values.named.emplace_back(name->bytes, value);
    }
  }
  return values;
}

Value Interpreter::attribute(const Value& of, const TextPtr& name) {
  if (const auto* undefined = std::get_if<Undefined>(&of)) fail_on_undefined(runtime_, *undefined);
  if (std::optional<Value> found = find_attribute(runtime_, of, name->bytes)) return *found;
  if (const Dict* dict = as_dict(of)) {
    runtime_.step(1 + dict->items.size() / 8);
    if (const Value* value = dict->find(name->bytes)) return *value;
  }
  return Undefined{Undefined::Why::attribute, type_name(of), name};
}

Value Interpreter::element(const Value& of, const Value& index) {
  if (const auto* undefined = std::get_if<Undefined>(&of)) fail_on_undefined(runtime_, *undefined);
  if (const Dict* dict = as_dict(of)) {
    if (const Value* value = jinja::find(runtime_, *dict, index)) return *value;
  } else if (const auto whole = as_int(index)) {
    const Text* text = as_text(of);
    const Sequence* sequence = as_sequence(of);
    const bool indexable =
        text != nullptr ||
        (sequence != nullptr &&
         (sequence->kind == Sequence::Kind::list || sequence->kind == Sequence::Kind::tuple ||
          sequence->kind == Sequence::Kind::group || sequence->kind == Sequence::Kind::range));
    if (indexable) {
      if (text != nullptr && !text->ascii) runtime_.step(text->bytes.size() / 8);
      const Int size = static_cast<Int>(*length_of(of));
      const Int at = *whole < 0 ? *whole + size : *whole;
      if (at >= 0 && at < size) {
        const auto i = static_cast<size_t>(at);
        if (sequence != nullptr) return sequence->items[i];
        if (text->ascii) return runtime_.text(text->bytes.substr(i, 1), text->markup);
        const size_t begin = offset_of(text->bytes, i);
        const size_t bytes = offset_of(std::string_view(text->bytes).substr(begin), 1);
        return runtime_.text(text->bytes.substr(begin, bytes), text->markup);
      }
    }
  }
  if (const auto* name = std::get_if<TextPtr>(&index)) {
    if (std::optional<Value> found = find_attribute(runtime_, of, (*name)->bytes)) return *found;
    return Undefined{Undefined::Why::attribute, type_name(of), *name};
  }
  Builder spelled(runtime_);
  add_repr(spelled, index);
  return Undefined{Undefined::Why::element, type_name(of), std::get<TextPtr>(spelled.value())};
}

Value Interpreter::call(const Value& callee, const CallArguments& arguments) {
  const Depth depth(*this);
  runtime_.step();
  if (const auto* undefined = std::get_if<Undefined>(&callee))
    fail_on_undefined(runtime_, *undefined);
  if (const Loop* loop = as_loop(callee)) {
    if (!loop->recurse) runtime_.fail("only a loop that is marked recursive can be called");
    return loop->recurse(*Bound(runtime_, "loop", arguments, {"items"}, 1)[0]);
  }
  const Function* function = as_function(callee);
  if (function == nullptr) runtime_.fail(fmt::format("a {} cannot be called", type_name(callee)));
  switch (function->kind) {
    case Function::Kind::global:
      return call_global(*this, function->name, arguments);
    case Function::Kind::method:
      return call_method(*this, function->self, function->name, arguments);
    case Function::Kind::macro:
      return call_macro(*function->macro, arguments);
  }
  return None{};
}

Value Interpreter::filter_text(Expr filter, Value value, const ScopePtr& scope) {
  const auto& node = std::get<Filter>(filter->node);
  if (node.value != nullptr) value = filter_text(node.value, std::move(value), scope);
  runtime_.line = filter->line;
  return call_filter(node.name, value, eval_arguments(node.arguments, scope));
}

// Statements.

Interpreter::Flow Interpreter::run_body(const Body& body, const ScopePtr& scope, Builder& out) {
  const Depth depth(*this);
  for (const Statement* statement : body) {
    runtime_.step();
    runtime_.line = statement->line;
    const Flow flow =
        std::visit([&](const auto& node) { return run_node(node, scope, out); }, statement->node);
    if (flow != Flow::next) return flow;
  }
  return Flow::next;
}

Interpreter::Flow Interpreter::run_node(const Data& node, const ScopePtr&, Builder& out) {
  runtime_.step(node.text.size() / 64);
  out.add(node.text);
  return Flow::next;
}

Interpreter::Flow Interpreter::run_node(const Print& node, const ScopePtr& scope, Builder& out) {
  const Value value = eval(node.value, scope);
  if (const Text* text = as_text(value)) runtime_.step(text->bytes.size() / 64);
  add_text(out, value);
  return Flow::next;
}

Interpreter::Flow Interpreter::run_node(const Set& node, const ScopePtr& scope, Builder&) {
  const int line = runtime_.line;
  Value value = eval(node.value, scope);
  runtime_.line = line;
  assign(node.target, std::move(value), scope);
  return Flow::next;
}

Interpreter::Flow Interpreter::run_node(const SetBlock& node, const ScopePtr& scope, Builder&) {
  Builder block(runtime_);
  const Flow flow = run_body(node.body, inner(scope), block);
  if (flow != Flow::next) return flow;
  Value value = block.value();
  if (node.filter != nullptr) value = filter_text(node.filter, std::move(value), scope);
  assign(node.target, std::move(value), scope);
  return Flow::next;
}

Interpreter::Flow Interpreter::run_node(const If& node, const ScopePtr& scope, Builder& out) {
  for (const auto& [test, body] : node.arms)
    if (truth(eval(test, scope))) return run_body(body, scope, out);
  return run_body(node.otherwise, scope, out);
}

Interpreter::Flow Interpreter::run_node(const For& node, const ScopePtr& scope, Builder& out) {
  return run_loop(node, eval(node.items, scope), scope, 0, out);
}

Interpreter::Flow Interpreter::run_loop(const For& node, const Value& items, const ScopePtr& scope,
                                        size_t depth0, Builder& out) {
  const int line = runtime_.line;
  Iteration iteration(runtime_, items);
  runtime_.own(sizeof(Loop));
  Loop& loop = loops_.emplace_back();
  loop.depth0 = depth0;
  if (node.condition == nullptr) loop.length = iteration.length();
  loop.advance = [&]() -> std::optional<Value> {
    while (std::optional<Value> item = iteration.next()) {
      if (node.condition == nullptr) return item;
      const ScopePtr test = inner(scope);
      assign(node.target, *item, test);
      if (truth(eval(node.condition, test))) return item;
    }
    return std::nullopt;
  };
  if (node.recursive) {
    loop.recurse = [&, depth0](const Value& nested) {
      Builder block(runtime_);
      run_loop(node, nested, scope, depth0 + 1, block);
      return block.value();
    };
  }
  bool any = false;
  Flow flow = Flow::next;
  while (flow != Flow::leave_loop) {
    std::optional<Value> item =
        loop.peeked ? std::exchange(loop.peeked, std::nullopt) : loop.advance();
    if (!item) break;
    if (any) ++loop.index0;
    any = true;
    loop.previous = std::exchange(loop.current, *item);
    const ScopePtr pass = inner(scope);
    if (loop_) set(*pass, *loop_, &loop);
    runtime_.line = line;
    assign(node.target, std::move(*item), pass);
    flow = run_body(node.body, pass, out);
  }
  // What it refers to ends here; a template may still hold the loop itself.
  loop.advance = nullptr;
  loop.recurse = nullptr;
  loop.previous = loop.current = None{};
  loop.peeked.reset();
  return any ? Flow::next : run_body(node.otherwise, inner(scope), out);
}

Interpreter::Flow Interpreter::run_node(const Macro& node, const ScopePtr& scope, Builder&) {
  set(*scope, node.name, make_macro(node, scope));
  return Flow::next;
}

Value Interpreter::make_macro(const Macro& macro, const ScopePtr& scope) {
  runtime_.step();
  runtime_.own(sizeof(MacroObject));
  auto function = std::make_shared<Function>();
  function->kind = Function::Kind::macro;
  function->name = program_.names[macro.name];
  function->macro = &macros_.emplace_back(MacroObject{&macro, scope});
  return FunctionPtr(std::move(function));
}

Value Interpreter::call_macro(const MacroObject& object, const CallArguments& arguments) {
  const Macro& macro = *object.macro;
  const std::string& name = program_.names[macro.name];
  const ScopePtr scope = inner(object.scope);
  const auto& parameters = macro.parameters;
  const auto& positional = arguments.positional;
  std::vector<bool> given(parameters.size(), false);
  for (size_t i = 0; i < std::min(positional.size(), parameters.size()); ++i) {
    set(*scope, parameters[i].name, positional[i]);
    given[i] = true;
  }
  const DictPtr named_rest = runtime_.dict();
  const Value* caller = nullptr;
  for (const auto& [key, value] : arguments.named) {
    size_t i = 0;
    while (i < parameters.size() && (given[i] || program_.names[parameters[i].name] != key)) ++i;
    if (i < parameters.size()) {
      set(*scope, parameters[i].name, value);
      given[i] = true;
    } else if (key == "caller" && macro.reads_caller) {
      caller = &value;
    } else if (macro.reads_named_rest) {
      runtime_.put(*named_rest, runtime_.text(key), value);
    } else {
      runtime_.fail(fmt::format("macro '{}' takes no argument '{}'", name, key));
    }
  }
  if (positional.size() > parameters.size() && !macro.reads_rest)
    runtime_.fail(
        fmt::format("macro '{}' takes not more than {} arguments", name, parameters.size()));
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (given[i]) continue;
    const Expr otherwise = parameters[i].otherwise;
    set(*scope, parameters[i].name,
        otherwise != nullptr ? eval(otherwise, scope)
                             : runtime_.undefined(fmt::format("parameter '{}' was not provided",
                                                              program_.names[parameters[i].name])));
  }
  const bool names_caller = std::any_of(parameters.begin(), parameters.end(),
                                        [&](const Parameter& p) { return p.name == caller_; });
  if (macro.reads_caller && caller_ && !names_caller)
    set(*scope, *caller_, caller != nullptr ? *caller : runtime_.undefined("No caller defined"));
  if (macro.reads_rest && rest_) {
    const SequencePtr rest = runtime_.sequence(Sequence::Kind::tuple);
    for (size_t i = parameters.size(); i < positional.size(); ++i)
      runtime_.push(*rest, positional[i]);
    set(*scope, *rest_, rest);
  }
  if (macro.reads_named_rest && named_rest_) set(*scope, *named_rest_, named_rest);
  Builder block(runtime_);
  run_body(macro.body, scope, block);
  return block.value();
}

Interpreter::Flow Interpreter::run_node(const CallBlock& node, const ScopePtr& scope,
                                        Builder& out) {
  const int line = runtime_.line;
  const auto& call_node = std::get<Call>(node.call->node);
  const Value callee = eval(call_node.callee, scope);
  CallArguments arguments = eval_arguments(call_node.arguments, scope);
  arguments.named.emplace_back("caller", make_macro(node.caller, scope));
  runtime_.line = line;
  add_text(out, call(callee, arguments));
  return Flow::next;
}

Interpreter::Flow Interpreter::run_node(const FilterBlock& node, const ScopePtr& scope,
                                        Builder& out) {
  Builder block(runtime_);
  const Flow flow = run_body(node.body, inner(scope), block);
  if (flow != Flow::next) return flow;
  add_text(out, filter_text(node.filter, block.value(), scope));
  return Flow::next;
}

Interpreter::Flow Interpreter::run_node(const With& node, const ScopePtr& scope, Builder& out) {
  const ScopePtr with = inner(scope);
  for (const auto& [target, value] : node.variables) assign(target, eval(value, scope), with);
  return run_body(node.body, with, out);
}

Interpreter::Flow Interpreter::run_node(const Generation& node, const ScopePtr& scope,
                                        Builder& out) {
  return run_body(node.body, inner(scope), out);
}

Interpreter::Flow Interpreter::run_node(const Break&, const ScopePtr&, Builder&) {
  return Flow::leave_loop;
}

Interpreter::Flow Interpreter::run_node(const Continue&, const ScopePtr&, Builder&) {
  return Flow::leave_pass;
}

}  // namespace moru::jinja
