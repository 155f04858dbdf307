#include "formats/jinja/parser.h"

#include <fmt/format.h>

#include <algorithm>
#include <initializer_list>
#include <unordered_map>

#include "base/error.h"
#include "base/text.h"
#include "formats/jinja/interpreter.h"
#include "formats/jinja/lexer.h"
#include "formats/jinja/strings.h"

namespace moru::jinja {
namespace {

// Brackets, statements and signs nest at most this deep; Python's parser gives up sooner.
constexpr int kMaxNesting = 150;
constexpr size_t kMaxSourceBytes = size_t{4} << 20;

// Statements that Jinja2 knows and a chat template has no use for.
constexpr std::string_view kUnsupportedTags[] = {"include", "import",     "from",  "extends",
                                                 "block",   "autoescape", "trans", "do"};

struct BinaryRow {
  std::string_view op;
  Value (*apply)(Runtime&, const Value&, const Value&);
};
constexpr BinaryRow kSums[] = {{"+", add}, {"-", subtract}};
constexpr BinaryRow kProducts[] = {
    {"*", multiply}, {"/", divide}, {"//", floor_divide}, {"%", modulo}};

struct ComparisonRow {
  std::string_view op;
  Comparison::Op meaning;
};
constexpr ComparisonRow kComparisons[] = {
    {"==", Comparison::Op::eq}, {"!=", Comparison::Op::ne}, {"<", Comparison::Op::lt},
    {"<=", Comparison::Op::le}, {">", Comparison::Op::gt},  {">=", Comparison::Op::ge},
};

class Parser {
 public:
  Parser(std::string where, std::string_view source) {
    program_.where = std::move(where);
    if (source.size() > kMaxSourceBytes)
      fail_at(program_.where, 1, fmt::format("longer than {} MiB", kMaxSourceBytes >> 20));
    tokens_ = tokenize(program_.where, source);
  }

  Program run() {
    program_.body = parse_body({}, 1);
    if (!unknown_.empty()) fail_at(program_.where, unknown_.front().line, unknown_.front().what);
    return std::move(program_);
  }

 private:
  using Kind = Token::Kind;
  using Words = std::initializer_list<std::string_view>;

  // Counts nesting while it lives.
  class Nesting {
   public:
    explicit Nesting(Parser& parser) : parser_(parser) {
      if (++parser_.nesting_ > kMaxNesting)
        parser_.fail(fmt::format("nested deeper than {}", kMaxNesting));
    }
    ~Nesting() { --parser_.nesting_; }
    Nesting(const Nesting&) = delete;
    Nesting& operator=(const Nesting&) = delete;

   private:
    Parser& parser_;
  };

  const Token& now() const { return tokens_[at_]; }
  const Token& next() const { return tokens_[std::min(at_ + 1, tokens_.size() - 1)]; }
  Token take() { return tokens_[at_ + 1 < tokens_.size() ? at_++ : at_]; }
  bool is(Kind kind) const { return now().kind == kind; }
  bool is_op(std::string_view op) const { return is(Kind::op) && now().text == op; }
  bool is_name(std::string_view name) const { return is(Kind::name) && now().text == name; }
  bool take_op(std::string_view op) {
    if (!is_op(op)) return false;
    take();
    return true;
  }
  bool take_name(std::string_view name) {
    if (!is_name(name)) return false;
    take();
    return true;
  }

  [[noreturn]] void fail(std::string what) const {
    fail_at(program_.where, now().line, std::move(what));
  }
  [[noreturn]] void fail_on_token(std::string_view wanted) const {
    fail(fmt::format("{} where {} belongs", describe(now()), wanted));
  }
  static std::string describe(const Token& token) {
    switch (token.kind) {
      case Kind::end:
        return "the end of the template";
      case Kind::end_print:
      case Kind::end_block:
        return token.text;
      case Kind::text:
        return "a text";
      default:
        return fmt::format("'{}'", truncate_to_width(token.text, 40));
    }
  }
  void expect_op(std::string_view op) {
    if (!take_op(op)) fail_on_token(fmt::format("'{}'", op));
  }
  std::string expect_name(std::string_view what) {
    if (!is(Kind::name)) fail_on_token(what);
    return take().text;
  }
  void expect(Kind kind, std::string_view what) {
    if (!is(kind)) fail_on_token(what);
    take();
  }

  NameId name_id(const std::string& name) {
    const auto [at, is_new] = name_ids_.emplace(name, static_cast<NameId>(program_.names.size()));
    if (is_new) program_.names.push_back(name);
    return at->second;
  }
  static TextPtr text_of(std::string bytes) {
    auto text = std::make_shared<Text>();
    text->ascii = is_ascii(bytes);
    text->bytes = std::move(bytes);
    return text;
  }
  template <typename Node>
  Expr make(int line, Node node) {
    return &program_.expressions.emplace_back(Expression{line, std::move(node)});
  }
  template <typename Node>
  const Statement* state(int line, Node node) {
    return &program_.statements.emplace_back(Statement{line, std::move(node)});
  }

  // Statements up to one of `ends`, whose tag has then been entered ("{%" and nothing after it
  // taken), or for no `ends` to the end of the template. `begin` is the line of what they end.
  Body parse_body(Words ends, int begin) {
    const Nesting nesting(*this);
    Body body;
    for (;;) {
      const int line = now().line;
      switch (now().kind) {
        case Kind::data:
          body.push_back(state(line, Data{take().text}));
          break;
        case Kind::begin_print: {
          take();
          const Expr value = parse_tuple(true);
          body.push_back(state(line, Print{value}));
          expect(Kind::end_print, "}}");
          break;
        }
        case Kind::begin_block:
          take();
          if (is(Kind::name) && std::find(ends.begin(), ends.end(), now().text) != ends.end())
            return body;
          parse_statement(body);
          expect(Kind::end_block, "%}");
          break;
        default:
          if (ends.size() == 0) return body;
          fail(fmt::format("the template ends before {{% {} %}} of line {}", *(ends.end() - 1),
                           begin));
      }
    }
  }

  // "%}", statements, and the name of the tag that ends them, one of `ends`, which is taken.
  Body parse_block(Words ends, std::string* end = nullptr) {
    take_op(":");
    const int begin = now().line;
    expect(Kind::end_block, "%}");
    Body body = parse_body(ends, begin);
    const std::string name = take().text;
    if (end != nullptr) *end = name;
    return body;
  }

  void parse_statement(Body& body) {
    const int line = now().line;
    const std::string tag = expect_name("the name of a statement");
    if (tag == "set") {
      body.push_back(parse_set(line));
    } else if (tag == "if") {
      body.push_back(parse_if(line));
    } else if (tag == "for") {
      body.push_back(parse_for(line));
    } else if (tag == "macro") {
      body.push_back(parse_macro(line));
    } else if (tag == "call") {
      body.push_back(parse_call_block(line));
    } else if (tag == "filter") {
      const Expr filter = parse_filters(nullptr, true);
      body.push_back(state(line, FilterBlock{filter, parse_block({"endfilter"})}));
    } else if (tag == "with") {
      body.push_back(parse_with(line));
    } else if (tag == "generation") {
      body.push_back(state(line, Generation{parse_block({"endgeneration"})}));
    } else if (tag == "break") {
      body.push_back(state(line, Break{}));
    } else if (tag == "continue") {
      body.push_back(state(line, Continue{}));
    } else if (tag == "print") {
      do {
        body.push_back(state(line, Print{parse_expression()}));
      } while (take_op(","));
    } else if (std::find(std::begin(kUnsupportedTags), std::end(kUnsupportedTags), tag) !=
               std::end(kUnsupportedTags)) {
      throw Error(ErrorKind::unsupported,
                  {.where = fmt::format("{}: line {}", program_.where, line),
                   .what = fmt::format("{{% {} %}} is not something that chat templates use", tag),
                   .cure = "take the statement out of the template"});
    } else {
      --at_;
      fail(fmt::format("there is no statement {{% {} %}} that could stand here", tag));
    }
  }

  const Statement* parse_set(int line) {
    Target target = parse_target({}, true);
    if (take_op("=")) {
      const Expr value = parse_tuple(true);
      return state(line, Set{std::move(target), value});
    }
    const Expr filter = is_op("|") ? parse_filters(nullptr, false) : nullptr;
    return state(line, SetBlock{std::move(target), filter, parse_block({"endset"})});
  }

  const Statement* parse_if(int line) {
    If node;
    std::string end = "if";
    const size_t unknown = unknown_.size();
    while (end == "if" || end == "elif") {
      const Expr test = parse_tuple(false);
      node.arms.emplace_back(test, parse_block({"elif", "else", "endif"}, &end));
    }
    if (end == "else") node.otherwise = parse_block({"endif"});
    unknown_.resize(unknown);
    return state(line, std::move(node));
  }

  const Statement* parse_for(int line) {
    For node{};
    node.target = parse_target({"in"}, false);
    if (!take_name("in")) fail_on_token("'in'");
    node.items = parse_tuple(false, {"recursive", "if"});
    if (take_name("if")) node.condition = parse_expression();
    node.recursive = take_name("recursive");
    std::string end;
    node.body = parse_block({"else", "endfor"}, &end);
    if (end == "else") node.otherwise = parse_block({"endfor"});
    return state(line, std::move(node));
  }

  std::vector<Parameter> parse_parameters() {
    std::vector<Parameter> parameters;
    expect_op("(");
    while (!is_op(")")) {
      if (!parameters.empty()) expect_op(",");
      const NameId name = name_id(expect_name("the name of a parameter"));
      Expr otherwise = nullptr;
      if (take_op("=")) {
        otherwise = parse_expression();
      } else if (!parameters.empty() && parameters.back().otherwise != nullptr) {
        fail("a parameter without a default after one that has one");
      }
      parameters.push_back({name, otherwise});
    }
    take();
    return parameters;
  }

  // The body of a macro, noting which special variables it reads.
  void parse_macro_body(Macro& macro, std::string_view end) {
    macros_.push_back(&macro);
    macro.body = parse_block({end});
    macros_.pop_back();
  }

  const Statement* parse_macro(int line) {
    Macro macro{};
    macro.name = name_id(expect_name("the macro's name"));
    macro.parameters = parse_parameters();
    parse_macro_body(macro, "endmacro");
    return state(line, std::move(macro));
  }

  const Statement* parse_call_block(int line) {
    CallBlock node{};
    node.caller.name = name_id("caller");
    if (is_op("(")) node.caller.parameters = parse_parameters();
    node.call = parse_expression();
    if (!std::holds_alternative<Call>(node.call->node)) fail("{% call %} without a call");
    parse_macro_body(node.caller, "endcall");
    return state(line, std::move(node));
  }

  const Statement* parse_with(int line) {
    With node;
    while (!is(Kind::end_block)) {
      if (!node.variables.empty()) expect_op(",");
      Target target = parse_target({}, false);
      expect_op("=");
      node.variables.emplace_back(std::move(target), parse_expression());
    }
    node.body = parse_block({"endwith"});
    return state(line, std::move(node));
  }

  Target parse_target(Words ends, bool with_namespace) {
    Target tuple;
    tuple.line = now().line;
    tuple.is_tuple = true;
    bool has_comma = false;
    while (!is(Kind::end_block) && !is_op(")") && !is_op("=") && !is_any_name(ends)) {
      tuple.elements.push_back(parse_target_element(with_namespace));
      if (!take_op(",")) break;
      has_comma = true;
    }
    if (tuple.elements.empty()) fail_on_token("a name to assign to");
    if (!has_comma) {
      Target only = std::move(tuple.elements.front());
      return only;
    }
    return tuple;
  }

  Target parse_target_element(bool with_namespace) {
    const Nesting nesting(*this);
    if (take_op("(")) {
      Target inner = parse_target({}, with_namespace);
      expect_op(")");
      return inner;
    }
    Target target;
    target.line = now().line;
    const std::string name = expect_name("a name to assign to");
    if (is_constant_name(name)) {
      --at_;
      fail(fmt::format("nothing can be assigned to '{}'", name));
    }
    target.name = name_id(name);
    if (with_namespace && take_op(".")) target.attribute = text_of(expect_name("an attribute"));
    return target;
  }

  static bool is_constant_name(std::string_view name) {
    return name == "true" || name == "True" || name == "false" || name == "False" ||
           name == "none" || name == "None";
  }
  bool is_any_name(Words words) const {
    return is(Kind::name) && std::find(words.begin(), words.end(), now().text) != words.end();
  }

  // One expression, or a tuple of several without brackets around it.
  Expr parse_tuple(bool with_conditional, Words ends = {}) {
    const int line = now().line;
    std::vector<Expr> items;
    bool has_comma = false;
    while (!is_tuple_end(ends)) {
      items.push_back(with_conditional ? parse_expression() : parse_or());
      if (!take_op(",")) break;
      has_comma = true;
    }
    if (items.empty()) fail_on_token("an expression");
    if (!has_comma) return items.front();
    return make(line, ListLiteral{std::move(items), true});
  }
  bool is_tuple_end(Words ends) const {
    return is(Kind::end_print) || is(Kind::end_block) || is(Kind::end) || is_op(")") ||
           is_any_name(ends);
  }

  Expr parse_expression() {
    const Nesting nesting(*this);
    int line = now().line;
    const size_t unknown = unknown_.size();
    Expr value = parse_or();
    while (take_name("if")) {
      const Expr test = parse_or();
      const Expr otherwise = take_name("else") ? parse_expression() : nullptr;
      value = make(line, Conditional{test, value, otherwise});
      line = now().line;
      unknown_.resize(unknown);
    }
    return value;
  }

  Expr parse_or() {
    const int line = now().line;
    Expr left = parse_and();
    while (take_name("or")) {
      const Expr right = parse_and();
      left = make(line, Logic{false, left, right});
    }
    return left;
  }

  Expr parse_and() {
    const int line = now().line;
    Expr left = parse_not();
    while (take_name("and")) {
      const Expr right = parse_not();
      left = make(line, Logic{true, left, right});
    }
    return left;
  }

  Expr parse_not() {
    const Nesting nesting(*this);
    const int line = now().line;
    if (take_name("not")) return make(line, Not{parse_not()});
    return parse_comparison();
  }

  Expr parse_comparison() {
    const int line = now().line;
    Comparison node{parse_sum(), {}};
    for (;;) {
      if (take_name("in")) {
        node.rest.emplace_back(Comparison::Op::in, parse_sum());
      } else if (is_name("not") && next().kind == Kind::name && next().text == "in") {
        take();
        take();
        node.rest.emplace_back(Comparison::Op::not_in, parse_sum());
      } else {
        const auto* row =
            std::find_if(std::begin(kComparisons), std::end(kComparisons),
                         [&](const ComparisonRow& candidate) { return is_op(candidate.op); });
        if (row == std::end(kComparisons)) break;
        take();
        node.rest.emplace_back(row->meaning, parse_sum());
      }
    }
    if (node.rest.empty()) return node.first;
    return make(line, std::move(node));
  }

  // left op right op …, for the operators of a table; `operand` parses what binds tighter.
  template <size_t kCount>
  Expr parse_chain(const BinaryRow (&table)[kCount], Expr (Parser::*operand)()) {
    const int line = now().line;
    Expr left = (this->*operand)();
    for (;;) {
      const auto* row = std::find_if(std::begin(table), std::end(table),
                                     [&](const BinaryRow& r) { return is_op(r.op); });
      if (row == std::end(table)) return left;
      take();
      const Expr right = (this->*operand)();
      left = make(line, Binary{row->apply, left, right});
    }
  }
  Expr parse_sum() { return parse_chain(kSums, &Parser::parse_concat); }

  Expr parse_concat() {
    const int line = now().line;
    std::vector<Expr> parts = {parse_product()};
    while (take_op("~")) parts.push_back(parse_product());
    if (parts.size() == 1) return parts.front();
    return make(line, Concat{std::move(parts)});
  }

  Expr parse_product() { return parse_chain(kProducts, &Parser::parse_power); }
  Expr parse_power() {  // Jinja2 reads a ** b ** c from the left, unlike Python
    static constexpr BinaryRow kPowers[] = {{"**", power}};
    return parse_chain(kPowers, &Parser::parse_filtered_unary);
  }
  Expr parse_filtered_unary() { return parse_unary(true); }

  Expr parse_unary(bool with_filter) {
    const Nesting nesting(*this);
    const int line = now().line;
    Expr value = nullptr;
    if (take_op("-")) {
      value = make(line, Unary{negate, parse_unary(false)});
    } else if (take_op("+")) {
      value = make(line, Unary{plus, parse_unary(false)});
    } else {
      value = parse_primary();
    }
    value = parse_postfix(value);
    return with_filter ? parse_filters_and_tests(value) : value;
  }

  Expr parse_primary() {
    const Token token = take();
    switch (token.kind) {
      case Kind::name:
        if (token.text == "true" || token.text == "True") return make(token.line, Constant{true});
        if (token.text == "false" || token.text == "False")
          return make(token.line, Constant{false});
        if (token.text == "none" || token.text == "None") return make(token.line, Constant{None{}});
        note_special_name(token.text);
        return make(token.line, Name{name_id(token.text)});
      case Kind::text: {
        std::string joined = token.text;
        while (is(Kind::text)) joined += take().text;
        return make(token.line, Constant{text_of(std::move(joined))});
      }
      case Kind::whole:
      case Kind::real:
        return make(token.line, Constant{token.value});
      case Kind::op:
        if (token.text == "(") return parse_parentheses(token.line);
        if (token.text == "[") return parse_list(token.line);
        if (token.text == "{") return parse_dict(token.line);
        break;
      default:
        break;
    }
    if (token.kind != Kind::end) --at_;
    fail_on_token("an expression");
  }

  void note_special_name(std::string_view name) {
    for (Macro* macro : macros_) {
      macro->reads_caller |= name == "caller";
      macro->reads_rest |= name == "varargs";
      macro->reads_named_rest |= name == "kwargs";
    }
  }

  Expr parse_parentheses(int line) {
    if (take_op(")")) return make(line, ListLiteral{{}, true});
    const Expr value = parse_tuple(true);
    expect_op(")");
    return value;
  }

  Expr parse_list(int line) {
    ListLiteral node{{}, false};
    while (!is_op("]")) {
      node.items.push_back(parse_expression());
      if (!take_op(",")) break;
    }
    expect_op("]");
    return make(line, std::move(node));
  }

  Expr parse_dict(int line) {
    DictLiteral node;
    while (!is_op("}")) {
      const Expr key = parse_expression();
      expect_op(":");
      node.items.emplace_back(key, parse_expression());
      if (!take_op(",")) break;
    }
    expect_op("}");
    return make(line, std::move(node));
  }

  Expr parse_postfix(Expr value) {
    for (;;) {
      const int line = now().line;
      if (take_op(".")) {
        if (is(Kind::whole)) {
          value = make(line, Element{value, make(line, Constant{take().value})});
        } else {
          value = make(line, Attribute{value, text_of(expect_name("an attribute"))});
        }
      } else if (take_op("[")) {
        value = parse_subscript(line, value);
      } else if (is_op("(")) {
        value = make(line, Call{value, parse_arguments()});
      } else {
        return value;
      }
    }
  }

  Expr parse_subscript(int line, Expr of) {
    const auto bound = [&]() -> Expr {
      return is_op(":") || is_op("]") ? nullptr : parse_expression();
    };
    const Expr first = bound();
    if (take_op(":")) {
      const Expr to = bound();
      const Expr step = take_op(":") ? bound() : nullptr;
      expect_op("]");
      return make(line, Slice{of, first, to, step});
    }
    if (first == nullptr) fail_on_token("an expression");
    std::vector<Expr> items = {first};
    while (take_op(",")) items.push_back(parse_expression());
    expect_op("]");
    if (items.size() == 1) return make(line, Element{of, first});
    return make(line, Element{of, make(line, ListLiteral{std::move(items), true})});
  }

  Arguments parse_arguments() {
    Arguments arguments;
    expect_op("(");
    while (!is_op(")")) {
      if (take_op("*")) {
        if (arguments.rest != nullptr) fail("two *arguments in one call");
        arguments.rest = parse_expression();
      } else if (take_op("**")) {
        if (arguments.named_rest != nullptr) fail("two **arguments in one call");
        arguments.named_rest = parse_expression();
      } else if (is(Kind::name) && next().kind == Kind::op && next().text == "=") {
        const std::string name = take().text;
        take();
        arguments.named.emplace_back(name, parse_expression());
      } else {
        if (!arguments.named.empty() || arguments.rest || arguments.named_rest)
          fail("a positional argument after a named one");
        arguments.positional.push_back(parse_expression());
      }
      if (!take_op(",")) break;
    }
    expect_op(")");
    return arguments;
  }
  Arguments parse_optional_arguments() { return is_op("(") ? parse_arguments() : Arguments{}; }

  std::string parse_dotted_name(std::string_view what) {
    std::string name = expect_name(what);
    while (take_op(".")) name += "." + expect_name(what);
    return name;
  }

  // | name(…) | …; `inside` where the first name follows without a |.
  Expr parse_filters(Expr value, bool inside) {
    while (inside || is_op("|")) {
      if (!inside) take();
      inside = false;
      const int line = now().line;
      std::string name = parse_dotted_name("the name of a filter");
      if (!has_filter(name)) unknown_.push_back({line, no_filter_message(name)});
      value = make(line, Filter{value, std::move(name), parse_optional_arguments()});
    }
    return value;
  }

  Expr parse_filters_and_tests(Expr value) {
    for (;;) {
      const int line = now().line;
      if (is_op("|")) {
        value = parse_filters(value, false);
      } else if (take_name("is")) {
        value = parse_test(line, value);
      } else if (is_op("(")) {
        value = make(line, Call{value, parse_arguments()});
      } else {
        return value;
      }
    }
  }

  Expr parse_test(int line, Expr value) {
    const bool negated = take_name("not");
    Test node{value, parse_dotted_name("the name of a test"), {}};
    if (!has_test(node.name)) unknown_.push_back({line, no_test_message(node.name)});
    if (is_op("(")) {
      node.arguments = parse_arguments();
    } else if (begins_argument()) {
      if (is_name("is")) fail("two tests in a row: put the first into brackets");
      node.arguments.positional.push_back(parse_postfix(parse_primary()));
    }
    const Expr test = make(line, std::move(node));
    return negated ? make(line, Not{test}) : test;
  }
  // Whether what follows a test's name is its argument: {% if a is divisibleby 3 %}.
  bool begins_argument() const {
    if (is(Kind::name)) return !is_name("else") && !is_name("or") && !is_name("and");
    return is(Kind::text) || is(Kind::whole) || is(Kind::real) || is_op("[") || is_op("{");
  }

  Program program_;
  std::vector<Token> tokens_;
  size_t at_ = 0;
  int nesting_ = 0;
  std::vector<Macro*> macros_;  // whose bodies the parser stands in
  // Filters and tests that do not exist. As in Jinja2, that is an error at once unless they stand
  // under a condition, where they may never be reached.
  struct Unknown {
    int line;
    std::string what;
  };
  std::vector<Unknown> unknown_;
  std::unordered_map<std::string, NameId> name_ids_;
};

}  // namespace

Program parse(std::string where, std::string_view source) {
  return Parser(std::move(where), repair_utf8(source)).run();
}

}  // namespace moru::jinja
