// What a run can learn from, and what of the model can learn: preferences, labels, raw text; whole
// weights, packed weights.
#include <signal.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "base/files.h"
#include "engine/weights.h"
#include "formats/safetensors.h"
#include "support.h"
#include "tiny_model.h"
#include "tune/guard.h"
#include "tune/preference_data.h"
#include "tune/presets.h"
#include "tune/trainer.h"

using namespace moru;

namespace {

const std::filesystem::path kModel = MORU_SOURCE_DIR "/tests/golden/tune/llama";

std::string lines(const std::vector<nlohmann::json>& rows) {
  std::string text;
  for (const nlohmann::json& row : rows) text += row.dump() + "\n";
  return text;
}

std::string pairs(size_t count) {
  std::vector<nlohmann::json> rows;
  for (size_t i = 0; i < count; ++i)
    rows.push_back({{"prompt", "say " + std::to_string(i * 7 % 10)},
                    {"chosen", std::string(1 + i % 5, static_cast<char>('a' + i % 26))},
                    {"rejected", std::string(2 + i % 3, static_cast<char>('A' + i % 26))}});
  return lines(rows);
}

TuneOptions options_for(const TempDir& dir, const char* out, const char* rows = "rows.jsonl") {
  TuneOptions o;
  o.model = kModel;
  o.data = {{.path = dir.path() / rows}};
  o.out = dir.path() / out;
  o.rows.plain_template = "{prompt}:{completion}";
  o.rows.max_length = 64;
  o.precision = Profile::f32;
  o.threads = 2;
  o.epochs = 3;
  o.batch_size = 4;
  o.lr = 3e-3;
  o.eval_steps = 3;
  o.save_steps = 2;
  return o;
}
TuneOptions dpo_for(const TempDir& dir, const char* out) {
  TuneOptions o = options_for(dir, out);
  apply_method("dpo", o);
  o.lr = 3e-3;
  o.epochs = 3;
  return o;
}

double metric(const TuneEvent& event, std::string_view name) {
  for (const Metric& m : event.metrics)
    if (m.name == name) return m.value;
  FAIL("no metric " << std::string(name));
  return 0;
}

std::string adapter_bytes(const TuneOptions& o) {
  return read_file(o.out / "adapter" / "adapter_model.safetensors");
}

std::vector<TuneEvent> steps_of(const TuneOptions& o) {
  std::vector<TuneEvent> steps;
  tune(o, [&](const TuneEvent& e) {
    if (e.kind == TuneEvent::Kind::step) steps.push_back(e);
  });
  return steps;
}

// Runs to the end through stops after every third step.
size_t run_in_pieces(const TuneOptions& o) {
  for (size_t runs = 1;; ++runs) {
    size_t steps = 0;
    try {
      tune(o, [&](const TuneEvent& e) {
        if (e.kind == TuneEvent::Kind::step && ++steps == 3) ::raise(SIGTERM);
      });
      return runs;
    } catch (const Error& error) {
      REQUIRE(error.kind() == ErrorKind::interrupted);
    }
  }
}

}  // namespace

// ---- preferences ------------------------------------------------------------------------------

TEST_CASE("fifty steps of DPO, IPO and RPO are TRL's") {
  const nlohmann::json golden = nlohmann::json::parse(read_file(kModel / "dpo.json"));
  const TempDir dir;
  dir.file("rows.jsonl", lines(golden["rows"]));
  for (const auto& [name, run] : golden["runs"].items()) {
    CAPTURE(name);
    TuneOptions o = options_for(dir, name.c_str());
    apply_method("dpo", o);
    o.adapter = kModel / "start";
    o.rows.plain_template = "{prompt}{completion}";
    o.preference.loss = name == "ipo" ? PreferenceLoss::ipo : PreferenceLoss::sigmoid;
    o.preference.beta = run["beta"];
    o.preference.anchor = name == "rpo" ? 0.5 : 0;
    o.val_fraction = 0;
    o.batch_size = 8;
    o.max_steps = 50;
    o.lr = golden["lr"];
    o.schedule.kind = Schedule::constant;
    o.warmup_ratio = 0;
    o.max_z_score = 0;
    const std::vector<TuneEvent> found = steps_of(o);
    REQUIRE(found.size() == run["steps"].size());
    double loss_residual = 0, norm_residual = 0;
    for (size_t i = 0; i < found.size(); ++i) {
      CAPTURE(i);
      const nlohmann::json& wanted = run["steps"][i];
      CHECK(std::abs(found[i].loss - wanted["loss"].get<double>()) < 1e-4);
      CHECK(std::abs(found[i].grad_norm - wanted["grad_norm"].get<double>()) < 1e-2);
      loss_residual += (found[i].loss - wanted["loss"].get<double>()) / 50;
      norm_residual += (found[i].grad_norm - wanted["grad_norm"].get<double>()) / 50;
      for (const char* key :
           {"rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen",
            "logps/rejected", "logits/chosen", "logits/rejected", "entropy"})
        CHECK(std::abs(metric(found[i], key) - wanted[key].get<double>()) < 2e-3);
      for (const char* key : {"rewards/accuracies", "mean_token_accuracy"})
        CHECK(metric(found[i], key) == doctest::Approx(wanted[key].get<double>()).epsilon(1e-6));
    }
    CHECK(std::abs(loss_residual) < 1e-5);
    CHECK(std::abs(norm_residual) < 1e-3);
  }
}

TEST_CASE(
    "before its first update DPO has loss ln 2 and rewards of exactly 0, however it is batched") {
  const TempDir dir;
  dir.file("rows.jsonl", pairs(24));
  for (const Profile precision : {Profile::f32, Profile::bf16}) {
    for (const uint64_t tokens : {1, 40, 2048}) {
      TuneOptions o = dpo_for(dir, "out");
      o.precision = precision;
      o.micro_batch_tokens = tokens;
      o.restart = true;
      o.lr = 1e-30;  // a step that changes nothing
      for (const TuneEvent& step : steps_of(o)) {
        CHECK(std::abs(step.loss - 0.6931471805599453) < 1e-7);
        CHECK(metric(step, "rewards/chosen") == 0);
        CHECK(metric(step, "rewards/rejected") == 0);
      }
    }
  }
}

TEST_CASE("runs on preferences stopped at any step reach the bits of one that was not") {
  const TempDir dir;
  dir.file("rows.jsonl", pairs(20));
  const TuneOptions whole = dpo_for(dir, "whole"), stopped = dpo_for(dir, "stopped");
  const TuneResult expected = tune(whole);
  REQUIRE(expected.val_loss.has_value());
  CHECK(*expected.val_loss < *expected.val_loss_before);
  CHECK(run_in_pieces(stopped) > 3);
  CHECK(adapter_bytes(stopped) == adapter_bytes(whole));

  // Threads change no bit; small batches only the order of sums.
  TuneOptions one = dpo_for(dir, "one");
  one.threads = 1;
  tune(one);
  CHECK(adapter_bytes(one) == adapter_bytes(whole));
  TuneOptions small = dpo_for(dir, "small");
  small.micro_batch_tokens = 1;
  CHECK(std::abs(*tune(small).val_loss - *expected.val_loss) < 1e-5);
}

TEST_CASE("a preference is learnt by every method, and the anchor keeps chosen answers likely") {
  const TempDir dir;
  dir.file("rows.jsonl", pairs(16));
  for (const char* method : {"dpo", "simpo", "orpo"}) {
    CAPTURE(method);
    TuneOptions o = options_for(dir, method);
    apply_method(method, o);
    o.lr = 1e-2;
    o.preference.anchor = 1;
    o.max_steps = 60;
    o.val_fraction = 0;
    o.batch_size = 16;
    const std::vector<TuneEvent> steps = steps_of(o);
    CHECK(metric(steps.back(), "rewards/accuracies") >= 0.95);
    CHECK(metric(steps.back(), "logps/chosen") >= metric(steps.front(), "logps/chosen"));
    CHECK(steps.back().loss < steps.front().loss);
  }
}

TEST_CASE("ORPO's own loss counts the answer alone, or prompt and answer as TRL's does") {
  const TempDir dir;
  dir.file("rows.jsonl", pairs(8));
  TuneOptions o = options_for(dir, "answer");
  apply_method("orpo", o);
  o.lr = 1e-2;
  o.max_steps = 30;
  o.val_fraction = 0;
  o.batch_size = 8;
  o.preference.beta = 1e-9;  // the anchor is what is left
  // −log p of the model as it is, over the answers alone and over all tokens.
  Pool pool(2);
  const ModelFiles files = open_model(kModel);
  Model model = load_model(pool, files, {.profile = Profile::f32, .context = 64});
  Lora none;
  none.layers.resize(model.config.layers);
  lay_out(none, model.config);
  TrainingBatch answers, all;
  const PreferenceList data(load_pairs(pool, files, {.sources = o.data, .rows = o.rows}).examples);
  for (size_t i = 0; i < data.size(); ++i) {
    const ExampleView e = data[i].chosen;
    answers.append(e.ids, e.trained);
    all.append(e.ids, std::vector<uint8_t>(e.ids.size(), 1));
  }
  CHECK(all.trained() > answers.trained() + 8);
  LoraTraining training(pool, model, none, {.tokens = all.tokens()});
  const auto mean_loss = [&](const TrainingBatch& batch) {
    return training.evaluate(batch) / static_cast<double>(batch.trained());
  };
  const std::vector<TuneEvent> of_answer = steps_of(o);
  CHECK(of_answer[0].loss == doctest::Approx(mean_loss(answers)).epsilon(1e-6));
  o.out = dir.path() / "all";
  o.preference.anchor_over_prompt = true;
  const std::vector<TuneEvent> of_all = steps_of(o);
  CHECK(of_all[0].loss == doctest::Approx(mean_loss(all)).epsilon(1e-6));
  // What is told of the answers is the same; what is learnt is not.
  for (const char* key :
       {"logps/chosen", "rewards/chosen", "logits/chosen", "entropy", "mean_token_accuracy"})
    CHECK(metric(of_all[0], key) == doctest::Approx(metric(of_answer[0], key)).epsilon(1e-6));
  CHECK(of_all.back().loss < of_all[0].loss - 0.3);
  CHECK(metric(of_all.back(), "logps/chosen") != metric(of_answer.back(), "logps/chosen"));
}

TEST_CASE("wanted answers become likelier than unwanted ones, and a run goes on where it stopped") {
  const TempDir dir;
  std::vector<nlohmann::json> rows;
  for (size_t i = 0; i < 24; ++i)
    rows.push_back({{"prompt", "say " + std::to_string(i)},
                    {"completion", i % 2 == 0 ? "yes" : "NO"},
                    {"label", i % 2 == 0}});
  dir.file("rows.jsonl", lines(rows));
  const auto options = [&](const char* out) {
    TuneOptions o = options_for(dir, out);
    apply_method("kto", o);
    o.lr = 1e-2;
    o.epochs = 4;
    o.batch_size = 8;
    return o;
  };
  const TuneOptions whole = options("whole"), stopped = options("stopped");
  const std::vector<TuneEvent> steps = steps_of(whole);
  // 1 − σ(0) for every answer of a policy that is its reference.
  CHECK(steps.front().loss == doctest::Approx(0.5).epsilon(1e-9));
  CHECK(metric(steps.front(), "kl") == 0);
  CHECK(metric(steps.back(), "rewards/margins") > 0.05);
  CHECK(run_in_pieces(stopped) > 2);
  CHECK(adapter_bytes(stopped) == adapter_bytes(whole));
}

TEST_CASE("what KTO tells of the logits is what SFT tells of the same answers") {
  const TempDir dir;
  std::vector<nlohmann::json> labelled, all, wanted, others;
  for (size_t i = 0; i < 12; ++i) {
    nlohmann::json row = {{"prompt", "say " + std::to_string(i)},
                          {"completion", std::string(1 + i % 4, static_cast<char>('a' + i))}};
    all.push_back(row);
    (i % 3 == 0 ? wanted : others).push_back(row);
    row["label"] = i % 3 == 0;
    labelled.push_back(row);
  }
  dir.file("labelled.jsonl", lines(labelled));
  dir.file("all.jsonl", lines(all));
  dir.file("wanted.jsonl", lines(wanted));
  dir.file("others.jsonl", lines(others));
  // From an adapter that gets more tokens of the wanted answers right than of the others.
  TuneOptions before = options_for(dir, "before", "wanted.jsonl");
  before.epochs = 30;
  before.lr = 1e-2;
  before.val_fraction = 0;
  tune(before);
  const auto first_step = [&](const char* method, const char* rows) {
    TuneOptions o = options_for(dir, (std::string(method) + rows).c_str(), rows);
    apply_method(method, o);
    o.val_fraction = 0;
    o.batch_size = 64;
    o.max_steps = 1;
    o.adapter = before.out / "adapter";
    return steps_of(o).at(0);
  };
  const TuneEvent kto = first_step("kto", "labelled.jsonl");
  CHECK(metric(kto, "entropy") ==
        doctest::Approx(metric(first_step("sft", "all.jsonl"), "entropy")).epsilon(1e-6));
  REQUIRE(metric(first_step("sft", "others.jsonl"), "mean_token_accuracy") <
          metric(kto, "mean_token_accuracy") - 0.01);
  CHECK(metric(kto, "mean_token_accuracy") ==
        doctest::Approx(metric(first_step("sft", "wanted.jsonl"), "mean_token_accuracy"))
            .epsilon(1e-6));

  // Of a side that a step has no answers of, nothing is told.
  for (nlohmann::json& row : labelled) row["label"] = false;
  dir.file("unwanted.jsonl", lines(labelled));
  const TuneEvent unwanted = first_step("kto", "unwanted.jsonl");
  std::vector<std::string> names;
  for (const Metric& m : unwanted.metrics) names.push_back(m.name);
  CHECK(names == std::vector<std::string>{"rewards/rejected", "logps/rejected", "logits/rejected",
                                          "kl", "entropy"});
}

// ---- what learns ------------------------------------------------------------------------------

TEST_CASE("full fine-tuning ends in a model that has the loss it was chosen by") {
  const TempDir dir;
  std::vector<nlohmann::json> rows;
  for (size_t i = 0; i < 24; ++i)
    rows.push_back({{"prompt", "say " + std::to_string(i % 10)},
                    {"completion", std::string(1 + i % 5, static_cast<char>('a' + i % 3))}});
  dir.file("rows.jsonl", lines(rows));
  for (const char* model : {"llama", "llama_bias", "gemma3"}) {
    for (const Profile precision : {Profile::f32, Profile::bf16}) {
      CAPTURE(model);
      const auto options = [&](const char* out) {
        TuneOptions o = options_for(dir, out);
        o.model = kModel.parent_path() / model;
        o.precision = precision;
        o.learnt.full = true;
        o.lr = 1e-3;
        return o;
      };
      TuneOptions whole = options("whole"), stopped = options("stopped");
      std::filesystem::remove_all(whole.out);
      std::filesystem::remove_all(stopped.out);
      const TuneResult r = tune(whole);
      CHECK(r.adapter.empty());
      CHECK(*r.val_loss < *r.val_loss_before - 0.1);
      CHECK(run_in_pieces(stopped) > 2);
      CHECK(read_file(stopped.out / "model" / "model.safetensors") ==
            read_file(r.model / "model.safetensors"));

      // As a base for another run it starts where this one was best. The file holds the type that
      // was computed in.
      TuneOptions next = options_for(dir, "next");
      next.restart = true;
      next.model = r.model;
      next.precision = precision;
      next.max_steps = 1;
      // In bf16 norms learn in f32 and are written in bf16.
      CHECK(*tune(next).val_loss_before ==
            doctest::Approx(*r.val_loss).epsilon(precision == Profile::f32 ? 1e-6 : 1e-2));
    }
  }
}

TEST_CASE("a skill is learnt from nothing: sums modulo ten") {
  const TempDir dir;
  std::vector<nlohmann::json> rows;
  for (int a = 0; a < 10; ++a)
    for (int b = 0; b < 10; ++b)
      rows.push_back(nlohmann::json{{"prompt", std::to_string(a) + "+" + std::to_string(b) + "="},
                                    {"completion", std::to_string((a + b) % 10)}});
  dir.file("rows.jsonl", lines(rows));
  TuneOptions o = options_for(dir, "out");
  o.validation = dir.path() / "rows.jsonl";
  o.learnt.full = true;
  o.lr = 3e-3;
  o.epochs = 60;
  o.batch_size = 20;
  o.eval_steps = 0;
  o.save_steps = 1000;
  std::vector<double> right;
  tune(o, [&](const TuneEvent& e) {
    if (e.kind == TuneEvent::Kind::validation) right.push_back(metric(e, "mean_token_accuracy"));
  });
  // Of the two tokens of an answer one is its end, which is soon learnt: 0.975 are 95 of 100 sums.
  CHECK(right.front() < 0.1);
  CHECK(right.back() >= 0.975);
}

TEST_CASE("eight examples are learnt by heart") {
  const TempDir dir;
  std::vector<nlohmann::json> rows;
  for (int i = 0; i < 8; ++i)
    rows.push_back(
        nlohmann::json{{"prompt", "Question " + std::to_string(i)},
                       {"completion", "the answer is " + std::to_string(i * i * i * 7919 % 1000)}});
  dir.file("rows.jsonl", lines(rows));
  TuneOptions o = options_for(dir, "out");
  o.validation = dir.path() / "rows.jsonl";
  o.learnt.full = true;
  o.lr = 3e-3;
  o.epochs = 100;
  o.batch_size = 8;
  o.eval_steps = 0;
  o.save_steps = 1000;
  CHECK(*tune(o).val_loss < 0.01);
}

TEST_CASE("frozen layers keep their weights, and modules to save are learnt beside an adapter") {
  const TempDir dir;
  dir.file("rows.jsonl",
           lines({{{"prompt", "a"}, {"completion", "b"}}, {{"prompt", "c"}, {"completion", "d"}}}));
  TuneOptions o = options_for(dir, "frozen");
  o.model = kModel.parent_path() / "llama_bias";
  o.val_fraction = 0;
  o.learnt.full = true;
  o.learnt.frozen_layers = 1;
  o.max_steps = 3;
  const auto changed = [&](const std::filesystem::path& folder, const char* name) {
    const SafetensorsFolder before(o.model, "model"), after(folder, "model");
    const auto find = [&](const SafetensorsFolder& files) {
      for (const Tensor* t : files.tensors())
        if (t->name == name) {
          std::vector<float> values(t->count());
          dequantize(t->type, t->data, values);
          return values;
        }
      FAIL("no tensor " << name);
      return std::vector<float>();
    };
    return find(before) != find(after);
  };
  const TuneResult frozen = tune(o);
  CHECK_FALSE(changed(frozen.model, "model.embed_tokens.weight"));
  CHECK_FALSE(changed(frozen.model, "model.layers.0.self_attn.q_proj.weight"));
  CHECK_FALSE(changed(frozen.model, "model.layers.0.input_layernorm.weight"));
  CHECK(changed(frozen.model, "model.layers.1.self_attn.q_proj.weight"));
  CHECK(changed(frozen.model, "model.layers.1.self_attn.q_proj.bias"));
  CHECK(changed(frozen.model, "lm_head.weight"));

  o.out = dir.path() / "modules";
  o.learnt = {};
  o.learnt.modules_to_save = {"lm_head"};
  const TuneResult modules = tune(o);
  const ModelFiles files = open_model(o.model);
  const std::filesystem::path merged = dir.path() / "merged";
  write_merged_folder(merged, files, read_peft_adapter(modules.adapter, files.config), DType::f32);
  CHECK(changed(merged, "lm_head.weight"));
  CHECK(changed(merged, "model.layers.0.self_attn.q_proj.weight"));  // the adapter
  CHECK_FALSE(changed(merged, "model.norm.weight"));
  o.out = dir.path() / "tied";
  o.model = kModel;  // its head is its embedding
  CHECK(error_from([&] { tune(o); }).kind() == ErrorKind::usage);
}

TEST_CASE("a model that stays packed teaches its adapter the same, in f32 to the bit") {
  const TempDir dir;
  dir.file("rows.jsonl", lines({{{"prompt", "a"}, {"completion", "bcd"}},
                                {{"prompt", "c"}, {"completion", "de"}},
                                {{"prompt", "e"}, {"completion", "f"}}}));
  write_tiny_model(dir.path() / "tiny.gguf", {.type = DType::q4_k});
  for (const Profile precision : {Profile::f32, Profile::bf16}) {
    const auto options = [&](const char* out, bool packed) {
      TuneOptions o = options_for(dir, out);
      o.restart = true;
      o.model = dir.path() / "tiny.gguf";
      o.precision = precision;
      o.keep_quantized = packed;
      return o;
    };
    const TuneOptions packed = options("packed", true), plain = options("plain", false);
    const TuneResult found = tune(packed), wanted = tune(plain);
    if (precision == Profile::f32)
      CHECK(adapter_bytes(packed) == adapter_bytes(plain));
    else  // packed rows of the embedding are not rounded to bf16
      CHECK(found.train_loss == doctest::Approx(wanted.train_loss).epsilon(1e-2));
  }
}

TEST_CASE("LoRA+ moves B faster than A") {
  const TempDir dir;
  dir.file("rows.jsonl", lines({{{"prompt", "a"}, {"completion", "bcd"}}}));
  const auto largest = [&](double ratio, const char* half) {
    TuneOptions o = options_for(dir, "out");
    o.restart = true;
    o.val_fraction = 0;
    o.max_steps = 2;  // the first step of a warm-up moves nothing
    o.learnt.lora_plus_ratio = ratio;
    tune(o);
    const SafetensorsFolder file(o.out / "adapter", "adapter_model");
    float most = 0;
    for (const Tensor* t : file.tensors()) {
      if (t->name.find(half) == std::string::npos) continue;
      std::vector<float> values(t->count());
      dequantize(t->type, t->data, values);
      for (const float v : values) most = std::max(most, std::abs(v));
    }
    return most;
  };
  // AdamW's first update has the size of the learning rate.
  CHECK(largest(16, "lora_B") == doctest::Approx(16 * largest(1, "lora_B")).epsilon(1e-3));
}

TEST_CASE("raw text is learnt whole, in pieces of the maximum length") {
  const TempDir dir;
  std::string text;
  for (int i = 0; i < 60; ++i) text += "the hat in the tin. ";
  dir.file("texts/b.txt", text);
  dir.file("texts/a.txt", "another thing");
  TuneOptions o = options_for(dir, "out", "texts");
  o.method = Method::text;
  o.val_fraction = 0;
  o.max_steps = 20;
  o.lr = 2e-2;
  std::vector<TuneEvent> steps;
  const TuneResult r = tune(o, [&](const TuneEvent& e) {
    if (e.kind == TuneEvent::Kind::step) steps.push_back(e);
  });
  CHECK(r.counts.rows == 2);
  CHECK(r.trained_tokens + r.examples == r.tokens);  // all but the first of each piece
  CHECK(r.examples > 5);
  CHECK(steps.back().loss < steps.front().loss - 1);
}

// ---- bad steps --------------------------------------------------------------------------------

TEST_CASE("a value far above the last ones is an outlier, one among them is not") {
  OutlierGuard guard;
  for (int i = 0; i < 200; ++i) {
    CHECK(guard.z_score(2 + 0.1 * (i % 3)) < 6);
    guard.add(2 + 0.1 * (i % 3));
  }
  CHECK(guard.values.size() == OutlierGuard::kWindow);
  CHECK(guard.z_score(5) > 6);
  CHECK(guard.z_score(0) < 0);
  OutlierGuard young;
  young.add(1);
  CHECK(young.z_score(1e9) == 0);
}

TEST_CASE("a step that stands out is left out") {
  const TempDir dir;
  std::vector<nlohmann::json> rows;
  for (size_t i = 0; i < 40; ++i)
    rows.push_back({{"prompt", "a"}, {"completion", i == 39 ? "Q7!?zK" : "an an an"}});
  dir.file("rows.jsonl", lines(rows));
  TuneOptions o = options_for(dir, "out");
  o.batch_size = 1;
  o.epochs = 3;
  o.val_fraction = 0;
  o.lr = 1e-2;
  o.max_z_score = 4;
  std::vector<uint64_t> skipped, marked;
  const TuneResult r = tune(o, [&](const TuneEvent& e) {
    if (e.kind == TuneEvent::Kind::skipped) skipped.push_back(e.step);
  });
  CHECK(!skipped.empty());
  CHECK(r.skipped_steps == skipped.size());
  // The log says which.
  std::istringstream log(read_file(o.out / "log.jsonl"));
  for (std::string line; std::getline(log, line);)
    if (const auto j = nlohmann::json::parse(line); j.contains("skipped")) {
      CHECK(j["skipped"] == true);
      marked.push_back(j["step"]);
    }
  CHECK(marked == skipped);
}

TEST_CASE("a loss that is no number ends the run, naming the row") {
  const TempDir dir;
  dir.file("rows.jsonl", lines({{{"prompt", "a"}, {"completion", "b"}}}));
  TuneOptions o = options_for(dir, "out");
  o.val_fraction = 0;
  o.lr = 1e30;
  o.max_steps = 20;
  const Error e = error_from([&] { tune(o); });
  CHECK(e.kind() == ErrorKind::bad_input);
  CHECK(e.where().find("rows.jsonl") != std::string::npos);
}

namespace {

// The model with a head of its own and an embedding of `letter` that is no number to learn with.
std::filesystem::path broken_model(const TempDir& dir, char letter) {
  const std::filesystem::path folder = dir.path() / "broken";
  std::filesystem::create_directories(folder);
  for (const char* name : {"config.json", "tokenizer.json", "tokenizer_config.json"})
    std::filesystem::copy_file(kModel / name, folder / name);
  nlohmann::json config = nlohmann::json::parse(read_file(kModel / "config.json"));
  config["tie_word_embeddings"] = false;
  write_file(folder / "config.json", config.dump());

  const TokenId id = open_model(kModel).tokenizer.encode(std::string(1, letter)).back();
  const SafetensorsFile file(kModel / "model.safetensors");
  std::vector<Tensor> tensors(file.tensors().begin(), file.tensors().end());
  const Tensor embedding = *file.find("model.embed_tokens.weight");
  std::vector<std::byte> broken(embedding.data.begin(), embedding.data.end());
  const size_t row = embedding.data.size() / embedding.shape[0];
  REQUIRE(embedding.type == DType::bf16);
  const uint16_t infinity = 0x7F80;
  std::memcpy(broken.data() + static_cast<size_t>(id) * row, &infinity, sizeof infinity);
  for (Tensor& t : tensors)
    if (t.name == embedding.name) t.data = broken;
  tensors.push_back(embedding);
  tensors.back().name = "lm_head.weight";
  write_safetensors(folder / "model.safetensors", tensors, {{"format", "pt"}});
  return folder;
}

}  // namespace

TEST_CASE("a row that makes the loss no number is named by file and line, by every method") {
  const TempDir dir;
  const std::filesystem::path model = broken_model(dir, 'Z');
  // Row 5 of the second file is the only one with the letter.
  const auto rows_of = [](const std::string& method, bool broken) {
    std::vector<nlohmann::json> rows;
    for (size_t i = 0; i < 8; ++i) {
      const std::string answer =
          broken && i == 4 ? "aZb" : std::string(2, static_cast<char>('a' + i));
      nlohmann::json row = {{"prompt", "say " + std::to_string(i)}, {"completion", answer}};
      if (method == "dpo")
        row = {{"prompt", row["prompt"]}, {"chosen", "good"}, {"rejected", answer}};
      if (method == "kto") row["label"] = i % 2 == 0;
      if (method == "text") row = {{"text", "say " + answer}};
      rows.push_back(row);
    }
    return lines(rows);
  };
  for (const std::string method : {"sft", "text", "dpo", "kto"}) {
    CAPTURE(method);
    dir.file("sound.jsonl", rows_of(method, false));
    dir.file("broken.jsonl", rows_of(method, true));
    TuneOptions o = options_for(dir, method.c_str(), "sound.jsonl");
    apply_method(method, o);
    o.model = model;
    o.data.push_back({.path = dir.path() / "broken.jsonl"});
    o.rows.plain_template = "{prompt}:{completion}";
    o.val_fraction = 0;
    o.batch_size = 4;
    const Error e = error_from([&] { tune(o); });
    CHECK(e.kind() == ErrorKind::bad_input);
    CHECK(e.where().ends_with("broken.jsonl: line 5"));
    CHECK(e.problem().find("the loss of step") == 0);

    // Likewise where it is validated on.
    o.out = dir.path() / (method + "_validation");
    o.data.pop_back();
    o.validation = dir.path() / "broken.jsonl";
    const Error v = error_from([&] { tune(o); });
    CHECK(v.where().ends_with("broken.jsonl: line 5"));
    CHECK(v.problem() == "the validation loss after step 0 is no number");
  }
}

TEST_CASE("a run that does not fit the memory is refused before it begins") {
  const TempDir dir;
  dir.file("rows.jsonl", pairs(4));
  TuneOptions o = dpo_for(dir, "out");
  o.rows.max_length = 60;
  o.batch_size = 1'000'000'000;
  o.lora.rank = 1024;
  // Activations of so many tokens are more than any machine has.
  o.micro_batch_tokens = size_t{1} << 40;
  o.batch_tokens = size_t{1} << 40;
  CHECK(error_from([&] { tune(o); }).kind() == ErrorKind::no_space);

  TuneOptions allowed = dpo_for(dir, "out");
  allowed.memory = size_t{1} << 40;
  CHECK(tune(allowed).steps > 0);
  allowed.restart = true;
  for (const size_t bytes : {size_t{1000}, size_t{2} << 20}) {  // not the weights, not the rest
    allowed.memory = bytes;
    const Error e = error_from([&] { tune(allowed); });
    CHECK(e.kind() == ErrorKind::no_space);
    CHECK(std::string(e.what()).find("may be taken") != std::string::npos);
  }
}

TEST_CASE("presets and methods set what their names say") {
  TuneOptions o;
  apply_preset("rhea-dpo", o);
  CHECK(o.method == Method::dpo);
  CHECK(o.lora.rank == 8);
  CHECK(o.lora.alpha == 16);
  CHECK(o.preference.beta == 0.1);
  CHECK(o.lr == 1e-5);
  CHECK(o.batch_size == 1);
  CHECK(o.epochs == 1);
  apply_preset("full", o);
  CHECK(o.learnt.full);
  CHECK(error_from([&] { apply_preset("rhea", o); }).kind() == ErrorKind::usage);
  CHECK(error_from([&] { apply_method("ppo", o); }).kind() == ErrorKind::usage);
}
