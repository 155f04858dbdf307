#include "forge/improve.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "base/clock.h"
#include "base/cpu.h"
#include "base/error.h"
#include "base/files.h"
#include "base/hash.h"
#include "base/text.h"
#include "forge/journal.h"
#include "lighten/lighten.h"
#include "tune/adapter.h"

namespace moru {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr std::array<const char*, 2> kMethodNames = {"sft", "dpo"};
constexpr size_t kLongestSequence = 8192;  // a question with its answer

// The model that an iteration starts from: the file that answers, the file that is tuned, and what
// the gate measured of it.
struct Accepted {
  fs::path served, trained;
  GateMeasures measures;
};

struct Improve {
  const ImproveOptions& options;
  const std::function<void(const std::string&)>& say;
  Journal journal;
  Pool pool;
  std::vector<QuestionSet> asked;  // by the gate
  Accepted last;
  GateMeasures original;  // of the model that all began with
  ImproveReport report;

  Improve(const ImproveOptions& o, const std::function<void(const std::string&)>& n)
      : options(o), say(n), journal(o.out), pool(o.threads != 0 ? o.threads : usable_threads()) {}

  void note(const std::string& line) const {
    if (say) say(line);
  }

  // Runs `work` with the model in memory, and nothing else of it afterwards.
  template <typename Work>
  auto with_engine(const fs::path& path, Work&& work) {
    const ModelFiles files = open_model(path);
    const Model model = load_model(
        pool, files, {.context = std::min<size_t>(files.config.context, kLongestSequence)});
    Engine engine(pool, model);
    return work(engine, files);
  }

  // The questions of the gate: named ones, or those that the pairs leave out, which are the same in
  // every iteration because prompts are held out by their hash.
  void read_gate_questions() {
    if (!options.gate_questions.empty()) {
      for (const fs::path& path : options.gate_questions)
        asked.push_back(read_questions(path, options.pairs.rows));
      return;
    }
    const std::vector<Question> all =
        read_all_questions(options.pairs.questions, options.pairs.rows);
    EvaluationTexts evaluation(options.pairs.overlap_words);
    for (const fs::path& path : options.pairs.evaluation) evaluation.add_file(path);
    QuestionSet set{.where = "held-out questions", .items = {}};
    std::string hashed;
    for (const Question* question :
         choose_prompts(all, evaluation, options.pairs.prompts).validate) {
      set.items.push_back(*question);
      hashed += row_of(*question).dump() + '\n';
    }
    if (set.items.empty())
      throw Error(ErrorKind::usage, {.where = "--gate-questions",
                                     .what = "names no file, and no question is held out",
                                     .cure = "name one, or raise --validate-fraction"});
    set.asked_sha256 = set.file_sha256 = sha256(hashed);
    asked.push_back(std::move(set));
  }

  Json gate_inputs() const {
    Json sets = Json::array();
    for (const QuestionSet& set : asked) sets.push_back(set.asked_sha256);
    return {{"asked", sets},
            {"max_tokens", options.gate.limits.max_tokens},
            {"instruction_tokens", options.gate.instruction_tokens},
            {"text", options.gate.text.empty() ? "" : sha256_of_path(options.gate.text)},
            {"text_chunks", options.gate.text_chunks},
            {"template", options.pairs.style.plain_template},
            {"system", options.pairs.style.system}};
  }

  // What the gate sees of a model, in a stage of its own; the answers stay in `folder`.
  std::pair<GateMeasures, double> measured(std::string_view stage_name, const std::string& name,
                                           const fs::path& model, const fs::path& folder) {
    Json inputs = gate_inputs();
    inputs["model"] = sha256_of_path(model);
    const auto file_of = [&](const std::string& word) { return folder / (word + ".jsonl"); };
    const Journal::Stage stage = journal.run(stage_name, inputs, [&](const fs::path&) {
      make_folder(options.out / folder);
      const GateMeasures m = with_engine(model, [&](Engine& engine, const ModelFiles& files) {
        return measure_for_gate(asked, name, inputs["model"], engine, files, options.pairs.style,
                                options.gate, options.out / folder);
      });
      Journal::Product product{{{"losses", m.losses}, {"seconds", m.seconds}}};
      for (size_t i = 0; i < asked.size(); ++i)
        product.files.push_back(file_of(fmt::format("questions-{}", i + 1)));
      product.files.push_back(file_of("instructions"));
      return product;
    });
    GateMeasures m{.name = name, .model_sha256 = inputs["model"]};
    for (size_t i = 0; i < asked.size(); ++i)
      m.scores.push_back(read_results(options.out / file_of(fmt::format("questions-{}", i + 1))));
    m.instructions = read_results(options.out / file_of("instructions"));
    stage.output.at("losses").get_to(m.losses);
    m.seconds = stage.output.at("seconds");
    return {std::move(m), stage.seconds};
  }

  void measure_base() {
    last = {.served = options.model, .trained = options.model, .measures = {}};
    report.base_sha256 = sha256_of_path(options.model);
    note("measuring the model as it is");
    std::tie(last.measures, report.measure_seconds) =
        measured("measure", options.model.filename().string(), options.model, "base");
    original = last.measures;
  }

  PairsJob pairs_job(const fs::path& folder, size_t number) const {
    PairsJob job = options.pairs;
    job.out = options.out / folder / "pairs.jsonl";
    // Another iteration, other draws, also where the model is still the same.
    job.sampling.seed += number - 1;
    return job;
  }

  void make_pairs_of(Iteration& it, const fs::path& folder) {
    const PairsJob job = pairs_job(folder, it.number);
    Json inputs = {{"model", sha256_of_path(last.served)},
                   {"seed", job.sampling.seed},
                   {"answers", job.sampling.answers},
                   {"temperature", job.sampling.temperature},
                   {"top_p", job.sampling.top_p},
                   {"max_tokens", job.sampling.limits.max_tokens},
                   {"stop", job.sampling.limits.stop},
                   {"template", job.style.plain_template},
                   {"system", job.style.system},
                   {"filter", name_of(job.rules.filter)},
                   {"max_per_prompt", job.rules.max_per_prompt},
                   {"max_per_category", job.rules.max_per_category},
                   {"max_length_ratio", job.rules.max_length_ratio},
                   {"max_margin", job.rules.max_margin.value_or(0)},
                   {"near_duplicate", job.prompts.near_duplicate},
                   {"validate_fraction", job.prompts.validate_fraction}};
    for (const Question& q : read_all_questions(job.questions, job.rows))
      inputs["questions"].push_back(sha256(row_of(q).dump()));
    for (const fs::path& path : job.evaluation)
      inputs["evaluation"].push_back(sha256_of_path(path));
    note(fmt::format("iteration {}: sampling answers", it.number));
    const Journal::Stage stage = journal.run("pairs", inputs, [&](const fs::path&) {
      const PairsSummary summary =
          with_engine(last.served, [&](Engine& engine, const ModelFiles& files) {
            return write_pairs(job, engine, files, inputs["model"]);
          });
      return Journal::Product{to_json(summary),
                              {folder / "pairs.jsonl", folder / "pairs.right.jsonl"}};
    });
    it.pairs = stage.output;
    it.pairs_seconds = stage.seconds;
  }

  // The rows that a method learns, and how.
  TuneOptions tuning_of(const Iteration& it, const fs::path& folder) const {
    TuneOptions tuning = options.tune;
    tuning.model = last.trained;
    tuning.data.resize(1);
    switch (it.method) {
      case ImproveMethod::sft:
        tuning.method = Method::sft;
        tuning.data[0].path = options.out / folder / "pairs.right.jsonl";
        break;
      case ImproveMethod::dpo:
        tuning.method = Method::dpo;
        tuning.lr = options.dpo_lr;
        tuning.data[0].path = options.out / folder / "pairs.jsonl";
        break;
    }
    tuning.out = options.out / folder / "tuning";
    tuning.rows.plain_template = options.pairs.style.plain_template;
    tuning.threads = pool.size();
    return tuning;
  }

  void tune_on_pairs(Iteration& it, const fs::path& folder) {
    TuneOptions tuning = tuning_of(it, folder);
    Json inputs = {{"method", name_of(it.method)},
                   {"lora_r", tuning.lora.rank},
                   {"lora_alpha", tuning.lora.alpha},
                   {"lr", tuning.lr},
                   {"epochs", tuning.epochs},
                   {"max_steps", tuning.max_steps},
                   {"batch_size", tuning.batch_size},
                   {"max_length", tuning.rows.max_length},
                   {"val_fraction", tuning.val_fraction},
                   {"seed", tuning.seed}};
    if (it.method == ImproveMethod::dpo)
      inputs["preference"] = {name_of(tuning.preference.loss), tuning.preference.beta,
                              tuning.preference.label_smoothing, tuning.preference.anchor};
    note(fmt::format("iteration {}: tuning ({})", it.number, name_of(it.method)));
    const Journal::Stage stage = journal.run("tune", inputs, [&](const fs::path& scratch) {
      // A run of other settings in this folder is not gone on with.
      const fs::path begun = scratch / "begun";
      tuning.restart = !fs::exists(begun);
      if (tuning.restart) fs::remove_all(tuning.out);
      write_file(begun, "");
      const TuneResult result = tune(tuning, [&](const TuneEvent& event) {
        if (event.kind == TuneEvent::Kind::validation) note("  " + event.text);
      });
      Json output = {{"steps", result.steps},
                     {"examples", result.examples},
                     {"tokens", result.tokens},
                     {"train_loss", result.train_loss},
                     {"tokens_per_second", result.tokens_per_second},
                     {"peak_bytes", result.peak_bytes}};
      if (result.val_loss_before) output["val_loss_before"] = *result.val_loss_before;
      if (result.val_loss) output["val_loss"] = *result.val_loss;
      const fs::path adapter = folder / "tuning" / "adapter";
      return Journal::Product{
          output, {adapter / "adapter_config.json", adapter / "adapter_model.safetensors"}};
    });
    it.tuning = stage.output;
    it.tune_seconds = stage.seconds;
  }

  // Two files: the numbers that the next iteration trains on, and the type that is served.
  Accepted merge(Iteration& it, const fs::path& folder) {
    const fs::path whole = folder / "model-BF16.gguf", served = folder / "model.gguf";
    note(fmt::format("iteration {}: merging into {}", it.number, options.served_type));
    const Journal::Stage stage =
        journal.run("merge", {{"type", options.served_type}}, [&](const fs::path&) {
          const ModelFiles base = open_model(last.trained);
          const Lora lora = read_peft_adapter(options.out / folder / "tuning/adapter", base.config);
          write_merged_gguf(options.out / whole, base, lora, DType::bf16);
          lighten_model(pool, open_model(options.out / whole), preset_of(options.served_type),
                        options.out / served);
          return Journal::Product{Json::object(), {whole, served}};
        });
    it.merge_seconds = stage.seconds;
    return {.served = options.out / served, .trained = options.out / whole, .measures = {}};
  }

  void iterate(size_t number) {
    const fs::path folder = fmt::format("iteration-{}", number);
    make_folder(options.out / folder);
    Iteration it{.number = number,
                 .method = options.methods[std::min(number, options.methods.size()) - 1]};
    make_pairs_of(it, folder);
    tune_on_pairs(it, folder);
    Accepted next = merge(it, folder);
    note(fmt::format("iteration {}: at the gate", number));
    std::tie(next.measures, it.gate_seconds) =
        measured("gate", fmt::format("iteration {}", number), next.served, folder / "gate");
    it.verdict = judge_chain(original, last.measures, next.measures, asked, options.gate);
    for (const std::string& reason : it.verdict.reasons()) note("  refused: " + reason);
    if (it.verdict.accepted()) {
      ++report.accepted;
      last = std::move(next);
      publish(last.served);
    }
    report.iterations.push_back(std::move(it));
  }

  // Under its final name: a hard link where the file system can, else a copy.
  void publish(const fs::path& file) {
    const fs::path target = options.out / "model.gguf", beside = options.out / "model.gguf.partial";
    std::error_code failed;
    fs::remove(beside, failed);
    fs::create_hard_link(file, beside, failed);
    if (failed) fs::copy_file(file, beside, fs::copy_options::overwrite_existing);
    fs::rename(beside, target);
    report.model = target;
  }
};

}  // namespace

const char* name_of(ImproveMethod method) { return kMethodNames[static_cast<size_t>(method)]; }

ImproveMethod improve_method_named(std::string_view name) {
  for (size_t i = 0; i < kMethodNames.size(); ++i)
    if (name == kMethodNames[i]) return static_cast<ImproveMethod>(i);
  throw Error(ErrorKind::usage,
              {.where = "--method",
               .what = fmt::format("there is no method \"{}\"", name),
               .cure = fmt::format("use one of {}", fmt::join(kMethodNames, ", "))});
}

ImproveReport improve(const ImproveOptions& options,
                      const std::function<void(const std::string&)>& note) {
  MORU_CHECK(!options.methods.empty());
  check(options.gate);
  preset_of(options.served_type);
  make_folder(options.out);
  Improve run(options, note);
  run.read_gate_questions();
  run.measure_base();
  for (size_t number = 1; number <= options.iterations; ++number) run.iterate(number);
  write_file(options.out / "improve.json", to_json(run.report).dump(2) + "\n");
  return std::move(run.report);
}

Json to_json(const ImproveReport& report) {
  Json iterations = Json::array();
  for (const Iteration& it : report.iterations) {
    iterations.push_back({{"iteration", it.number},
                          {"method", name_of(it.method)},
                          {"pairs", it.pairs},
                          {"tuning", it.tuning},
                          {"seconds",
                           {{"pairs", it.pairs_seconds},
                            {"tune", it.tune_seconds},
                            {"merge", it.merge_seconds},
                            {"gate", it.gate_seconds}}}});
    iterations.back().update(to_json(it.verdict));
  }
  return {{"base_sha256", report.base_sha256},
          {"measure_seconds", report.measure_seconds},
          {"accepted", report.accepted},
          {"model", report.model.string()},
          {"iterations", std::move(iterations)}};
}

std::string table_of(const ImproveReport& report) {
  std::string table = fmt::format("{:<14}{:>7}{:>8}{:>11}{:>11}{:>9}{:>9}  {}\n", "iteration",
                                  "pairs", "steps", "before", "after", "change", "minutes", "gate");
  for (const Iteration& it : report.iterations) {
    const GateRow& score = it.verdict.last.rows.front();
    table += fmt::format("{:<14}{:>7}{:>8}{:>9.1f} %{:>9.1f} %{:>+9.1f}{:>9.1f}  {}\n",
                         fmt::format("{} ({})", it.number, name_of(it.method)),
                         it.pairs.at("counts").at("pairs").get<size_t>(),
                         it.tuning.at("steps").get<size_t>(), 100 * score.before, 100 * score.after,
                         100 * (score.after - score.before), it.seconds() / 60,
                         it.verdict.accepted() ? "accepted" : "refused");
  }
  if (!report.iterations.empty()) table += "\n" + table_of(report.iterations.back().verdict);
  return table;
}

}  // namespace moru
