#include "tune/trainer.h"

#include <fmt/format.h>
#include <signal.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <mutex>
#include <nlohmann/json.hpp>
#include <thread>

#include "base/clock.h"
#include "base/cpu.h"
#include "base/error.h"
#include "base/files.h"
#include "base/hash.h"
#include "tune/checkpoint.h"
#include "tune/guard.h"
#include "tune/run_log.h"

namespace moru {
namespace {

using nlohmann::ordered_json;

// Outliers in a row after which they are the rule, and are learnt from again.
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

// In the folder of a rank's own files: hashes of what it reads.
constexpr const char* kHashes = "hashes.txt";

// Of the run's peak.
ScheduleOptions schedule_of(const TuneOptions& o) {
  ScheduleOptions schedule = o.schedule;
  schedule.lr = o.lr;
  return schedule;
}

// What decides the bits of the result. Threads, memory and logging do not.
std::string fingerprint_of(const TuneOptions& o, const std::filesystem::path& hashes) {
  ordered_json j = {
      {"model", remembered_sha256(o.model, hashes)},
      {"data", ordered_json::array()},
      {"validation", o.validation.empty() ? "" : remembered_sha256(o.validation, hashes)},
      {"adapter", o.adapter.empty() ? "" : sha256_of_path(o.adapter)},
      {"template", o.rows.plain_template},
      {"system", o.rows.system},
      {"columns", {o.rows.prompt_column, o.rows.completion_column}},
      {"max_length", o.rows.max_length},
      {"truncation", static_cast<int>(o.rows.truncation)},
      {"mask", {o.rows.last_turn_only, o.rows.train_on_prompt}},
      {"lora", {o.lora.rank, o.lora.alpha, o.lora.rank_stabilised, o.lora.dora}},
      {"targets", ordered_json::array()},
      {"adamw", {o.adamw.beta1, o.adamw.beta2, o.adamw.eps, o.adamw.weight_decay}},
      {"lr",
       {o.lr, name_of(o.schedule.kind), o.schedule.min_ratio, o.warmup_ratio, o.max_grad_norm}},
      {"steps", {o.epochs, o.max_steps, o.batch_size, o.batch_tokens, o.micro_batch_tokens}},
      {"validate", {o.val_fraction, o.eval_steps, o.patience}},
      {"seed", o.seed},
      {"precision", static_cast<int>(o.precision)},
      {"method", name_of(o.method)},
      {"preference",
       {name_of(o.preference.loss), o.preference.beta, o.preference.label_smoothing,
        o.preference.gamma, o.preference.dpop_lambda, o.preference.anchor,
        o.preference.anchor_over_prompt, o.preference.desirable_weight,
        o.preference.undesirable_weight}},
      {"learnt",
       {o.learnt.full, o.learnt.frozen_layers, o.learnt.modules_to_save, o.learnt.lora_plus_ratio}},
      {"layers", o.lora.layers},
      {"neftune", o.neftune_alpha},
      {"max_z_score", o.max_z_score}};
  // Beside those of the first schedules, so that checkpoints of before go on.
  if (const std::string own = schedule_kwargs(o.schedule); !own.empty()) j["schedule"] = own;
  for (const DataSource& s : o.data)
    j["data"].push_back(
        {remembered_sha256(s.path, hashes), to_json(s.format), s.weight, s.num_samples});
  j["rows"] = {o.rows.nfc, o.deduplicate};
  for (const Projection target : o.lora.targets) j["targets"].push_back(traits(target).name);
  return sha256(j.dump());
}

// Rows of one step: [cursor, end) of the epoch's order.
size_t step_end(const TuneOptions& o, const Objective& objective, const Permutation& order,
                size_t cursor) {
  if (o.batch_tokens == 0) return std::min<size_t>(cursor + o.batch_size, order.size());
  size_t tokens = objective.length(order[cursor]), end = cursor + 1;
  for (; end < order.size(); ++end) {
    tokens += objective.length(order[end]);
    if (tokens > o.batch_tokens) break;
  }
  return end;
}

uint64_t count_steps(const TuneOptions& o, const Objective& objective) {
  if (o.max_steps != 0) return o.max_steps;
  const size_t rows = objective.rows();
  if (o.batch_tokens == 0) return o.epochs * ((rows + o.batch_size - 1) / o.batch_size);
  uint64_t steps = 0;
  for (uint64_t epoch = 0; epoch < o.epochs; ++epoch) {
    const Permutation order = epoch_order(rows, o.seed, epoch);
    for (size_t at = 0; at < rows; at = step_end(o, objective, order, at)) ++steps;
  }
  return steps;
}

// Tokens of the largest step that there may be.
size_t largest_step(const TuneOptions& o, const Objective& objective) {
  return o.batch_tokens != 0 ? o.batch_tokens : objective.largest(o.batch_size);
}

// Tokens that are computed at a time: never more than a step has, never fewer than a row.
size_t batch_capacity(const TuneOptions& o, const Objective& objective) {
  return std::max(objective.longest(),
                  std::min<size_t>(o.micro_batch_tokens, largest_step(o, objective)));
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

// What one of the processes may take: what was allowed, or nine tenths of what there is.
size_t memory_limit(const TuneOptions& o, const Ranks& ranks) {
  const size_t limit = o.memory != 0 ? o.memory : usable_memory_bytes() / 10 * 9;
  return limit / ranks.on_this_machine();
}

[[noreturn]] void refuse_memory(const TuneOptions& o, size_t needed, size_t limit) {
  throw Error(
      ErrorKind::no_space,
      {.where = "memory plan",
       .what = fmt::format("training would take {}, and {} may be taken", megabytes(needed),
                           megabytes(limit)),
       .cure = o.learnt.full ? "learn an adapter instead (without --full), or allow more memory"
                             : "lower --micro-batch-tokens or --max-length, take a quantized model "
                               "with --qlora, or allow more memory"});
}

// The lightest level that fits, or the one asked for. Everything that a run takes after the plan
// stands here, so that the prediction is of the whole process.
MemoryPlan plan_memory(const TuneOptions& o, const Model& model, const Lora& lora,
                       const TrainingOptions& wanted, bool validates, size_t sum_bytes,
                       const Ranks& ranks) {
  MemoryPlan plan;
  plan.weights = model.weight_bytes();
  // Two moments, and the best values where they are chosen by validation.
  // And the sum of gradients over the batches of a step.
  plan.adapter = lora.values.size() * sizeof(float) * (validates ? 3 : 2) + sum_bytes;
  // Scratch memory of products and attention, what oneDNN generates, threads' stacks.
  constexpr size_t kKernels = 24 << 20;
  const size_t now = resident_bytes(), limit = memory_limit(o, ranks);
  const auto fill = [&](Recompute level) {
    plan.recompute = level;
    TrainingOptions options = wanted;
    options.recompute = level;
    plan.activations = LoraTraining::plan_bytes(model, lora, options);
    plan.peak = std::max(peak_memory_bytes(), now + plan.adapter + plan.activations + kKernels);
    return plan.peak <= limit;
  };
  const bool fits =
      o.recompute ? fill(*o.recompute) : fill(Recompute::light) || fill(Recompute::block);
  if (!fits) refuse_memory(o, plan.peak, limit);
  return plan;
}

std::string describe(const Objective& data) {
  const DataCounts& c = data.counts();
  const uint64_t tokens = data.tokens(), trained = data.trained_tokens();
  std::string text = fmt::format(
      "{} examples and {} to validate on from {} rows, {} tokens, {} of them learnt "
      "({:.0f} %)",
      data.rows(), data.validation_rows(), c.rows, tokens, trained,
      100.0 * static_cast<double>(trained) / static_cast<double>(std::max<uint64_t>(1, tokens)));
  const auto note = [&](uint64_t count, const char* what) {
    if (count != 0) text += fmt::format("; {} {}", count, what);
  };
  note(c.truncated, "cut to the maximum length");
  note(c.without_answer, "dropped: nothing left to learn");
  note(c.bad, "dropped: not understood");
  note(c.duplicates, "dropped: equal to an earlier one");
  note(c.split_by_turn, "conversations learnt turn by turn");
  for (size_t i = 0; i < std::min<size_t>(3, data.problems().size()); ++i) {
    const auto& [file, row] = data.problems()[i];
    text += fmt::format("\n  {}: line {}: {}{}{}", file.filename().string(), row.line, row.field,
                        row.field.empty() ? "" : " ", row.what);
  }
  return text;
}

// What load_examples may have left in the folder of a run.
void remove_all_examples(const std::filesystem::path& folder) {
  for (const char* name : {"examples", "validation"}) remove_examples(folder / name);
}

ordered_json number_or_null(std::optional<double> value) {
  return value && std::isfinite(*value) ? ordered_json(*value) : ordered_json();
}

ordered_json to_json(const TuneResult& r, const std::string& fingerprint) {
  return {{"adapter", r.adapter.filename().string()},
          {"model", r.model.filename().string()},
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
  const auto path_of = [&](const char* key) {
    const std::string name = j.value(key, "");
    return name.empty() ? std::filesystem::path() : o.out / name;
  };
  r.adapter = path_of("adapter");
  r.model = path_of("model");
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

// Where a rank puts files that only it reads.
std::filesystem::path files_of(const TuneOptions& o, const Ranks& ranks) {
  return ranks.leads() ? o.out : o.out / fmt::format("rank{}", ranks.rank());
}

// The ranks of a machine share its processors.
size_t threads_of(const Ranks& ranks) {
  if (ranks.on_this_machine() == 1) return usable_threads();
  const size_t whole = std::thread::hardware_concurrency();
  return std::max<size_t>(1, std::min(usable_threads(), whole / ranks.on_this_machine()));
}

// One run: what is loaded, where it stands, and the steps that move it on.
class Run {
 public:
  Run(const TuneOptions& options, std::string fingerprint, const TuneProgress& progress,
      Ranks& ranks)
      : o_(options),
        fingerprint_(std::move(fingerprint)),
        progress_(progress),
        ranks_(ranks),
        own_files_(files_of(options, ranks)),
        checkpoint_(options.out / "checkpoint.safetensors"),
        pool_(options.threads == 0 ? threads_of(ranks) : options.threads) {}

  TuneResult finish_from_here() {
    load();
    plan();
    resume();
    StopSignals signals;
    const std::unique_lock moving(still_);
    const Rescue rescue(*this);
    if (run_.step == 0 && std::isnan(run_.first_loss)) validate();
    stopped_early_ = o_.patience != 0 && run_.without_improvement >= o_.patience;
    while (run_.step < steps_ && !stopped_early_) step();
    return finish();
  }

 private:
  void tell(const TuneEvent& event) const {
    if (progress_ && ranks_.leads()) progress_(event);
  }

  // Rows and weights. The files are closed before the first step: their pages would count.
  void load() {
    const ModelFiles files = open_model(o_.model);
    ObjectiveOptions wanted;
    wanted.method = o_.method;
    wanted.data.sources = o_.data;
    wanted.data.rows = o_.rows;
    wanted.data.max_bad = o_.max_bad;
    wanted.data.deduplicate = o_.deduplicate;
    wanted.data.seed = o_.seed;
    wanted.data.spill = own_files_ / "examples";
    wanted.data.key = fingerprint_;
    wanted.validation = o_.validation;
    wanted.val_fraction = o_.val_fraction;
    wanted.preference = o_.preference;
    objective_ = make_objective(pool_, ranks_, wanted, files);
    if (objective_->rows() == 0)
      throw Error(ErrorKind::bad_input, {.where = o_.data[0].path.string(),
                                         .what = "no example is left to learn",
                                         .cure = "give more rows, or a larger share of them"});
    tell({.kind = TuneEvent::Kind::data, .text = describe(*objective_)});
    const bool packed = o_.keep_quantized;
    refuse_large(files, packed);
    // Positions are those of the longest row, which for a pair is shorter than its tokens.
    model_ = load_model(
        pool_, files,
        {.profile = packed ? Profile::exact : o_.precision, .context = o_.rows.max_length});
    lora_ = o_.learnt.full       ? Lora{}
            : o_.adapter.empty() ? make_lora(model_->config, o_.lora, o_.seed)
                                 : read_peft_adapter(o_.adapter, model_->config);
    lora_.layers.resize(model_->config.layers);
    if (o_.adapter.empty()) take_magnitudes(pool_, *model_, lora_);
    if (o_.learnt.full || !o_.learnt.modules_to_save.empty() || !lora_.whole.empty())
      add_whole(pool_, *model_, o_.learnt, type(), lora_);
  }

  // Weights that cannot even be loaded, of which the plan would come too late.
  void refuse_large(const ModelFiles& files, bool packed) const {
    size_t weights = 0;
    for (const Tensor& t : files.tensors)
      weights += packed ? t.data.size() : t.count() * (type() == DType::bf16 ? 2 : 4);
    const size_t limit = memory_limit(o_, ranks_);
    if (weights > limit) refuse_memory(o_, weights, limit);
  }

  DType type() const { return o_.precision == Profile::f32 ? DType::f32 : DType::bf16; }

  void plan() {
    capacity_ = batch_capacity(o_, *objective_);
    steps_ = count_steps(o_, *objective_);
    TrainingOptions options{.tokens = capacity_, .quantized_type = type()};
    const bool validates = objective_->validation_rows() != 0;
    const size_t sum_bytes =
        largest_step(o_, *objective_) > capacity_ ? ranks_.sum_bytes(lora_.values.size()) : 0;
    const MemoryPlan memory =
        plan_memory(o_, *model_, lora_, options, validates, sum_bytes, ranks_);
    options.recompute = memory.recompute;
    tell({.kind = TuneEvent::Kind::plan,
          .steps = steps_,
          .text = fmt::format("{} steps; {} parameters learnt; memory: weights {}, activations {} "
                              "({}), optimizer {}: peak {}",
                              steps_, lora_.values.size(), megabytes(memory.weights),
                              megabytes(memory.activations), name_of(memory.recompute),
                              megabytes(memory.adapter), megabytes(memory.peak))});
    training_.emplace(pool_, *model_, lora_, options);
    adamw_.emplace(lora_.values.size(), o_.adamw);
    groups_ = parameter_groups(lora_, o_.learnt);
    schedule_ = schedule_of(o_);
    schedule_.warmup =
        static_cast<uint64_t>(std::ceil(o_.warmup_ratio * static_cast<double>(steps_)));
    schedule_.total = steps_;
  }

  // Where the run stands. The reference is the model as it is before the first step.
  void resume() {
    const std::string key =
        fmt::format("{} {} {} {}", remembered_sha256(o_.model, own_files_ / kHashes),
                    o_.adapter.empty() ? std::string() : sha256_of_path(o_.adapter),
                    static_cast<int>(type()), o_.learnt.full);
    size_t told = 0;
    objective_->take_reference(*training_, capacity_, o_.out / "reference.safetensors", key,
                               [&](size_t done, size_t of) {
                                 // A line each tenth.
                                 if (done * 10 / of == told) return;
                                 told = done * 10 / of;
                                 tell({.kind = TuneEvent::Kind::reference,
                                       .text = fmt::format("reference: {} of {} rows", done, of)});
                               });
    std::optional<TrainingRun> saved;
    if (ranks_.leads()) saved = read_checkpoint(checkpoint_, fingerprint_, lora_.values.size());
    bool goes_on = saved.has_value();
    share_value(ranks_, goes_on);
    if (goes_on) {
      if (saved) run_ = std::move(*saved);
      share(ranks_, run_);
      swap_state();
      for (auto* stale : {&run_.values, &run_.m, &run_.v}) std::vector<float>().swap(*stale);
      training_->refresh();
      tell({.kind = TuneEvent::Kind::resumed,
            .step = run_.step,
            .steps = steps_,
            .text = fmt::format("going on from step {} of {}", run_.step, steps_)});
    }
    if (ranks_.leads()) log_.emplace(o_.out, run_.step);
    seconds_before_ = run_.seconds;
    watch_ = Stopwatch();
    order_ = epoch_order(objective_->rows(), o_.seed, run_.epoch);
  }

  // While it lives, this process can save on another thread where it is about to be killed.
  class Rescue {
   public:
    explicit Rescue(Run& run) : ranks_(run.ranks_) {
      if (ranks_.leads()) ranks_.set_rescue([&run] { return run.save_last_step(); });
    }
    ~Rescue() { ranks_.set_rescue({}); }
    Rescue(const Rescue&) = delete;
    Rescue& operator=(const Rescue&) = delete;

   private:
    Ranks& ranks_;
  };

  // Saves what the run was before the step that is being computed, and tells so; nothing if it is
  // moving, or being validated, now. After it has saved, nothing moves any more.
  std::string save_last_step() {
    if (!still_.try_lock()) return {};
    // Copies take memory and time, and there is little left of the latter.
    constexpr size_t kMaxFloats = size_t{64} << 20;
    if (lora_.values.size() > kMaxFloats) return still_.unlock(), std::string();
    TrainingRun run = run_;
    run.values = lora_.values;
    run.m = adamw_->m;
    run.v = adamw_->v;
    run.recent_losses = losses_.values;
    run.recent_norms = norms_.values;
    run.updates = adamw_->steps;
    run.seconds = seconds_before_ + watch_.seconds();
    write_checkpoint(checkpoint_, fingerprint_, run);
    return fmt::format(
        "{}: stopped after step {} of {}; all is saved (give the same command to go on)",
        o_.out.string(), run.step, steps_);
  }

  // Computes what changes nothing of the run, which may be saved meanwhile.
  template <typename Compute>
  StepLoss while_still(Compute&& compute) {
    struct Unlocked {
      std::mutex& mutex;
      explicit Unlocked(std::mutex& m) : mutex(m) { mutex.unlock(); }
      ~Unlocked() { mutex.lock(); }
    };
    const Unlocked unlocked(still_);
    return compute();
  }

  // Values and moments are the optimiser's while the run moves and run_'s while it is written or
  // has been read: exchanged, not copied, since they may be most of the memory.
  void swap_state() {
    run_.values.swap(lora_.values);
    run_.m.swap(adamw_->m);
    run_.v.swap(adamw_->v);
    run_.recent_losses.swap(losses_.values);
    run_.recent_norms.swap(norms_.values);
    std::swap(run_.updates, adamw_->steps);
  }

  void save() {
    if (!ranks_.leads()) return;
    run_.seconds = seconds_before_ + watch_.seconds();
    swap_state();
    write_checkpoint(checkpoint_, fingerprint_, run_);
    swap_state();
  }

  static void put(const std::vector<Metric>& metrics, const char* prefix, ordered_json& line) {
    for (const Metric& m : metrics) line[prefix + m.name] = number_or_null(m.value);
  }

  void validate() {
    if (objective_->validation_rows() == 0) return;
    const StepLoss found = objective_->validate(*training_, capacity_);
    ordered_json line = {{"step", run_.step}, {"val_loss", number_or_null(found.loss)}};
    put(found.metrics, "val_", line);
    if (log_) log_->write(line);
    if (!std::isfinite(found.loss))
      refuse_nan(found, fmt::format("validation loss after step {}", run_.step));
    if (run_.step == 0) run_.first_loss = found.loss;
    if (found.loss < run_.best_loss) {
      run_.best_loss = found.loss;
      run_.best_step = run_.step;
      if (ranks_.leads()) run_.best = lora_.values;
      run_.without_improvement = 0;
    } else {
      ++run_.without_improvement;
    }
    tell({.kind = TuneEvent::Kind::validation,
          .step = run_.step,
          .steps = steps_,
          .loss = found.loss,
          .metrics = found.metrics,
          .text = fmt::format("validation loss {:.4f}{}", found.loss,
                              run_.best_step == run_.step ? ", the best so far" : "")});
  }

  // A loss or gradient that is no number ends the run: going on would hide the row.
  void refuse_nan(const StepLoss& found, const std::string& what) const {
    throw Error(ErrorKind::bad_input,
                {.where = found.bad_row ? fmt::format("{}: line {}", found.bad_row->file.string(),
                                                      found.bad_row->line)
                                        : o_.data.front().path.string(),
                 .what = fmt::format("the {} is no number", what),
                 .cure = "look at the row, or lower --lr; what was saved before can be gone on "
                         "with"});
  }

  // Whether a step stands out so far from the last ones that it is left out.
  bool is_outlier(double loss, double norm) {
    if (o_.max_z_score == 0) return false;
    if (run_.skipped_in_a_row >= kMaxSkippedInARow) {  // no outliers any more
      losses_.values.clear();
      norms_.values.clear();
    }
    return std::max(losses_.z_score(loss), norms_.z_score(norm)) > o_.max_z_score;
  }

  void step() {
    Stopwatch step_watch;
    const size_t end = step_end(o_, *objective_, order_, run_.cursor);
    std::vector<uint32_t> rows;
    for (size_t i = run_.cursor; i < end; ++i) rows.push_back(static_cast<uint32_t>(order_[i]));
    training_->set_noise(
        {.alpha = static_cast<float>(o_.neftune_alpha), .seed = o_.seed, .step = run_.step});
    const StepLoss found =
        while_still([&] { return objective_->accumulate(*training_, rows, capacity_); });
    const double norm = global_norm(pool_, training_->gradients());
    const double lr = o_.lr * schedule_factor(schedule_, run_.step);
    if (!std::isfinite(found.loss) || !std::isfinite(norm))
      refuse_nan(found,
                 fmt::format("{} of step {}", std::isfinite(found.loss) ? "gradient" : "loss",
                             run_.step + 1));
    const bool skips = is_outlier(found.loss, norm);
    if (skips) {
      ++run_.skipped;
      ++run_.skipped_in_a_row;
    } else {
      adamw_->step(pool_, lora_.values, training_->gradients(), lr,
                   clip_scale(norm, o_.max_grad_norm), groups_);
      training_->refresh();
      losses_.add(found.loss);
      norms_.add(norm);
      run_.loss_sum += found.loss;
      ++run_.loss_count;
      run_.skipped_in_a_row = 0;
    }
    ++run_.step;
    run_.tokens_done += found.tokens;
    run_.cursor = end;
    const bool epoch_ends = end == order_.size();
    const double epoch = static_cast<double>(run_.epoch) +
                         static_cast<double>(end) / static_cast<double>(order_.size());
    if (epoch_ends) {
      run_.last_epoch_loss =
          run_.loss_count == 0 ? 0 : run_.loss_sum / static_cast<double>(run_.loss_count);
      run_.loss_sum = 0;
      run_.loss_count = 0;
      run_.cursor = 0;
      order_ = epoch_order(objective_->rows(), o_.seed, ++run_.epoch);
    }
    tokens_here_ += static_cast<double>(found.tokens);
    seconds_here_ += step_watch.seconds();
    report(found, norm, lr, epoch, skips);
    after_step(epoch_ends);
  }

  void report(const StepLoss& found, double norm, double lr, double epoch, bool skipped) {
    const double rate = tokens_here_ / seconds_here_;
    const double per_step = static_cast<double>(run_.tokens_done) / static_cast<double>(run_.step);
    TuneEvent event{.kind = TuneEvent::Kind::step,
                    .step = run_.step,
                    .steps = steps_,
                    .epoch = epoch,
                    .loss = found.loss,
                    .lr = lr,
                    .grad_norm = norm,
                    .metrics = found.metrics,
                    .tokens_per_second = rate,
                    .seconds_left = per_step * static_cast<double>(steps_ - run_.step) / rate,
                    .text = {}};
    tell(event);
    ordered_json line = {{"step", run_.step},
                         {"epoch", epoch},
                         {"loss", number_or_null(found.loss)},
                         {"lr", lr},
                         {"grad_norm", number_or_null(norm)},
                         {"tokens", found.tokens},
                         {"num_tokens", run_.tokens_done},
                         {"tokens_per_second", rate}};
    put(found.metrics, "", line);
    if (skipped) line["skipped"] = true;
    if (log_) log_->write(line);
    if (!skipped) return;
    event.kind = TuneEvent::Kind::skipped;
    event.text = fmt::format(
        "step {} skipped: its loss or gradient stands {} standard deviations "
        "above the last steps'",
        run_.step, o_.max_z_score);
    tell(event);
  }

  // Validates, saves and stops where it is due.
  void after_step(bool epoch_ends) {
    const bool last = run_.step == steps_;
    const bool validates =
        last || (o_.eval_steps == 0 ? epoch_ends : run_.step % o_.eval_steps == 0);
    if (validates) validate();
    if (o_.patience != 0 && run_.without_improvement >= o_.patience) {
      stopped_early_ = true;
      tell({.kind = TuneEvent::Kind::stopped_early,
            .step = run_.step,
            .steps = steps_,
            .text = fmt::format("no better validation loss {} times in a row: stopping; the best "
                                "is of step {}",
                                run_.without_improvement, run_.best_step)});
    }
    const bool asked = ranks_.any(StopSignals::asked());
    if (asked || last || stopped_early_ || validates ||
        (o_.save_steps != 0 && run_.step % o_.save_steps == 0))
      save();
    if (asked && !last && !stopped_early_) {
      ranks_.any(false);  // it is saved before anyone ends
      throw Error(
          ErrorKind::interrupted,
          {.where = o_.out.string(),
           .what = fmt::format("stopped after step {} of {}; all is saved", run_.step, steps_),
           .cure = "give the same command to go on"});
    }
  }

  // The best that was learnt, and the account of the run.
  TuneResult finish() {
    TuneResult r;
    r.counts = objective_->counts();
    r.tokens = objective_->tokens();
    r.trained_tokens = objective_->trained_tokens();
    r.examples = objective_->rows();
    r.validation_examples = objective_->validation_rows();
    r.steps = run_.step;
    r.best_step = run_.best.empty() ? run_.step : run_.best_step;
    r.skipped_steps = run_.skipped;
    r.train_loss = run_.loss_count != 0 ? run_.loss_sum / static_cast<double>(run_.loss_count)
                                        : run_.last_epoch_loss;
    if (objective_->validation_rows() != 0) {
      r.val_loss_before = run_.first_loss;
      r.val_loss = run_.best_loss;
    }
    r.seconds = seconds_before_ + watch_.seconds();
    r.tokens_per_second = seconds_here_ > 0 ? tokens_here_ / seconds_here_ : 0;
    r.peak_bytes = peak_memory_bytes();
    remove_all_examples(own_files_);
    std::filesystem::remove(own_files_ / kHashes);
    if (!ranks_.leads()) {
      std::error_code ignored;  // another rank's files, or none of this machine
      std::filesystem::remove(own_files_, ignored);
      return r;
    }
    if (!run_.best.empty()) lora_.values.swap(run_.best);
    // Writing a whole model takes memory of its own, which the plan does not count.
    training_.reset();
    adamw_.reset();
    if (!o_.learnt.full) {
      r.adapter = o_.out / "adapter";
      write_peft_adapter(r.adapter, lora_, model_->config, o_.model.string());
    } else {
      const ModelFiles files = open_model(o_.model);
      r.model = o_.out / (files.folder ? "model" : "model.gguf");
      if (files.folder)
        write_merged_folder(r.model, files, lora_, type());
      else
        write_merged_gguf(r.model, files, lora_, type());
    }
    write_file(o_.out / "tune.json", to_json(r, fingerprint_).dump(2) + "\n");
    std::filesystem::remove(checkpoint_);
    return r;
  }

  const TuneOptions& o_;
  const std::string fingerprint_;
  const TuneProgress& progress_;
  Ranks& ranks_;
  const std::filesystem::path own_files_;  // examples that memory should not hold
  const std::filesystem::path checkpoint_;
  Pool pool_;
  std::unique_ptr<Objective> objective_;
  std::optional<Model> model_;
  Lora lora_;
  size_t capacity_ = 0;
  uint64_t steps_ = 0;
  std::optional<LoraTraining> training_;
  std::optional<AdamW> adamw_;
  std::vector<ParameterGroup> groups_;
  ScheduleOptions schedule_;
  std::optional<RunLog> log_;

  // Held while the run moves from one step's state to the next's: but while gradients are computed.
  std::mutex still_;
  TrainingRun run_;
  OutlierGuard losses_, norms_;
  Permutation order_;  // of the epoch
  Stopwatch watch_;
  double seconds_before_ = 0, tokens_here_ = 0, seconds_here_ = 0;
  bool stopped_early_ = false;
};

// Ranks that read something else than rank 0 would train something else.
void check_same(Ranks& ranks, const std::string& fingerprint) {
  std::string of_first = fingerprint;
  share_list(ranks, of_first);
  for (size_t rank = 1; rank < ranks.size(); ++rank) {
    bool differs = of_first != fingerprint;
    share_value(ranks, differs, rank);
    if (differs)
      throw Error(ErrorKind::usage,
                  {.where = fmt::format("rank {}", rank),
                   .what = "reads another model or other data than rank 0, or has other options",
                   .cure = "give all machines the same files"});
  }
}

}  // namespace

void check(const TuneOptions& o) {
  const auto refuse = [](const char* where, const char* what) {
    throw Error(ErrorKind::usage, {.where = where, .what = what, .cure = "see moru tune --help"});
  };
  if (o.data.empty()) refuse("data", "no rows are given");
  if (o.epochs == 0 && o.max_steps == 0) refuse("--epochs", "must be at least 1");
  if (o.batch_size == 0 && o.batch_tokens == 0) refuse("--batch-size", "must be at least 1");
  if (o.rows.max_length < 2) refuse("--max-length", "must be at least 2");
  if (!(o.lr > 0)) refuse("--lr", "must be above 0");
  if (!(o.val_fraction >= 0 && o.val_fraction < 1)) refuse("--val-fraction", "must be in [0, 1)");
  if (!(o.warmup_ratio >= 0 && o.warmup_ratio <= 1)) refuse("--warmup-ratio", "must be in [0, 1]");
  if (o.lora.rank == 0 || o.lora.rank > 1024) refuse("--lora-r", "must be in [1, 1024]");
  if (!(o.lora.alpha > 0)) refuse("--lora-alpha", "must be above 0");
  if (!(o.adamw.weight_decay >= 0)) refuse("--weight-decay", "must be at least 0");
  if (!(o.max_grad_norm >= 0)) refuse("--max-grad-norm", "must be at least 0");
  if (!(o.schedule.min_ratio >= 0 && o.schedule.min_ratio <= 1))
    refuse("--min-lr-ratio", "must be in [0, 1]");
  check(schedule_of(o));
  if (o.micro_batch_tokens == 0) refuse("--micro-batch-tokens", "must be at least 1");
  if (!(o.learnt.lora_plus_ratio > 0)) refuse("--loraplus-lr-ratio", "must be above 0");
  if (o.learnt.full && !o.adapter.empty())
    refuse("--adapter", "full fine-tuning learns no adapter; merge it first");
  if (!(o.neftune_alpha >= 0)) refuse("--neftune-noise-alpha", "must be at least 0");
  if (!(o.max_z_score >= 0)) refuse("--max-z-score", "must be at least 0");
  check(o.preference);
  if (o.precision == Profile::exact) refuse("--precision", "training computes in bf16 or f32");
  if (o.learnt.full && o.keep_quantized)
    refuse("--preset qlora", "keeps weights packed, and --full learns them");
  if (o.keep_quantized) refuse_unquantized(open_model(o.model), "--qlora, --preset qlora");
}

TuneResult tune(const TuneOptions& o, const TuneProgress& progress) {
  OneRank one;
  return tune(o, progress, one);
}

TuneResult tune(const TuneOptions& o, const TuneProgress& progress, Ranks& ranks) {
  check(o);
  make_folder(files_of(o, ranks));
  std::optional<FolderLock> lock;
  if (ranks.leads()) lock.emplace(o.out, o.out / ".lock");
  const std::string fingerprint = fingerprint_of(o, files_of(o, ranks) / kHashes);
  check_same(ranks, fingerprint);
  std::optional<TuneResult> done;
  if (o.restart) remove_all_examples(files_of(o, ranks));
  if (o.restart && ranks.leads())
    for (const char* name : {"checkpoint.safetensors", "reference.safetensors", "tune.json"})
      std::filesystem::remove(o.out / name);
  if (!o.restart && ranks.leads()) done = finished_result(o, fingerprint);
  bool is_done = done.has_value();
  share_value(ranks, is_done);
  if (is_done) return done.value_or(TuneResult{});
  return Run(o, fingerprint, progress, ranks).finish_from_here();
}

bool tune_is_asked_to_stop() { return StopSignals::asked(); }

}  // namespace moru
