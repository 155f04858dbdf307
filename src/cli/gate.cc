// moru gate: a changed model against the one before it; refuses what lost too much.
#include "prove/gate.h"

#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <memory>

#include "base/files.h"
#include "base/hash.h"
#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/model_flags.h"

namespace moru {
namespace {

constexpr int kRefused = 1;                // the exit code
constexpr size_t kLongestSequence = 8192;  // a question with its answer

struct GateFlags {
  ModelFlags computing;  // its path is not used: there are two
  std::string before, after, base, kept, text;
  std::vector<std::string> questions;
  QuestionOptions rows;
  PromptStyle style;
  GateOptions options;
  double tolerance_points = 1;
  bool json = false;
};

void show_progress(const ProveProgress& p) {
  if (!::isatty(STDERR_FILENO)) return;
  fmt::print(stderr, "\r\033[K{}/{} asked, {} right", p.done, p.total, p.correct);
  if (p.done == p.total) fmt::print(stderr, "\r\033[K");
}

// Flags about quantized weights are for those of the models that have some; one of them must.
void refuse_idle_flags(const CLI::App& cmd, const GateFlags& flags) {
  if (flags.questions.empty())
    refuse_given(cmd, {"--prompt-column", "--answer-column", "--limit", "--system", "--max-tokens"},
                 "is about --questions, and none are given");
  const LoadOptions loading = flags.computing.load_options();
  if (loading.profile != Profile::exact && loading.activations != Activations::int8) return;
  for (const std::string& path : {flags.before, flags.base})
    if (!path.empty() && is_quantized(open_model(path))) return;
  refuse_unquantized(open_model(flags.after), loading.profile == Profile::exact
                                                  ? "--precision exact"
                                                  : "--activations int8");
}

// One model at a time is in memory.
GateMeasures measure(const GateFlags& flags, const GateOptions& options, Pool& pool,
                     const std::vector<QuestionSet>& questions, const std::string& path,
                     const char* word) {
  const ModelFiles files = open_model(path);
  LoadOptions loading = flags.computing.load_options();
  if (!is_quantized(files)) {
    if (loading.profile == Profile::exact) loading.profile.reset();
    loading.activations = Activations::int16;
  }
  if (loading.context == 0)
    loading.context = std::min<size_t>(files.config.context, kLongestSequence);
  const Model model = load_model(pool, files, loading);
  Engine engine(pool, model);
  std::filesystem::path kept = flags.kept;
  if (!kept.empty()) make_folder(kept /= word);
  return measure_for_gate(questions, files.path.filename().string(), sha256_of_path(files.path),
                          engine, files, flags.style, options, kept, show_progress);
}

void run_gate(const CLI::App& cmd, const GateFlags& flags) {
  GateOptions options = flags.options;
  options.tolerance = flags.tolerance_points / 100;
  options.text = flags.text;
  check(options);
  refuse_idle_flags(cmd, flags);
  if (!flags.kept.empty()) say_on_interrupt();
  std::vector<QuestionSet> questions;
  for (const std::string& path : flags.questions)
    questions.push_back(read_questions(path, flags.rows));
  Pool pool(flags.computing.pool_size());
  const GateMeasures before = measure(flags, options, pool, questions, flags.before, "before");
  const GateMeasures after = measure(flags, options, pool, questions, flags.after, "after");
  const ChainVerdict verdict =
      flags.base.empty() ? ChainVerdict{.last = judge_gate(before, after, questions, options)}
                         : judge_chain(measure(flags, options, pool, questions, flags.base, "base"),
                                       before, after, questions, options);
  if (flags.json)
    fmt::print("{}\n", (verdict.base ? to_json(verdict) : to_json(verdict.last)).dump(2));
  else
    fmt::print("{}", verdict.base ? table_of(verdict) : table_of(verdict.last));
  if (verdict.accepted()) return;
  fmt::print(stderr, "moru: {} is refused: {} (keep the model before it)\n", flags.after,
             fmt::join(verdict.reasons(), "; "));
  throw CLI::RuntimeError(kRefused);
}

}  // namespace

void add_gate(CLI::App& app) {
  auto flags = std::make_shared<GateFlags>();
  GateOptions& o = flags->options;
  CLI::App* cmd = app.add_subcommand("gate", "Refuse a tuned model that lost what it could before");
  cmd->add_option("before", flags->before, "the model that is served now")->required();
  cmd->add_option("after", flags->after, "the model that would take its place")->required();
  cmd->add_option("--base", flags->base,
                  "the model that tuning began with: it must hold against that too, since small "
                  "losses add up");
  flags->computing.add_computing_to(*cmd);
  cmd->add_option("-q,--questions", flags->questions, "files of questions; both are asked them");
  cmd->add_option("--prompt-column", flags->rows.prompt_column, "field or column that asks")
      ->capture_default_str();
  cmd->add_option("--answer-column", flags->rows.answer_column, "field or column that answers")
      ->capture_default_str();
  cmd->add_option("--limit", flags->rows.limit, "of each file a fixed random sample; 0: all");
  cmd->add_option("--template", flags->style.plain_template,
                  "\"{prompt}\\n{completion}\" instead of the chat template");
  cmd->add_option("--system", flags->style.system, "system message of every question");
  cmd->add_option("--max-tokens", o.limits.max_tokens, "longest answer to a question")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  cmd->add_option("--text", flags->text, "plain text to measure the loss on; default: built in");

  cmd->add_option("--tolerance", flags->tolerance_points, "points that a share may fall")
      ->capture_default_str();
  cmd->add_option("--standard-errors", o.standard_errors,
                  "or so many standard errors, if that is more")
      ->capture_default_str();
  cmd->add_option("--loss-tolerance", o.loss_tolerance, "nats per token that the loss may rise")
      ->capture_default_str();
  cmd->add_option("--length-factor", o.length_factor, "by which the mean length may change")
      ->capture_default_str();
  cmd->add_option("--kept", flags->kept, "folder for every answer; resumes from it");
  cmd->add_flag("--json", flags->json, "print JSON");
  cmd->callback([cmd, flags] { run_gate(*cmd, *flags); });
}

}  // namespace moru
