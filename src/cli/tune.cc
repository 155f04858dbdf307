// moru tune: fine-tune a model on pairs.
#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/cpu.h"
#include "base/error.h"
#include "base/files.h"
#include "base/text.h"
#include "cli/flag_rules.h"
#include "forge/run_report.h"
#include "forge/terminal.h"
#include "tune/check.h"
#include "tune/presets.h"
#include "tune/trainer.h"

namespace moru {
namespace {

struct TuneFlags {
  TuneOptions options;
  std::vector<std::string> data;
  std::string dataset_info, normalize;
  std::string model, out = "tuned", validation, adapter;
  std::string loss_type, anchor_over = "completion";
  std::string target_modules = "all-linear", layers, schedule = "cosine", schedule_kwargs,
              precision = "bf16";
  std::string recompute = "auto", truncation = "keep_start", merge, merge_type = "bf16";
  std::optional<size_t> check;
  bool json = false;
};

// "\n" and "\t" as people type them in a shell.
std::string unescape(const std::string& text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    const char next = i + 1 < text.size() ? text[i + 1] : '\0';
    if (text[i] != '\\' || (next != 'n' && next != 't' && next != '\\')) {
      out += text[i];
      continue;
    }
    out += next == 'n' ? '\n' : next == 't' ? '\t' : '\\';
    ++i;
  }
  return out;
}

// "FILE", "FILE*0.5", or the name of a data set of --dataset-info.
std::vector<DataSource> sources_of(const TuneFlags& flags) {
  std::vector<DataSource> sources;
  bool names_set = flags.dataset_info.empty();
  for (const std::string& text : flags.data) {
    std::string name = text;
    double weight = 1;
    if (const size_t star = text.rfind('*');
        star != std::string::npos && !std::filesystem::exists(text)) {
      name = text.substr(0, star);
      const char* end = text.data() + text.size();
      const auto [stop, failed] = std::from_chars(text.data() + star + 1, end, weight);
      if (failed != std::errc{} || stop != end || !(weight > 0 && weight <= 1000))
        throw Error(ErrorKind::usage, {.where = text,
                                       .what = "has no weight above 0 after the *",
                                       .cure = "for example pairs.jsonl*0.5"});
    }
    if (std::filesystem::is_directory(name))
      throw Error(ErrorKind::usage,
                  {.where = name, .what = "is a folder", .cure = "name the files of rows in it"});
    if (flags.dataset_info.empty() || std::filesystem::exists(name)) {
      sources.push_back({.path = name, .weight = weight});
      continue;
    }
    names_set = true;
    for (DataSetInfo& set : read_dataset_info(flags.dataset_info, {name}))
      sources.push_back({.path = std::move(set.file),
                         .format = std::move(set.format),
                         .weight = weight,
                         .num_samples = set.num_samples});
  }
  if (!names_set)
    throw Error(ErrorKind::usage,
                {.where = "--dataset-info",
                 .what = "is about data sets that it names, and all data are files",
                 .cure = "leave it out, or name one of its data sets"});
  return sources;
}

TuneOptions options_of(const TuneFlags& flags) {
  TuneOptions o = flags.options;
  o.model = flags.model;
  o.data = sources_of(flags);
  o.out = flags.out;
  o.validation = flags.validation;
  o.adapter = flags.adapter;
  if (!flags.loss_type.empty()) o.preference.loss = parse_preference_loss(flags.loss_type);
  o.preference.anchor_over_prompt = flags.anchor_over == "all";
  o.rows.plain_template = unescape(o.rows.plain_template);
  o.rows.nfc = flags.normalize == "nfc";
  o.rows.truncation =
      flags.truncation == "keep_end" ? Truncation::keep_end : Truncation::keep_start;
  o.lora.targets = parse_target_modules(flags.target_modules);
  o.lora.layers = parse_layers(flags.layers);
  o.schedule.kind = parse_schedule(flags.schedule);
  if (!flags.schedule_kwargs.empty()) take_schedule_kwargs(flags.schedule_kwargs, o.schedule);
  o.precision = flags.precision == "f32" ? Profile::f32 : Profile::bf16;
  if (flags.recompute == "none") o.recompute = Recompute::none;
  if (flags.recompute == "light") o.recompute = Recompute::light;
  if (flags.recompute == "block") o.recompute = Recompute::block;
  return o;
}

// Flags that say how, where nothing asks what they are about: better refused than ignored.
void refuse_idle_flags(const CLI::App& cmd, const TuneFlags& flags, const TuneOptions& o) {
  const bool pairs = o.method == Method::dpo, kto = o.method == Method::kto;
  const PreferenceLoss loss = o.preference.loss;
  const bool orpo = pairs && loss == PreferenceLoss::orpo;
  const bool smooths =
      pairs && (loss == PreferenceLoss::sigmoid || loss == PreferenceLoss::robust ||
                loss == PreferenceLoss::sigmoid_norm || loss == PreferenceLoss::dpop ||
                loss == PreferenceLoss::simpo);
  struct Rule {
    bool idle;
    std::vector<const char*> flags;
    const char* wants;
  };
  const Rule rules[] = {
      {o.learnt.full,
       {"--lora-r", "--lora-alpha", "--use-rslora", "--use-dora", "--target-modules",
        "--layers-to-transform", "--loraplus-lr-ratio", "--modules-to-save", "--qlora", "--merge"},
       "is about adapters, and --full learns the weights themselves"},
      {!o.learnt.full, {"--freeze-layers"}, "is about --full; see --layers-to-transform"},
      {!flags.adapter.empty(),
       {"--lora-r", "--lora-alpha", "--use-rslora", "--use-dora", "--target-modules",
        "--layers-to-transform"},
       "is about a new adapter, and that of --adapter is what it is"},
      {o.schedule.kind != Schedule::cosine_with_min_lr,
       {"--min-lr-ratio"},
       "is about --lr-scheduler-type cosine_with_min_lr"},
      {o.method != Method::sft,
       {"--last-turn-only", "--train-on-prompt"},
       "is about --method sft: text has no prompts, and preferences are between last answers"},
      {o.method == Method::text,
       {"--template", "--system", "--truncation-mode"},
       "is about prompts and answers, and --method text learns all of a text as it is"},
      {o.method != Method::sft,
       {"--prompt-column", "--completion-column"},
       "is about --method sft; --dataset-info names the columns of pairs and labelled answers"},
      {o.rows.last_turn_only,
       {"--train-on-prompt"},
       "learns all of a conversation, and --last-turn-only its last answer"},
      {!pairs, {"--loss-type"}, "is about pairs: --method dpo, simpo or orpo"},
      {!pairs && !kto, {"--beta"}, "is about --method dpo, simpo, orpo or kto"},
      {!pairs, {"--rpo-alpha"}, "is about pairs: --method dpo, simpo or orpo"},
      {!smooths,
       {"--label-smoothing"},
       "is about --loss-type sigmoid, sigmoid_norm, robust, dpop or simpo"},
      {!pairs || (!orpo && o.preference.anchor == 0),
       {"--anchor-over"},
       "is about --method orpo, or pairs with --rpo-alpha"},
      {!pairs || loss != PreferenceLoss::simpo, {"--simpo-gamma"}, "is about --method simpo"},
      {!pairs || loss != PreferenceLoss::dpop, {"--dpop-lambda"}, "is about --loss-type dpop"},
      {o.batch_tokens != 0, {"--batch-size"}, "counts examples, and --batch-tokens their tokens"},
      {!o.validation.empty(),
       {"--val-fraction"},
       "is about rows set aside, and --validation is given"},
      {o.validation.empty() && o.val_fraction == 0,
       {"--eval-steps", "--patience"},
       "is about validation, and --val-fraction 0 leaves nothing to validate on"},
      {o.max_steps != 0, {"--epochs"}, "counts passes over the data, and --max-steps steps"},
      {flags.merge.empty(), {"--merge-type"}, "is about --merge"},
      {flags.check.has_value(),
       {"--json"},
       "is about what a run found, and --check learns nothing"},
      {!kto, {"--desirable-weight", "--undesirable-weight"}, "is about --method kto"},
  };
  for (const Rule& rule : rules)
    if (rule.idle) refuse_given(cmd, rule.flags, rule.wants);
}

// The first examples as the model will see them, and what may be wrong with the others.
void print_check(const TuneOptions& o, size_t count) {
  const ModelFiles files = open_model(o.model);
  Pool pool(o.threads == 0 ? usable_threads() : o.threads);
  LoadExamples request{.sources = o.data, .rows = o.rows, .max_bad = UINT64_MAX};
  request.deduplicate = o.deduplicate;
  request.seed = o.seed;
  request.spill = std::filesystem::temp_directory_path() / fmt::format("moru-check-{}", ::getpid());
  const CheckedExamples checked = load_checked(pool, files, o.method, request);
  const LoadedExamples& data = checked.data;
  remove_examples(request.spill);  // what is mapped stays readable
  const ShowOptions show{.colour = wants_colour(STDOUT_FILENO),
                         .width = terminal_width(STDOUT_FILENO)};
  for (size_t i = 0; i < std::min(count * checked.a_row(), data.examples.size()); ++i) {
    const ExampleView e = data.examples[i];
    std::string name = o.data[e.source].path.filename().string();
    if (const std::string_view answer = checked.answer(i); !answer.empty())
      name += fmt::format(" ({})", answer);
    fmt::print("{}\n", show_example(files, e, name, show));
  }
  fmt::print("{}", show_report(files, data, report_of(pool, files, data.examples), show.width));
}

// Tells where a run stands: on a terminal in one line, rewritten and never wider than it; elsewhere
// in a line a step. Of steps that are quicker than a person reads, only some are told: the log has
// all, and mpirun, which reads nothing for the two seconds that it takes to end a run, would leave
// this process waiting for room in the pipe instead of saving.
class Progress {
 public:
  void tell(const TuneEvent& event);
  void clear() const {  // the line that is rewritten
    if (live_) fmt::print(stderr, "\r\033[K");
  }

 private:
  static constexpr double kApart = 0.2;  // seconds
  const bool live_ = ::isatty(STDERR_FILENO) != 0;
  std::optional<Stopwatch> since_last_;
};

void Progress::tell(const TuneEvent& event) {
  const size_t width = terminal_width(STDERR_FILENO);
  if (event.kind == TuneEvent::Kind::step) {
    if (since_last_ && since_last_->seconds() < kApart && event.step != event.steps) return;
    since_last_.emplace();
    const std::string line =
        fmt::format("step {}/{}  loss {:.4f}  {:.0f} tokens/s  {} left  lr {:.1e}  norm {:.2f}",
                    event.step, event.steps, event.loss, event.tokens_per_second,
                    format_duration(event.seconds_left), event.lr, event.grad_norm);
    if (live_)
      fmt::print(stderr, "\r\033[K{}", truncate_to_width(line, width - 1));
    else
      fmt::print(stderr, "{}\n", line);
  } else {
    fmt::print(stderr, "{}",
               live_ ? "\r\033[K" + wrap_to_width(event.text, width, 2) : event.text + "\n");
  }
  std::fflush(stderr);
}

void write_report(const std::filesystem::path& folder) {
  // A finished run that is asked for again may have lost its log.
  if (std::filesystem::exists(folder / "log.jsonl"))
    write_file(folder / "report.html", run_report_html(folder));
}

void run_tune(const CLI::App& cmd, const TuneFlags& flags) {
  const TuneOptions o = options_of(flags);
  refuse_idle_flags(cmd, flags, o);
  check(o);
  if (flags.check) return print_check(o, *flags.check);
  const std::unique_ptr<Ranks> ranks = join_ranks();
  Progress progress;
  const auto print = [&](const TuneEvent& event) {
    progress.tell(event);
    // The page grows with every validation; whoever watches reloads it.
    if (event.kind == TuneEvent::Kind::validation) write_report(o.out);
  };
  TuneResult r;
  const int code = ranks->run([&] { r = tune(o, print, *ranks); }, tune_is_asked_to_stop);
  if (code != 0) throw CLI::RuntimeError(code);
  if (!ranks->leads()) return;
  progress.clear();
  write_report(o.out);

  std::string merged;
  if (!flags.merge.empty() && r.model.empty()) {
    const ModelFiles files = open_model(o.model);
    const Lora lora = read_peft_adapter(r.adapter, files.config);
    const DType type = *dtype_from_name(flags.merge_type);
    merged = (o.out / (flags.merge == "gguf" ? "model.gguf" : "model")).string();
    if (flags.merge == "gguf")
      write_merged_gguf(merged, files, lora, type);
    else
      write_merged_folder(merged, files, lora, type);
  }
  if (flags.json) {
    nlohmann::ordered_json j = nlohmann::ordered_json::parse(read_file(o.out / "tune.json"));
    if (!merged.empty()) j["merged"] = merged;
    fmt::print("{}\n", j.dump(2));
    return;
  }
  fmt::print("{} steps in {}, {:.0f} tokens/s, peak memory {} MB\n", r.steps,
             format_duration(r.seconds), r.tokens_per_second, r.peak_bytes / 1'000'000);
  if (r.skipped_steps != 0)
    fmt::print("{} of them skipped: their loss or gradient stood out\n", r.skipped_steps);
  if (r.val_loss)
    fmt::print("validation loss {:.4f} -> {:.4f} (step {})\n", r.val_loss_before.value_or(0),
               *r.val_loss, r.best_step);
  if (r.model.empty())
    fmt::print("adapter: {}\n", r.adapter.string());
  else
    fmt::print("model: {}\n", r.model.string());
  fmt::print("report: {}\n", (o.out / "report.html").string());
  if (!merged.empty()) fmt::print("merged model: {}\n", merged);
}

}  // namespace

void add_tune(CLI::App& app) {
  auto flags = std::make_shared<TuneFlags>();  // shared with the callback
  TuneOptions& o = flags->options;
  CLI::App* cmd = app.add_subcommand("tune", "Fine-tune a model on your data");
  cmd->footer(
      "In several processes, on one machine or more: mpirun --bind-to none -n 4 moru tune ...\n"
      "Their number changes speed, not results.");
  // First of all options: what they set, the others may set again.
  cmd->add_option_function<std::string>(
      "--preset", [&o](const std::string& name) { apply_preset(name, o); },
      "a recipe that the other flags change: lora, qlora, full, rhea-sft or rhea-dpo");
  cmd->add_option_function<std::string>(
      "--method", [&o](const std::string& name) { apply_method(name, o); },
      "what is learnt from: sft (answers, the default), text (raw text), dpo, simpo, orpo "
      "(pairs), kto (labelled answers)");
  cmd->add_option("model", flags->model, "GGUF file or Hugging Face folder")->required();
  cmd->add_option("data", flags->data,
                  "rows to learn: JSON Lines, JSON or CSV, also gzip; FILE*0.5 takes a half of "
                  "them, FILE*2 each twice")
      ->required();
  cmd->add_option("--dataset-info", flags->dataset_info,
                  "a LLaMA-Factory dataset_info.json: its data sets may be named as data")
      ->check(CLI::ExistingFile);
  cmd->add_option("-o,--out", flags->out, "folder for the adapter, log and checkpoint")
      ->capture_default_str();
  cmd->add_option("--validation", flags->validation, "rows to validate on, not learnt");
  cmd->add_option("--val-fraction", o.val_fraction, "share of the rows set aside to validate on")
      ->capture_default_str();
  cmd->add_option("--adapter", flags->adapter, "PEFT folder to go on from");

  cmd->add_option("--template", o.rows.plain_template,
                  "plain rendering instead of the chat template: \"{prompt}\\n{completion}\"");
  cmd->add_option("--system", o.rows.system, "system message for rows that have none");
  cmd->add_option("--prompt-column", o.rows.prompt_column, "field or column that asks");
  cmd->add_option("--completion-column", o.rows.completion_column, "field or column that answers");
  cmd->add_option("--max-length,--cutoff-len", o.rows.max_length, "tokens of a row at most")
      ->capture_default_str();
  cmd->add_option("--truncation-mode", flags->truncation, "which part of a long row stays")
      ->check(CLI::IsMember({"keep_start", "keep_end"}))
      ->capture_default_str();
  cmd->add_option("--max-bad", o.max_bad, "rows that may be unusable before the run is refused")
      ->capture_default_str();
  cmd->add_flag("--deduplicate", o.deduplicate, "learn equal examples once");
  cmd->add_option("--normalize", flags->normalize, "nfc: compose decomposed text (Korean as jamo)")
      ->check(CLI::IsMember({"nfc"}));
  cmd->add_flag("--last-turn-only", o.rows.last_turn_only, "learn only the last answer of a row");
  cmd->add_flag("--train-on-prompt", o.rows.train_on_prompt,
                "learn prompts too: all of a conversation, as the template renders it");

  cmd->add_option("--lora-r,--lora-rank", o.lora.rank, "rank")->capture_default_str();
  cmd->add_option("--lora-alpha", o.lora.alpha, "alpha; the scale is alpha/r")
      ->capture_default_str();
  cmd->add_flag("--use-rslora", o.lora.rank_stabilised, "scale alpha/sqrt(r)");
  cmd->add_flag("--use-dora", o.lora.dora,
                "DoRA: the length of each row of a weight is learnt beside its direction");
  cmd->add_option("--target-modules,--lora-target", flags->target_modules,
                  "all-linear, or names: q_proj,v_proj")
      ->capture_default_str();

  cmd->add_option("--layers-to-transform", flags->layers,
                  "layers that get an adapter, of all: 0-3,7");
  cmd->add_option("--loraplus-lr-ratio", o.learnt.lora_plus_ratio,
                  "LoRA+: learning rate of B over that of A");
  cmd->add_option(
         "--modules-to-save", o.learnt.modules_to_save,
         "weights learnt whole beside the adapter, and kept with it: embed_tokens, lm_head, norm")
      ->delimiter(',')
      ->allow_extra_args(false);
  cmd->add_flag("--full", o.learnt.full, "learn every weight instead of an adapter");
  cmd->add_option("--freeze-layers", o.learnt.frozen_layers,
                  "with --full: so many layers from below, and the embedding, stay as they are");
  cmd->add_flag("--qlora", o.keep_quantized, "keep a quantized model packed: less memory");

  cmd->add_option("--loss-type", flags->loss_type,
                  "of pairs: sigmoid, hinge, ipo, robust, sigmoid_norm, dpop, sppo_hard, apo_zero, "
                  "apo_down, simpo, orpo");
  cmd->add_option("--beta,--pref-beta", o.preference.beta, "strength of the reference")
      ->capture_default_str();
  cmd->add_option("--label-smoothing", o.preference.label_smoothing,
                  "share of pairs taken to be the wrong way round: cDPO, robust");
  cmd->add_option("--rpo-alpha,--cpo-alpha,--pref-ftx", o.preference.anchor,
                  "weight of the chosen answers' own loss; 1 keeps them likely");
  cmd->add_option(
         "--anchor-over", flags->anchor_over,
         "tokens that this loss counts: the completion (LLaMA-Factory's ORPO), or all, with "
         "the prompt (TRL's)")
      ->check(CLI::IsMember({"completion", "all"}))
      ->capture_default_str();
  cmd->add_option("--simpo-gamma", o.preference.gamma, "SimPO's margin");
  cmd->add_option("--dpop-lambda", o.preference.dpop_lambda, "DPOP's penalty");
  cmd->add_option("--desirable-weight", o.preference.desirable_weight, "KTO: of wanted answers");
  cmd->add_option("--undesirable-weight", o.preference.undesirable_weight,
                  "KTO: of unwanted answers");

  cmd->add_option("--neftune-noise-alpha", o.neftune_alpha,
                  "noise on the embeddings of what is learnt: 5 is usual");
  cmd->add_option("--lr,--learning-rate", o.lr, "peak learning rate")->capture_default_str();
  cmd->add_option("--lr-scheduler-type", flags->schedule, names_of_schedules())
      ->capture_default_str();
  cmd->add_option("--min-lr-ratio", o.schedule.min_ratio, "of cosine_with_min_lr")
      ->capture_default_str();
  cmd->add_option("--lr-scheduler-kwargs", flags->schedule_kwargs,
                  "options of others, as transformers names them: {\"num_decay_steps\": 20}");
  cmd->add_option("--warmup-ratio", o.warmup_ratio, "share of the steps")->capture_default_str();
  cmd->add_option("--weight-decay", o.adamw.weight_decay, "of AdamW")->capture_default_str();
  cmd->add_option("--max-grad-norm", o.max_grad_norm, "0: no clipping")->capture_default_str();
  cmd->add_option("--max-z-score", o.max_z_score,
                  "skip a step whose loss or gradient stands so far out; 0: never")
      ->capture_default_str();
  cmd->add_option("--epochs,--num-train-epochs", o.epochs, "passes over the data")
      ->capture_default_str();
  cmd->add_option("--max-steps", o.max_steps, "instead of epochs");
  cmd->add_option("--batch-size", o.batch_size, "examples a step")->capture_default_str();
  cmd->add_option("--batch-tokens", o.batch_tokens,
                  "a step takes examples up to this many tokens instead");
  cmd->add_option("--micro-batch-tokens", o.micro_batch_tokens,
                  "tokens computed at a time: memory and speed, and sums rounded in another order")
      ->capture_default_str();
  cmd->add_option("--eval-steps", o.eval_steps, "0: validate at the end of each epoch")
      ->capture_default_str();
  cmd->add_option("--patience", o.patience, "stop after so many validations without improvement")
      ->capture_default_str();
  cmd->add_option("--save-steps", o.save_steps, "steps between checkpoints; 0: none")
      ->capture_default_str();
  cmd->add_option("--seed", o.seed,
                  "of the order, the adapter's start and noise: same seed, same bits")
      ->capture_default_str();

  cmd->add_option("--precision", flags->precision, "bf16 or f32")
      ->check(CLI::IsMember({"bf16", "f32"}))
      ->capture_default_str();
  cmd->add_option("--recompute", flags->recompute, "what the backward pass computes anew")
      ->check(CLI::IsMember({"auto", "none", "light", "block"}))
      ->capture_default_str();
  cmd->add_option("--threads", o.threads, "0: all that this process may use")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  cmd->add_option("--memory", o.memory,
                  "most memory to take, as 4GiB: the run is refused if it needs more; 0: all that "
                  "this process may use")
      ->transform(memory_size());
  cmd->add_flag("--restart", o.restart, "forget the run that --out holds");
  cmd->add_option("--merge", flags->merge, "also write the merged model: gguf, or hf (a folder)")
      ->check(CLI::IsMember({"gguf", "hf"}));
  cmd->add_option("--merge-type", flags->merge_type, "numbers of the merged model")
      ->check(CLI::IsMember({"f32", "bf16", "f16"}))
      ->capture_default_str();
  cmd->add_option(
      "--check", flags->check,
      "print the first N rendered examples and what is odd about the rest, and learn nothing");
  cmd->add_flag("--json", flags->json, "print the result as JSON");
  cmd->callback([cmd, flags] { run_tune(*cmd, *flags); });
}

}  // namespace moru
