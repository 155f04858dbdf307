// Parses a template into a Program with Jinja2's grammar and the extensions that transformers adds:
// {% break %}, {% continue %} and {% generation %}.
#pragma once
#include <string>
#include <string_view>

#include "formats/jinja/syntax.h"

namespace moru::jinja {

// Errors: bad_input for what is no template, unsupported for what needs other files ({% include %},
// {% extends %} …); each names `where` and the line.
Program parse(std::string where, std::string_view source);

}  // namespace moru::jinja
