#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <new>

#include "base/error.h"
#include "cli/commands.h"

namespace {

// 80 columns, whatever the lengths of names.
constexpr size_t kHelpColumn = 30;

int fail(int code, const std::string& message) {
  fmt::print(stderr, "moru: {}\n", message);
  return code;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app(
      "moru: the cheapest language model that is good enough for your work, with proof.\n"
      "Lighten it, tune it on your pairs, prove it on your questions, serve it: on a CPU.");
  app.name("moru");
  app.set_version_flag("--version", std::string("moru ") + MORU_VERSION);
  app.require_subcommand(1);
  app.get_formatter()->column_width(kHelpColumn);
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
  try {
    app.parse(argc, argv);
    return 0;
  } catch (const CLI::RuntimeError& error) {
    return error.get_exit_code();  // a command that has said why
  } catch (const CLI::ParseError& error) {
    // Help and version are "errors" of code 0 to CLI11.
    return error.get_exit_code() == 0 ? app.exit(error)
                                      : fail(exit_code(moru::ErrorKind::usage),
                                             fmt::format("{} (see moru --help)", error.what()));
  } catch (const moru::Error& error) {
    return fail(exit_code(error.kind()), error.what());
  } catch (const std::bad_alloc&) {
    return fail(exit_code(moru::ErrorKind::no_space),
                "memory: there is not enough (close other programs or take a smaller model)");
  } catch (const std::exception& error) {
    return fail(70, fmt::format("internal error: {}", error.what()));
  }
}
