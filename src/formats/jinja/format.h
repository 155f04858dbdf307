// Python's two ways to put values into a text: "%s" % value and "{}".format(value).
#pragma once
#include <string>
#include <string_view>

#include "formats/jinja/value.h"

namespace moru::jinja {

class Interpreter;
struct CallArguments;

// format % arguments, where format is a text.
Value format_percent(Runtime& runtime, const Value& format, const Value& arguments);
// format.format(*arguments, **arguments).
Value format_braces(Interpreter& interpreter, const Text& format, const CallArguments& arguments);

}  // namespace moru::jinja
