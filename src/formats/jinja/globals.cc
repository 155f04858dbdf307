// The functions that every template sees, as transformers sets them up.
#include <fmt/format.h>

#include <algorithm>
#include <ctime>
#include <map>

#include "formats/jinja/interpreter.h"

namespace moru::jinja {
namespace {

constexpr size_t kMaxRange = 100'000;  // Jinja2's sandbox has the same
constexpr size_t kMaxDateBytes = 4096;

Value range(Interpreter& in, const CallArguments& arguments) {
  Runtime& runtime = in.runtime();
  const Bound bound(runtime, "range", arguments, {"start", "stop", "step"}, 1);
  const Int start = bound.has(1) ? bound.whole(0, 0) : 0;
  const Int stop = bound.has(1) ? bound.whole(1, 0) : bound.whole(0, 0);
  const Int step = bound.whole(2, 1);
  if (step == 0) runtime.fail("range: a step of zero");
  const SequencePtr numbers = runtime.sequence(Sequence::Kind::range);
  for (Int i = start; step > 0 ? i < stop : i > stop;) {
    if (numbers->items.size() == kMaxRange)
      runtime.fail(fmt::format("range: more than {} numbers", kMaxRange));
    runtime.push(*numbers, i);
    if (__builtin_add_overflow(i, step, &i)) break;
  }
  std::string label = step == 1 ? fmt::format("range({}, {})", start, stop)
                                : fmt::format("range({}, {}, {})", start, stop, step);
  numbers->label = std::get<TextPtr>(runtime.text(std::move(label)));
  return numbers;
}

// dict(mapping or pairs, **more).
DictPtr make_dict(Runtime& runtime, const CallArguments& arguments) {
  if (arguments.positional.size() > 1) runtime.fail("dict takes at most one positional argument");
  const DictPtr dict = runtime.dict();
  if (!arguments.positional.empty()) {
    const Value& from = arguments.positional[0];
    if (const Dict* other = as_dict(from)) {
      for (const auto& [key, value] : other->items) runtime.put(*dict, key, value);
    } else {
      Iteration pairs(runtime, from);
      while (const std::optional<Value> pair = pairs.next()) {
        const std::vector<Value> parts = items_of(runtime, *pair);
        if (parts.size() != 2) runtime.fail("dict wants pairs of key and value");
        runtime.put(*dict, parts[0], parts[1]);
      }
    }
  }
  for (const auto& [name, value] : arguments.named) runtime.put(*dict, runtime.text(name), value);
  return dict;
}

Value dict(Interpreter& in, const CallArguments& arguments) {
  return make_dict(in.runtime(), arguments);
}

Value make_namespace(Interpreter& in, const CallArguments& arguments) {
  Runtime& runtime = in.runtime();
  const DictPtr attributes = make_dict(runtime, arguments);
  Namespace* space = runtime.make_namespace();
  for (const auto& [key, value] : attributes->items) {
    if (!as_text(key)) runtime.fail("namespace wants names that are texts");
    if (as_text(key)->bytes.starts_with('_'))
      runtime.fail("a namespace cannot hold attributes that begin with an underscore");
    runtime.own(2 * sizeof(Value));
    space->attributes.emplace_back(std::get<TextPtr>(key), value);
  }
  return space;
}

Value raise_exception(Interpreter& in, const CallArguments& arguments) {
  Runtime& runtime = in.runtime();
  const Bound bound(runtime, "raise_exception", arguments, {"message"}, 1);
  runtime.fail(to_text(runtime, *bound[0]), "the template itself refuses this conversation");
}

Value strftime_now(Interpreter& in, const CallArguments& arguments) {
  Runtime& runtime = in.runtime();
  const std::string format(Bound(runtime, "strftime_now", arguments, {"format"}, 1).text(0));
  if (format.empty()) return runtime.text("");
  const auto seconds = static_cast<std::time_t>(in.now());
  std::tm local{};
  ::localtime_r(&seconds, &local);
  std::string date(kMaxDateBytes, '\0');
  const size_t size = std::strftime(date.data(), date.size(), format.c_str(), &local);
  date.resize(size);
  return runtime.text(std::move(date));
}

using Global = Value (*)(Interpreter&, const CallArguments&);
const std::map<std::string_view, Global>& globals() {
  static const std::map<std::string_view, Global> table = {
      {"dict", dict},   {"namespace", make_namespace},  {"raise_exception", raise_exception},
      {"range", range}, {"strftime_now", strftime_now},
  };
  return table;
}

}  // namespace

std::optional<Value> find_global(std::string_view name) {
  const auto at = globals().find(name);
  if (at == globals().end()) return std::nullopt;
  auto function = std::make_shared<Function>();
  function->kind = Function::Kind::global;
  function->name = at->first;
  return FunctionPtr(std::move(function));
}

Value call_global(Interpreter& interpreter, std::string_view name, const CallArguments& arguments) {
  return globals().at(name)(interpreter, arguments);
}

}  // namespace moru::jinja
