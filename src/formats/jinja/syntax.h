// What the parser makes of a template: a tree of statements and expressions, as in Jinja2's own
// `nodes`. Nodes are owned by the Program and refer to each other by pointer.
#pragma once
#include <deque>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "formats/jinja/value.h"

namespace moru::jinja {

using NameId = uint32_t;  // index into Program::names

struct Expression;
using Expr = const Expression*;

struct Arguments {
  std::vector<Expr> positional;
  std::vector<std::pair<std::string, Expr>> named;
  Expr rest = nullptr;        // *rest
  Expr named_rest = nullptr;  // **named_rest
};

struct Constant {
  Value value;
};
struct Name {
  NameId id;
};
struct ListLiteral {
  std::vector<Expr> items;
  bool is_tuple;
};
struct DictLiteral {
  std::vector<std::pair<Expr, Expr>> items;
};
struct Attribute {  // of.name
  Expr of;
  TextPtr name;
};
struct Element {  // of[index]
  Expr of, index;
};
struct Slice {  // of[from:to:step]; each bound may be nullptr
  Expr of, from, to, step;
};
struct Call {
  Expr callee;
  Arguments arguments;
};
struct Filter {  // value | name(arguments); value is nullptr at the bottom of a filter block
  Expr value;
  std::string name;
  Arguments arguments;
};
struct Test {  // value is name(arguments)
  Expr value;
  std::string name;
  Arguments arguments;
};
struct Unary {
  Value (*apply)(Runtime&, const Value&);
  Expr value;
};
struct Binary {
  Value (*apply)(Runtime&, const Value&, const Value&);
  Expr left, right;
};
struct Not {
  Expr value;
};
struct Logic {  // and, or
  bool is_and;
  Expr left, right;
};
struct Concat {  // a ~ b ~ c
  std::vector<Expr> parts;
};
struct Comparison {
  enum class Op { eq, ne, lt, le, gt, ge, in, not_in };
  Expr first;
  std::vector<std::pair<Op, Expr>> rest;
};
struct Conditional {  // then if test else otherwise; otherwise may be nullptr
  Expr test, then, otherwise;
};

struct Expression {
  int line;
  std::variant<Constant, Name, ListLiteral, DictLiteral, Attribute, Element, Slice, Call, Filter,
               Test, Unary, Binary, Not, Logic, Concat, Comparison, Conditional>
      node;
};

// What can be assigned to: a name, an attribute of a namespace, or a tuple of targets.
struct Target {
  int line = 0;
  NameId name = 0;
  TextPtr attribute;  // of the namespace `name`
  bool is_tuple = false;
  std::vector<Target> elements;  // of a tuple
};

struct Statement;
using Body = std::vector<const Statement*>;

struct Data {
  std::string text;
};
struct Print {
  Expr value;
};
struct Set {
  Target target;
  Expr value;
};
struct SetBlock {
  Target target;
  Expr filter;  // nullptr: none
  Body body;
};
struct If {
  std::vector<std::pair<Expr, Body>> arms;  // if, elif …
  Body otherwise;
};
struct For {
  Target target;
  Expr items;
  Expr condition;  // nullptr: none
  bool recursive;
  Body body, otherwise;
};
struct Parameter {
  NameId name;
  Expr otherwise;  // nullptr: none
};
struct Macro {
  NameId name;
  std::vector<Parameter> parameters;
  Body body;
  // Which of its special variables the body reads.
  bool reads_caller = false, reads_rest = false, reads_named_rest = false;
};
struct CallBlock {
  Macro caller;
  Expr call;
};
struct FilterBlock {
  Expr filter;
  Body body;
};
struct With {
  std::vector<std::pair<Target, Expr>> variables;
  Body body;
};
struct Generation {
  Body body;
};
struct Break {};
struct Continue {};

struct Statement {
  int line;
  std::variant<Data, Print, Set, SetBlock, If, For, Macro, CallBlock, FilterBlock, With, Generation,
               Break, Continue>
      node;
};

struct Program {
  std::string where;
  std::vector<std::string> names;
  std::deque<Expression> expressions;
  std::deque<Statement> statements;
  Body body;
};

}  // namespace moru::jinja
