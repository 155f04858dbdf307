// Every family of the table against transformers, on tiny models with computed weights
// (tests/parity/expect_families.py).
#include "engine/families.h"

#include <doctest/doctest.h>

#include <cmath>
#include <map>
#include <nlohmann/json.hpp>

#include "base/files.h"
#include "base/random.h"
#include "engine/forward.h"
#include "engine/training.h"
#include "formats/safetensors.h"
#include "lighten/lighten.h"
#include "support.h"

using namespace moru;
using Json = nlohmann::json;

namespace {

constexpr size_t kContext = 64;  // one more than the longest case: it decides longrope's factors

std::vector<std::filesystem::path> golden_files() {
  std::vector<std::filesystem::path> files;
  for (const auto& entry :
       std::filesystem::directory_iterator(MORU_SOURCE_DIR "/tests/golden/families"))
    files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  return files;
}

uint64_t splitmix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

uint64_t fnv1a(std::string_view text) {
  uint64_t h = 0xCBF29CE484222325;
  for (const char c : text) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001B3;
  return h;
}

// weights() of the script: multiples of 2^-8 and below, which every float type holds.
std::vector<float> weights_of(const std::string& name, const std::vector<size_t>& shape) {
  const auto has = [&](const char* part) { return name.find(part) != std::string::npos; };
  int shift = 2;
  if (has("embed")) {
    shift = 0;
  } else if (shape.size() > 1 && !has("bias")) {
    shift = (static_cast<int>(std::log2(shape.back())) - 1) / 2;
  }
  size_t count = 1;
  for (const size_t n : shape) count *= n;
  std::vector<float> values(count);
  for (size_t i = 0; i < count; ++i) {
    const auto u = static_cast<float>(splitmix64(fnv1a(name) + i) >> 56);
    values[i] = std::ldexp((2 * u - 255) / 256, -shift) + (has("norm") ? 1.0f : 0.0f);
  }
  return values;
}

// A Hugging Face folder of the golden file's model.
void write_folder(const std::filesystem::path& folder, const Json& golden) {
  std::filesystem::create_directories(folder);
  write_file(folder / "config.json", golden["config"].dump(1));
  for (const char* name : {"tokenizer.json", "tokenizer_config.json"})
    write_file(folder / name,
               read_file(std::filesystem::path(MORU_SOURCE_DIR "/tests/golden/tune/llama") / name));
  std::vector<std::vector<float>> values;
  std::vector<Tensor> tensors;
  for (const auto& [name, json] : golden["tensors"].items()) {
    const auto shape = json.get<std::vector<size_t>>();
    values.push_back(weights_of(name, shape));
    tensors.push_back({name, DType::f32, shape, {}});
  }
  for (size_t i = 0; i < tensors.size(); ++i) tensors[i].data = std::as_bytes(std::span(values[i]));
  write_safetensors_folder(folder, tensors, size_t{1} << 30);
}

// The model as a GGUF, matrices in `type` where their rows allow it.
void write_gguf_of(const std::filesystem::path& path, const ModelFiles& files, DType type) {
  Pool pool(2);
  lighten_model(pool, files, preset_of(traits(type).name), path, {});
}

// Logits of every position, fed in chunks of `chunk` tokens.
std::vector<std::vector<float>> logits_of(Engine& engine, std::span<const TokenId> ids,
                                          size_t chunk) {
  std::vector<std::vector<float>> all;
  KvSequence sequence = engine.cache().make_sequence();
  for (size_t at = 0; at < ids.size(); at += chunk) {
    const StepSpan span{&sequence, ids.subspan(at, std::min(chunk, ids.size() - at)), 0};
    engine.step({&span, 1}, [&](size_t, size_t count, float* logits) {
      const size_t vocab = engine.model().config.vocab;
      for (size_t i = 0; i < count; ++i)
        all.emplace_back(logits + i * vocab, logits + (i + 1) * vocab);
    });
  }
  return all;
}

struct Difference {
  double worst = 0;     // of a logit
  double relative = 0;  // root mean square, over that of the logits themselves
};

Difference difference(Pool& pool, const ModelFiles& files, const Json& golden,
                      Profile profile = Profile::f32, size_t chunk = 7) {
  const Model model = load_model(pool, files, {.profile = profile, .context = kContext});
  Engine engine(pool, model, {.cache_tokens = 512, .kv_type = KvType::f32});
  Difference d;
  double squares = 0, whole = 0;
  for (const auto& item : golden["cases"]) {
    const auto ids = item["ids"].get<std::vector<TokenId>>();
    const auto logits = logits_of(engine, ids, chunk);
    for (size_t at = 0; at < ids.size(); ++at)
      for (size_t k = 0; k < item["logits"][at].size(); ++k) {
        const double found = double{logits[at][(at * 61 + k * 71) % model.config.vocab]};
        const double expected = item["logits"][at][k].get<double>();
        const double off = std::abs(found - expected);
        d.worst = off <= d.worst ? d.worst : off;  // a NaN counts
        squares += off * off;
        whole += expected * expected;
      }
  }
  d.relative = std::sqrt(squares / whole);
  return d;
}

}  // namespace

TEST_CASE("f32 logits of every family are those of transformers, from its folder and its GGUF") {
  Pool pool(2);
  for (const auto& path : golden_files()) {
    CAPTURE(path.filename().string());
    const Json golden = Json::parse(read_file(path));
    const TempDir temp;
    write_folder(temp.path() / "hf", golden);
    const ModelFiles folder = open_model(temp.path() / "hf");
    CHECK(folder.unmatched.empty());
    const double from_folder = difference(pool, folder, golden).worst;
    write_gguf_of(temp.path() / "model.gguf", folder, DType::f32);
    const ModelFiles gguf = open_model(temp.path() / "model.gguf");
    const double from_gguf = difference(pool, gguf, golden).worst;
    MESSAGE(path.stem().string() << ": max abs difference " << from_folder << " from the folder, "
                                 << from_gguf << " from a GGUF");
    CHECK(from_folder <= 1e-4);
    CHECK(from_gguf <= 1e-4);
  }
}

// Weights are whole in bf16 but those of norms; what is rounded is the activations.
TEST_CASE("bf16 logits of every family are near those of transformers in f32") {
  Pool pool(2);
  for (const auto& path : golden_files()) {
    CAPTURE(path.filename().string());
    const Json golden = Json::parse(read_file(path));
    const TempDir temp;
    write_folder(temp.path() / "hf", golden);
    const ModelFiles files = open_model(temp.path() / "hf");
    // A router's logits are rounded, too, and a near tie is then another expert's.
    const double bound = files.config.experts.count == 0 ? 0.012 : 0.1;
    for (const size_t chunk : {size_t{7}, kContext}) {  // of few rows, of many
      CAPTURE(chunk);
      const double off = difference(pool, files, golden, Profile::bf16, chunk).relative;
      MESSAGE(path.stem().string() << ": " << off << " of the logits' root mean square");
      CHECK(off <= bound);
    }
  }
}

// Which tensors of a lightened model are quantized, all of them where rows are multiples of 32.
TEST_CASE("the exact profile of every family is f32 on its quantized weights") {
  Pool pool(2);
  for (const auto& path : golden_files()) {
    CAPTURE(path.filename().string());
    const Json golden = Json::parse(read_file(path));
    const TempDir temp;
    write_folder(temp.path() / "hf", golden);
    write_gguf_of(temp.path() / "model.gguf", open_model(temp.path() / "hf"), DType::q8_0);
    const ModelFiles files = open_model(temp.path() / "model.gguf");
    const LoadOptions exact{.profile = Profile::exact, .context = kContext};
    const LoadOptions f32{.profile = Profile::f32, .context = kContext};
    const Model quantized = load_model(pool, files, exact),
                reference = load_model(pool, files, f32);
    REQUIRE(quantized.embedding.quantized() != nullptr);
    Engine left(pool, quantized, {.cache_tokens = 512, .kv_type = KvType::f32});
    Engine right(pool, reference, {.cache_tokens = 512, .kv_type = KvType::f32});
    const auto ids = golden["cases"][1]["ids"].get<std::vector<TokenId>>();
    const auto found = logits_of(left, ids, 9), wanted = logits_of(right, ids, 9);
    double squares = 0, difference = 0;
    for (size_t at = 0; at < ids.size(); ++at)
      for (size_t i = 0; i < wanted[at].size(); ++i) {
        squares += std::pow(double{wanted[at][i]}, 2);
        difference += std::pow(double{found[at][i]} - double{wanted[at][i]}, 2);
      }
    // int16 activations round by 2^-16 of a row's largest; a dozen roundings add up.
    const double relative = std::sqrt(difference / squares);
    MESSAGE(path.stem().string() << ": relative distance " << relative);
    CHECK(relative < 1e-3);
    // Alone or in other chunks: the same bits.
    CHECK(logits_of(left, ids, 1) == found);
    CHECK(logits_of(left, ids, 64) == found);
  }
}

TEST_CASE(
    "families that are known and not computed are refused by name, with what to take instead") {
  const auto refused_folder = [](const char* architecture) {
    return error_from([&] {
      family_of_folder("config.json", Json{{"architectures", {architecture}}});
    });
  };
  for (const auto& [architecture, name, cure] :
       {std::array{"Llama4ForConditionalGeneration", "Llama 4", "Llama 3.1"},
        std::array{"Grok1ForCausalLM", "Grok", "gpt-oss"},
        std::array{"DeepseekV3ForCausalLM", "DeepSeek V3", "distillation"},
        std::array{"QWenLMHeadModel", "Qwen 1", "Qwen3"},
        std::array{"NoSuchForCausalLM", "NoSuchForCausalLM", "llama, mistral"}}) {
    CAPTURE(architecture);
    const Error e = refused_folder(architecture);
    CHECK(e.kind() == ErrorKind::unsupported);
    CHECK(e.problem().find(name) != std::string::npos);
    CHECK(e.cure().find(cure) != std::string::npos);
  }
  GgufMetadata m;
  m.set("general.architecture", GgufScalar{std::string("grok")});
  CHECK(error_from([&] { family_of_gguf(m); }).problem() ==
        "the family Grok (grok) is not supported");
}

TEST_CASE(
    "a key that changes the result and that a family does not have is refused by key and value") {
  const Json golden =
      Json::parse(read_file(MORU_SOURCE_DIR "/tests/golden/families/llama_bias.json"));
  const Family& llama = family_of_folder("config.json", golden["config"]);
  const auto error_with = [&](const char* key, const Json& value) {
    Json config = golden["config"];
    config[key] = value;
    return error_from([&] { config_of_folder(llama, "config.json", config); });
  };
  for (const auto& [key, value] :
       std::vector<std::pair<const char*, Json>>{{"use_cla", true},
                                                 {"pretraining_tp", 2},
                                                 {"mlp_bias", true},
                                                 {"attn_logit_softcapping", 50.0},
                                                 {"embedding_multiplier", 12.0},
                                                 {"logits_scaling", 8.0},
                                                 {"logit_scale", 0.0625},
                                                 {"sliding_window", 4096},
                                                 {"num_local_experts", 8},
                                                 {"hidden_act", "relu"},
                                                 {"rope_scaling", {{"rope_type", "mrope"}}},
                                                 {"partial_rotary_factor", 0.5}}) {
    CAPTURE(key);
    const Error e = error_with(key, value);
    CHECK(e.kind() == ErrorKind::unsupported);
    const std::string shown = value.is_object()   ? "mrope"
                              : value.is_string() ? "relu"
                                                  : value.dump();
    CHECK(e.problem() == "'" + shown + "' is not supported");
  }
  // Values that change nothing are fine.
  Json config = golden["config"];
  config["logits_scaling"] = 1.0;
  config["pretraining_tp"] = 1;
  config["mlp_bias"] = false;
  config["sliding_window"] = nullptr;
  CHECK(config_of_folder(llama, "config.json", config).logit_scale == 1);
}

TEST_CASE("models with a flag that has no backward pass are refused for training by the flag") {
  Pool pool(1);
  for (const auto& [name, flag] : std::map<std::string, std::string>{
           {"mixtral", "experts"},
           {"cohere2", "LayerNorm"},
           {"olmo2", "norms after the sub-layers alone"},
           {"hunyuan", "norms of queries and keys after rotation"}}) {
    CAPTURE(name);
    const TempDir temp;
    write_folder(
        temp.path() / "hf",
        Json::parse(read_file(std::filesystem::path(MORU_SOURCE_DIR "/tests/golden/families") /
                              (name + ".json"))));
    Model model =
        load_model(pool, open_model(temp.path() / "hf"), {.profile = Profile::f32, .context = 32});
    Lora lora;
    lora.layers.resize(model.config.layers);
    lora.layers[0][0] = {.rank = 2, .alpha = 2};
    lay_out(lora, model.config);
    const Error e = error_from([&] { LoraTraining(pool, model, lora, {.tokens = 64}); });
    CHECK(e.kind() == ErrorKind::unsupported);
    CHECK(e.problem().find(flag) != std::string::npos);
  }
}

// The loss of two documents under an adapter, and its gradient, by training's own forward pass.
struct Trained {
  Model& model;
  Lora lora;
  TrainingBatch batch;

  double loss(Pool& pool, std::vector<float>* gradient = nullptr) {
    LoraTraining training(pool, model, lora, {.tokens = batch.tokens()});
    if (gradient == nullptr) return training.evaluate(batch);
    training.clear_gradients();
    const double sum = training.accumulate(batch, 1);
    gradient->assign(training.gradients().begin(), training.gradients().end());
    return sum;
  }
};

TEST_CASE("families that train have the loss of their logits, and its slope as gradient") {
  Pool pool(2);
  size_t trained = 0;
  for (const auto& path : golden_files()) {
    CAPTURE(path.filename().string());
    const Json golden = Json::parse(read_file(path));
    const TempDir temp;
    write_folder(temp.path() / "hf", golden);
    const ModelFiles files = open_model(temp.path() / "hf");
    Model model = load_model(pool, files, {.profile = Profile::f32, .context = kContext});
    Trained t{.model = model, .lora = {}, .batch = {}};
    t.lora.layers.resize(model.config.layers);
    for (LoraLayer& layer : t.lora.layers)
      for (LoraPair& pair : layer) pair.rank = 2, pair.alpha = 2;
    lay_out(t.lora, model.config);
    double wanted = 0;
    Engine engine(pool, model, {.cache_tokens = 512, .kv_type = KvType::f32});
    for (const size_t which : {0, 2}) {
      const auto ids = golden["cases"][which]["ids"].get<std::vector<TokenId>>();
      const std::span<const TokenId> some = std::span(ids).first(24);
      t.batch.append(some, std::vector<uint8_t>(some.size(), 1));
      const auto logits = logits_of(engine, some, 64);
      for (size_t i = 1; i < some.size(); ++i)
        wanted += double{log_sum_exp(logits[i - 1])} -
                  double{logits[i - 1][static_cast<size_t>(some[i])]};
    }
    double loss = 0;
    try {
      loss = t.loss(pool);
    } catch (const Error& error) {
      CHECK(error.problem().find("cannot be trained yet") != std::string::npos);
      continue;
    }
    CHECK(loss == doctest::Approx(wanted).epsilon(2e-5));
    ++trained;
    Random random(7);
    for (float& value : t.lora.values) value = 0.1f * random.normal();
    std::vector<float> gradient;
    t.loss(pool, &gradient);
    const std::vector<float> start = t.lora.values;
    for (size_t p = 0; p < kProjections; ++p) {
      CAPTURE(traits(static_cast<Projection>(p)).name);
      // Along the gradient of one kind of matrix, its length is the slope.
      std::vector<float> direction(start.size());
      double square = 0;
      for (const LoraLayer& layer : t.lora.layers)
        for (const auto& [first, count] : {std::pair{layer[p].a, layer[p].rank * layer[p].in},
                                           {layer[p].b, layer[p].rank * layer[p].out}})
          for (size_t i = first; i < first + count; ++i) {
            direction[i] = gradient[i];
            square += std::pow(double{gradient[i]}, 2);
          }
      const double length = std::sqrt(square), step = 1e-2;
      double side[2];
      for (const int sign : {0, 1}) {
        const double scale = (sign == 0 ? -step : step) / length;
        for (size_t i = 0; i < start.size(); ++i)
          t.lora.values[i] = start[i] + static_cast<float>(scale * double{direction[i]});
        side[sign] = t.loss(pool);
      }
      t.lora.values = start;
      // f32 sums of 46 losses near 5 leave 1e-5 of each; the slope's curvature a share of step².
      CHECK((side[1] - side[0]) / (2 * step) == doctest::Approx(length).epsilon(0.01));
    }
  }
  CHECK(trained >= 12);
}
