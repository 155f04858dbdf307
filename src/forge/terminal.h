// What the terminal can show.
#pragma once
#include <cstddef>

namespace moru {

// Whether `fd` is a terminal that moves its cursor.
bool is_terminal(int fd);
// A terminal, and neither NO_COLOR (https://no-color.org) nor TERM=dumb asks for plain text.
bool wants_colour(int fd);
// Columns to write into: the terminal's, at least 60 and at most 80; 80 for a file or pipe.
size_t terminal_width(int fd);

}  // namespace moru
