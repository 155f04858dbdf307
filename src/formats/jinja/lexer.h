// Cuts a template into tokens as Jinja2's lexer does with trim_blocks and lstrip_blocks set: the
// newline after a block goes, and so does the white space before one on its line.
#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "formats/jinja/value.h"

namespace moru::jinja {

struct Token {
  enum class Kind {
    data,
    begin_print,
    end_print,
    begin_block,
    end_block,
    name,
    text,
    whole,
    real,
    op,
    end,
  };
  Kind kind;
  int line;
  std::string text;  // data, name, op: as written; text: unescaped
  Value value;       // whole, real
};

// The last token is Kind::end. Errors: bad_input, naming `where` and the line.
std::vector<Token> tokenize(const std::string& where, std::string_view source);

// Error bad_input at a line of the template.
[[noreturn]] void fail_at(const std::string& where, int line, std::string what,
                          std::string cure = {});

}  // namespace moru::jinja
