#include "forge/live.h"

#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdlib>

#include "base/clock.h"
#include "base/error.h"
#include "base/text.h"
#include "forge/terminal.h"

namespace moru {
namespace {

constexpr std::string_view kHideCursor = "\x1b[?25l";
constexpr std::string_view kShowCursor = "\x1b[?25h";
constexpr std::string_view kClearLine = "\r\x1b[K";
constexpr size_t kBarColumns = 20;

void write_all(int fd, std::string_view text) {
  while (!text.empty()) {
    const ssize_t n = ::write(fd, text.data(), text.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return;  // nobody looks any more: not a reason to stop working
    text.remove_prefix(static_cast<size_t>(n));
  }
}

// ---- the cursor ----

// The terminal whose cursor is hidden; -1 where none is. Read by signal handlers.
volatile sig_atomic_t hidden_on = -1;
constexpr std::array<int, 5> kEnding = {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGABRT};
std::array<struct sigaction, kEnding.size()> previous;

void show_cursor() {
  const int fd = hidden_on;
  if (fd < 0) return;
  hidden_on = -1;
  const int saved = errno;
  // Only what is safe in a signal handler.
  [[maybe_unused]] const ssize_t ignored = ::write(fd, kShowCursor.data(), kShowCursor.size());
  errno = saved;
}

// Brings the cursor back, then does what would have been done without us.
void on_ending_signal(int number, siginfo_t* info, void* context) {
  show_cursor();
  for (size_t i = 0; i < kEnding.size(); ++i) {
    if (kEnding[i] != number) continue;
    const struct sigaction& before = previous[i];
    if ((before.sa_flags & SA_SIGINFO) != 0) {
      before.sa_sigaction(number, info, context);
    } else if (before.sa_handler == SIG_DFL) {
      ::sigaction(number, &before, nullptr);
      ::raise(number);
    } else if (before.sa_handler != SIG_IGN) {
      before.sa_handler(number);
    }
  }
}

void hide_cursor(int fd) {
  MORU_CHECK(hidden_on < 0);
  static const bool at_exit [[maybe_unused]] = std::atexit(show_cursor) == 0;
  hidden_on = fd;
  struct sigaction action {};
  action.sa_sigaction = on_ending_signal;
  action.sa_flags = SA_SIGINFO;
  sigemptyset(&action.sa_mask);
  for (size_t i = 0; i < kEnding.size(); ++i) ::sigaction(kEnding[i], &action, &previous[i]);
  write_all(fd, kHideCursor);
}

void restore_cursor() {
  show_cursor();
  for (size_t i = 0; i < kEnding.size(); ++i) {
    struct sigaction current {};
    ::sigaction(kEnding[i], nullptr, &current);
    // Whoever took the signal over since keeps it.
    if ((current.sa_flags & SA_SIGINFO) != 0 && current.sa_sigaction == on_ending_signal)
      ::sigaction(kEnding[i], &previous[i], nullptr);
  }
}

// ---- lines ----

std::string bar(double done) {
  const auto full = static_cast<size_t>(std::clamp(done, 0.0, 1.0) * kBarColumns);
  std::string text;
  for (size_t i = 0; i < kBarColumns; ++i) text += i < full ? "█" : "░";
  return text;
}

std::string one_line(std::string_view text) {
  std::string line;
  for (const CodePoint c : CodePoints(text))
    append_utf8(line, c.value < 0x20 || c.value == 0x7F ? U' ' : c.value);
  return line;
}

int percent(double done) { return static_cast<int>(std::clamp(done, 0.0, 1.0) * 100); }

}  // namespace

LiveOptions live_options(int fd) {
  return {.fd = fd,
          .terminal = is_terminal(fd),
          .colour = wants_colour(fd),
          .width = terminal_width(fd)};
}

Live::Live(std::vector<std::string> stages, LiveOptions options) : options_(std::move(options)) {
  MORU_CHECK(options_.width >= 60);
  if (!options_.clock) options_.clock = [watch = Stopwatch()] { return watch.seconds(); };
  for (std::string& name : stages) stages_.push_back({.name = one_line(name), .number = {}});
  current_ = stages_.size();
  if (options_.terminal && !options_.write) hide_cursor(options_.fd);
  if (options_.terminal) redraw();
}

Live::~Live() {
  if (options_.terminal && !options_.write) restore_cursor();
}

double Live::now() const { return options_.clock(); }

void Live::write(std::string_view text) const {
  if (options_.write)
    options_.write(text);
  else
    write_all(options_.fd, text);
}

void Live::begin(std::string_view stage, double done) {
  const auto found =
      std::find_if(stages_.begin(), stages_.end(), [&](const Stage& s) { return s.name == stage; });
  MORU_CHECK(found != stages_.end());
  current_ = static_cast<size_t>(found - stages_.begin());
  found->state = State::current;
  found->began = last_shown_ = now();
  found->done = found->first_done = std::clamp(done, 0.0, 1.0);
  if (options_.terminal)
    redraw();
  else
    write(plain_line_of(*found));
}

void Live::update(double done, std::string_view number) {
  MORU_CHECK(current_ < stages_.size());
  Stage& stage = stages_[current_];
  stage.done = std::isfinite(done) ? std::clamp(done, 0.0, 1.0) : 0;
  stage.number = one_line(number);
  const double every = options_.terminal ? options_.redraw_every_s : options_.plain_every_s;
  if (now() - last_shown_ < every) return;
  last_shown_ = now();
  if (options_.terminal)
    redraw();
  else
    write(plain_line_of(stage));
}

void Live::finish(std::string_view outcome, bool reused) {
  MORU_CHECK(current_ < stages_.size());
  Stage& stage = stages_[current_];
  stage.state = reused ? State::reused : State::finished;
  stage.took = now() - stage.began;
  stage.number = one_line(outcome);
  current_ = stages_.size();
  if (options_.terminal)
    redraw();
  else
    write(plain_line_of(stage));
}

void Live::note(std::string_view line) {
  std::string text;
  if (options_.terminal && drawn_ > 0) {
    // The note takes the place of the top line; what was drawn moves down.
    text = fmt::format("\x1b[{}A\r\x1b[J", drawn_);
    drawn_ = 0;
  }
  write(text + one_line(line) + "\n");
  if (options_.terminal) redraw();
}

// Empty until there is something to go by.
std::string Live::left_of(const Stage& stage) const {
  const double elapsed = now() - stage.began, gained = stage.done - stage.first_done;
  if (elapsed < 1 || gained <= 0) return "";
  return format_duration(elapsed / gained * (1 - stage.done));
}

std::string Live::line_of(const Stage& stage) const {
  size_t name_columns = 0;
  for (const Stage& s : stages_) name_columns = std::max(name_columns, display_width(s.name));
  name_columns = std::min<size_t>(name_columns, 20);
  const std::string name = pad_right(truncate_to_width(stage.name, name_columns), name_columns);
  std::string mark, middle, end;
  switch (stage.state) {
    case State::pending:
      return fmt::format("· {}", name);
    case State::current: {
      mark = "▸";
      middle = fmt::format("{} {:3} %  {}", bar(stage.done), percent(stage.done), stage.number);
      const std::string left = left_of(stage);
      if (!left.empty()) end = fmt::format("{} left", left);
      break;
    }
    case State::finished:
      mark = "✓";
      middle = stage.number;
      end = format_duration(stage.took);
      break;
    case State::reused:
      mark = "✓";
      middle = stage.number;
      end = "done earlier";
      break;
  }
  const size_t room = options_.width - 3 - name_columns - 2 - 2 - display_width(end);
  return fmt::format("{} {}  {}  {}", mark, name, pad_right(truncate_to_width(middle, room), room),
                     end);
}

std::string Live::plain_line_of(const Stage& stage) const {
  const std::string number = stage.number.empty() ? "" : fmt::format(", {}", stage.number);
  switch (stage.state) {
    case State::pending:
      return "";
    case State::current: {
      if (stage.done == stage.first_done && stage.number.empty())
        return fmt::format("{}: begins\n", stage.name);
      const std::string left = left_of(stage);
      return fmt::format("{}: {} %{}{}\n", stage.name, percent(stage.done), number,
                         left.empty() ? "" : fmt::format(", {} left", left));
    }
    case State::finished:
      return fmt::format("{}: done in {}{}\n", stage.name, format_duration(stage.took), number);
    case State::reused:
      return fmt::format("{}: done earlier{}\n", stage.name, number);
  }
  return "";
}

void Live::redraw() {
  std::string screen;
  if (drawn_ > 0) screen = fmt::format("\x1b[{}A", drawn_);
  for (const Stage& stage : stages_) {
    screen += kClearLine;
    const std::string line = line_of(stage);
    const char* colour = "";
    if (options_.colour) {
      if (stage.state == State::pending || stage.state == State::reused) colour = "\x1b[2m";
      if (stage.state == State::current) colour = "\x1b[1m";
    }
    screen += *colour == '\0' ? line : fmt::format("{}{}\x1b[0m", colour, line);
    screen += '\n';
  }
  drawn_ = stages_.size();
  write(screen);
}

}  // namespace moru
