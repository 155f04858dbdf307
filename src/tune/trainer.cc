#include "tune/trainer.h"

#include <fmt/format.h>
#include <signal.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/clock.h"
#include "base/cpu.h"
#include "base/error.h"
#include "base/files.h"
#include "base/hash.h"
#include "tune/checkpoint.h"

namespace moru {
namespace {

using nlohmann::ordered_json;

// Steps with a loss that is no number before the run gives up.
constexpr uint64_t kMaxSkippedInARow = 10;

// Turns the first SIGINT or SIGTERM into a flag while it lives; a second one ends the process.
class StopSignals {
 public:
  StopSignals() {
    asked_ = 0;
    struct sigaction action {};
    action.sa_handler = [](int) { asked_ = 1; };
    action.sa_flags = static_cast<int>(SA_RESETHAND);
    ::sigaction(SIGINT, &action, &old_int_);
    ::sigaction(SIGTERM, &action, &old_term_);
  }
  ~StopSignals() {
    ::sigaction(SIGINT, &old_int_, nullptr);
    ::sigaction(SIGTERM, &old_term_, nullptr);
  }
  StopSignals(const StopSignals&) = delete;
  StopSignals& operator=(const StopSignals&) = delete;
  static bool asked() { return asked_ != 0; }

 private:
  static volatile sig_atomic_t asked_;
  struct sigaction old_int_ {
  }, old_term_{};
};
volatile sig_atomic_t StopSignals::asked_ = 0;

size_t resident_bytes() {
  std::ifstream in("/proc/self/statm");
  size_t whole = 0, resident = 0;
  in >> whole >> resident;
  return resident * 4096;
}

// What decides the bits of the result. Threads, memory and logging do not.
std::string fingerprint_of(const TuneOptions& o) {
  ordered_json j = {
      {"model", sha256_of_path(o.model)},
      {"data", sha256_of_path(o.data)},
      {"validation", o.validation.empty() ? "" : sha256_of_path(o.validation)},
      {"adapter", o.adapter.empty() ? "" : sha256_of_path(o.adapter)},
      {"template", o.rows.plain_template},
      {"system", o.rows.system},
      {"columns", {o.rows.prompt_column, o.rows.completion_column}},
      {"max_length", o.rows.max_length},
      {"truncation", static_cast<int>(o.rows.truncation)},
      {"last_turn_only", o.rows.last_turn_only},
      {"lora", {o.lora.rank, o.lora.alpha, o.lora.rank_stabilised}},
      {"targets", ordered_json::array()},
      {"adamw", {o.adamw.beta1, o.adamw.beta2, o.adamw.eps, o.adamw.weight_decay}},
      {"lr", {o.lr, name_of(o.schedule), o.min_lr_ratio, o.warmup_ratio, o.max_grad_norm}},
      {"steps", {o.epochs, o.max_steps, o.batch_size, o.batch_tokens, o.micro_batch_tokens}},
      {"validate", {o.val_fraction, o.eval_steps, o.patience}},
      {"seed", o.seed},
      {"precision", static_cast<int>(o.precision)}};
  for (const Projection target : o.lora.targets) j["targets"].push_back(traits(target).name);
  return sha256(j.dump());
}

void check(const TuneOptions& o) {
  const auto refuse = [](const char* where, const char* what) {
    throw Error(ErrorKind::usage, {.where = where, .what = what, .cure = "see moru tune --help"});
  };
  if (o.epochs == 0 && o.max_steps == 0) refuse("--epochs", "must be at least 1");
  if (o.batch_size == 0 && o.batch_tokens == 0) refuse("--batch-size", "must be at least 1");
  if (o.rows.max_length < 2) refuse("--max-length", "must be at least 2");
  if (!(o.lr > 0)) refuse("--lr", "must be above 0");
  if (!(o.val_fraction >= 0 && o.val_fraction < 1)) refuse("--val-fraction", "must be in [0, 1)");
  if (!(o.warmup_ratio >= 0 && o.warmup_ratio <= 1)) refuse("--warmup-ratio", "must be in [0, 1]");
  if (o.lora.rank == 0 || o.lora.rank > 1024) refuse("--lora-r", "must be in [1, 1024]");
  if (o.precision == Profile::exact) refuse("--precision", "training computes in bf16 or f32");
}

std::vector<size_t> lengths_of(std::span<const Example> examples, std::span<const uint32_t> which) {
  std::vector<size_t> lengths;
  for (const uint32_t i : which) lengths.push_back(examples[i].ids.size());
  return lengths;
}

// Examples of one step: [cursor, end) of the epoch's order.
size_t step_end(const TuneOptions& o, std::span<const Example> examples,
                std::span<const uint32_t> order, size_t cursor) {
  if (o.batch_tokens == 0) return std::min<size_t>(cursor + o.batch_size, order.size());
  size_t tokens = examples[order[cursor]].ids.size(), end = cursor + 1;
  while (end < order.size() && tokens + examples[order[end]].ids.size() <= o.batch_tokens)
    tokens += examples[order[end++]].ids.size();
  return end;
}

uint64_t count_steps(const TuneOptions& o, std::span<const Example> examples) {
  if (o.max_steps != 0) return o.max_steps;
  uint64_t steps = 0;
  for (uint64_t epoch = 0; epoch < o.epochs; ++epoch) {
    const std::vector<uint32_t> order = epoch_order(examples.size(), o.seed, epoch);
    for (size_t at = 0; at < order.size(); at = step_end(o, examples, order, at)) ++steps;
  }
  return steps;
}

// What one step computed, before the optimiser moves.
struct StepLoss {
  double loss = 0;
  uint64_t tokens = 0;
  uint64_t bad_line = 0;  // of the first row whose loss is no number
};

StepLoss accumulate_step(LoraTraining& training, std::span<const Example> examples,
                         std::span<const uint32_t> which, size_t capacity) {
  StepLoss out;
  uint64_t learnt = 0;
  for (const uint32_t i : which) learnt += examples[i].trained_tokens();
  const std::vector<size_t> lengths = lengths_of(examples, which);
  training.clear_gradients();
  double sum = 0;
  std::vector<float> nll;
  for (const std::vector<uint32_t>& members : pack(lengths, capacity)) {
    TrainingBatch batch;
    for (const uint32_t i : members)
      batch.append(examples[which[i]].ids, examples[which[i]].trained);
    nll.assign(batch.tokens(), 0);
    sum += training.accumulate(batch, 1 / static_cast<float>(learnt), nll);
    out.tokens += batch.tokens();
    for (size_t d = 0; d < members.size() && out.bad_line == 0; ++d)
      for (size_t i = batch.documents[d].first; i < batch.documents[d].end; ++i)
        if (!std::isfinite(nll[i])) out.bad_line = examples[which[members[d]]].line;
  }
  out.loss = sum / static_cast<double>(learnt);
  return out;
}

std::string megabytes(size_t bytes) { return fmt::format("{} MB", (bytes + 500'000) / 1'000'000); }

const char* name_of(Recompute level) {
  switch (level) {
    case Recompute::none:
      return "everything kept";
    case Recompute::light:
      return "norms and hidden rows remade";
    case Recompute::block:
      return "blocks remade";
  }
  return "";
}

// The lightest level that fits, or the one asked for.
MemoryPlan plan_memory(const TuneOptions& o, const Model& model, const Lora& lora, size_t tokens) {
  MemoryPlan plan;
  plan.weights = model.weight_bytes();
  // Moments, the best adapter, and what a checkpoint copies.
  plan.adapter = lora.values.size() * sizeof(float) * 5;
  const size_t now = resident_bytes(), limit = usable_memory_bytes();
  const auto fill = [&](Recompute level) {
    plan.recompute = level;
    plan.activations =
        LoraTraining::plan_bytes(model, lora, {.tokens = tokens, .recompute = level});
    plan.peak = std::max(peak_memory_bytes(), now + plan.adapter + plan.activations);
    return plan.peak < limit - limit / 10;
  };
  const bool fits =
      o.recompute ? fill(*o.recompute) : fill(Recompute::light) || fill(Recompute::block);
  if (!fits)
    throw Error(ErrorKind::no_space,
                {.where = "memory plan",
                 .what = fmt::format("training would take {} of {}", megabytes(plan.peak),
                                     megabytes(limit)),
                 .cure = "lower --micro-batch-tokens, --max-length or --lora-r"});
  return plan;
}

std::string describe(const Dataset& data) {
  const DataCounts& c = data.counts;
  std::string text =
      fmt::format("{} examples from {} rows, {} tokens, {} of them learnt ({:.0f} %)",
                  data.examples.size(), c.rows, data.tokens(), data.trained_tokens(),
                  100.0 * static_cast<double>(data.trained_tokens()) /
                      static_cast<double>(std::max<uint64_t>(1, data.tokens())));
  const auto note = [&](uint64_t count, const char* what) {
    if (count != 0) text += fmt::format("; {} {}", count, what);
  };
  note(c.truncated, "cut to the maximum length");
  note(c.without_answer, "dropped: nothing left to learn");
  note(c.bad, "dropped: not understood");
  note(c.split_by_turn, "conversations learnt turn by turn");
  for (size_t i = 0; i < std::min<size_t>(3, data.problems.size()); ++i)
    text += fmt::format("\n  line {}: {}{}{}", data.problems[i].line, data.problems[i].field,
                        data.problems[i].field.empty() ? "" : " ", data.problems[i].what);
  return text;
}

// Lines of the log up to `step`: what a killed run wrote after its last checkpoint is forgotten.
void rewind_log(const std::filesystem::path& path, uint64_t step) {
  if (!std::filesystem::exists(path)) return;
  std::ifstream in(path);
  std::string line, kept;
  while (std::getline(in, line)) {
    const ordered_json j = ordered_json::parse(line, nullptr, false);
    if (j.is_object() && j.value("step", uint64_t{0}) <= step) kept += line + "\n";
  }
  write_file(path, kept);
}

ordered_json number_or_null(std::optional<double> value) {
  return value && std::isfinite(*value) ? ordered_json(*value) : ordered_json();
}

ordered_json to_json(const TuneResult& r, const std::string& fingerprint) {
  return {{"adapter", r.adapter.filename().string()},
          {"steps", r.steps},
          {"best_step", r.best_step},
          {"skipped_steps", r.skipped_steps},
          {"examples", r.examples},
          {"validation_examples", r.validation_examples},
          {"tokens", r.tokens},
          {"trained_tokens", r.trained_tokens},
          {"train_loss", r.train_loss},
          {"val_loss_before", number_or_null(r.val_loss_before)},
          {"val_loss", number_or_null(r.val_loss)},
          {"seconds", r.seconds},
          {"tokens_per_second", r.tokens_per_second},
          {"peak_bytes", r.peak_bytes},
          {"rows",
           {{"read", r.counts.rows},
            {"truncated", r.counts.truncated},
            {"without_answer", r.counts.without_answer},
            {"bad", r.counts.bad}}},
          {"fingerprint", fingerprint}};
}

// The result of a finished run of the same fingerprint.
std::optional<TuneResult> finished_result(const TuneOptions& o, const std::string& fingerprint) {
  const std::filesystem::path path = o.out / "tune.json";
  if (!std::filesystem::exists(path)) return std::nullopt;
  const ordered_json j = ordered_json::parse(read_file(path), nullptr, false);
  if (!j.is_object() || j.value("fingerprint", "") != fingerprint) return std::nullopt;
  TuneResult r;
  const auto optional = [&](const char* key) -> std::optional<double> {
    return j.contains(key) && j[key].is_number() ? std::optional(j[key].get<double>())
                                                 : std::nullopt;
  };
  r.adapter = o.out / j.value("adapter", "adapter");
  r.steps = j.value("steps", uint64_t{0});
  r.best_step = j.value("best_step", uint64_t{0});
  r.skipped_steps = j.value("skipped_steps", uint64_t{0});
  r.examples = j.value("examples", uint64_t{0});
  r.validation_examples = j.value("validation_examples", uint64_t{0});
  r.tokens = j.value("tokens", uint64_t{0});
  r.trained_tokens = j.value("trained_tokens", uint64_t{0});
  r.train_loss = j.value("train_loss", 0.0);
  r.val_loss_before = optional("val_loss_before");
  r.val_loss = optional("val_loss");
  r.seconds = j.value("seconds", 0.0);
  r.tokens_per_second = j.value("tokens_per_second", 0.0);
  r.peak_bytes = j.value("peak_bytes", size_t{0});
  return r;
}

}  // namespace

double validation_loss(LoraTraining& training, std::span<const Example> examples, size_t capacity) {
  std::vector<uint32_t> all(examples.size());
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint32_t>(i);
  double sum = 0;
  uint64_t learnt = 0;
  for (const std::vector<uint32_t>& members : pack(lengths_of(examples, all), capacity)) {
    TrainingBatch batch;
    for (const uint32_t i : members) batch.append(examples[i].ids, examples[i].trained);
    sum += training.evaluate(batch);
    learnt += batch.trained();
  }
  return learnt == 0 ? 0 : sum / static_cast<double>(learnt);
}

TuneResult tune(const TuneOptions& o, const TuneProgress& progress) {
  check(o);
  const auto tell = [&](const TuneEvent& event) {
    if (progress) progress(event);
  };
  make_folder(o.out);
  const std::filesystem::path checkpoint = o.out / "checkpoint.safetensors";
  const std::filesystem::path log = o.out / "log.jsonl";
  const std::string fingerprint = fingerprint_of(o);
  if (o.restart) {
    for (const char* name : {"checkpoint.safetensors", "log.jsonl", "tune.json"})
      std::filesystem::remove(o.out / name);
  } else if (const auto done = finished_result(o, fingerprint)) {
    return *done;
  }

  // Rows and weights. The files are closed before the first step: their pages would count.
  Pool pool(o.threads == 0 ? usable_threads() : o.threads);
  TuneResult result;
  Split split;
  std::optional<Model> loaded;
  {
    const ModelFiles files = open_model(o.model);
    Dataset data = load_dataset(o.data, files, o.rows);
    tell({.kind = TuneEvent::Kind::data, .text = describe(data)});
    result.counts = data.counts;
    if (o.validation.empty()) {
      split = split_by_hash(std::move(data.examples), o.val_fraction);
    } else {
      split.train = std::move(data.examples);
      split.validation = load_dataset(o.validation, files, o.rows).examples;
    }
    loaded = load_model(pool, files, {.profile = o.precision, .context = o.rows.max_length});
  }
  Model& model = *loaded;
  const std::span<const Example> examples = split.train;
  size_t longest = 0;
  for (const auto* set : {&split.train, &split.validation})
    for (const Example& e : *set) longest = std::max(longest, e.ids.size());
  for (const Example& e : examples) {
    result.tokens += e.ids.size();
    result.trained_tokens += e.trained_tokens();
  }
  result.examples = examples.size();
  result.validation_examples = split.validation.size();

  Lora lora = o.adapter.empty() ? make_lora(model.config, o.lora, o.seed)
                                : read_peft_adapter(o.adapter, model.config);
  // A batch never needs more tokens than a step has.
  size_t step_tokens = 0;
  for (const Example& e : examples) step_tokens = std::max(step_tokens, e.ids.size());
  if (o.batch_tokens == 0) {
    std::vector<size_t> lengths;
    for (const Example& e : examples) lengths.push_back(e.ids.size());
    std::sort(lengths.rbegin(), lengths.rend());
    step_tokens = 0;
    for (size_t i = 0; i < std::min<size_t>(o.batch_size, lengths.size()); ++i)
      step_tokens += lengths[i];
  } else {
    step_tokens = std::max<size_t>(step_tokens, o.batch_tokens);
  }
  const size_t capacity = std::max(longest, std::min<size_t>(o.micro_batch_tokens, step_tokens));
  const MemoryPlan plan = plan_memory(o, model, lora, capacity);
  const uint64_t steps = count_steps(o, examples);
  tell({.kind = TuneEvent::Kind::plan,
        .steps = steps,
        .text = fmt::format("{} steps; {} adapter parameters; memory: weights {}, activations {} "
                            "({}), adapter {}: peak {}",
                            steps, lora.values.size(), megabytes(plan.weights),
                            megabytes(plan.activations), name_of(plan.recompute),
                            megabytes(plan.adapter), megabytes(plan.peak))});

  LoraTraining training(pool, model, lora, {.tokens = capacity, .recompute = plan.recompute});
  AdamW adamw(lora.values.size(), o.adamw);
  const ScheduleOptions schedule{
      .kind = o.schedule,
      .warmup = static_cast<uint64_t>(std::ceil(o.warmup_ratio * static_cast<double>(steps))),
      .total = steps,
      .min_ratio = o.min_lr_ratio};

  // Where the run stands.
  TrainingRun run;
  if (std::optional<TrainingRun> saved =
          read_checkpoint(checkpoint, fingerprint, lora.values.size())) {
    run = std::move(*saved);
    lora.values = run.values;
    adamw.m = run.m;
    adamw.v = run.v;
    adamw.steps = run.updates;
    training.refresh();
    rewind_log(log, run.step);
    tell({.kind = TuneEvent::Kind::resumed,
          .step = run.step,
          .steps = steps,
          .text = fmt::format("going on from step {} of {}", run.step, steps)});
  } else {
    std::filesystem::remove(log);
  }
  Stopwatch watch;
  const double seconds_before = run.seconds;
  const auto save = [&] {
    run.values = lora.values;
    run.m = adamw.m;
    run.v = adamw.v;
    run.updates = adamw.steps;
    run.seconds = seconds_before + watch.seconds();
    write_checkpoint(checkpoint, fingerprint, run);
  };
  const auto validate = [&] {
    if (split.validation.empty()) return;
    const double loss = validation_loss(training, split.validation, capacity);
    append_line(log, ordered_json{{"step", run.step}, {"val_loss", number_or_null(loss)}}.dump());
    if (run.step == 0) run.first_loss = loss;
    if (loss < run.best_loss) {
      run.best_loss = loss;
      run.best_step = run.step;
      run.best = lora.values;
      run.without_improvement = 0;
    } else {
      ++run.without_improvement;
    }
    tell({.kind = TuneEvent::Kind::validation,
          .step = run.step,
          .steps = steps,
          .loss = loss,
          .text = fmt::format("validation loss {:.4f}{}", loss,
                              run.best_step == run.step ? ", the best so far" : "")});
  };

  StopSignals signals;
  if (run.step == 0 && std::isnan(run.first_loss)) validate();
  std::vector<uint32_t> order = epoch_order(examples.size(), o.seed, run.epoch);
  double tokens_here = 0, seconds_here = 0;
  bool stopped_early = o.patience != 0 && run.without_improvement >= o.patience;
  while (run.step < steps && !stopped_early) {
    Stopwatch step_watch;
    const size_t end = step_end(o, examples, order, run.cursor);
    const std::span<const uint32_t> which =
        std::span<const uint32_t>(order).subspan(run.cursor, end - run.cursor);
    const StepLoss step = accumulate_step(training, examples, which, capacity);
    const double norm = global_norm(pool, training.gradients());
    const double lr = o.lr * schedule_factor(schedule, run.step);
    const bool finite = std::isfinite(step.loss) && std::isfinite(norm);
    if (finite) {
      adamw.step(pool, lora.values, training.gradients(), lr, clip_scale(norm, o.max_grad_norm));
      training.refresh();
      run.loss_sum += step.loss;
      ++run.loss_count;
      run.skipped_in_a_row = 0;
    } else {
      ++run.skipped;
      ++run.skipped_in_a_row;
    }
    ++run.step;
    run.tokens_done += step.tokens;
    run.cursor = end;
    const bool epoch_ends = end == order.size();
    const double epoch = static_cast<double>(run.epoch) +
                         static_cast<double>(end) / static_cast<double>(order.size());
    if (epoch_ends) {
      run.last_epoch_loss =
          run.loss_count == 0 ? 0 : run.loss_sum / static_cast<double>(run.loss_count);
      run.loss_sum = 0;
      run.loss_count = 0;
      run.cursor = 0;
      order = epoch_order(examples.size(), o.seed, ++run.epoch);
    }
    tokens_here += static_cast<double>(step.tokens);
    seconds_here += step_watch.seconds();
    const double rate = tokens_here / seconds_here;
    const double per_step = static_cast<double>(run.tokens_done) / static_cast<double>(run.step);
    TuneEvent event{.kind = TuneEvent::Kind::step,
                    .step = run.step,
                    .steps = steps,
                    .epoch = epoch,
                    .loss = step.loss,
                    .lr = lr,
                    .grad_norm = norm,
                    .tokens_per_second = rate,
                    .seconds_left = per_step * static_cast<double>(steps - run.step) / rate,
                    .text = {}};
    tell(event);
    append_line(log, ordered_json{{"step", run.step},
                                  {"epoch", epoch},
                                  {"loss", number_or_null(step.loss)},
                                  {"lr", lr},
                                  {"grad_norm", number_or_null(norm)},
                                  {"tokens", step.tokens},
                                  {"tokens_per_second", rate}}
                         .dump());
    if (!finite) {
      event.kind = TuneEvent::Kind::skipped;
      event.text = step.bad_line != 0
                       ? fmt::format("step {} skipped: the loss of the row at line {} is no number",
                                     run.step, step.bad_line)
                       : fmt::format("step {} skipped: its gradient is no number", run.step);
      tell(event);
      if (run.skipped_in_a_row >= kMaxSkippedInARow)
        throw Error(ErrorKind::bad_input,
                    {.where = o.data.string(),
                     .what = fmt::format("{} steps in a row gave no number", run.skipped_in_a_row),
                     .cure = "lower --lr, or look at the rows named above"});
    }

    const bool last = run.step == steps;
    const bool validates = last || (o.eval_steps == 0 ? epoch_ends : run.step % o.eval_steps == 0);
    if (validates) validate();
    if (o.patience != 0 && run.without_improvement >= o.patience) {
      stopped_early = true;
      tell({.kind = TuneEvent::Kind::stopped_early,
            .step = run.step,
            .steps = steps,
            .text = fmt::format("no better validation loss {} times in a row: stopping; the best "
                                "is of step {}",
                                run.without_improvement, run.best_step)});
    }
    const bool asked = StopSignals::asked();
    if (asked || last || stopped_early || validates ||
        (o.save_steps != 0 && run.step % o.save_steps == 0))
      save();
    if (asked && !last && !stopped_early)
      throw Error(
          ErrorKind::interrupted,
          {.where = o.out.string(),
           .what = fmt::format("stopped after step {} of {}; all is saved", run.step, steps),
           .cure = "give the same command to go on"});
  }

  // The best adapter, and the account of the run.
  if (!run.best.empty()) lora.values = run.best;
  result.adapter = o.out / "adapter";
  result.steps = run.step;
  result.best_step = run.best.empty() ? run.step : run.best_step;
  result.skipped_steps = run.skipped;
  result.train_loss = run.loss_count != 0 ? run.loss_sum / static_cast<double>(run.loss_count)
                                          : run.last_epoch_loss;
  if (!split.validation.empty()) {
    result.val_loss_before = run.first_loss;
    result.val_loss = run.best_loss;
  }
  result.seconds = seconds_before + watch.seconds();
  result.tokens_per_second = seconds_here > 0 ? tokens_here / seconds_here : 0;
  result.peak_bytes = peak_memory_bytes();
  write_peft_adapter(result.adapter, lora, o.model.string());
  write_file(o.out / "tune.json", to_json(result, fingerprint).dump(2) + "\n");
  std::filesystem::remove(checkpoint);
  return result;
}

}  // namespace moru
