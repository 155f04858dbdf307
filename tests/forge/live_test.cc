#include "forge/live.h"

#include <fmt/format.h>
#include <pty.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/text.h"
#include "forge/terminal.h"
#include "support.h"

using namespace moru;

namespace {

// A view whose clock and output the test holds.
struct Screen {
  double time = 0;
  std::string text;

  LiveOptions options(bool terminal, size_t width = 80) {
    return {.terminal = terminal,
            .width = width,
            .clock = [this] { return time; },
            .write = [this](std::string_view part) { text += part; }};
  }
  std::string take() { return std::exchange(text, ""); }
};

// What stands on the screen after `text`, for the few sequences that Live writes.
std::vector<std::string> rendered(std::string_view text) {
  std::vector<std::string> lines(1);
  size_t row = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\n') {
      if (++row == lines.size()) lines.emplace_back();
    } else if (text[i] == '\r') {
      continue;  // only before a clear
    } else if (text[i] == '\x1b') {
      size_t end = i + 2;
      while (end < text.size() && (text[end] < '@' || text[end] > '~')) ++end;
      const std::string argument(text.substr(i + 2, end - i - 2));
      if (text[end] == 'A') row -= std::stoul(argument);
      if (text[end] == 'K') lines[row].clear();
      if (text[end] == 'J') {
        lines.resize(row + 1);
        lines[row].clear();
      }
      i = end;
    } else {
      lines[row] += text[i];
    }
  }
  return lines;
}

std::string trimmed(std::string text) {
  while (text.ends_with(' ')) text.pop_back();
  return text;
}

}  // namespace

TEST_CASE("on a terminal each stage has a line that is redrawn in place") {
  Screen screen;
  Live live({"measure", "tune"}, screen.options(true));
  live.begin("measure");
  screen.time = 10;
  live.update(0.25, "0.31 so far");
  std::vector<std::string> lines = rendered(screen.text);
  REQUIRE(lines.size() == 3);
  CHECK(lines[0].starts_with("▸ measure  █████░░░░░░░░░░░░░░░  25 %  0.31 so far"));
  CHECK(lines[0].ends_with("30 s left"));
  CHECK(trimmed(lines[1]) == "· tune");
  screen.time = 41;
  live.finish("0.305 (0.255–0.358)");
  live.begin("tune");
  lines = rendered(screen.text);
  REQUIRE(lines.size() == 3);
  CHECK(lines[0].starts_with("✓ measure  0.305 (0.255–0.358)"));
  CHECK(lines[0].ends_with("41 s"));
  CHECK(lines[1].starts_with("▸ tune     ░░░"));
}

TEST_CASE("no line passes the width, whatever it has to say") {
  for (const size_t width : {60u, 80u}) {
    Screen screen;
    Live live({"아주 긴 이름을 가진 단계입니다", "tune"}, screen.options(true, width));
    live.begin("tune");
    for (int i = 0; i < 10; ++i) {
      screen.time += 1000;
      live.update(0.001 * i, "손실 1.234, 토큰 12,345/s, " + std::string(200, 'x') + "\n\x1b[2J");
    }
    for (const std::string& line : rendered(screen.text)) CHECK(display_width(line) <= width);
  }
}

TEST_CASE("time left counts only what this run did") {
  Screen screen;
  Live live({"tune"}, screen.options(true));
  live.begin("tune", 0.5);
  screen.time = 10;
  live.update(0.6, "");  // a tenth in ten seconds: four tenths are left
  CHECK(rendered(screen.text)[0].ends_with("40 s left"));
}

TEST_CASE("a fast stage does not redraw more often than it is asked to") {
  Screen screen;
  Live live({"tune"}, screen.options(true));
  live.begin("tune");
  screen.take();
  for (int i = 0; i < 1000; ++i) {
    screen.time += 0.001;
    live.update(i * 0.001, "");
  }
  const std::string text = screen.take();
  CHECK(std::count(text.begin(), text.end(), '\n') <= 10);
}

TEST_CASE("elsewhere plain lines come at the ends of a stage and every ten seconds") {
  Screen screen;
  Live live({"measure", "tune"}, screen.options(false));
  live.begin("measure");
  for (int i = 1; i <= 25; ++i) {
    screen.time = i;
    live.update(i / 50.0, "0.31");
  }
  live.finish("0.305");
  live.begin("tune");
  live.finish("taken over", true);
  CHECK(screen.text ==
        "measure: begins\n"
        "measure: 20 %, 0.31, 40 s left\n"
        "measure: 40 %, 0.31, 30 s left\n"
        "measure: done in 25 s, 0.305\n"
        "tune: begins\n"
        "tune: done earlier, taken over\n");
}

TEST_CASE("a note stands above the stages") {
  Screen screen;
  Live live({"measure", "tune"}, screen.options(true));
  live.begin("measure");
  live.note("12 questions stand in the pairs too");
  const std::vector<std::string> lines = rendered(screen.text);
  REQUIRE(lines.size() == 4);
  CHECK(lines[0] == "12 questions stand in the pairs too");
  CHECK(lines[1].starts_with("▸ measure"));
}

TEST_CASE("odd numbers do no harm") {
  Screen screen;
  Live live({"tune"}, screen.options(true));
  live.begin("tune");
  for (const double done : {-1.0, 2.0, std::nan(""), 1e300}) {
    screen.time += 5;
    live.update(done, "loss nan");
  }
  CHECK(screen.text.find("-") == std::string::npos);
}

// A real terminal: what a process that ends in some way leaves behind.
namespace {

struct Ending {
  std::string text;
  int status = 0;
};

template <typename Child>
Ending on_a_terminal(Child&& child) {
  int master = -1;
  winsize size{.ws_row = 24, .ws_col = 100, .ws_xpixel = 0, .ws_ypixel = 0};
  const pid_t pid = ::forkpty(&master, nullptr, nullptr, &size);
  REQUIRE(pid >= 0);
  if (pid == 0) {
    ::setenv("TERM", "xterm", 1);
    ::unsetenv("NO_COLOR");
    child();
    ::_exit(0);
  }
  Ending ending;
  char buffer[4096];
  for (ssize_t n; (n = ::read(master, buffer, sizeof buffer)) > 0;)
    ending.text.append(buffer, static_cast<size_t>(n));
  ::waitpid(pid, &ending.status, 0);
  ::close(master);
  return ending;
}

bool cursor_is_back(const std::string& text) {
  const size_t hidden = text.rfind("\x1b[?25l"), shown = text.rfind("\x1b[?25h");
  return hidden != std::string::npos && shown != std::string::npos && shown > hidden;
}

volatile sig_atomic_t seen = 0;

}  // namespace

TEST_CASE("the cursor is back after the view, an exit, a signal and a handler of one's own") {
  const auto show = [] {
    Live live({"tune"}, live_options(1));
    live.begin("tune");
  };
  CHECK(cursor_is_back(on_a_terminal(show).text));

  const Ending exited = on_a_terminal([] {
    static Live* live = new Live({"tune"}, live_options(1));  // never destroyed
    live->begin("tune");
    std::exit(3);
  });
  CHECK(cursor_is_back(exited.text));
  CHECK(WEXITSTATUS(exited.status) == 3);

  for (const int number : {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGABRT}) {
    CAPTURE(number);
    const Ending killed = on_a_terminal([&] {
      ::signal(number, SIG_DFL);  // the test framework has handlers of its own
      Live live({"tune"}, live_options(1));
      live.begin("tune");
      ::raise(number);
    });
    CHECK(cursor_is_back(killed.text));
    CHECK(WIFSIGNALED(killed.status));
    CHECK(WTERMSIG(killed.status) == number);
  }

  const Ending handled = on_a_terminal([] {
    ::signal(SIGTERM, [](int) { seen = 1; });
    {
      Live live({"tune"}, live_options(1));
      ::raise(SIGTERM);
    }
    ::_exit(seen == 1 ? 7 : 8);
  });
  CHECK(cursor_is_back(handled.text));
  CHECK(WEXITSTATUS(handled.status) == 7);
}

TEST_CASE("a terminal is told from a pipe, and NO_COLOR is respected") {
  const Ending terminal = on_a_terminal([] {
    const LiveOptions plain = live_options(1);
    ::setenv("NO_COLOR", "1", 1);
    const LiveOptions no_colour = live_options(1);
    ::setenv("TERM", "dumb", 1);
    const bool right = plain.terminal && plain.colour && plain.width == 80 && no_colour.terminal &&
                       !no_colour.colour && !live_options(1).terminal;
    ::_exit(right ? 5 : 6);
  });
  CHECK(WEXITSTATUS(terminal.status) == 5);
  int ends[2];
  REQUIRE(::pipe(ends) == 0);
  CHECK(!is_terminal(ends[1]));
  CHECK(!wants_colour(ends[1]));
  CHECK(terminal_width(ends[1]) == 80);
  ::close(ends[0]);
  ::close(ends[1]);
}
