#include "cli/interrupt.h"

#include <signal.h>
#include <unistd.h>

#include <string_view>

namespace moru {

void say_on_interrupt() {
  struct sigaction action = {};
  // Only what a handler may call. The signal comes again when the handler returns (it may have been
  // called by another), and ends the process.
  action.sa_handler = [](int signal) {
    constexpr std::string_view kSaid =
        "\nmoru: interrupted (run the same command again to go on where it was)\n";
    [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, kSaid.data(), kSaid.size());
    ::signal(signal, SIG_DFL);
    ::raise(signal);
  };
  for (const int signal : {SIGINT, SIGTERM}) ::sigaction(signal, &action, nullptr);
}

}  // namespace moru
