// JSON Schemas (drafts 7 to 2020-12) as programs over the bytes of JSON texts. docs/constraints.md
// lists the keywords; what would change which values are valid and cannot be held to is refused
// with its path, never left out.
//
// Every text of the program is valid by the schema, but not every valid text is of the program:
// properties come in the schema's order, there are none beyond it unless it asks for them, white
// space is bounded, and numbers have at most some digits.
#pragma once
#include <string_view>

#include "engine/grammar.h"

namespace moru {

// Errors: bad_input (no JSON, no schema), unsupported; `where`: "json_schema: /properties/x/not".
Program json_schema_program(std::string_view schema);
// Any JSON object.
Program json_object_program();

}  // namespace moru
