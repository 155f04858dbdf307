// Runs the moru program as a person would, for tests of commands.
#pragma once
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

namespace moru {

struct Ended {
  int code = -1;       // of exit; 128 + signal if one ended it
  std::string output;  // stdout and stderr together
};

class Program {
 public:
  // MORU_PROGRAM, or another program that is found as a shell finds it, with these words.
  explicit Program(const std::vector<std::string>& words, const char* program = MORU_PROGRAM) {
    std::array<int, 2> ends{};
    if (::pipe2(ends.data(), O_CLOEXEC) != 0) std::abort();
    pid_ = ::fork();
    if (pid_ == 0) {
      ::dup2(ends[1], STDOUT_FILENO);
      ::dup2(ends[1], STDERR_FILENO);
      std::vector<char*> arguments;
      std::string name = program;
      arguments.push_back(name.data());
      std::vector<std::string> copies = words;
      for (std::string& word : copies) arguments.push_back(word.data());
      arguments.push_back(nullptr);
      ::execvp(program, arguments.data());
      ::_exit(127);
    }
    ::close(ends[1]);
    output_ = ends[0];
  }

  pid_t pid() const { return pid_; }
  void kill_now() { ::kill(pid_, SIGKILL); }
  void kill_after(std::chrono::milliseconds time, int signal = SIGKILL) {
    std::thread([pid = pid_, time, signal] {
      std::this_thread::sleep_for(time);
      ::kill(pid, signal);
    }).detach();
  }

  Ended wait() {
    Ended ended;
    std::array<char, 4096> buffer{};
    for (ssize_t n = 0; (n = ::read(output_, buffer.data(), buffer.size())) > 0;)
      ended.output.append(buffer.data(), static_cast<size_t>(n));
    ::close(output_);
    int status = 0;
    ::waitpid(pid_, &status, 0);
    ended.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    return ended;
  }

 private:
  pid_t pid_ = -1;
  int output_ = -1;
};

inline Ended run_program(const std::vector<std::string>& words) { return Program(words).wait(); }

}  // namespace moru
