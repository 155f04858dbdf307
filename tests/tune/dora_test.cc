#include <algorithm>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>

#include "base/files.h"
#include "base/random.h"
#include "engine/adapter.h"
#include "engine/training.h"
#include "formats/safetensors.h"
#include "support.h"
#include "tune/adapter.h"

using namespace moru;

namespace {

// Tiny models with random weights, DoRA adapters of theirs as PEFT writes them, and what PEFT
// computes with those (tests/parity/tune/expect_dora.py).
const std::filesystem::path kGolden = MORU_SOURCE_DIR "/tests/golden/tune";
constexpr const char* kModels[] = {"llama", "llama_bias", "gemma3"};

Model load(Pool& pool, const std::filesystem::path& path, Profile profile = Profile::f32) {
  return load_model(pool, open_model(path), {.profile = profile, .context = 64});
}

std::vector<float> floats(const Tensor& t) {
  std::vector<float> out(t.count());
  dequantize(t.type, t.data, out);
  return out;
}

std::vector<int32_t> integers(const SafetensorsFile& file, std::string_view name) {
  const Tensor& t = *file.find(name);
  std::vector<int32_t> out(t.count());
  std::memcpy(out.data(), t.data.data(), t.data.size());
  return out;
}

TrainingBatch documents_of(const char* model) {
  const SafetensorsFile file(kGolden / model / "expected.safetensors");
  const auto ids = integers(file, "ids"), trained = integers(file, "trained");
  TrainingBatch batch;
  size_t at = 0;
  for (const int32_t length : integers(file, "lengths")) {
    const auto n = static_cast<size_t>(length);
    const std::vector<uint8_t> learnt(trained.begin() + static_cast<std::ptrdiff_t>(at),
                                      trained.begin() + static_cast<std::ptrdiff_t>(at + n));
    batch.append(std::span(ids).subspan(at, n), learnt);
    at += n;
  }
  return batch;
}

double relative_distance(std::span<const float> x, std::span<const float> y) {
  REQUIRE(x.size() == y.size());
  double difference = 0, size = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    difference += std::pow(double{x[i]} - double{y[i]}, 2);
    size += std::pow(double{y[i]}, 2);
  }
  return std::sqrt(difference / size);
}

struct Found {
  std::vector<float> nll, gradients;
};
Found run(Pool& pool, Model& model, const Lora& lora, const TrainingBatch& batch,
          Recompute level = Recompute::light) {
  LoraTraining training(pool, model, lora, {.tokens = batch.tokens(), .recompute = level});
  training.clear_gradients();
  Found out;
  out.nll.resize(batch.tokens());
  training.accumulate(batch, 1 / static_cast<float>(batch.trained()), out.nll);
  const auto gradients = training.gradients();
  out.gradients.assign(gradients.begin(), gradients.end());
  return out;
}

std::string peft_name(size_t layer, size_t p, const char* part) {
  return "base_model.model.model.layers." + std::to_string(layer) + "." +
         std::string(traits(static_cast<Projection>(p)).module) + part;
}

Lora no_adapter(const Config& config) {
  Lora lora;
  lora.layers.resize(config.layers);
  lay_out(lora, config);
  return lora;
}

// ‖W + s·B·A‖ of a row, with B·A formed.
double direct_norm(const Model& model, const Lora& lora, size_t layer, size_t p, size_t row) {
  const LoraPair& pair = lora.layers[layer][p];
  std::vector<float> w(pair.in);
  matrix_of(model.layers[layer], static_cast<Projection>(p)).read_rows(row, 1, w.data());
  const auto a = lora.a(pair), b = lora.b(pair);
  double squares = 0;
  for (size_t j = 0; j < pair.in; ++j) {
    double sum = double{w[j]};
    for (size_t i = 0; i < pair.rank; ++i)
      sum += double{pair.scale} * double{b[row * pair.rank + i]} * double{a[i * pair.in + j]};
    squares += sum * sum;
  }
  return std::sqrt(squares);
}

}  // namespace

TEST_CASE("DoRA's losses and gradients are PEFT's in f32, near them in bf16") {
  Pool pool(2), one(1);
  for (const char* name : kModels) {
    CAPTURE(name);
    Model model = load(pool, kGolden / name);
    const Lora lora = read_peft_adapter(kGolden / name / "dora", model.config);
    const TrainingBatch batch = documents_of(name);
    const Found found = run(pool, model, lora, batch);
    const SafetensorsFile file(kGolden / name / "expected_dora.safetensors");
    const auto nll = floats(*file.find("nll"));
    for (size_t i = 0; i < nll.size(); ++i)
      CHECK(found.nll[i] == doctest::Approx(nll[i]).epsilon(2e-5));
    const std::span<const float> all(found.gradients);
    for (size_t l = 0; l < model.config.layers; ++l) {
      for (size_t p = 0; p < kProjections; ++p) {
        CAPTURE(l);
        CAPTURE(p);
        const LoraPair& pair = lora.layers[l][p];
        const auto wanted = [&](const char* part) {
          const Tensor* tensor = file.find(peft_name(l, p, part));
          REQUIRE(tensor != nullptr);
          return floats(*tensor);
        };
        CHECK(relative_distance(all.subspan(pair.a, pair.rank * pair.in),
                                wanted(".lora_A.weight")) < 1e-4);
        CHECK(relative_distance(all.subspan(pair.b, pair.rank * pair.out),
                                wanted(".lora_B.weight")) < 1e-4);
        CHECK(relative_distance(all.subspan(pair.magnitude, pair.out),
                                wanted(".lora_magnitude_vector")) < 1e-4);
      }
    }
    CHECK(run(one, model, lora, batch).gradients == found.gradients);
    Model half = load(pool, kGolden / name, Profile::bf16);
    const Found rounded = run(pool, half, lora, batch);
    CHECK(relative_distance(rounded.gradients, found.gradients) < 3e-2);
    for (const Recompute level : {Recompute::none, Recompute::block}) {
      CHECK(run(pool, model, lora, batch, level).gradients == found.gradients);
      CHECK(run(pool, half, lora, batch, level).gradients == rounded.gradients);
    }
  }
}

TEST_CASE("DoRA whose magnitudes are the norms with B·A formed is plain LoRA") {
  Pool pool(2);
  for (const char* name : kModels) {
    CAPTURE(name);
    Model model = load(pool, kGolden / name);
    Lora dora = read_peft_adapter(kGolden / name / "dora", model.config);
    for (size_t l = 0; l < model.config.layers; ++l)
      for (size_t p = 0; p < kProjections; ++p) {
        const auto m = dora.magnitude(dora.layers[l][p]);
        for (size_t row = 0; row < m.size(); ++row)
          m[row] = static_cast<float>(direct_norm(model, dora, l, p, row));
      }
    Lora plain = dora;
    plain.dora = false;
    lay_out(plain, model.config);
    std::copy_n(dora.values.begin(), plain.values.size(), plain.values.begin());
    const TrainingBatch batch = documents_of(name);
    const Found found = run(pool, model, dora, batch), wanted = run(pool, model, plain, batch);
    // Every factor is 1 within a rounding or two of f32.
    for (size_t i = 0; i < wanted.nll.size(); ++i)
      CHECK(found.nll[i] == doctest::Approx(wanted.nll[i]).epsilon(1e-6));
    CHECK(relative_distance(std::span(found.gradients).first(plain.values.size()),
                            wanted.gradients) < 2e-6);
  }
}

TEST_CASE("a new DoRA adapter changes nothing, whatever form the weights have") {
  Pool pool(2);
  Model model = load(pool, kGolden / "llama_bias");
  Lora lora = make_lora(
      model.config,
      {.rank = 4, .alpha = 8, .dora = true, .targets = {Projection::q, Projection::down}}, 1);
  take_magnitudes(pool, model, lora);
  const TrainingBatch batch = documents_of("llama_bias");
  const Found found = run(pool, model, lora, batch),
              base = run(pool, model, no_adapter(model.config), batch);
  for (size_t i = 0; i < base.nll.size(); ++i)
    CHECK(found.nll[i] == doctest::Approx(base.nll[i]).epsilon(1e-6));
}

TEST_CASE("a DoRA folder comes back as it was, and one without all of it is refused by name") {
  const Config config = open_model(kGolden / "llama").config;
  const Lora lora = read_peft_adapter(kGolden / "llama" / "dora", config);
  CHECK(lora.dora);
  const TempDir dir;
  write_peft_adapter(dir.path(), lora, config, "llama");
  CHECK(read_peft_adapter(dir.path(), config).values == lora.values);

  auto j = nlohmann::json::parse(read_file(dir.path() / "adapter_config.json"));
  const auto refusal = [&] { return error_from([&] { read_peft_adapter(dir.path(), config); }); };
  j["use_dora"] = false;
  dir.file("adapter_config.json", j.dump());
  CHECK(refusal().kind() == ErrorKind::bad_input);
  CHECK(refusal().where().find("lora_magnitude_vector") != std::string::npos);
  j["use_dora"] = true;
  dir.file("adapter_config.json", j.dump());
  dir.file("adapter_model.safetensors",
           read_file(kGolden / "llama/start/adapter_model.safetensors"));
  CHECK(std::string(refusal().what()).find("lora_magnitude_vector is missing") !=
        std::string::npos);
}

TEST_CASE("a model with DoRA merged computes what base and adapter compute together") {
  Pool pool(2);
  for (const char* name : kModels) {
    CAPTURE(name);
    const ModelFiles files = open_model(kGolden / name);
    Model base = load(pool, kGolden / name);
    const Lora lora = read_peft_adapter(kGolden / name / "dora", base.config);
    const TrainingBatch batch = documents_of(name);
    const Found wanted = run(pool, base, lora, batch);
    const TempDir dir;
    const auto check = [&](const std::filesystem::path& path) {
      CAPTURE(path.filename().string());
      Model merged = load(pool, path);
      const Found found = run(pool, merged, no_adapter(base.config), batch);
      for (size_t i = 0; i < wanted.nll.size(); ++i)
        CHECK(std::abs(found.nll[i] - wanted.nll[i]) < 2e-5f);
    };
    write_merged_gguf(dir.path() / "m.gguf", files, lora, DType::f32);
    check(dir.path() / "m.gguf");
    write_merged_folder(dir.path() / "hf", files, lora, DType::f32);
    check(dir.path() / "hf");
    // Over a GGUF base, whose rows of q and k stand in another order.
    write_merged_gguf(dir.path() / "base.gguf", files, no_adapter(base.config), DType::f32);
    write_merged_gguf(dir.path() / "again.gguf", open_model(dir.path() / "base.gguf"), lora,
                      DType::f32);
    check(dir.path() / "again.gguf");
  }
}

TEST_CASE("what cannot hold DoRA's magnitudes says that it must be merged") {
  const ModelFiles files = open_model(kGolden / "llama");
  const Lora lora = read_peft_adapter(kGolden / "llama" / "dora", files.config);
  const TempDir dir;
  const Error file = error_from([&] { write_gguf_adapter(dir.path() / "a.gguf", files, lora); });
  CHECK(file.kind() == ErrorKind::unsupported);
  CHECK(file.cure().find("merge") != std::string::npos);
  const Error beside = error_from([&] { make_adapter(lora); });
  CHECK(beside.kind() == ErrorKind::usage);
  CHECK(beside.cure().find("merge") != std::string::npos);
}
