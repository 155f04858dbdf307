// Jinja2's tests: `value is name(arguments)`.
#include <fmt/format.h>

#include <algorithm>

#include "formats/jinja/interpreter.h"
#include "formats/jinja/strings.h"

namespace moru::jinja {
namespace {

using TestFunction = bool (*)(Interpreter&, const Value&, const CallArguments&);

bool remainder_is(Interpreter& in, const Value& v, Int divisor, Int remainder) {
  Runtime& runtime = in.runtime();
  return equal(runtime, modulo(runtime, v, divisor), remainder);
}
const Value& only(Interpreter& in, const CallArguments& arguments) {
  if (arguments.positional.size() != 1 || !arguments.named.empty())
    in.runtime().fail("the test takes one argument");
  return arguments.positional[0];
}

bool is_sequence(const Value& v) {
  if (const Sequence* sequence = as_sequence(v))
    return sequence->kind == Sequence::Kind::list || sequence->kind == Sequence::Kind::tuple ||
           sequence->kind == Sequence::Kind::group || sequence->kind == Sequence::Kind::range;
  return is_undefined(v) || as_text(v) || as_dict(v);
}

using In = Interpreter;
using Args = CallArguments;
constexpr auto kEqual = [](In& in, const Value& v, const Args& a) {
  return equal(in.runtime(), v, only(in, a));
};
constexpr auto kNotEqual = [](In& in, const Value& v, const Args& a) {
  return !equal(in.runtime(), v, only(in, a));
};
constexpr auto kGreater = [](In& in, const Value& v, const Args& a) {
  return compare(in.runtime(), v, only(in, a), ">") > 0;
};
constexpr auto kGreaterOrEqual = [](In& in, const Value& v, const Args& a) {
  return compare(in.runtime(), v, only(in, a), ">=") >= 0;
};
constexpr auto kLess = [](In& in, const Value& v, const Args& a) {
  return compare(in.runtime(), v, only(in, a), "<") < 0;
};
constexpr auto kLessOrEqual = [](In& in, const Value& v, const Args& a) {
  return compare(in.runtime(), v, only(in, a), "<=") <= 0;
};

struct TestRow {
  std::string_view name;
  TestFunction test;
};
constexpr TestRow kTests[] = {
    {"boolean", [](In&, const Value& v, const Args&) { return std::holds_alternative<bool>(v); }},
    {"callable", [](In&, const Value& v,
                    const Args&) { return as_function(v) || as_loop(v) || is_undefined(v); }},
    {"defined", [](In&, const Value& v, const Args&) { return !is_undefined(v); }},
    {"divisibleby",
     [](In& in, const Value& v, const Args& a) {
       return equal(in.runtime(), modulo(in.runtime(), v, only(in, a)), Int{0});
     }},
    {"eq", kEqual},
    {"==", kEqual},
    {"equalto", kEqual},
    {"escaped", [](In&, const Value& v, const Args&) { return as_text(v) && as_text(v)->markup; }},
    {"even", [](In& in, const Value& v, const Args&) { return remainder_is(in, v, 2, 0); }},
    {"false",
     [](In&, const Value& v, const Args&) { return std::holds_alternative<bool>(v) && !truth(v); }},
    {"filter",
     [](In&, const Value& v, const Args&) { return as_text(v) && has_filter(as_text(v)->bytes); }},
    {"float", [](In&, const Value& v, const Args&) { return std::holds_alternative<double>(v); }},
    {"ge", kGreaterOrEqual},
    {">=", kGreaterOrEqual},
    {"gt", kGreater},
    {">", kGreater},
    {"greaterthan", kGreater},
    {"in",
     [](In& in, const Value& v, const Args& a) { return contains(in.runtime(), only(in, a), v); }},
    {"integer", [](In&, const Value& v, const Args&) { return std::holds_alternative<Int>(v); }},
    {"iterable", [](In&, const Value& v, const Args&) { return is_iterable(v); }},
    {"le", kLessOrEqual},
    {"<=", kLessOrEqual},
    {"lower",
     [](In& in, const Value& v, const Args&) { return is_lower_text(to_text(in.runtime(), v)); }},
    {"lt", kLess},
    {"<", kLess},
    {"lessthan", kLess},
    {"mapping", [](In&, const Value& v, const Args&) { return as_dict(v) != nullptr; }},
    {"ne", kNotEqual},
    {"!=", kNotEqual},
    {"none", [](In&, const Value& v, const Args&) { return is_none(v); }},
    {"number", [](In&, const Value& v, const Args&) { return as_number(v).has_value(); }},
    {"odd", [](In& in, const Value& v, const Args&) { return remainder_is(in, v, 2, 1); }},
    {"sameas", [](In& in, const Value& v, const Args& a) { return same(v, only(in, a)); }},
    {"sequence", [](In&, const Value& v, const Args&) { return is_sequence(v); }},
    {"string", [](In&, const Value& v, const Args&) { return as_text(v) != nullptr; }},
    {"test",
     [](In&, const Value& v, const Args&) { return as_text(v) && has_test(as_text(v)->bytes); }},
    {"true",
     [](In&, const Value& v, const Args&) { return std::holds_alternative<bool>(v) && truth(v); }},
    {"undefined", [](In&, const Value& v, const Args&) { return is_undefined(v); }},
    {"upper",
     [](In& in, const Value& v, const Args&) { return is_upper_text(to_text(in.runtime(), v)); }},
};

const TestRow* find_row(std::string_view name) {
  const auto* row = std::find_if(std::begin(kTests), std::end(kTests),
                                 [&](const TestRow& candidate) { return candidate.name == name; });
  return row == std::end(kTests) ? nullptr : row;
}

}  // namespace

bool has_test(std::string_view name) { return find_row(name) != nullptr; }

std::string no_test_message(std::string_view name) {
  return fmt::format("there is no test '{}'", name);
}

bool Interpreter::call_test(std::string_view name, const Value& value,
                            const CallArguments& arguments) {
  runtime_.step();
  const TestRow* row = find_row(name);
  if (row == nullptr) runtime_.fail(no_test_message(name));
  return row->test(*this, value, arguments);
}

}  // namespace moru::jinja
