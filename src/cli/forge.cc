#include "forge/forge.h"

#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <memory>
#include <optional>
#include <string>

#include "base/error.h"
#include "cli/commands.h"
#include "cli/interrupt.h"
#include "forge/terminal.h"

namespace moru {
namespace {

struct ForgeFlags {
  ForgeOptions options;
  std::string prompt_column, completion_column, answer_column;
  std::optional<double> at_least, keep;
};

void run_forge(ForgeFlags flags) {
  ForgeOptions& o = flags.options;
  o.goal.at_least = flags.at_least;
  o.goal.keep = flags.keep;
  if (flags.prompt_column.empty() != flags.completion_column.empty())
    throw Error(ErrorKind::usage, {.where = "--prompt-column",
                                   .what = "and --completion-column name the columns of one pair",
                                   .cure = "give both or neither"});
  o.tune.rows.prompt_column = flags.prompt_column;
  o.tune.rows.completion_column = flags.completion_column;
  const std::string& answer =
      flags.answer_column.empty() ? flags.completion_column : flags.answer_column;
  if (!flags.prompt_column.empty()) o.rows.prompt_column = flags.prompt_column;
  if (!answer.empty()) o.rows.answer_column = answer;
  say_on_interrupt();
  const ForgeReport report = forge(o);
  fmt::print("\n{}", report_table(report, {.colour = wants_colour(STDOUT_FILENO),
                                           .width = terminal_width(STDOUT_FILENO)}));
  fmt::print("report  {}\n", (o.out / "report.html").string());
  if (report.chosen() != nullptr)
    fmt::print("model   {}\nserve   moru serve {}\n", (o.out / "model.gguf").string(),
               o.out.string());
}

std::string command_line() {
  // As the kernel has it: the words that were really given.
  std::string line, word;
  FILE* file = std::fopen("/proc/self/cmdline", "rb");
  if (file == nullptr) return line;
  for (int c = std::fgetc(file); c != EOF; c = std::fgetc(file)) {
    if (c != '\0') {
      word += static_cast<char>(c);
      continue;
    }
    const bool plain =
        !word.empty() && word.find_first_of(" \t\n\"'\\{}$&;|<>()*?") == std::string::npos;
    line += (line.empty() ? "" : " ") + (plain ? word : "'" + word + "'");
    word.clear();
  }
  std::fclose(file);
  return line;
}

}  // namespace

void add_forge(CLI::App& app) {
  auto flags = std::make_shared<ForgeFlags>();
  ForgeOptions& o = flags->options;
  // Tuning for small models on small data: more steps than a large model wants.
  o.tune.lr = 1e-3;
  o.tune.epochs = 3;
  o.tune.patience = 1;
  o.limits.max_tokens = 64;
  CLI::App* cmd = app.add_subcommand(
      "forge", "Tune, lighten and prove a model; choose the cheapest good-enough one");
  cmd->add_option("--model", o.model, "GGUF file or Hugging Face folder")->required();
  cmd->add_option("--pairs", o.pairs, "what to learn: JSONL, JSON or CSV")->required();
  cmd->add_option("--questions", o.questions, "held-out questions with answers")->required();
  cmd->add_option("-o,--out", o.out, "folder of the result; run again to go on")->required();
  cmd->add_option("--at-least", flags->at_least, "good enough: lower end of the 95 % interval");
  cmd->add_option("--keep", flags->keep, "good enough: this share of the best candidate, paired");
  cmd->add_option("--size-ladder", o.ladder, "types to try, separated by commas")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->capture_default_str();
  CLI::Option* prices =
      cmd->add_option("--vendor-prices", o.vendor_prices, "list prices to show in the table");
  cmd->add_option("--vendors", o.vendors, "which of them, separated by commas")
      ->needs(prices)
      ->delimiter(',')
      ->allow_extra_args(false);
  cmd->add_option("--machine-price", o.machine_usd_per_hour, "US dollars an hour")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  cmd->add_option("--prompt-column", flags->prompt_column, "column of both files");
  cmd->add_option("--completion-column", flags->completion_column, "column of the pairs");
  cmd->add_option("--answer-column", flags->answer_column, "column of the questions");
  cmd->add_option("--template", o.style.plain_template,
                  "\"{prompt}\\n{completion}\" instead of the chat template");
  cmd->add_option("--system", o.style.system, "system message of every conversation");
  cmd->add_option("--max-tokens", o.limits.max_tokens, "longest answer")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  cmd->add_option("--lora-r", o.tune.lora.rank, "rank of the adapter")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  cmd->add_option("--lora-alpha", o.tune.lora.alpha, "scale of the adapter is alpha / r")
      ->capture_default_str();
  cmd->add_option("--lr", o.tune.lr, "peak learning rate")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  cmd->add_option("--epochs", o.tune.epochs, "passes over the pairs")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  cmd->add_option("--batch-size", o.tune.batch_size, "pairs a step")
      ->check(CLI::Range(1, 100000))
      ->capture_default_str();
  cmd->add_option("--max-length", o.tune.rows.max_length, "longest pair in tokens")
      ->check(CLI::Range(8, 1 << 20))
      ->capture_default_str();
  cmd->add_option("--val-fraction", o.tune.val_fraction, "share of the pairs to validate on")
      ->check(CLI::Range(0.0, 0.9))
      ->capture_default_str();
  cmd->add_option("--seed", o.tune.seed, "of tuning: same seed, same adapter")
      ->capture_default_str();
  cmd->add_option("--threads", o.threads, "0: all that this process may use")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  cmd->callback([flags] {
    flags->options.command = command_line();
    run_forge(*flags);
  });
}

}  // namespace moru
