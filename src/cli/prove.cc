#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>

#include "base/clock.h"
#include "base/error.h"
#include "base/hash.h"
#include "cli/adapter_flags.h"
#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/model_flags.h"
#include "prove/divergence.h"
#include "prove/engine_answerer.h"

namespace moru {
namespace {

struct ProveFlags {
  ModelFlags model;
  CacheFlags cache;
  AdapterFlags adapter;
  std::string questions, results, compare_with;
  std::string check;
  QuestionOptions rows;
  PromptStyle style;
  AnswerLimits limits;
  std::string choice_score = "sum";
  double machine_usd_per_hour = 0.1;
  bool restart = false, json = false;

  std::string text, reference, reference_precision = "f32";
  size_t chunks = 20;
};

std::string percent(double share) { return fmt::format("{:.1f} %", 100 * share); }

// One line on a terminal, rewritten; nothing elsewhere.
void show_progress(const ProveProgress& p) {
  if (!::isatty(STDERR_FILENO)) return;
  const double left = p.seconds / static_cast<double>(std::max<size_t>(p.done, 1)) *
                      static_cast<double>(p.total - p.done);
  fmt::print(stderr, "\r\033[K{}/{} asked, {} right, {} left", p.done, p.total, p.correct,
             format_duration(left));
  if (p.done == p.total) fmt::print(stderr, "\r\033[K");
}

void print_comparison(const Comparison& c, const Results& mine, const std::string& other) {
  fmt::print("against {}: both right {}, only this {}, only that {}, both wrong {}\n", other,
             c.counts.both, c.counts.only_a, c.counts.only_b, c.counts.neither);
  const double difference =
      (static_cast<double>(c.counts.only_a) - static_cast<double>(c.counts.only_b)) /
      static_cast<double>(std::max<size_t>(c.counts.total(), 1));
  fmt::print("  difference {:+.1f} points ({:+.1f} to {:+.1f}), McNemar p = {:.4f}\n",
             100 * difference, 100 * c.difference.low, 100 * c.difference.high, c.p);
  for (const size_t i : c.newly_wrong) {
    fmt::print("  newly wrong: {}: {}\n", mine.items[i].id, mine.items[i].answer);
  }
}

void ask(const ProveFlags& flags, const ModelFiles& files, Engine& engine) {
  const QuestionSet questions = read_questions(flags.questions, flags.rows);
  // An adapter makes another model of the same file.
  std::string name = files.path.filename().string(), hash = sha256_of_path(files.path);
  if (const std::string& adapter = flags.adapter.folder; !adapter.empty()) {
    name += " with " + std::filesystem::path(adapter).filename().string();
    hash = sha256(hash + " " + sha256_of_path(adapter));
  }
  const Answerer answerer =
      make_answerer(std::move(name), std::move(hash), engine, files, flags.style);
  const Results results = prove(
      questions, answerer,
      {.limits = flags.limits,
       .choice_score = flags.choice_score == "mean" ? ChoiceScore::per_character : ChoiceScore::sum,
       .results = flags.results,
       .replace_other = flags.restart,
       .progress = show_progress});
  const Tally t = tally(results.items);
  if (flags.json) {
    fmt::print("{}\n",
               nlohmann::ordered_json{{"model", files.path.string()},
                                      {"model_sha256", answerer.model_sha256},
                                      {"questions_sha256", questions.file_sha256},
                                      {"correct", t.correct},
                                      {"total", t.total},
                                      {"accuracy", t.accuracy()},
                                      {"interval95", {t.interval.low, t.interval.high}},
                                      {"tokens_in", t.tokens_in},
                                      {"tokens_out", t.tokens_out},
                                      {"cut", t.cut},
                                      {"seconds", t.seconds},
                                      {"tokens_per_second", t.tokens_per_second()},
                                      {"usd_per_1000", t.usd_per_1000(flags.machine_usd_per_hour)}}
                   .dump(2));
  } else {
    fmt::print("{} of {} right: {} (95 %: {} to {})\n", t.correct, t.total, percent(t.accuracy()),
               percent(t.interval.low), percent(t.interval.high));
    fmt::print("{:.0f} tokens/s, {:.2f} answers/s, ${:.4f} for 1,000 answers at ${:.2f}/h\n",
               t.tokens_per_second(), t.answers_per_second(),
               t.usd_per_1000(flags.machine_usd_per_hour), flags.machine_usd_per_hour);
    if (t.cut > 0)
      fmt::print("{} answers reached --max-tokens {}\n", t.cut, flags.limits.max_tokens);
  }
  if (!flags.compare_with.empty())
    print_comparison(compare(results, read_results(flags.compare_with)), results,
                     flags.compare_with);
}

void diverge(const ProveFlags& flags, Pool& pool, const ModelFiles& files, Engine& engine) {
  const std::filesystem::path reference =
      flags.reference.empty() ? files.path : std::filesystem::path(flags.reference);
  const ModelFiles reference_files = open_model(reference);
  if (flags.reference_precision == "exact")
    refuse_unquantized(reference_files, "--reference-precision exact");
  ModelFlags reference_flags;
  reference_flags.precision = flags.reference_precision;
  LoadOptions options = reference_flags.load_options();
  options.context = engine.model().config.context;
  const Model model = load_model(pool, reference_files, options);
  Engine reference_engine(pool, model, {.cache_tokens = 1024, .kv_type = KvType::f32});
  const Divergence d =
      divergence(engine, reference_engine, files, flags.text, {.chunks = flags.chunks});
  if (flags.json) {
    fmt::print("{}\n", nlohmann::ordered_json{{"mean_kld", d.mean},
                                              {"mean_kld_error", d.mean_error},
                                              {"median_kld", d.median},
                                              {"p99_kld", d.p99},
                                              {"max_kld", d.max},
                                              {"same_top", d.same_top},
                                              {"perplexity", d.perplexity},
                                              {"reference_perplexity", d.reference_perplexity},
                                              {"positions", d.positions}}
                           .dump(2));
    return;
  }
  fmt::print("KLD mean {:.3e} ± {:.1e}, median {:.3e}, 99 % {:.3e}, max {:.3e}\n", d.mean,
             d.mean_error, d.median, d.p99, d.max);
  fmt::print("same top token {}, perplexity {:.4f} (reference {:.4f}), {} positions\n",
             percent(d.same_top), d.perplexity, d.reference_perplexity, d.positions);
}

void run_prove(const CLI::App& cmd, const ProveFlags& flags) {
  if (flags.questions.empty() == flags.text.empty())
    throw Error(ErrorKind::usage, {.where = "prove",
                                   .what = "wants either --questions or --text",
                                   .cure = "give the file of one of them"});
  if (flags.questions.empty())
    refuse_given(cmd,
                 {"--results", "--compare", "--prompt-column", "--answer-column", "--limit",
                  "--template", "--system", "--max-tokens", "--machine-price", "--restart"},
                 "is about --questions, and --text is measured");
  else
    refuse_given(cmd, {"--reference", "--reference-precision", "--chunks"},
                 "is about --text, and --questions are asked");
  if (flags.results.empty())
    refuse_given(cmd, {"--restart"}, "is about --results, which is not given");
  if (!flags.results.empty()) say_on_interrupt();
  const ModelFiles files = open_model(flags.model.path);
  Pool pool(flags.model.pool_size());
  LoadOptions options = flags.model.load_options();
  if (options.context == 0) options.context = std::min<size_t>(files.config.context, 8192);
  const Model model = load_model(pool, files, options);
  const std::optional<Adapter> adapter = flags.adapter.load(model.config);
  EngineOptions engine_options = flags.cache.engine_options();
  engine_options.adapter = adapter ? &*adapter : nullptr;
  Engine engine(pool, model, engine_options);
  if (!flags.text.empty()) return diverge(flags, pool, files, engine);
  ask(flags, files, engine);
}

}  // namespace

void add_prove(CLI::App& app) {
  auto flags = std::make_shared<ProveFlags>();
  CLI::App* cmd = app.add_subcommand("prove", "Ask a model your questions; or compare it by KLD");
  flags->model.add_to(*cmd);
  flags->cache.add_to(*cmd);
  flags->adapter.add_to(*cmd);
  cmd->add_option("-q,--questions", flags->questions, "JSONL, JSON or CSV of questions");
  cmd->add_option("--results", flags->results, "keep every answer here; resumes");
  cmd->add_option("--compare", flags->compare_with, "results of another model, to pair with");
  cmd->add_option("--prompt-column", flags->rows.prompt_column, "field or column that asks")
      ->capture_default_str();
  cmd->add_option("--answer-column", flags->rows.answer_column, "field or column that answers")
      ->capture_default_str();
  cmd->add_option("--limit", flags->rows.limit, "a fixed random sample of so many; 0: all");
  cmd->add_option("--template", flags->style.plain_template,
                  "\"{prompt}\\n{completion}\" instead of the chat template");
  cmd->add_option("--system", flags->style.system, "system message of every question");
  cmd->add_option("--max-tokens", flags->limits.max_tokens, "longest answer")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  cmd->add_option("--machine-price", flags->machine_usd_per_hour, "US dollars an hour")
      ->capture_default_str();
  cmd->add_flag("--restart", flags->restart, "replace results of another model or questions");
  cmd->add_option("--text", flags->text, "plain text: KLD against --reference on it");
  cmd->add_option("--reference", flags->reference, "another model; default: the same file in f32");
  cmd->add_option("--reference-precision", flags->reference_precision, "exact, bf16 or f32")
      ->check(CLI::IsMember({"auto", "exact", "bf16", "f32"}))
      ->capture_default_str();
  cmd->add_option("--chunks", flags->chunks, "chunks of 512 tokens of --text")
      ->check(CLI::Range(1, 100000))
      ->capture_default_str();
  cmd->add_flag("--json", flags->json, "print JSON");
  cmd->callback([cmd, flags] { run_prove(*cmd, *flags); });
}

}  // namespace moru
