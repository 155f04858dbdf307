// Weights that are learnt whole beside an adapter: PEFT's modules_to_save.
#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "base/files.h"
#include "engine/adapter.h"
#include "engine/training.h"
#include "formats/safetensors.h"
#include "support.h"
#include "tune/adapter.h"
#include "tune/trainer.h"

using namespace moru;

namespace {

// Adapters as PEFT writes them, and what PEFT computes with them
// (tests/parity/tune/make_adapters.py).
const std::filesystem::path kGolden = MORU_SOURCE_DIR "/tests/golden/tune";
struct Case {
  const char *adapter, *model;
};
constexpr Case kCases[] = {
    {"modules", "llama_bias"}, {"tied", "llama"}, {"own_head", "llama"}, {"norms", "gemma3"}};

Model load(Pool& pool, const std::filesystem::path& path) {
  return load_model(pool, open_model(path), {.profile = Profile::f32, .context = 64});
}

Lora no_adapter(const Config& config) {
  Lora lora;
  lora.layers.resize(config.layers);
  lay_out(lora, config);
  return lora;
}

// The losses of every token of `ids` after the first.
std::vector<float> losses(Pool& pool, Model& model, const Lora& lora,
                          const std::vector<int32_t>& ids) {
  TrainingBatch batch;
  batch.append(ids, std::vector<uint8_t>(ids.size(), 1));
  LoraTraining training(pool, model, lora, {.tokens = ids.size()});
  std::vector<float> nll(ids.size());
  training.evaluate(batch, nll);
  nll.pop_back();
  return nll;
}

void check_close(const std::vector<float>& x, const std::vector<float>& y) {
  REQUIRE(x.size() == y.size());
  for (size_t i = 0; i < x.size(); ++i) CHECK(std::abs(x[i] - y[i]) < 1e-4f);
}

struct Expected {
  std::vector<int32_t> ids;
  std::vector<float> losses;
};
Expected expected_of(const char* adapter) {
  const SafetensorsFile file(kGolden / adapter / "losses.safetensors");
  const Tensor &ids = *file.find("ids"), &found = *file.find("losses");
  Expected out;
  for (size_t i = 0; i < ids.count(); ++i)
    out.ids.push_back(static_cast<int32_t>(reinterpret_cast<const int64_t*>(ids.data.data())[i]));
  out.losses.resize(found.count());
  dequantize(found.type, found.data, out.losses);
  return out;
}

nlohmann::json config_in(const std::filesystem::path& folder) {
  return nlohmann::json::parse(read_file(folder / "adapter_config.json"));
}

std::string rows() {
  std::string text;
  for (size_t i = 0; i < 12; ++i)
    text += nlohmann::json{{"prompt", "say " + std::to_string(i)},
                           {"completion", std::string(1 + i % 5, static_cast<char>('a' + i % 3))}}
                .dump() +
            "\n";
  return text;
}

TuneOptions options_for(const TempDir& dir, const char* out, const char* model) {
  TuneOptions o;
  o.model = kGolden / model;
  o.data = {{.path = dir.path() / "rows.jsonl"}};
  o.validation = dir.path() / "rows.jsonl";
  o.out = dir.path() / out;
  o.rows.plain_template = "{prompt}:{completion}";
  o.rows.max_length = 64;
  o.precision = Profile::f32;
  o.threads = 2;
  o.epochs = 2;
  o.batch_size = 4;
  o.lr = 3e-3;
  return o;
}

}  // namespace

TEST_CASE("an adapter with whole modules computes what PEFT computes, merged and in its folder") {
  Pool pool(2);
  for (const Case& c : kCases) {
    CAPTURE(c.adapter);
    const ModelFiles files = open_model(kGolden / c.model);
    const Expected wanted = expected_of(c.adapter);
    const TempDir dir;
    const Lora read = read_peft_adapter(kGolden / c.adapter, files.config);
    CHECK_FALSE(read.whole.empty());
    write_peft_adapter(dir.path() / "again", read, files.config, c.model);
    const Lora again = read_peft_adapter(dir.path() / "again", files.config);
    for (const WholeWeight& w : read.whole)
      REQUIRE_MESSAGE(again.find_whole(w.name) != nullptr, w.name);
    // What PEFT saved is what we save.
    const SafetensorsFolder ours(dir.path() / "again", "adapter_model"),
        theirs(kGolden / c.adapter, "adapter_model");
    CHECK(ours.tensors().size() == theirs.tensors().size());
    for (const Tensor* tensor : theirs.tensors()) {
      CAPTURE(tensor->name);
      const Tensor* found = ours.find(tensor->name);
      REQUIRE(found != nullptr);
      CHECK(found->shape == tensor->shape);
    }
    for (const Lora* lora : {&read, &again}) {
      write_merged_gguf(dir.path() / "m.gguf", files, *lora, DType::f32);
      Model gguf = load(pool, dir.path() / "m.gguf");
      check_close(losses(pool, gguf, no_adapter(files.config), wanted.ids), wanted.losses);
    }
    write_merged_folder(dir.path() / "hf", files, read, DType::f32);
    Model folder = load(pool, dir.path() / "hf");
    check_close(losses(pool, folder, no_adapter(files.config), wanted.ids), wanted.losses);
    // The same over a GGUF base.
    write_merged_gguf(dir.path() / "base.gguf", files, no_adapter(files.config), DType::f32);
    write_merged_folder(dir.path() / "back", open_model(dir.path() / "base.gguf"), read,
                        DType::f32);
    Model back = load(pool, dir.path() / "back");
    check_close(losses(pool, back, no_adapter(files.config), wanted.ids), wanted.losses);
    if (std::string_view(c.adapter) == "own_head") continue;  // not while it is tied
    Model base = load(pool, kGolden / c.model);
    check_close(losses(pool, base, read, wanted.ids), wanted.losses);
  }
}

TEST_CASE("a run with whole modules ends in a PEFT folder that merges, and goes on from it") {
  const TempDir dir;
  dir.file("rows.jsonl", rows());
  for (const char* model : {"llama", "llama_bias", "gemma3"}) {
    CAPTURE(model);
    TuneOptions o = options_for(dir, "first", model);
    o.restart = true;
    const bool tied = open_model(o.model).config.tied_head;
    o.learnt.modules_to_save = {"embed_tokens", "norm"};
    if (!tied) o.learnt.modules_to_save.push_back("lm_head");
    const TuneResult first = tune(o);
    CHECK(first.model.empty());
    CHECK(*first.val_loss < *first.val_loss_before - 0.05);
    CHECK(config_in(first.adapter).value("ensure_weight_tying", false) == tied);
    CHECK(config_in(first.adapter)["modules_to_save"] ==
          (tied ? nlohmann::json{"model.embed_tokens", "model.norm"}
                : nlohmann::json{"lm_head", "model.embed_tokens", "model.norm"}));

    const auto starts_at = [&](TuneOptions next) {
      next.restart = true;
      next.learnt.modules_to_save.clear();
      next.out = dir.path() / "next";
      next.max_steps = 1;
      return *tune(next).val_loss_before;
    };
    TuneOptions next = o;
    next.adapter = first.adapter;
    CHECK(starts_at(next) == doctest::Approx(*first.val_loss).epsilon(1e-6));
    // What the second run adds stands beside what the first had.
    CHECK(config_in(dir.path() / "next" / "adapter")["modules_to_save"] ==
          config_in(first.adapter)["modules_to_save"]);
    const ModelFiles files = open_model(o.model);
    write_merged_folder(dir.path() / "merged", files,
                        read_peft_adapter(first.adapter, files.config), DType::f32);
    next.adapter.clear();
    next.model = dir.path() / "merged";
    CHECK(starts_at(next) == doctest::Approx(*first.val_loss).epsilon(1e-5));
    std::filesystem::remove_all(dir.path() / "merged");
  }
}

TEST_CASE("whole modules that cannot be are refused by name") {
  const Config llama = open_model(kGolden / "llama").config;
  const TempDir dir;
  // The embedding of a tied model without its head.
  nlohmann::json j = config_in(kGolden / "tied");
  j["ensure_weight_tying"] = false;
  dir.file("adapter_config.json", j.dump());
  const SafetensorsFolder tied(kGolden / "tied", "adapter_model");
  std::vector<Tensor> tensors;
  for (const Tensor* tensor : tied.tensors())
    if (tensor->name.find("lm_head") == std::string::npos) tensors.push_back(*tensor);
  write_safetensors(dir.path() / "adapter_model.safetensors", tensors, {{"format", "pt"}});
  const Error loose = error_from([&] { read_peft_adapter(dir.path(), llama); });
  CHECK(loose.kind() == ErrorKind::unsupported);
  CHECK(loose.where().find("ensure_weight_tying") != std::string::npos);
  // A module of no model.
  tensors.back().name = "base_model.model.model.vision.weight";
  write_safetensors(dir.path() / "adapter_model.safetensors", tensors, {{"format", "pt"}});
  CHECK(error_from([&] { read_peft_adapter(dir.path(), llama); }).where().find("vision") !=
        std::string::npos);

  // Weights of another shape.
  const ModelFiles files = open_model(kGolden / "llama_bias");
  Lora lora = read_peft_adapter(kGolden / "modules", files.config);
  for (WholeWeight& w : lora.whole)
    if (w.name == "output.weight") --w.rows;
  CHECK(error_from([&] {
          write_merged_gguf(dir.path() / "m.gguf", files, lora, DType::f32);
        }).what() == doctest::Contains("output.weight"));
  CHECK_FALSE(std::filesystem::exists(dir.path() / "m.gguf"));

  dir.file("rows.jsonl", rows());
  TuneOptions o = options_for(dir, "out", "llama");
  o.learnt.modules_to_save = {"blk.0.attn_q.weight"};
  CHECK(error_from([&] { tune(o); }).kind() == ErrorKind::usage);  // it has an adapter
  o.learnt.modules_to_save = {};
  o.adapter = kGolden / "own_head";
  CHECK(error_from([&] { tune(o); }).kind() == ErrorKind::bad_input);  // one the model has not
  CHECK(error_from([&] { make_adapter(read_peft_adapter(kGolden / "tied", llama)); }).kind() ==
        ErrorKind::usage);
}
