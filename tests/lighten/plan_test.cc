#include "lighten/plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <map>

#include "support.h"

using namespace moru;

namespace {

struct Shape {
  size_t width, ffn, layers, heads, kv_heads, head_dim, vocab;
  bool tied;
};
constexpr Shape kSmolLm2_135m = {576, 1536, 30, 9, 3, 64, 49152, true};
constexpr Shape kLlama31_8b = {4096, 14336, 32, 32, 8, 128, 128256, false};
constexpr Shape kGemma3_270m = {640, 2048, 18, 4, 1, 256, 262144, true};

std::vector<Tensor> tensors_of(const Shape& s) {
  std::vector<Tensor> tensors;
  const auto add = [&](std::string name, std::vector<size_t> shape, DType type) {
    tensors.push_back({std::move(name), type, std::move(shape), {}});
  };
  add("token_embd.weight", {s.vocab, s.width}, DType::bf16);
  for (size_t i = 0; i < s.layers; ++i) {
    const auto layer = [&](const char* name) { return fmt::format("blk.{}.{}.weight", i, name); };
    add(layer("attn_norm"), {s.width}, DType::f32);
    add(layer("attn_q"), {s.heads * s.head_dim, s.width}, DType::bf16);
    add(layer("attn_k"), {s.kv_heads * s.head_dim, s.width}, DType::bf16);
    add(layer("attn_v"), {s.kv_heads * s.head_dim, s.width}, DType::bf16);
    add(layer("attn_output"), {s.width, s.heads * s.head_dim}, DType::bf16);
    add(layer("ffn_norm"), {s.width}, DType::f32);
    add(layer("ffn_gate"), {s.ffn, s.width}, DType::bf16);
    add(layer("ffn_up"), {s.ffn, s.width}, DType::bf16);
    add(layer("ffn_down"), {s.width, s.ffn}, DType::bf16);
  }
  add("output_norm.weight", {s.width}, DType::f32);
  if (!s.tied) add("output.weight", {s.vocab, s.width}, DType::bf16);
  return tensors;
}

PlanFacts facts_of(const Shape& s) { return {.heads = s.heads, .kv_heads = s.kv_heads}; }

Plan plan(std::string_view preset, const Shape& s) {
  const Preset* found = find_preset(preset);
  REQUIRE(found != nullptr);
  return plan_preset(*found, tensors_of(s), facts_of(s));
}

double megabytes(std::string_view preset, const Shape& s) {
  return static_cast<double>(planned_bytes({}, tensors_of(s), plan(preset, s))) / 1e6;
}

DType type_of(const Plan& p, std::string_view name) {
  for (const TensorPlan& t : p.tensors)
    if (t.name == name) return t.type;
  FAIL("no tensor " << name);
  return {};
}

}  // namespace

TEST_CASE("planned sizes are those of llama.cpp's files, less the 2 MB of tokenizer") {
  const auto near = [](double got, double wanted) {
    CAPTURE(got);
    CHECK(std::abs(got + 1.9 - wanted) < 0.02 * wanted);
  };
  near(megabytes("Q4_K_M", kSmolLm2_135m), 105.5);
  near(megabytes("Q4_0", kSmolLm2_135m), 91.7);
  near(megabytes("IQ4_XS", kSmolLm2_135m), 91.3);
  near(megabytes("Q8_0", kSmolLm2_135m), 144.8);
  near(megabytes("BF16", kSmolLm2_135m), 270.9);
  near(megabytes("Q4_K_M", kGemma3_270m), 253.1 - 6);  // a vocabulary of 262,144 is 8 MB
  near(megabytes("Q4_K_M", kLlama31_8b), 4918);        // 4.58 GiB
}

TEST_CASE("Q4_K_M spends its bytes on the layers that matter more") {
  const Plan p = plan("q4_k_m", kLlama31_8b);
  CHECK(type_of(p, "output.weight") == DType::q6_k);
  CHECK(type_of(p, "token_embd.weight") == DType::q4_k);
  CHECK(type_of(p, "blk.0.attn_norm.weight") == DType::f32);
  CHECK(type_of(p, "blk.0.attn_q.weight") == DType::q4_k);
  for (const size_t more : {0u, 3u, 6u, 9u, 28u, 31u})
    CHECK(type_of(p, fmt::format("blk.{}.ffn_down.weight", more)) == DType::q6_k);
  for (const size_t less : {4u, 5u, 7u, 26u})
    CHECK(type_of(p, fmt::format("blk.{}.attn_v.weight", less)) == DType::q4_k);
  CHECK(p.notes.empty());
}

TEST_CASE("rows that 256 does not divide fall back, and the log says what that costs") {
  const Plan p = plan("Q4_K_M", kSmolLm2_135m);
  CHECK(type_of(p, "token_embd.weight") == DType::q8_0);
  CHECK(type_of(p, "blk.10.attn_q.weight") == DType::q5_0);
  CHECK(type_of(p, "blk.0.attn_v.weight") == DType::q8_0);
  CHECK(type_of(p, "blk.4.ffn_down.weight") == DType::q4_k);
  const auto note = std::find_if(p.notes.begin(), p.notes.end(), [](const std::string& line) {
    return line.find("Q4_K needs multiples of 256, so Q5_0 instead") != std::string::npos;
  });
  REQUIRE(note != p.notes.end());
  CAPTURE(*note);
  CHECK(note->find("rows of 576") != std::string::npos);
  CHECK(note->find("(+9.8 MB)") != std::string::npos);
  CHECK(type_for_rows(DType::q5_k, 576) == DType::q5_1);
  CHECK(type_for_rows(DType::q3_k, 576) == DType::q4_0);
  CHECK(type_for_rows(DType::iq4_xs, 576) == DType::iq4_nl);
  CHECK(type_for_rows(DType::q6_k, 512) == DType::q6_k);
  CHECK(type_for_rows(DType::q4_k, 100) == DType::f16);
  CHECK(type_for_rows(DType::q8_0, 100) == DType::f16);
  CHECK(type_for_rows(DType::bf16, 100) == DType::bf16);
}

TEST_CASE("a plan covers every preset and every odd tensor") {
  std::vector<Tensor> tensors = tensors_of(kSmolLm2_135m);
  tensors.push_back({"blk.0.ffn_gate_inp.weight", DType::f32, {8, 576}, {}});
  tensors.push_back({"blk.0.attn_q.bias", DType::bf16, {576}, {}});
  tensors.push_back({"blk.0.ffn_down_exps.weight", DType::bf16, {8, 576, 1536}, {}});
  for (const Preset& preset : presets()) {
    CAPTURE(preset.name);
    const Plan p = plan_preset(preset, tensors, {.experts = 8, .calibrated = true});
    REQUIRE(p.tensors.size() == tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      CHECK(p.tensors[i].name == tensors[i].name);
      CHECK(!p.tensors[i].reason.empty());
      CHECK(tensors[i].shape.back() % traits(p.tensors[i].type).block == 0);
    }
    CHECK(type_of(p, "blk.0.ffn_gate_inp.weight") == DType::f32);
    CHECK(type_of(p, "blk.0.attn_q.bias") == DType::f32);
    CHECK(planned_bytes({}, tensors, p) > 0);
  }
  CHECK(find_preset("Q4_K_X") == nullptr);
  CHECK(find_preset("iq4_xs")->base == DType::iq4_xs);
  CHECK(plan_preset(*find_preset("Q4_0"), {}, {}).tensors.empty());
}

TEST_CASE("types and bytes are those of files that llama.cpp's tools made") {
  const char* home = std::getenv("HOME");
  const std::filesystem::path models =
      std::filesystem::path(home ? home : "") / ".cache/moru-peers/models";
  size_t seen = 0;
  for (const Preset& preset : presets()) {
    const auto path = models / fmt::format("SmolLM2-135M-{}.gguf", preset.name);
    if (!std::filesystem::exists(path)) continue;
    CAPTURE(preset.name);
    const GgufFile file(path);
    const PlanFacts facts = {.heads = *file.metadata().integer("llama.attention.head_count"),
                             .kv_heads = *file.metadata().integer("llama.attention.head_count_kv")};
    const Plan p = plan_preset(preset, file.tensors(), facts);
    for (size_t i = 0; i < p.tensors.size(); ++i) {
      CAPTURE(p.tensors[i].name);
      CHECK(traits(p.tensors[i].type).name == traits(file.tensors()[i].type).name);
    }
    CHECK(file.metadata().integer("general.file_type") == preset.file_type);
    CHECK(planned_bytes(file.metadata(), file.tensors(), p) == std::filesystem::file_size(path));
    ++seen;
  }
  if (seen == 0) MESSAGE("skipped: no quantized models in " << models.string());
}
