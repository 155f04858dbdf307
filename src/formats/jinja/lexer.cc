#include "formats/jinja/lexer.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>

#include "base/error.h"
#include "base/text.h"
#include "formats/jinja/strings.h"

namespace moru::jinja {
namespace {

// Longest first.
constexpr std::string_view kOperators[] = {"//", "**", "==", "!=", ">=", "<=", "+", "-", "/",
                                           "*",  "%",  "~",  "[",  "]",  "(",  ")", "{", "}",
                                           ">",  "<",  "=",  ".",  ":",  "|",  ",", ";"};

std::string with_plain_newlines(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\r') {
      out += '\n';
      if (i + 1 < text.size() && text[i + 1] == '\n') ++i;
    } else {
      out += text[i];
    }
  }
  return out;
}

bool is_ascii_digit(char c) { return c >= '0' && c <= '9'; }

int hex_of(char c) {
  if (is_ascii_digit(c)) return c - '0';
  const char lower = static_cast<char>(c | 0x20);
  return lower >= 'a' && lower <= 'f' ? lower - 'a' + 10 : -1;
}

class Lexer {
 public:
  Lexer(const std::string& where, std::string_view source)
      : where_(where), source_(with_plain_newlines(source)) {
    if (source_.ends_with('\n')) source_.pop_back();  // Jinja drops one newline at the end
  }

  std::vector<Token> run() {
    while (at_ < source_.size()) read_data();
    tokens_.push_back({Token::Kind::end, line_, "", {}});
    return std::move(tokens_);
  }

 private:
  std::string_view rest() const { return std::string_view(source_).substr(at_); }
  bool sees(std::string_view text) const { return rest().starts_with(text); }
  [[noreturn]] void fail(std::string what) const { fail_at(where_, line_, std::move(what)); }

  // Moves on, counting lines.
  void take(size_t count) {
    for (size_t i = at_; i < at_ + count; ++i)
      if (source_[i] == '\n') ++line_;
    at_ += count;
    line_starting_ = count > 0 ? source_[at_ - 1] == '\n' : line_starting_;
  }
  void take_space() { take(rest().size() - strip(rest(), Side::left).size()); }

  void push(Token::Kind kind, std::string text) {
    tokens_.push_back({kind, line_, std::move(text), {}});
  }

  // Data up to the next tag, then that tag.
  void read_data() {
    size_t tag = at_;
    for (;; ++tag) {
      tag = source_.find('{', tag);
      if (tag == std::string::npos || tag + 1 >= source_.size()) {
        push(Token::Kind::data, source_.substr(at_));
        return take(source_.size() - at_);
      }
      const char next = source_[tag + 1];
      if (next == '%' || next == '{' || next == '#') break;
    }
    const char kind = source_[tag + 1];
    const char sign = sign_at(tag + 2);
    push_data(at_, tag, sign, kind != '{');
    take(tag - at_);
    if (kind == '%' && read_raw_begin()) return read_raw();
    take(2 + (sign != 0));
    line_starting_ = false;
    if (kind == '#') return read_comment();
    push(kind == '{' ? Token::Kind::begin_print : Token::Kind::begin_block, "");
    read_tag(kind == '{');
  }

  char sign_at(size_t at) const {
    return at < source_.size() && (source_[at] == '-' || source_[at] == '+') ? source_[at] : '\0';
  }

  // source[begin, end) as data before a tag with `sign`, stripped as the tag asks for.
  void push_data(size_t begin, size_t end, char sign, bool is_block) {
    std::string_view text = std::string_view(source_).substr(begin, end - begin);
    if (sign == '-') {
      text = strip(text, Side::right);
    } else if (sign != '+' && is_block) {
      const size_t newline = text.rfind('\n');
      const size_t line_begin = newline == text.npos ? 0 : newline + 1;
      if ((line_begin > 0 || line_starting_) && strip(text.substr(line_begin), Side::left).empty())
        text = text.substr(0, line_begin);
    }
    if (!text.empty()) push(Token::Kind::data, std::string(text));
  }

  // The end of a block tag or comment that `closing` closes; false if it does not stand here.
  bool take_block_end(std::string_view closing) {
    const char sign = sign_at(at_);
    const std::string_view after = rest().substr(sign != 0);
    if (!after.starts_with(closing)) return false;
    take(closing.size() + (sign != 0));
    if (sign == '-') {
      take_space();
    } else if (sign == 0 && sees("\n")) {
      take(1);
    }
    return true;
  }

  // {% raw %}: takes it whole, or nothing.
  bool read_raw_begin() {
    std::string_view text = rest().substr(2);
    if (sign_at(at_ + 2) != 0) text.remove_prefix(1);
    text = strip(text, Side::left);
    if (!text.starts_with("raw")) return false;
    text = strip(text.substr(3), Side::left);
    if (text.starts_with("-%}")) {
      text = strip(text.substr(3), Side::left);
    } else if (text.starts_with("%}")) {
      text.remove_prefix(2);
    } else {
      return false;
    }
    take(rest().size() - text.size());
    return true;
  }

  void read_raw() {
    for (size_t tag = source_.find("{%", at_); tag != std::string::npos;
         tag = source_.find("{%", tag + 2)) {
      const char sign = sign_at(tag + 2);
      std::string_view text = std::string_view(source_).substr(tag + 2 + (sign != 0));
      text = strip(text, Side::left);
      if (!text.starts_with("endraw")) continue;
      text = strip(text.substr(6), Side::left);
      if (!text.starts_with("%}") && !text.starts_with("-%}") && !text.starts_with("+%}")) continue;
      push_data(at_, tag, sign, true);
      take(source_.size() - text.size() - at_);
      take_block_end("%}");
      return;
    }
    fail("a {% raw %} that is not closed");
  }

  void read_comment() {
    const size_t begin = at_, end = source_.find("#}", at_);
    if (end == std::string::npos) fail("a comment that is not closed");
    // The sign before #} belongs to it.
    take(end - begin - (end > begin && sign_at(end - 1) != 0));
    take_block_end("#}");
  }

  void read_tag(bool is_print) {
    std::string open;  // the closing brackets that are awaited
    for (;;) {
      if (open.empty() && take_tag_end(is_print)) return;
      if (at_ >= source_.size()) return;  // the parser tells what is missing
      const CodePoint c = code_point_at(source_, at_);
      if (is_space(c.value)) {
        take(c.bytes);
      } else if (is_ascii_digit(source_[at_])) {
        read_number();
      } else if (c.value == '_' || is_alpha(c.value)) {
        read_name();
      } else if (c.value == '"' || c.value == '\'') {
        read_text();
      } else {
        read_operator(open);
      }
    }
  }

  bool take_tag_end(bool is_print) {
    if (!is_print) {
      if (!sees("%}") && !sees("-%}") && !sees("+%}")) return false;
      push(Token::Kind::end_block, "%}");
      return take_block_end("%}");
    }
    if (!sees("}}") && !sees("-}}")) return false;
    push(Token::Kind::end_print, "}}");
    if (sees("-")) {
      take(3);
      take_space();
    } else {
      take(2);
    }
    return true;
  }

  void read_name() {
    const size_t begin = at_;
    size_t end = at_;
    while (end < source_.size()) {
      const CodePoint c = code_point_at(source_, end);
      if (c.value != '_' && !is_alpha(c.value) && !is_numeric(c.value)) break;
      end += c.bytes;
    }
    push(Token::Kind::name, source_.substr(begin, end - begin));
    take(end - begin);
  }

  // Digits of `base` with single underscores between them, from `at`.
  size_t digits_end(size_t at, int base) const {
    size_t end = at;
    const auto is_digit_at = [&](size_t i) {
      if (i >= source_.size()) return false;
      const int digit = hex_of(source_[i]);
      return digit >= 0 && digit < base;
    };
    while (is_digit_at(end) ||
           (end < source_.size() && source_[end] == '_' && is_digit_at(end + 1)))
      ++end;
    return end;
  }

  void read_number() {
    if (source_[at_] == '0' && at_ + 1 < source_.size()) {
      const char letter = static_cast<char>(source_[at_ + 1] | 0x20);
      const int base = letter == 'b' ? 2 : letter == 'o' ? 8 : letter == 'x' ? 16 : 0;
      if (base != 0 && digits_end(at_ + 2, base) > at_ + 2)
        return push_whole(at_ + 2, digits_end(at_ + 2, base), base);
    }
    size_t end = digits_end(at_, 10);
    const size_t whole_end = end;
    // x.0.1 is two look-ups, not a float.
    const bool after_dot = at_ > 0 && source_[at_ - 1] == '.';
    if (!after_dot) {
      if (end + 1 < source_.size() && source_[end] == '.' && is_ascii_digit(source_[end + 1]))
        end = digits_end(end + 1, 10);
      if (end < source_.size() && (source_[end] | 0x20) == 'e') {
        size_t exponent = end + 1;
        if (exponent < source_.size() && (source_[exponent] == '+' || source_[exponent] == '-'))
          ++exponent;
        if (digits_end(exponent, 10) > exponent && is_ascii_digit(source_[exponent]))
          end = digits_end(exponent, 10);
      }
    }
    if (end == whole_end) {
      if (source_[at_] == '0' && end > at_ + 1 && source_.find_first_not_of("0_", at_) < end)
        fail("a whole number that begins with 0");
      return push_whole(at_, end, 10);
    }
    std::string digits = source_.substr(at_, end - at_);
    std::erase(digits, '_');
    double value = 0;
    const auto read = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    if (read.ec == std::errc::result_out_of_range) value = std::strtod(digits.c_str(), nullptr);
    push(Token::Kind::real, digits);
    tokens_.back().value = value;
    take(end - at_);
  }

  void push_whole(size_t begin, size_t end, int base) {
    Int value = 0;
    for (size_t i = begin; i < end; ++i) {
      if (source_[i] == '_') continue;
      if (__builtin_mul_overflow(value, Int{base}, &value) ||
          __builtin_add_overflow(value, Int{hex_of(source_[i])}, &value))
        fail("a whole number of more than 127 bits");
    }
    push(Token::Kind::whole, source_.substr(at_, end - at_));
    tokens_.back().value = value;
    take(end - at_);
  }

  void read_text() {
    const char quote = source_[at_];
    size_t end = at_ + 1;
    while (end < source_.size() && source_[end] != quote) end += source_[end] == '\\' ? 2 : 1;
    if (end >= source_.size()) fail("a text that is not closed");
    push(Token::Kind::text, unescape(std::string_view(source_).substr(at_ + 1, end - at_ - 1)));
    take(end + 1 - at_);
  }

  // Python's escapes. A pair of surrogates stays two lone ones there, which no output can hold.
  std::string unescape(std::string_view text) const {
    std::string out;
    for (size_t i = 0; i < text.size(); ++i) {
      if (text[i] != '\\' || i + 1 == text.size()) {
        out += text[i];
        continue;
      }
      const char c = text[++i];
      static constexpr std::string_view kLetters = "\\'\"abfnrtv",
                                        kMeanings = "\\'\"\a\b\f\n\r\t\v";
      const size_t letter = kLetters.find(c);
      if (letter != kLetters.npos) {
        out += kMeanings[letter];
      } else if (c == '\n') {
        // A line that goes on.
      } else if (c >= '0' && c <= '7') {
        uint32_t value = 0;
        size_t n = 0;
        for (; n < 3 && i + n < text.size() && text[i + n] >= '0' && text[i + n] <= '7'; ++n)
          value = value * 8 + static_cast<uint32_t>(text[i + n] - '0');
        append_utf8(out, value);
        i += n - 1;
      } else if (c == 'x' || c == 'u' || c == 'U') {
        const size_t digits = c == 'x' ? 2 : c == 'u' ? 4 : 8;
        uint32_t value = 0;
        for (size_t n = 1; n <= digits; ++n) {
          const int digit = i + n < text.size() ? hex_of(text[i + n]) : -1;
          if (digit < 0) fail(fmt::format("\\{} in a text wants {} hex digits", c, digits));
          value = value * 16 + static_cast<uint32_t>(digit);
        }
        if (value > 0x10FFFF) fail("an escape past the last code point");
        append_utf8(out, value);
        i += digits;
      } else if (c == 'N') {
        fail("\\N{…} in a text: write the character itself");
      } else {
        out += '\\';
        out += c;
      }
    }
    return out;
  }

  void read_operator(std::string& open) {
    const auto* op = std::find_if(std::begin(kOperators), std::end(kOperators),
                                  [&](std::string_view text) { return sees(text); });
    if (op == std::end(kOperators)) {
      const size_t bytes = code_point_at(source_, at_).bytes;
      fail(fmt::format("'{}' means nothing here", source_.substr(at_, bytes)));
    }
    const char c = op->front();
    if (op->size() == 1) {
      if (c == '(') open += ')';
      if (c == '[') open += ']';
      if (c == '{') open += '}';
      if (c == ')' || c == ']' || c == '}') {
        if (open.empty()) fail(fmt::format("a '{}' that nothing opened", c));
        if (open.back() != c) fail(fmt::format("'{}' where '{}' belongs", c, open.back()));
        open.pop_back();
      }
    }
    push(Token::Kind::op, std::string(*op));
    take(op->size());
  }

  const std::string& where_;
  std::string source_;
  size_t at_ = 0;
  int line_ = 1;
  bool line_starting_ = true;  // nothing but white space stands between the line's begin and here
  std::vector<Token> tokens_;
};

}  // namespace

std::vector<Token> tokenize(const std::string& where, std::string_view source) {
  return Lexer(where, source).run();
}

void fail_at(const std::string& where, int line, std::string what, std::string cure) {
  throw Error(ErrorKind::bad_input, {.where = fmt::format("{}: line {}", where, line),
                                     .what = std::move(what),
                                     .cure = std::move(cure)});
}

}  // namespace moru::jinja
