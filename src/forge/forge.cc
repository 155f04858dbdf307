#include "forge/forge.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <optional>
#include <set>

#include "base/clock.h"
#include "base/cpu.h"
#include "base/error.h"
#include "base/files.h"
#include "base/hash.h"
#include "forge/journal.h"
#include "forge/live.h"
#include "forge/vendor_prices.h"
#include "lighten/lighten.h"
#include "prove/engine_answerer.h"

namespace moru {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr const char* kBase = "base";
constexpr const char* kTuned = "tuned BF16";
constexpr size_t kShownChanges = 8;     // newly wrong and newly right examples in the report
constexpr size_t kProveContext = 8192;  // longest question with its answer

std::string file_word(std::string name) {
  std::replace(name.begin(), name.end(), ' ', '-');
  return name;
}

// The plain template as a chat template, so that every server of the forged file renders what the
// model was tuned on.
std::string jinja_of(const std::string& plain_template) {
  const auto quoted = [](std::string_view text) {
    std::string out = "'";
    for (const char c : text) {
      if (c == '\\' || c == '\'') out += '\\';
      if (c == '\n') {
        out += "\\n";
      } else {
        out += c;
      }
    }
    return out + "'";
  };
  const std::string before = plain_template.substr(0, plain_template.find("{completion}"));
  const size_t at = before.find("{prompt}");
  const std::string contents =
      "{%- for message in messages %}{%- if not loop.first %}{{ '\\n' }}{%- endif %}"
      "{{ message['content'] }}{%- endfor %}";
  if (at == std::string::npos) return "{{ " + quoted(before) + " }}";
  return "{{ " + quoted(before.substr(0, at)) + " }}" + contents + "{{ " +
         quoted(before.substr(at + std::string_view("{prompt}").size())) + " }}";
}

// A candidate on disk and what it answered.
struct Proved {
  std::string name;
  fs::path file;
  std::string sha256;
  double bits_per_weight = 0;
  Results results;
  Tally tally;
};

double bits_per_weight(const ModelFiles& files) {
  double bits = 0, weights = 0;
  for (const Tensor& tensor : files.tensors) {
    bits += 8 * static_cast<double>(tensor.data.size());
    weights += static_cast<double>(tensor.count());
  }
  return bits / std::max(1.0, weights);
}

struct Forge {
  const ForgeOptions& options;
  Journal journal;
  Live live;
  Pool pool;
  QuestionSet questions;
  ForgeReport report;
  std::vector<Proved> proved;

  explicit Forge(const ForgeOptions& o)
      : options(o),
        journal(o.out),
        live({"measure", "tune", "merge", "lighten", "prove", "choose"}, live_options()),
        pool(o.threads != 0 ? o.threads : usable_threads()),
        questions(read_questions(o.questions, o.rows)) {}

  fs::path place(const fs::path& relative) const {
    make_folder((options.out / relative).parent_path());
    return options.out / relative;
  }

  void note_stage(std::string_view name, const Journal::Stage& stage) {
    report.stages.push_back({std::string(name), stage.seconds, stage.reused});
  }

  // Asks one model all questions; its answers lie in results/NAME.jsonl. `share` of the stage is
  // done before it, and it takes `width` of it.
  Json ask(const std::string& name, const fs::path& file, double share, double width) {
    const ModelFiles files = open_model(file);
    const Model model =
        load_model(pool, files, {.context = std::min<size_t>(files.config.context, kProveContext)});
    Engine engine(pool, model);
    const Answerer answerer =
        make_answerer(name, sha256_of_path(file), engine, files, options.style);
    const fs::path results = fs::path("results") / (file_word(name) + ".jsonl");
    const Results answered = prove(
        questions, answerer,
        {.limits = options.limits,
         .results = place(results),
         .replace_other = true,
         .progress = [&](const ProveProgress& p) {
           live.update(share + width * static_cast<double>(p.done) / static_cast<double>(p.total),
                       fmt::format("{}: {} of {} right", name, p.correct, p.done));
         }});
    const Tally t = tally(answered.items);
    return {{"name", name},
            {"file", file.string()},
            {"sha256", answerer.model_sha256},
            {"bits_per_weight", bits_per_weight(files)},
            {"results", results.string()},
            {"correct", t.correct},
            {"total", t.total}};
  }

  void take_proved(const Json& output) {
    Proved p{.name = output.at("name"),
             .file = output.at("file").get<std::string>(),
             .sha256 = output.at("sha256"),
             .bits_per_weight = output.at("bits_per_weight"),
             .results = read_results(options.out / output.at("results").get<std::string>())};
    p.tally = tally(p.results.items);
    proved.push_back(std::move(p));
  }

  static std::string outcome_of(const Json& output) {
    return fmt::format("{}: {} of {} right", output.at("name").get<std::string>(),
                       output.at("correct").get<size_t>(), output.at("total").get<size_t>());
  }

  Json asked_inputs() const {
    return {{"questions", questions.asked_sha256},
            {"template", options.style.plain_template},
            {"system", options.style.system},
            {"max_tokens", options.limits.max_tokens},
            {"stop", options.limits.stop}};
  }

  void measure() {
    live.begin("measure");
    Json inputs = asked_inputs();
    inputs["model"] = report.model.sha256;
    const Journal::Stage stage = journal.run("measure", inputs, [&](const fs::path&) {
      const Json output = ask(kBase, options.model, 0, 1);
      return Journal::Product{output, {output.at("results").get<std::string>()}};
    });
    take_proved(stage.output);
    note_stage("measure", stage);
    live.finish(outcome_of(stage.output), stage.reused);
  }

  void tune_adapter() {
    live.begin("tune");
    TuneOptions tuning = options.tune;
    tuning.model = options.model;
    tuning.data = {{.path = options.pairs}};
    tuning.out = options.out / "tuning";
    tuning.rows.plain_template = options.style.plain_template;
    tuning.rows.system = options.style.system;
    tuning.threads = pool.size();
    const Json inputs = {{"pairs", report.pairs.sha256},
                         {"lora_r", tuning.lora.rank},
                         {"lora_alpha", tuning.lora.alpha},
                         {"lr", tuning.lr},
                         {"epochs", tuning.epochs},
                         {"max_steps", tuning.max_steps},
                         {"batch_size", tuning.batch_size},
                         {"max_length", tuning.rows.max_length},
                         {"columns", {tuning.rows.prompt_column, tuning.rows.completion_column}},
                         {"val_fraction", tuning.val_fraction},
                         {"patience", tuning.patience},
                         {"seed", tuning.seed}};
    const Journal::Stage stage = journal.run("tune", inputs, [&](const fs::path& scratch) {
      // A run of other settings in this folder is not gone on with.
      const fs::path begun = scratch / "begun";
      tuning.restart = !fs::exists(begun);
      if (tuning.restart) fs::remove_all(tuning.out);
      write_file(begun, "");
      Json curve = Json::array();
      const TuneResult result = tune(tuning, [&](const TuneEvent& event) {
        const double done = static_cast<double>(event.step) /
                            static_cast<double>(std::max<uint64_t>(event.steps, 1));
        if (event.kind == TuneEvent::Kind::resumed) live.begin("tune", done);
        if (event.kind == TuneEvent::Kind::step)
          live.update(done, fmt::format("loss {:.3f}, {:.0f} tokens/s", event.loss,
                                        event.tokens_per_second));
        if (event.kind == TuneEvent::Kind::skipped) live.note(event.text);
      });
      fs::remove_all(options.out / "adapter");
      fs::copy(result.adapter, options.out / "adapter", fs::copy_options::recursive);
      Json output = {{"steps", result.steps},
                     {"best_step", result.best_step},
                     {"examples", result.examples},
                     {"validation_examples", result.validation_examples},
                     {"tokens", result.tokens},
                     {"trained_tokens", result.trained_tokens},
                     {"tokens_per_second", result.tokens_per_second},
                     {"train_loss", result.train_loss},
                     {"peak_bytes", result.peak_bytes},
                     {"dropped", result.counts.bad + result.counts.without_answer}};
      if (result.val_loss) output["val_loss"] = *result.val_loss;
      if (result.val_loss_before) output["val_loss_before"] = *result.val_loss_before;
      return Journal::Product{output,
                              {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}};
    });
    const Json& o = stage.output;
    report.pairs.rows = o.at("examples").get<size_t>() + o.at("validation_examples").get<size_t>();
    report.tried.push_back(fmt::format(
        "LoRA r {} on {} pairs, {} steps at up to {:.0e}: validation loss {} → {}, {:.0f} tokens/s",
        tuning.lora.rank, o.at("examples").get<size_t>(), o.at("steps").get<size_t>(), tuning.lr,
        o.contains("val_loss_before") ? fmt::format("{:.3f}", o["val_loss_before"].get<double>())
                                      : "not measured",
        o.contains("val_loss") ? fmt::format("{:.3f}", o["val_loss"].get<double>())
                               : "not measured",
        o.at("tokens_per_second").get<double>()));
    read_curve(tuning.out / "log.jsonl");
    note_stage("tune", stage);
    live.finish(o.contains("val_loss")
                    ? fmt::format("validation loss {:.3f}", o["val_loss"].get<double>())
                    : fmt::format("{} steps", o.at("steps").get<size_t>()),
                stage.reused);
  }

  // Loss by step from the trainer's log; a report without a curve is still a report.
  void read_curve(const fs::path& log) {
    if (!fs::exists(log)) return;
    for (const Row& row : read_records(log, SIZE_MAX)) {
      const Json& line = row.value;
      if (!line.contains("step") || !line["step"].is_number()) continue;
      const auto step = line["step"].get<size_t>();
      if (line.contains("val_loss") && line["val_loss"].is_number()) {
        const double loss = line["val_loss"];
        if (!report.curve.empty() && report.curve.back().step == step) {
          report.curve.back().validation_loss = loss;
        } else {
          report.curve.push_back({step, loss, loss});
        }
      } else if (line.contains("loss") && line["loss"].is_number()) {
        report.curve.push_back({step, line["loss"].get<double>(), std::nullopt});
      }
    }
  }

  fs::path merged_file() const { return options.out / "candidates" / "tuned-BF16.gguf"; }

  void merge() {
    live.begin("merge");
    const Journal::Stage stage =
        journal.run("merge", {{"template", options.style.plain_template}}, [&](const fs::path&) {
          ModelFiles files = open_model(options.model);
          if (!options.style.plain_template.empty())
            files.metadata.set("tokenizer.chat_template",
                               GgufScalar{jinja_of(options.style.plain_template)});
          const Lora lora = read_peft_adapter(options.out / "adapter", files.config);
          place("candidates/tuned-BF16.gguf");
          write_merged_gguf(merged_file(), files, lora, DType::bf16);
          return Journal::Product{{{"bytes", fs::file_size(merged_file())}},
                                  {"candidates/tuned-BF16.gguf"}};
        });
    note_stage("merge", stage);
    live.finish(format_bytes(stage.output.at("bytes").get<uint64_t>()), stage.reused);
  }

  // Token sequences of the pairs, prompt and answer, for calibration.
  std::vector<std::vector<TokenId>> calibration_sequences(const ModelFiles& files) const {
    DataOptions rows = options.tune.rows;
    rows.plain_template = options.style.plain_template;
    rows.system = options.style.system;
    Dataset data = load_dataset(options.pairs, files, rows);
    std::vector<std::vector<TokenId>> sequences;
    const Permutation order = epoch_order(data.examples.size(), options.tune.seed, 0);
    for (size_t i = 0; i < order.size(); ++i)
      sequences.push_back(std::move(data.examples[order[i]].ids));
    return sequences;
  }

  void lighten_ladder() {
    live.begin("lighten");
    const Json inputs = {{"ladder", options.ladder},
                         {"calibration_tokens", options.calibration_tokens}};
    const Journal::Stage stage = journal.run("lighten", inputs, [&](const fs::path&) {
      const ModelFiles files = open_model(merged_file());
      Importance importance;
      {
        const Model model = load_model(pool, files, {.profile = Profile::bf16, .context = 2048});
        Engine engine(pool, model);
        importance = collect_importance(
            engine, calibration_sequences(files), options.calibration_tokens,
            [&](size_t done, size_t total) {
              live.update(0.4 * static_cast<double>(done) / static_cast<double>(total),
                          fmt::format("calibrating, {} tokens", done));
            });
      }
      Journal::Product product{Json::array()};
      const double width = 0.6 / static_cast<double>(options.ladder.size());
      for (size_t i = 0; i < options.ladder.size(); ++i) {
        const Preset& preset = preset_of(options.ladder[i]);
        const fs::path file = fs::path("candidates") / fmt::format("tuned-{}.gguf", preset.name);
        const LightenResult made = lighten_model(
            pool, files, preset, place(file),
            {.importance = &importance, .progress = [&](double done) {
               live.update(0.4 + width * (static_cast<double>(i) + done), std::string(preset.name));
             }});
        product.output.push_back({{"type", preset.name},
                                  {"file", file.string()},
                                  {"bytes", made.file_bytes},
                                  {"bits_per_weight", made.bits_per_weight},
                                  {"notes", made.notes}});
        product.files.push_back(file);
      }
      return product;
    });
    for (const Json& made : stage.output) {
      report.tried.push_back(fmt::format("{}: {:.2f} bits per weight, {}",
                                         made.at("type").get<std::string>(),
                                         made.at("bits_per_weight").get<double>(),
                                         format_bytes(made.at("bytes").get<uint64_t>())));
      for (const Json& note : made.at("notes"))
        report.plan_log.push_back(made.at("type").get<std::string>() + ": " +
                                  note.get<std::string>());
    }
    note_stage("lighten", stage);
    live.finish(fmt::format("{} sizes", stage.output.size()), stage.reused);
  }

  void prove_candidates() {
    live.begin("prove");
    std::vector<std::pair<std::string, fs::path>> candidates = {{kTuned, merged_file()}};
    for (const std::string& type : options.ladder) {
      const std::string_view name = preset_of(type).name;
      candidates.emplace_back(fmt::format("tuned {}", name),
                              options.out / "candidates" / fmt::format("tuned-{}.gguf", name));
    }
    const Journal::Stage stage = journal.run("prove", asked_inputs(), [&](const fs::path&) {
      Journal::Product product{Json::array()};
      const double width = 1.0 / static_cast<double>(candidates.size());
      for (size_t i = 0; i < candidates.size(); ++i) {
        product.output.push_back(
            ask(candidates[i].first, candidates[i].second, width * static_cast<double>(i), width));
        product.files.push_back(product.output.back().at("results").get<std::string>());
      }
      return product;
    });
    for (const Json& output : stage.output) take_proved(output);
    note_stage("prove", stage);
    live.finish(fmt::format("{} candidates", stage.output.size()), stage.reused);
  }

  void choose_one() {
    live.begin("choose");
    std::vector<Contender> contenders;
    for (const Proved& p : proved)
      contenders.push_back({.name = p.name,
                            .results = &p.results,
                            .usd_per_1000 = p.tally.usd_per_1000(options.machine_usd_per_hour),
                            .file_bytes = fs::file_size(p.file)});
    const Choice choice = choose(contenders, options.goal);
    for (size_t i = 0; i < proved.size(); ++i) {
      const Proved& p = proved[i];
      const Judgement& judgement = choice.judgements[i];
      Candidate candidate{.name = p.name,
                          .file = p.name == kBase ? "" : fs::relative(p.file, options.out).string(),
                          .sha256 = p.sha256,
                          .file_bytes = contenders[i].file_bytes,
                          .bits_per_weight = p.bits_per_weight,
                          .correct = p.tally.correct,
                          .total = p.tally.total,
                          .interval = p.tally.interval,
                          .tokens_per_second = p.tally.tokens_per_second(),
                          .seconds = p.tally.seconds,
                          .usd_per_1000 = contenders[i].usd_per_1000,
                          .good_enough = judgement.good_enough,
                          .chosen = choice.chosen == i,
                          .verdict = judgement.verdict};
      if (judgement.against_best)
        candidate.against_best = {.newly_wrong = judgement.against_best->newly_wrong.size(),
                                  .newly_right = judgement.against_best->newly_right.size(),
                                  .p = judgement.against_best->p,
                                  .ratio = judgement.against_best->ratio};
      report.candidates.push_back(std::move(candidate));
    }
    report.outcome = choice.outcome;
    if (choice.chosen) {
      publish(proved[*choice.chosen].file);
      add_changes(proved[*choice.chosen], proved.front());
      if (*choice.chosen != choice.best) add_changes(proved[*choice.chosen], proved[choice.best]);
    }
    add_vendors();
    live.finish(choice.chosen ? proved[*choice.chosen].name : "nothing is good enough");
  }

  // The chosen file under its final name: a hard link where the file system can, else a copy.
  void publish(const fs::path& file) const {
    const fs::path target = options.out / "model.gguf", beside = options.out / "model.gguf.partial";
    std::error_code failed;
    fs::remove(beside, failed);
    fs::create_hard_link(file, beside, failed);
    if (failed) fs::copy_file(file, beside, fs::copy_options::overwrite_existing);
    fs::rename(beside, target);
  }

  void add_changes(const Proved& after, const Proved& before) {
    if (&after == &before) return;
    const Comparison comparison = compare(after.results, before.results);
    ChangeSet set{.title = after.name + " against " + before.name,
                  .newly_wrong_total = comparison.newly_wrong.size(),
                  .newly_right_total = comparison.newly_right.size(),
                  .p = comparison.p};
    std::map<std::string, const ItemResult*> earlier;
    for (const ItemResult& item : before.results.items) earlier[item.id] = &item;
    const auto example = [&](size_t place) {
      const ItemResult& item = after.results.items[place];
      const Question& question = questions.items[place];
      return ChangedAnswer{
          .id = item.id,
          .prompt = question.messages.back().value("content", ""),
          .expected = fmt::format("{}", fmt::join(question.expected.answers, " | ")),
          .before = earlier.count(item.id) ? earlier[item.id]->answer : "",
          .after = item.answer};
    };
    for (const size_t i : comparison.newly_wrong)
      if (set.newly_wrong.size() < kShownChanges) set.newly_wrong.push_back(example(i));
    for (const size_t i : comparison.newly_right)
      if (set.newly_right.size() < kShownChanges) set.newly_right.push_back(example(i));
    report.changes.push_back(std::move(set));
  }

  void add_vendors() {
    if (options.vendor_prices.empty()) return;
    const std::vector<VendorPrice> prices = read_vendor_prices(options.vendor_prices);
    for (const VendorPrice& price : select_prices(prices, options.vendors)) {
      report.candidates.push_back(
          {.name = price.name,
           .kind = Candidate::Kind::vendor,
           .usd_per_1000 = usd_per_1000(price, proved.back().tally),
           .verdict = "list price, not measured",
           .note = price.date.empty() ? price.note : price.date + " " + price.note});
    }
  }

  // Pairs that are also questions would make the proof worth nothing.
  void check_overlap() {
    std::set<std::string> asked;
    for (const Question& question : questions.items)
      if (!question.messages.empty()) asked.insert(question.messages.back().value("content", ""));
    const std::string& column = options.tune.rows.prompt_column;
    size_t shared = 0;
    RecordReader reader(options.pairs);
    while (const std::optional<Row> row = reader.next()) {
      const auto prompt = row->value.find(column.empty() ? "prompt" : column);
      if (prompt != row->value.end() && prompt->is_string())
        shared += asked.count(prompt->get<std::string>());
    }
    if (shared == 0) return;
    const std::string line =
        fmt::format("{} pairs ask what a question asks: scores on those are memory", shared);
    live.note(line);
    report.tried.push_back(line);
  }

  void describe() {
    report.title = options.out.filename().string();
    report.goal = describe_goal(options.goal);
    report.at_least = options.goal.at_least;
    report.machine_usd_per_hour = options.machine_usd_per_hour;
    report.command = options.command;
    report.machine = machine_name();
    report.started = utc_now();
    report.seed = options.tune.seed;
    report.model = {options.model.string(), sha256_of_path(options.model)};
    report.pairs = {options.pairs.string(), sha256_of_path(options.pairs)};
    report.questions = {options.questions.string(), questions.file_sha256, questions.items.size()};
    const TuneOptions& t = options.tune;
    report.settings = {
        {"template", options.style.plain_template.empty() ? "the model's chat template"
                                                          : options.style.plain_template},
        {"system message", options.style.system},
        {"longest answer", fmt::format("{} tokens, greedy", options.limits.max_tokens)},
        {"LoRA", fmt::format("r {}, alpha {}, lr {}, {} epochs, batch {}", t.lora.rank,
                             t.lora.alpha, t.lr, t.epochs, t.batch_size)},
        {"calibration", fmt::format("{} tokens of the pairs", options.calibration_tokens)},
    };
  }
};

void check(const ForgeOptions& options) {
  check_goal(options.goal);
  if (options.ladder.empty())
    throw Error(
        ErrorKind::usage,
        {.where = "--size-ladder", .what = "names no type", .cure = "for example Q8_0,Q4_K_M"});
  for (const std::string& type : options.ladder) preset_of(type);
  if (!options.style.plain_template.empty()) render_plain_prompt(options.style.plain_template, {});
  if (!options.vendor_prices.empty())
    select_prices(read_vendor_prices(options.vendor_prices), options.vendors);
}

}  // namespace

ForgeReport forge(const ForgeOptions& options) {
  check(options);
  Forge f(options);
  f.describe();
  f.check_overlap();
  f.measure();
  f.tune_adapter();
  f.merge();
  f.lighten_ladder();
  f.prove_candidates();
  f.choose_one();
  f.report.finished = utc_now();
  write_report(f.report, options.out);
  return f.report;
}

}  // namespace moru
