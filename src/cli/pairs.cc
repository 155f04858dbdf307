// moru pairs: preference pairs from a model's own answers.
#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <memory>

#include "base/clock.h"
#include "base/error.h"
#include "base/hash.h"
#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/model_flags.h"
#include "tune/pairs_job.h"

namespace moru {
namespace {

constexpr size_t kLongestSequence = 8192;  // a question with its answer

struct PairsFlags {
  ModelFlags model;
  PairsJob job;
  std::vector<std::string> questions, evaluation;
  std::string out = "pairs.jsonl", filter = "all", check;
  std::optional<double> max_margin;
  bool json = false;
};

// One line on a terminal, rewritten; nothing elsewhere.
void show_progress(const SampleProgress& p) {
  if (!::isatty(STDERR_FILENO)) return;
  const double left = p.seconds / static_cast<double>(std::max<size_t>(p.prompts, 1)) *
                      static_cast<double>(p.of - p.prompts);
  fmt::print(stderr, "\r\033[K{}/{} prompts, {:.0f} tokens/s, {} left", p.prompts, p.of,
             static_cast<double>(p.tokens) / std::max(p.seconds, 1e-9), format_duration(left));
  if (p.prompts == p.of) fmt::print(stderr, "\r\033[K");
}

PairsJob job_of(const PairsFlags& flags) {
  PairsJob job = flags.job;
  job.questions.assign(flags.questions.begin(), flags.questions.end());
  job.evaluation.assign(flags.evaluation.begin(), flags.evaluation.end());
  job.out = flags.out;
  job.rules.filter = *rejected_filter_named(flags.filter);
  job.rules.max_margin = flags.max_margin;
  job.rows.system = job.style.system;
  if (!flags.check.empty()) job.rows.check = check_named(flags.check);
  return job;
}

void run_pairs(const CLI::App& cmd, const PairsFlags& flags) {
  const PairsJob job = job_of(flags);
  if (job.sampling.temperature == 0) refuse_given(cmd, {"--top-p"}, kWithoutSampling);
  say_on_interrupt();  // every answer is kept
  const ModelFiles files = open_model(flags.model.path);
  Pool pool(flags.model.pool_size());
  LoadOptions options = flags.model.load_options();
  if (options.context == 0)
    options.context = std::min<size_t>(files.config.context, kLongestSequence);
  const Model model = load_model(pool, files, options);
  Engine engine(pool, model);
  const PairsSummary summary =
      write_pairs(job, engine, files, sha256_of_path(files.path), show_progress);
  if (flags.json) {
    fmt::print("{}\n", to_json(summary).dump(2));
    return;
  }
  fmt::print("{}", table_of(summary));
  fmt::print("{} pairs in {} ({})\n", summary.made.counts.pairs, summary.pairs.string(),
             format_duration(summary.seconds));
  if (!summary.validate.empty())
    fmt::print("{} questions to validate on: {}\n", summary.held_out, summary.validate.string());
}

}  // namespace

void add_pairs(CLI::App& app) {
  auto flags = std::make_shared<PairsFlags>();
  PairsJob& job = flags->job;
  CLI::App* cmd =
      app.add_subcommand("pairs", "Make preference pairs of a model's own right and wrong answers");
  flags->model.add_to(*cmd);
  cmd->add_option("-q,--questions", flags->questions, "prompts with known answers; several files")
      ->required();
  cmd->add_option("-o,--out", flags->out, "the pairs; answers and held-out questions go beside it")
      ->capture_default_str();
  cmd->add_option("--evaluation", flags->evaluation,
                  "files whose texts no pair may overlap with (13 words in a row)");
  cmd->add_option("--prompt-column", job.rows.prompt_column, "field or column that asks")
      ->capture_default_str();
  cmd->add_option("--answer-column", job.rows.answer_column, "field or column that answers")
      ->capture_default_str();
  cmd->add_option("--check", flags->check, "for rows that name none: " + names_of_checks())
      ->check([](const std::string& name) {
        return check_named(name) ? "" : "there is no check " + name;
      });
  cmd->add_option("--limit", job.rows.limit, "of each file a fixed random sample; 0: all");
  cmd->add_option("--template", job.style.plain_template,
                  "\"{prompt}\\n{completion}\" instead of the chat template");
  cmd->add_option("--system", job.style.system, "system message of every question");

  cmd->add_option("-n,--answers", job.sampling.answers, "sampled for each prompt")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  cmd->add_option("--temperature", job.sampling.temperature, "of the sampled answers; 0: all alike")
      ->capture_default_str();
  cmd->add_option("--top-p", job.sampling.top_p,
                  "sample from the likeliest set with this probability")
      ->capture_default_str();
  cmd->add_option("--seed", job.sampling.seed, "same seed, same answers")->capture_default_str();
  cmd->add_option("--max-tokens", job.sampling.limits.max_tokens, "longest answer")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  cmd->add_option("--stop", job.sampling.limits.stop,
                  "an answer ends before this text; may be given again")
      ->allow_extra_args(false);
  cmd->add_option("--sequences", job.sampling.sequences, "answers under way at once")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();

  cmd->add_option("--rejected-filter", flags->filter,
                  "wrong answers to keep: all, logp-below-mean or logp-above-mean")
      ->check(CLI::IsMember({"all", "logp-below-mean", "logp-above-mean"}))
      ->capture_default_str();
  cmd->add_option("--max-pairs-per-prompt", job.rules.max_per_prompt, "at most")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  cmd->add_option("--max-pairs-per-category", job.rules.max_per_category, "0: no quota");
  cmd->add_option("--max-length-ratio", job.rules.max_length_ratio,
                  "tokens of the longer answer to the shorter's")
      ->check(CLI::Range(1.0, 1e6))
      ->capture_default_str();
  cmd->add_option("--max-margin", flags->max_margin,
                  "leave out pairs already so far apart, nats of log p");
  cmd->add_option("--near-duplicate", job.prompts.near_duplicate,
                  "prompts this similar are one (Jaccard); above 1: only equal ones")
      ->check(CLI::Range(0.1, 2.0))
      ->capture_default_str();
  cmd->add_option("--validate-fraction", job.prompts.validate_fraction,
                  "share of the prompts that no pair is made of")
      ->check(CLI::Range(0.0, 0.9))
      ->capture_default_str();
  cmd->add_flag("--json", flags->json, "print JSON");
  cmd->callback([cmd, flags] { run_pairs(*cmd, *flags); });
}

}  // namespace moru
