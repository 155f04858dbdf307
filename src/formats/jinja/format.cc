#include "formats/jinja/format.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/text.h"
#include "formats/jinja/interpreter.h"
#include "formats/jinja/strings.h"

namespace moru::jinja {
namespace {

constexpr size_t kMaxPrecision = 1000;

// What stands before the type in "%-8.3f" and in "{:<8.3f}".
struct Spec {
  std::string fill = " ";
  char align = '\0';  // < > ^ =, or none
  char sign = '-';    // - + or space
  bool alternate = false;
  size_t width = 0;
  std::string_view group;  // "," or "_" between thousands
  std::optional<size_t> precision;
  char type = '\0';
};

size_t read_digits(Runtime& runtime, std::string_view text, size_t& at) {
  size_t number = 0;
  while (at < text.size() && text[at] >= '0' && text[at] <= '9') {
    number = number * 10 + static_cast<size_t>(text[at++] - '0');
    runtime.room(number);
  }
  return number;
}

// Digits of a number with its sign and prefix apart, so that zeros can go between.
struct Digits {
  std::string sign, prefix, body;
};

std::string group_thousands(std::string_view body, std::string_view separator, size_t every) {
  const size_t whole = std::min(body.find_first_not_of("0123456789abcdefABCDEF"), body.size());
  std::string out;
  for (size_t i = 0; i < whole; ++i) {
    if (i > 0 && (whole - i) % every == 0) out += separator;
    out += body[i];
  }
  return out + std::string(body.substr(whole));
}

void add_padded(Builder& out, const Spec& spec, const Digits& digits) {
  const size_t used = digits.sign.size() + digits.prefix.size() + digits.body.size();
  const size_t missing = spec.width > used ? spec.width - used : 0;
  const char align = spec.align == '\0' ? '>' : spec.align;
  const size_t before = align == '>' ? missing : align == '^' ? missing / 2 : 0;
  const size_t inside = align == '=' ? missing : 0;
  out.add(before, spec.fill);
  out.add(digits.sign);
  out.add(digits.prefix);
  out.add(inside, spec.fill);
  out.add(digits.body);
  out.add(missing - before - inside, spec.fill);
}

void add_padded_text(Builder& out, const Spec& spec, std::string_view text) {
  if (spec.precision) text = text.substr(0, offset_of(text, *spec.precision));
  const size_t used = count_code_points(text);
  const size_t missing = spec.width > used ? spec.width - used : 0;
  const size_t before = spec.align == '>' ? missing : spec.align == '^' ? missing / 2 : 0;
  out.add(before, spec.fill);
  out.add(text);
  out.add(missing - before, spec.fill);
}

std::string sign_of(const Spec& spec, bool negative) {
  if (negative) return "-";
  return spec.sign == '-' ? "" : std::string(1, spec.sign);
}

Digits digits_of(const Spec& spec, Int value) {
  Digits digits;
  digits.sign = sign_of(spec, value < 0);
  __extension__ typedef unsigned __int128 Wide;
  const Wide magnitude = value < 0 ? -static_cast<Wide>(value) : static_cast<Wide>(value);
  const int base = spec.type == 'b'            ? 2
                   : spec.type == 'o'          ? 8
                   : (spec.type | 0x20) == 'x' ? 16
                                               : 10;
  const char* letters = spec.type == 'X' ? "0123456789ABCDEF" : "0123456789abcdef";
  for (Wide rest = magnitude; rest > 0 || digits.body.empty(); rest /= static_cast<Wide>(base))
    digits.body += letters[static_cast<size_t>(rest % static_cast<Wide>(base))];
  std::reverse(digits.body.begin(), digits.body.end());
  if (spec.alternate && base != 10) digits.prefix = std::string("0") + spec.type;
  if (!spec.group.empty())
    digits.body = group_thousands(digits.body, spec.group, base == 10 ? 3 : 4);
  return digits;
}

Digits digits_of(Runtime& runtime, const Spec& spec, double value) {
  const size_t wanted = spec.precision.value_or(6);
  if (wanted > kMaxPrecision) runtime.fail(fmt::format("a precision past {}", kMaxPrecision));
  const int precision = static_cast<int>(wanted);
  Digits digits;
  digits.sign = sign_of(spec, std::signbit(value) && !std::isnan(value));
  const double magnitude = std::fabs(value);
  const bool capital = spec.type == 'E' || spec.type == 'F' || spec.type == 'G';
  if (!std::isfinite(value)) {
    digits.body = std::isnan(value) ? (capital ? "NAN" : "nan") : (capital ? "INF" : "inf");
    if (spec.type == '%') digits.body += '%';
    return digits;
  }
  switch (spec.type) {
    case 'e':
      digits.body = spec.alternate ? fmt::format("{:#.{}e}", magnitude, precision)
                                   : fmt::format("{:.{}e}", magnitude, precision);
      break;
    case 'E':
      digits.body = spec.alternate ? fmt::format("{:#.{}E}", magnitude, precision)
                                   : fmt::format("{:.{}E}", magnitude, precision);
      break;
    case 'g':
    case 'n':
      digits.body = spec.alternate ? fmt::format("{:#.{}g}", magnitude, std::max(precision, 1))
                                   : fmt::format("{:.{}g}", magnitude, std::max(precision, 1));
      break;
    case 'G':
      digits.body = spec.alternate ? fmt::format("{:#.{}G}", magnitude, std::max(precision, 1))
                                   : fmt::format("{:.{}G}", magnitude, std::max(precision, 1));
      break;
    case '%':
      digits.body = fmt::format("{:.{}f}%", magnitude * 100, precision);
      break;
    case '\0':
      if (!spec.precision) {
        digits.body = repr_of(magnitude);
      } else {
        digits.body = fmt::format("{:.{}g}", magnitude, std::max(precision, 1));
        if (digits.body.find_first_of(".e") == std::string::npos) digits.body += ".0";
      }
      break;
    default:
      digits.body = spec.alternate ? fmt::format("{:#.{}f}", magnitude, precision)
                                   : fmt::format("{:.{}f}", magnitude, precision);
  }
  if (!spec.group.empty()) digits.body = group_thousands(digits.body, spec.group, 3);
  return digits;
}

bool is_float_type(char type) {
  return type != '\0' && std::string_view("eEfFgGn%").find(type) != std::string_view::npos;
}

class PercentFormatter {
 public:
  PercentFormatter(Runtime& runtime, std::string_view format, const Value& arguments, bool markup)
      : runtime_(runtime), out_(runtime), format_(format), markup_(markup) {
    const Sequence* sequence = as_sequence(arguments);
    if (sequence != nullptr &&
        (sequence->kind == Sequence::Kind::tuple || sequence->kind == Sequence::Kind::group)) {
      arguments_ = sequence->items;
    } else {
      arguments_ = {arguments};
      mapping_ = as_dict(arguments);
      // What can be subscripted may be left over: it might have been a mapping.
      may_remain_ = mapping_ != nullptr || sequence != nullptr || is_undefined(arguments);
    }
  }

  Value run() {
    size_t at = 0;
    while (at < format_.size()) {
      const size_t percent = std::min(format_.find('%', at), format_.size());
      out_.add(format_.substr(at, percent - at));
      at = percent;
      if (at < format_.size()) add_value(++at);
    }
    if (next_ < arguments_.size() && !may_remain_)
      runtime_.fail("more values than the text has places for");
    return out_.value(markup_);
  }

 private:
  Value take() {
    if (keyed_) return *std::exchange(keyed_, std::nullopt);
    if (next_ >= arguments_.size()) runtime_.fail("fewer values than the text has places for");
    return arguments_[next_++];
  }

  size_t take_size(size_t& at, bool& negative) {
    if (at >= format_.size() || format_[at] != '*') return read_digits(runtime_, format_, at);
    ++at;
    const Value value = take();
    const auto whole = as_int(value);
    if (!whole) runtime_.fail("* in a format wants a whole number");
    negative = *whole < 0;
    const Int size = negative ? -*whole : *whole;
    runtime_.room(static_cast<size_t>(std::min<Int>(size, INT64_MAX)));
    return static_cast<size_t>(size);
  }

  // What follows a '%'.
  void add_value(size_t& at) {
    Spec spec;
    if (at < format_.size() && format_[at] == '(') {
      const size_t end = format_.find(')', at);
      if (end == format_.npos) runtime_.fail("a %( that is not closed");
      if (mapping_ == nullptr) runtime_.fail("a format with names wants a dict");
      const std::string_view key = format_.substr(at + 1, end - at - 1);
      const Value* value = mapping_->find(key);
      if (value == nullptr) runtime_.fail(fmt::format("the dict has no '{}'", key));
      keyed_ = *value;
      at = end + 1;
    }
    bool left = false, zeros = false, negative = false;
    for (; at < format_.size(); ++at) {
      const char c = format_[at];
      if (c == '-') {
        left = true;
      } else if (c == '+' || (c == ' ' && spec.sign != '+')) {
        spec.sign = c;
      } else if (c == '#') {
        spec.alternate = true;
      } else if (c == '0') {
        zeros = true;
      } else if (c != ' ') {
        break;
      }
    }
    spec.width = take_size(at, negative);
    left = left || negative;
    if (at < format_.size() && format_[at] == '.') {
      negative = false;
      spec.precision = take_size(++at, negative);
      if (negative) spec.precision = 0;
    }
    while (at < format_.size() && std::string_view("hlL").find(format_[at]) != std::string::npos)
      ++at;
    if (at >= format_.size()) runtime_.fail("a format that ends within a %");
    spec.type = format_[at++];
    spec.align = left ? '<' : '>';
    if (spec.type == '%') return out_.add("%");
    const Value value = take();
    switch (spec.type) {
      case 's':
      case 'r':
      case 'a': {
        Builder text(runtime_);
        spec.type == 's' ? add_text(text, value) : add_repr(text, value);
        const Text* own = as_text(value);
        const bool escapes = markup_ && !(own != nullptr && own->markup);
        return add_padded_text(out_, spec, escapes ? escape_html(text.text()) : text.text());
      }
      case 'c':
        return add_character(spec, value);
      default:
        break;
    }
    if (zeros && !left) {
      spec.fill = "0";
      spec.align = '=';
    }
    if (spec.type != '%' && is_float_type(spec.type) && spec.type != 'n') {
      const auto real = as_number(value);
      if (!real) fail_on_type(spec.type, value);
      return add_padded(out_, spec, digits_of(runtime_, spec, *real));
    }
    if (std::string_view("diuoxX").find(spec.type) == std::string_view::npos)
      runtime_.fail(fmt::format("there is no format %{}", spec.type));
    auto whole = as_int(value);
    const auto* real = std::get_if<double>(&value);
    const bool decimal = spec.type == 'd' || spec.type == 'i' || spec.type == 'u';
    if (!whole && decimal && real != nullptr && std::fabs(*real) < 0x1p126)
      whole = static_cast<Int>(*real);
    if (!whole) fail_on_type(spec.type, value);
    if (decimal) spec.type = 'd';
    Digits digits = digits_of(spec, *whole);
    if (spec.precision && *spec.precision > digits.body.size()) {
      runtime_.room(*spec.precision);
      digits.body.insert(0, *spec.precision - digits.body.size(), '0');
    }
    add_padded(out_, spec, digits);
  }

  void add_character(const Spec& spec, const Value& value) {
    std::string character;
    if (const auto code = as_int(value)) {
      if (*code < 0 || *code > 0x10FFFF) runtime_.fail("%c wants a code point");
      append_utf8(character, static_cast<char32_t>(*code));
    } else {
      const Text* text = as_text(value);
      if (text == nullptr || count_code_points(text->bytes) != 1)
        runtime_.fail("%c wants one character");
      character = text->bytes;
    }
    add_padded_text(out_, spec, character);
  }

  [[noreturn]] void fail_on_type(char type, const Value& value) {
    if (const auto* undefined = std::get_if<Undefined>(&value))
      fail_on_undefined(runtime_, *undefined);
    runtime_.fail(fmt::format("%{} wants a number, not a {}", type, type_name(value)));
  }

  Runtime& runtime_;
  Builder out_;
  std::string_view format_;
  bool markup_;
  std::vector<Value> arguments_;
  size_t next_ = 0;
  const Dict* mapping_ = nullptr;
  bool may_remain_ = false;
  std::optional<Value> keyed_;
};

// [[fill]align][sign][#][0][width][group][.precision][type]
Spec parse_spec(Runtime& runtime, std::string_view text) {
  Spec spec;
  const auto is_align = [](char c) { return c == '<' || c == '>' || c == '^' || c == '='; };
  size_t at = 0;
  if (!text.empty()) {
    const size_t first = code_point_at(text, 0).bytes;
    if (first < text.size() && is_align(text[first])) {
      spec.fill = std::string(text.substr(0, first));
      spec.align = text[first];
      at = first + 1;
    } else if (is_align(text[0])) {
      spec.align = text[0];
      at = 1;
    }
  }
  const auto take = [&](char c) {
    if (at >= text.size() || text[at] != c) return false;
    ++at;
    return true;
  };
  for (const char sign : {'+', '-', ' '})
    if (take(sign)) {
      spec.sign = sign;
      break;
    }
  spec.alternate = take('#');
  if (take('0') && spec.align == '\0') {
    spec.fill = "0";
    spec.align = '=';
  }
  spec.width = read_digits(runtime, text, at);
  if (take(',')) spec.group = ",";
  if (take('_')) spec.group = "_";
  if (take('.')) spec.precision = read_digits(runtime, text, at);
  if (at < text.size()) spec.type = text[at++];
  if (at != text.size()) runtime.fail(fmt::format("'{}' is no format", text));
  return spec;
}

void add_formatted(Builder& out, const Value& value, std::string_view spec_text) {
  Runtime& runtime = out.runtime();
  if (spec_text.empty()) return add_text(out, value);
  Spec spec = parse_spec(runtime, spec_text);
  const auto fail = [&] {
    runtime.fail(fmt::format("'{}' cannot format a {}", spec_text, type_name(value)));
  };
  const auto whole = as_int(value);
  const auto number = as_number(value);
  if (number && (is_float_type(spec.type) || !whole) && !(whole && spec.type == 'n')) {
    if (spec.type != '\0' && !is_float_type(spec.type)) fail();
    return add_padded(out, spec, digits_of(runtime, spec, *number));
  }
  if (whole) {
    if (spec.precision) fail();
    if (spec.type == 'c') {
      std::string character;
      append_utf8(character, static_cast<char32_t>(std::clamp<Int>(*whole, 0, 0x110000)));
      return add_padded_text(out, spec, character);
    }
    if (spec.type != '\0' && std::string_view("bdoxXn").find(spec.type) == std::string_view::npos)
      fail();
    return add_padded(out, spec, digits_of(spec, *whole));
  }
  const Text* text = as_text(value);
  if (text == nullptr || (spec.type != '\0' && spec.type != 's') || spec.align == '=') fail();
  add_padded_text(out, spec, text->bytes);
}

class BraceFormatter {
 public:
  BraceFormatter(Interpreter& interpreter, const CallArguments& arguments, bool markup)
      : interpreter_(interpreter),
        runtime_(interpreter.runtime()),
        arguments_(arguments),
        markup_(markup) {}

  // A spec may hold fields of its own, one level deep.
  void run(Builder& out, std::string_view format, int depth) {
    if (depth > 2) runtime_.fail("fields nested too deeply in a format");
    size_t at = 0;
    while (at < format.size()) {
      const char c = format[at];
      if (c != '{' && c != '}') {
        const size_t end = std::min(format.find_first_of("{}", at), format.size());
        out.add(format.substr(at, end - at));
        at = end;
      } else if (at + 1 < format.size() && format[at + 1] == c && depth == 1) {
        out.add({&c, 1});
        at += 2;
      } else if (c == '}') {
        runtime_.fail("a '}' that nothing opened in a format");
      } else {
        at = add_field(out, format, at + 1, depth);
      }
    }
  }

 private:
  // The field that begins at `at`; returns where the text after it begins.
  size_t add_field(Builder& out, std::string_view format, size_t at, int depth) {
    size_t end = at;
    for (int open = 1;; ++end) {
      if (end >= format.size()) runtime_.fail("a '{' that is not closed in a format");
      if (format[end] == '{') ++open;
      if (format[end] == '}' && --open == 0) break;
    }
    std::string_view field = format.substr(at, end - at), spec;
    char conversion = '\0';
    const size_t name_end = std::min(field.find_first_of("!:"), field.size());
    const std::string_view name = field.substr(0, name_end);
    field.remove_prefix(name_end);
    if (field.starts_with('!')) {
      if (field.size() < 2) runtime_.fail("a '!' without a conversion in a format");
      conversion = field[1];
      field.remove_prefix(2);
    }
    if (field.starts_with(':')) spec = field.substr(1);
    Value value = value_of(name);
    if (conversion != '\0') {
      Builder text(runtime_);
      if (conversion == 's') {
        add_text(text, value);
      } else if (conversion == 'r' || conversion == 'a') {
        add_repr(text, value);
      } else {
        runtime_.fail(fmt::format("there is no conversion '!{}'", conversion));
      }
      value = text.value();
    }
    Builder spelled_spec(runtime_);
    if (!spec.empty()) run(spelled_spec, spec, depth + 1);
    Builder formatted(runtime_);
    add_formatted(formatted, value, spelled_spec.text());
    const Text* own = as_text(value);
    const bool escapes = markup_ && !(own != nullptr && own->markup);
    out.add(escapes ? escape_html(formatted.text()) : formatted.text());
    return end + 1;
  }

  // "0", "name", "", with .attribute and [index] after it.
  Value value_of(std::string_view field) {
    const size_t first_end = std::min(field.find_first_of(".["), field.size());
    const std::string_view first = field.substr(0, first_end);
    Value value = root_of(first);
    std::string_view rest = field.substr(first_end);
    while (!rest.empty()) {
      const bool dotted = rest.front() == '.';
      const size_t end =
          dotted ? std::min(rest.find_first_of(".[", 1), rest.size()) : rest.find(']');
      if (end == rest.npos || end == 1) runtime_.fail("an empty look-up in a format");
      const std::string_view name = rest.substr(1, end - 1);
      const bool is_index = !dotted && name.find_first_not_of("0123456789") == name.npos;
      size_t at = 0;
      const Value key = is_index ? Value(Int{static_cast<int64_t>(read_digits(runtime_, name, at))})
                                 : runtime_.text(std::string(name));
      value = dotted ? interpreter_.attribute(value, std::get<TextPtr>(key))
                     : interpreter_.element(value, key);
      rest.remove_prefix(dotted ? end : end + 1);
    }
    return value;
  }

  Value root_of(std::string_view name) {
    size_t index = next_;
    if (name.empty()) {
      ++next_;
    } else if (name.find_first_not_of("0123456789") == name.npos) {
      size_t at = 0;
      index = read_digits(runtime_, name, at);
    } else {
      for (const auto& [key, value] : arguments_.named)
        if (key == name) return value;
      runtime_.fail(fmt::format("the format's '{}' is not given", name));
    }
    if (index >= arguments_.positional.size())
      runtime_.fail(fmt::format("the format's value {} is not given", index));
    return arguments_.positional[index];
  }

  Interpreter& interpreter_;
  Runtime& runtime_;
  const CallArguments& arguments_;
  bool markup_;
  size_t next_ = 0;
};

}  // namespace

Value format_percent(Runtime& runtime, const Value& format, const Value& arguments) {
  const Text& text = *as_text(format);
  return PercentFormatter(runtime, text.bytes, arguments, text.markup).run();
}

Value format_braces(Interpreter& interpreter, const Text& format, const CallArguments& arguments) {
  Builder out(interpreter.runtime());
  BraceFormatter(interpreter, arguments, format.markup).run(out, format.bytes, 1);
  return out.value(format.markup);
}

}  // namespace moru::jinja
