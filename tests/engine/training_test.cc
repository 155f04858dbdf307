#include "engine/training.h"

#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>

#include "base/files.h"
#include "base/random.h"
#include "engine/model_files.h"
#include "support.h"

using namespace moru;

namespace {

// Tiny models with random weights and what PEFT computes on them (tests/parity/tune).
const std::filesystem::path kGolden = MORU_SOURCE_DIR "/tests/golden/tune";
constexpr const char* kModels[] = {"llama", "llama_bias", "gemma3"};

Model load(Pool& pool, const char* name, Profile profile) {
  return load_model(pool, open_model(kGolden / name), {.profile = profile, .context = 64});
}

std::vector<int32_t> integers(const SafetensorsFile& file, std::string_view name) {
  const Tensor& t = *file.find(name);
  REQUIRE(t.type == DType::i32);
  std::vector<int32_t> out(t.count());
  std::memcpy(out.data(), t.data.data(), t.data.size());
  return out;
}

std::vector<float> floats(const Tensor& t) {
  std::vector<float> out(t.count());
  dequantize(t.type, t.data, out);
  return out;
}

std::string peft_name(const char* what, size_t layer, size_t p, const char* half) {
  return std::string(what) + ".base_model.model.model.layers." + std::to_string(layer) + "." +
         std::string(traits(static_cast<Projection>(p)).module) + ".lora_" + half + ".weight";
}

// The adapter of expected.safetensors.
Lora expected_adapter(const SafetensorsFile& file, const Config& config) {
  Lora lora;
  lora.layers.resize(config.layers);
  const float alpha = std::stof(file.metadata().at("alpha"));
  for (LoraLayer& layer : lora.layers)
    for (LoraPair& pair : layer) pair.rank = 4, pair.alpha = alpha;
  lay_out(lora, config);
  for (size_t l = 0; l < config.layers; ++l)
    for (size_t p = 0; p < kProjections; ++p) {
      const LoraPair& pair = lora.layers[l][p];
      const auto a = floats(*file.find(peft_name("adapter", l, p, "A")));
      const auto b = floats(*file.find(peft_name("adapter", l, p, "B")));
      std::copy(a.begin(), a.end(), lora.a(pair).begin());
      std::copy(b.begin(), b.end(), lora.b(pair).begin());
    }
  return lora;
}

struct Document {
  std::vector<int32_t> ids;
  std::vector<uint8_t> trained;
};

std::vector<Document> expected_documents(const SafetensorsFile& file) {
  const auto ids = integers(file, "ids"), trained = integers(file, "trained");
  std::vector<Document> documents;
  size_t at = 0;
  for (const int32_t length : integers(file, "lengths")) {
    Document& d = documents.emplace_back();
    for (int32_t i = 0; i < length; ++i, ++at) {
      d.ids.push_back(ids[at]);
      d.trained.push_back(static_cast<uint8_t>(trained[at]));
    }
  }
  return documents;
}

TrainingBatch batch_of(std::span<const Document> documents) {
  TrainingBatch batch;
  for (const Document& d : documents) batch.append(d.ids, d.trained);
  return batch;
}

double relative_distance(std::span<const float> x, std::span<const float> y) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    difference += std::pow(double{x[i]} - double{y[i]}, 2);
    size += std::pow(double{y[i]}, 2);
  }
  return std::sqrt(difference / size);
}

struct Gradients {
  double loss = 0;
  std::vector<float> values, nll;
};
Gradients gradients_of(Pool& pool, const Model& model, const Lora& lora,
                       std::span<const Document> documents, TrainingOptions options = {}) {
  const TrainingBatch batch = batch_of(documents);
  options.tokens = batch.tokens();
  LoraTraining training(pool, model, lora, options);
  training.clear_gradients();
  Gradients out;
  out.nll.resize(batch.tokens());
  out.loss = training.accumulate(batch, 1 / static_cast<float>(batch.trained()), out.nll) /
             static_cast<double>(batch.trained());
  const auto gradients = training.gradients();
  out.values.assign(gradients.begin(), gradients.end());
  return out;
}

Lora random_adapter(const Config& config, std::span<const Projection> targets, size_t rank) {
  Lora lora;
  lora.layers.resize(config.layers);
  for (LoraLayer& layer : lora.layers)
    for (const Projection target : targets) {
      layer[static_cast<size_t>(target)].rank = rank;
      layer[static_cast<size_t>(target)].alpha = 8;
    }
  lay_out(lora, config);
  Random random(5);
  for (float& value : lora.values) value = 0.1f * random.normal();
  return lora;
}

std::vector<Document> random_documents(std::initializer_list<size_t> lengths) {
  std::vector<Document> documents;
  Random random(3);
  for (const size_t length : lengths) {
    Document& d = documents.emplace_back();
    for (size_t i = 0; i < length; ++i) {
      d.ids.push_back(static_cast<int32_t>(random.below(256)));
      d.trained.push_back(i + 1 == length || random.below(2) == 0 ? 1 : 0);
    }
  }
  return documents;
}

}  // namespace

TEST_CASE("losses and gradients are PEFT's in f32") {
  Pool pool(2);
  for (const char* name : kModels) {
    CAPTURE(name);
    const Model model = load(pool, name, Profile::f32);
    const SafetensorsFile file(kGolden / name / "expected.safetensors");
    const Lora lora = expected_adapter(file, model.config);
    const auto documents = expected_documents(file);
    const Gradients found = gradients_of(pool, model, lora, documents);

    const auto nll = floats(*file.find("nll"));
    for (size_t i = 0; i < nll.size(); ++i)
      CHECK(found.nll[i] == doctest::Approx(nll[i]).epsilon(2e-5));
    for (size_t l = 0; l < model.config.layers; ++l) {
      for (size_t p = 0; p < kProjections; ++p) {
        const LoraPair& pair = lora.layers[l][p];
        const std::span<const float> all(found.values);
        CAPTURE(l);
        CAPTURE(p);
        CHECK(relative_distance(all.subspan(pair.a, pair.rank * pair.in),
                                floats(*file.find(peft_name("gradient", l, p, "A")))) < 1e-4);
        CHECK(relative_distance(all.subspan(pair.b, pair.rank * pair.out),
                                floats(*file.find(peft_name("gradient", l, p, "B")))) < 1e-4);
      }
    }
  }
}

TEST_CASE("bf16 gradients stay near f32's") {
  Pool pool(2);
  for (const char* name : kModels) {
    CAPTURE(name);
    const SafetensorsFile file(kGolden / name / "expected.safetensors");
    const auto documents = expected_documents(file);
    const Model f32 = load(pool, name, Profile::f32), bf16 = load(pool, name, Profile::bf16);
    const Lora lora = expected_adapter(file, f32.config);
    const Gradients exact = gradients_of(pool, f32, lora, documents);
    const Gradients rounded = gradients_of(pool, bf16, lora, documents);
    CHECK(rounded.loss == doctest::Approx(exact.loss).epsilon(5e-3));
    // 8 bits a number over some ten roundings; models of width 48 average little of it away.
    CHECK(relative_distance(rounded.values, exact.values) < 3e-2);
  }
}

TEST_CASE("the number of threads changes no bit") {
  for (const char* name : {"llama", "gemma3"}) {
    for (const Profile profile : {Profile::f32, Profile::bf16}) {
      CAPTURE(name);
      std::vector<Gradients> found;
      for (const size_t threads : {1, 2, 3}) {
        Pool pool(threads);
        const Model model = load(pool, name, profile);
        const Lora lora = random_adapter(
            model.config, std::array{Projection::q, Projection::v, Projection::down}, 4);
        found.push_back(gradients_of(pool, model, lora, random_documents({60, 13, 64, 5})));
      }
      for (size_t i = 1; i < found.size(); ++i) {
        CHECK(found[i].loss == found[0].loss);
        CHECK(found[i].values == found[0].values);
      }
    }
  }
}

TEST_CASE("what is made anew has the bits of what is kept") {
  Pool pool(2);
  for (const char* name : kModels) {
    for (const Profile profile : {Profile::f32, Profile::bf16}) {
      CAPTURE(name);
      const Model model = load(pool, name, profile);
      const Lora lora =
          random_adapter(model.config, std::array{Projection::k, Projection::o, Projection::up}, 3);
      const auto documents = random_documents({40, 30});
      const Gradients kept =
          gradients_of(pool, model, lora, documents, {.recompute = Recompute::none});
      for (const Recompute level : {Recompute::light, Recompute::block}) {
        const Gradients remade = gradients_of(pool, model, lora, documents, {.recompute = level});
        CHECK(remade.loss == kept.loss);
        CHECK(remade.values == kept.values);
      }
    }
  }
}

TEST_CASE("packed documents give what each gives alone, and so do small batches") {
  Pool pool(2);
  for (const char* name : kModels) {
    CAPTURE(name);
    const Model model = load(pool, name, Profile::f32);
    const Lora lora = random_adapter(
        model.config, std::array{Projection::q, Projection::k, Projection::v, Projection::gate}, 4);
    const auto documents = random_documents({17, 5, 40, 11, 2, 33, 8, 21});
    const Gradients packed = gradients_of(pool, model, lora, documents);

    LoraTraining training(pool, model, lora, {.tokens = 64});
    training.clear_gradients();
    const auto learnt = static_cast<float>(batch_of(documents).trained());
    size_t at = 0;
    for (const Document& d : documents) {
      const TrainingBatch batch = batch_of(std::span(&d, 1));
      std::vector<float> nll(batch.tokens());
      training.accumulate(batch, 1 / learnt, nll);
      for (const float one : nll) CHECK(one == doctest::Approx(packed.nll[at++]).epsilon(1e-5));
    }
    const auto gradients = training.gradients();
    CHECK(relative_distance(gradients, packed.values) < 1e-5);
  }
}

TEST_CASE("any subset of matrices, also of single layers, has the gradient it has among all") {
  Pool pool(2);
  const Model model = load(pool, "gemma3", Profile::f32);
  const auto documents = random_documents({30, 12});
  std::vector<Projection> all;
  for (size_t p = 0; p < kProjections; ++p) all.push_back(static_cast<Projection>(p));
  const Lora whole = random_adapter(model.config, all, 3);
  for (size_t layer = 0; layer < model.config.layers; ++layer) {
    for (size_t p = 0; p < kProjections; ++p) {
      CAPTURE(layer);
      CAPTURE(p);
      // The other matrices are merged into the base by leaving their B at zero in both.
      Lora all_zero_but_one = whole, one;
      for (const LoraLayer& pairs : whole.layers)
        for (const LoraPair& pair : pairs) {
          const auto b = all_zero_but_one.b(pair);
          if (&pair != &whole.layers[layer][p]) std::fill(b.begin(), b.end(), 0.0f);
        }
      one.layers.resize(model.config.layers);
      one.layers[layer][p] = {.rank = 3, .alpha = 8};
      lay_out(one, model.config);
      const LoraPair &from = whole.layers[layer][p], &to = one.layers[layer][p];
      std::ranges::copy(whole.a(from), one.a(to).begin());
      std::ranges::copy(whole.b(from), one.b(to).begin());
      const Gradients among = gradients_of(pool, model, all_zero_but_one, documents);
      const Gradients alone = gradients_of(pool, model, one, documents);
      const std::span<const float> found(alone.values), wanted(among.values);
      CHECK(relative_distance(found.subspan(to.a, 3 * to.in), wanted.subspan(from.a, 3 * to.in)) <
            1e-5);
      CHECK(relative_distance(found.subspan(to.b, 3 * to.out), wanted.subspan(from.b, 3 * to.out)) <
            1e-5);
    }
  }
}

TEST_CASE("evaluation gives the loss of training") {
  Pool pool(2);
  const Model model = load(pool, "gemma3", Profile::f32);
  const Lora lora = random_adapter(model.config, std::array{Projection::o}, 2);
  const TrainingBatch batch = batch_of(random_documents({30, 12}));
  LoraTraining training(pool, model, lora, {.tokens = batch.tokens()});
  std::vector<float> nll(batch.tokens());
  const double learnt = training.accumulate(batch, 1);
  CHECK(training.evaluate(batch, nll) == learnt);
  double sum = 0;
  for (const float one : nll) sum += double{one};
  CHECK(sum == learnt);
}

TEST_CASE("a batch without a token to learn has loss 0 and no gradient") {
  Pool pool(1);
  const Model model = load(pool, "llama", Profile::f32);
  const Lora lora = random_adapter(model.config, std::array{Projection::q}, 2);
  TrainingBatch batch;
  batch.append(std::array{1, 2, 3}, std::array<uint8_t, 3>{1, 0, 0});
  LoraTraining training(pool, model, lora, {.tokens = 8});
  training.clear_gradients();
  CHECK(training.accumulate(batch, 1) == 0);
  for (const float g : training.gradients()) CHECK(g == 0);
}
