// Ctrl-C in commands that keep what they have done.
#pragma once

namespace moru {

// From here on SIGINT and SIGTERM say that the same command goes on where it was, and end the
// process as they would have. Commands that end in order on a signal (tune) take it over meanwhile.
void say_on_interrupt();

}  // namespace moru
