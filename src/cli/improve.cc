// moru improve: a model learns from its own checked answers, with a gate between every two steps.
#include "forge/improve.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <memory>

#include "cli/commands.h"
#include "cli/flag_rules.h"
#include "cli/interrupt.h"

namespace moru {
namespace {

constexpr int kRefused = 1;  // the exit code

struct ImproveFlags {
  ImproveOptions options;
  std::string model, out = "improved", filter = "all", target_modules = "all-linear";
  std::string loss_type = "sigmoid";
  std::vector<std::string> questions, evaluation, gate_questions, methods = {"sft"};
  double tolerance_points = 1;
  bool json = false;
};

ImproveOptions options_of(const ImproveFlags& flags) {
  ImproveOptions o = flags.options;
  o.model = flags.model;
  o.out = flags.out;
  o.pairs.questions.assign(flags.questions.begin(), flags.questions.end());
  o.pairs.evaluation.assign(flags.evaluation.begin(), flags.evaluation.end());
  o.gate_questions.assign(flags.gate_questions.begin(), flags.gate_questions.end());
  o.pairs.rules.filter = *rejected_filter_named(flags.filter);
  o.pairs.rows.system = o.pairs.style.system;
  o.gate.tolerance = flags.tolerance_points / 100;
  o.gate.limits = o.pairs.sampling.limits;
  o.tune.preference.loss = parse_preference_loss(flags.loss_type);
  o.tune.lora.targets = parse_target_modules(flags.target_modules);
  o.methods.clear();
  for (const std::string& name : flags.methods) o.methods.push_back(improve_method_named(name));
  return o;
}

void run_improve(const CLI::App& cmd, const ImproveFlags& flags) {
  const ImproveOptions options = options_of(flags);
  const auto learns = [&](const char* method) {
    return std::find(flags.methods.begin(), flags.methods.end(), method) != flags.methods.end();
  };
  if (!learns("dpo"))
    refuse_given(cmd, {"--dpo-lr", "--beta", "--rpo-alpha", "--loss-type"},
                 "is about dpo, which --method does not name");
  if (!learns("dpo"))
    refuse_given(cmd,
                 {"--rejected-filter", "--max-pairs-per-prompt", "--max-pairs-per-category",
                  "--max-length-ratio"},
                 "is about pairs, and dpo, which learns from them, is not in --method");
  if (!learns("sft")) refuse_given(cmd, {"--lr"}, "is about sft, which --method does not name");
  if (options.tune.max_steps != 0)
    refuse_given(cmd, {"--epochs"}, "counts passes over the data, and --max-steps steps");
  if (options.pairs.sampling.temperature == 0) refuse_given(cmd, {"--top-p"}, kWithoutSampling);
  say_on_interrupt();
  const ImproveReport report =
      improve(options, [](const std::string& line) { fmt::print(stderr, "{}\n", line); });
  if (flags.json)
    fmt::print("{}\n", to_json(report).dump(2));
  else
    fmt::print("{}", table_of(report));
  if (report.accepted == 0) {
    fmt::print(stderr,
               "moru: the gate refused every iteration (tune with a lower --lr or --dpo-lr or "
               "fewer --epochs)\n");
    throw CLI::RuntimeError(kRefused);
  }
  if (!flags.json) fmt::print("model   {}\n", report.model.string());
}

}  // namespace

void add_improve(CLI::App& app) {
  auto flags = std::make_shared<ImproveFlags>();
  ImproveOptions& o = flags->options;
  o.tune.epochs = 1;
  o.tune.preference.anchor = 1;
  o.pairs.sampling.limits.max_tokens = 128;
  CLI::App* cmd = app.add_subcommand(
      "improve", "Sample, make pairs, tune, gate, repeat: learn from own checked answers");
  cmd->add_option("model", flags->model, "GGUF file or Hugging Face folder")->required();
  cmd->add_option("-q,--questions", flags->questions, "prompts with known answers; several files")
      ->required();
  cmd->add_option("-o,--out", flags->out, "folder for everything; resumes from it")
      ->capture_default_str();
  cmd->add_option("--iterations", o.iterations, "times that it samples, tunes and asks the gate")
      ->check(CLI::Range(1, 100))
      ->capture_default_str();
  cmd->add_option(
         "--method", flags->methods,
         "how each iteration learns, the last one all after it: sft (right answers) or dpo "
         "(pairs)")
      ->delimiter(',')
      ->capture_default_str();
  cmd->add_option("--served-type", o.served_type, "type of the tuned models that answer")
      ->capture_default_str();

  cmd->add_option("--evaluation", flags->evaluation,
                  "files whose texts no pair may overlap with (13 words in a row)");
  cmd->add_option("--prompt-column", o.pairs.rows.prompt_column, "field or column that asks")
      ->capture_default_str();
  cmd->add_option("--answer-column", o.pairs.rows.answer_column, "field or column that answers")
      ->capture_default_str();
  cmd->add_option("--system", o.pairs.style.system, "system message of every question");
  cmd->add_option("-n,--answers", o.pairs.sampling.answers, "sampled for each prompt")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  cmd->add_option("--temperature", o.pairs.sampling.temperature,
                  "of the sampled answers; 0: all alike")
      ->capture_default_str();
  cmd->add_option("--top-p", o.pairs.sampling.top_p,
                  "sample from the likeliest set with this probability")
      ->capture_default_str();
  cmd->add_option("--max-tokens", o.pairs.sampling.limits.max_tokens, "longest answer")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  cmd->add_option("--stop", o.pairs.sampling.limits.stop,
                  "an answer ends before this text; may be given again")
      ->allow_extra_args(false);
  cmd->add_option("--seed", o.pairs.sampling.seed, "same seed, same answers")
      ->capture_default_str();
  cmd->add_option("--rejected-filter", flags->filter,
                  "wrong answers to keep: all, logp-below-mean or logp-above-mean")
      ->check(CLI::IsMember({"all", "logp-below-mean", "logp-above-mean"}))
      ->capture_default_str();
  cmd->add_option("--max-pairs-per-prompt", o.pairs.rules.max_per_prompt, "at most")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  cmd->add_option("--max-pairs-per-category", o.pairs.rules.max_per_category, "0: no quota");
  cmd->add_option("--max-length-ratio", o.pairs.rules.max_length_ratio,
                  "tokens of the longer answer to the shorter's")
      ->check(CLI::Range(1.0, 1e6))
      ->capture_default_str();
  cmd->add_option("--near-duplicate", o.pairs.prompts.near_duplicate,
                  "prompts this similar are one (Jaccard); above 1: only equal ones")
      ->check(CLI::Range(0.1, 2.0))
      ->capture_default_str();
  cmd->add_option("--validate-fraction", o.pairs.prompts.validate_fraction,
                  "share of the prompts that no pair is made of")
      ->check(CLI::Range(0.0, 0.9))
      ->capture_default_str();

  cmd->add_option("--lr,--learning-rate", o.tune.lr, "peak learning rate of sft")
      ->capture_default_str();
  cmd->add_option("--dpo-lr", o.dpo_lr, "peak learning rate of dpo")->capture_default_str();
  cmd->add_option("--beta,--pref-beta", o.tune.preference.beta, "dpo: strength of the reference")
      ->capture_default_str();
  cmd->add_option("--rpo-alpha,--cpo-alpha,--pref-ftx", o.tune.preference.anchor,
                  "dpo: weight of the chosen answers' own loss, which keeps them likely")
      ->capture_default_str();
  cmd->add_option("--loss-type", flags->loss_type,
                  "dpo: sigmoid, hinge, ipo, robust, sigmoid_norm, dpop, sppo_hard, apo_zero, "
                  "apo_down, simpo, orpo")
      ->capture_default_str();
  cmd->add_option("--epochs,--num-train-epochs", o.tune.epochs, "passes over what is learnt")
      ->capture_default_str();
  cmd->add_option("--max-steps", o.tune.max_steps, "instead of epochs");
  cmd->add_option("--batch-size", o.tune.batch_size, "examples a step")->capture_default_str();
  cmd->add_option("--lora-r,--lora-rank", o.tune.lora.rank, "rank")->capture_default_str();
  cmd->add_option("--lora-alpha", o.tune.lora.alpha, "alpha; the scale is alpha/r")
      ->capture_default_str();
  cmd->add_option("--target-modules,--lora-target", flags->target_modules,
                  "all-linear, or names: q_proj,v_proj")
      ->capture_default_str();

  cmd->add_option("--gate-questions", flags->gate_questions,
                  "files that the gate asks; default: the held-out questions");
  cmd->add_option("--tolerance", flags->tolerance_points, "points that a share may fall")
      ->capture_default_str();
  cmd->add_option("--standard-errors", o.gate.standard_errors,
                  "or so many standard errors, if that is more")
      ->capture_default_str();
  cmd->add_option("--loss-tolerance", o.gate.loss_tolerance,
                  "nats per token that the loss may rise")
      ->capture_default_str();
  cmd->add_option("--length-factor", o.gate.length_factor, "by which the mean length may change")
      ->capture_default_str();
  cmd->add_option("--threads", o.threads, "0: all that this process may use")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  cmd->add_flag("--json", flags->json, "print JSON");
  cmd->callback([cmd, flags] { run_improve(*cmd, *flags); });
}

}  // namespace moru
