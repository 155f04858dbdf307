// What a long command shows while it works: a line for each stage with a bar, the number that
// matters now, and how long is left.
//
// On a terminal the lines are redrawn in place. Elsewhere (a log, a pipe) a plain line is written
// when a stage begins and ends and every ten seconds in between.
#pragma once
#include <cstddef>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace moru {

struct LiveOptions {
  int fd = 2;
  bool terminal = false;  // redraw in place
  bool colour = false;
  size_t width = 80;  // ≥ 60
  double plain_every_s = 10, redraw_every_s = 0.1;
  // Seconds since some start, and where text goes; for tests. Empty: the clock, and `fd`.
  std::function<double()> clock = {};
  std::function<void(std::string_view)> write = {};
};
// As the terminal behind `fd` can show it; NO_COLOR is respected.
LiveOptions live_options(int fd = 2);

// One at a time in a process. While it lives on a terminal the cursor is hidden; it comes back with
// the destructor, at exit, and when a signal ends the process.
class Live {
 public:
  Live(std::vector<std::string> stages, LiveOptions options);
  ~Live();
  Live(const Live&) = delete;
  Live& operator=(const Live&) = delete;

  // The named stage begins; `done` is the share of it that an earlier run finished.
  void begin(std::string_view stage, double done = 0);
  // The current stage is `done` (0 to 1) finished; `number` says how it goes: "loss 1.234".
  void update(double done, std::string_view number);
  // The current stage is finished; `outcome` stays on its line.
  void finish(std::string_view outcome, bool reused = false);
  // A line above the stages: a warning or a remark.
  void note(std::string_view line);

 private:
  enum class State { pending, current, finished, reused };
  struct Stage {
    std::string name, number;
    State state = State::pending;
    double done = 0, first_done = 0, began = 0, took = 0;
  };

  double now() const;
  std::string left_of(const Stage& stage) const;
  std::string line_of(const Stage& stage) const;
  std::string plain_line_of(const Stage& stage) const;
  void redraw();
  void write(std::string_view text) const;

  std::vector<Stage> stages_;
  LiveOptions options_;
  size_t current_ = 0;
  size_t drawn_ = 0;  // lines on the screen that the next drawing replaces
  double last_shown_ = 0;
};

}  // namespace moru
