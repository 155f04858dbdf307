#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <exception>
#include <new>
#include <string>
#include <vector>

#include "base/error.h"
#include "cli/commands.h"
#include "cli/flag_rules.h"

namespace {

int fail(int code, const std::string& message) {
  fmt::print(stderr, "moru: {}\n", message);
  return code;
}

// What the words ask for: `help`, `help run` and, first of all, a word that is no command.
std::vector<std::string> words_of(const CLI::App& app, int argc, char** argv) {
  std::vector<std::string> words(argv + 1, argv + argc);
  if (words.empty()) return words;
  if (words[0] == "help") {
    words.erase(words.begin());
    words.emplace_back("--help");
  }
  const std::string& first = words[0];
  const auto named = [&](const CLI::App* command) { return command->get_name() == first; };
  if (app.get_option_no_throw(first) == nullptr && app.get_subcommands(named).empty())
    throw moru::Error(moru::ErrorKind::usage,
                      {.where = first,
                       .what = first.starts_with('-') ? "is no flag" : "is no command",
                       .cure = "see moru --help"});
  return words;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app(
      "moru: the cheapest language model that is good enough for your work, with proof.\n"
      "Tuned on your pairs, lightened, proved on your questions, served: on a CPU.");
  app.name("moru");
  app.set_version_flag("--version", std::string("moru ") + MORU_VERSION);
  app.require_subcommand(1);
  app.formatter(moru::help_format());  // before the commands, which inherit it
  moru::add_forge(app);
  moru::add_run(app);
  moru::add_info(app);
  moru::add_bench(app);
  moru::add_lighten(app);
  moru::add_tune(app);
  moru::add_adapter(app);
  moru::add_pairs(app);
  moru::add_prove(app);
  moru::add_gate(app);
  moru::add_improve(app);
  moru::add_serve(app);
  moru::refuse_odd_values(app);
  try {
    std::vector<std::string> words = words_of(app, argc, argv);
    std::reverse(words.begin(), words.end());  // as CLI11 takes them
    app.parse(std::move(words));
    return 0;
  } catch (const CLI::RuntimeError& error) {
    return error.get_exit_code();  // a command that has said why
  } catch (const CLI::ParseError& error) {
    // Help and version are "errors" of code 0 to CLI11.
    if (error.get_exit_code() == 0) return app.exit(error);
    std::string command = "moru";
    for (const CLI::App* called : app.get_subcommands()) command += " " + called->get_name();
    return fail(exit_code(moru::ErrorKind::usage),
                fmt::format("{} (see {} --help)", moru::problem_of(error), command));
  } catch (const moru::Error& error) {
    return fail(exit_code(error.kind()), error.what());
  } catch (const std::bad_alloc&) {
    return fail(exit_code(moru::ErrorKind::no_space),
                "memory: there is not enough (close other programs or take a smaller model)");
  } catch (const std::exception& error) {
    return fail(70, fmt::format("internal error: {}", error.what()));
  }
}
