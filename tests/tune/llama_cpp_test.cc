// What is written for llama.cpp gives there the logits it gives here: an adapter beside its base
// (--lora) and merged into it. All of it is f32, so that nothing but the order of sums differs, and
// attention is not llama.cpp's -fa, which alone changes logits by 1e-3.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>

#include "base/files.h"
#include "base/random.h"
#include "engine/adapter.h"
#include "engine/forward.h"
#include "engine/row_ops.h"
#include "peers.h"
#include "program.h"
#include "support.h"
#include "tune/adapter.h"

using namespace moru;

namespace {

const std::filesystem::path kGolden = MORU_SOURCE_DIR "/tests/golden/tune";
constexpr size_t kContext = 64, kChunks = 4;

// llama-perplexity --kl-divergence-base writes
//
//   "_logits_" | n_ctx u32 | vocab i32 | chunks i32 | tokens i32[chunks · n_ctx] | rows
//
// and a row for each position of a chunk's second half but the last: scale f32 | least f32 |
// u16[vocab], an even count: log p = least + scale · u16. A row spans 16 nats at most, so it is off
// by half of 16/65535, 1.2e-4; what is less likely than that is written as the least.
struct LogProbs {
  std::vector<TokenId> tokens;           // [kChunks · kContext]
  std::vector<std::vector<float>> rows;  // kContext / 2 - 1 of each chunk
  std::vector<float> least;              // of each row
};

template <typename T>
std::vector<T> take(std::string_view& rest, size_t count) {
  REQUIRE(rest.size() >= count * sizeof(T));
  std::vector<T> values(count);
  std::memcpy(values.data(), rest.data(), count * sizeof(T));
  rest.remove_prefix(count * sizeof(T));
  return values;
}

LogProbs read_log_probs(const std::filesystem::path& path, size_t vocab) {
  const std::string bytes = read_file(path);
  std::string_view rest = bytes;
  REQUIRE(rest.starts_with("_logits_"));
  rest.remove_prefix(8);
  REQUIRE(take<int32_t>(rest, 3) == std::vector<int32_t>{kContext, static_cast<int32_t>(vocab),
                                                         static_cast<int32_t>(kChunks)});
  LogProbs out;
  out.tokens = take<TokenId>(rest, kChunks * kContext);
  while (!rest.empty()) {
    const std::vector<float> range = take<float>(rest, 2);
    std::vector<float>& row = out.rows.emplace_back();
    for (const uint16_t step : take<uint16_t>(rest, (vocab + 1) / 2 * 2))
      row.push_back(range[1] + range[0] * static_cast<float>(step));
    row.resize(vocab);
    out.least.push_back(range[1]);
  }
  REQUIRE(out.rows.size() == kChunks * (kContext / 2 - 1));
  return out;
}

LogProbs in_llama_cpp(const std::filesystem::path& program, const TempDir& dir, size_t vocab,
                      const std::string& model, const std::string& adapter) {
  std::vector<std::string> words = {"-m", dir.path() / model, "-f", dir.path() / "text"};
  for (const auto& [flag, value] : {std::pair{"-c", std::to_string(kContext)},
                                    {"--chunks", std::to_string(kChunks)},
                                    {"-t", "2"},
                                    {"-fa", "off"},
                                    {"-ctk", "f32"},
                                    {"-ctv", "f32"}})
    words.insert(words.end(), {flag, value});
  words.insert(words.end(), {"--kl-divergence-base", dir.path() / "logits"});
  if (!adapter.empty()) words.insert(words.end(), {"--lora", dir.path() / adapter});
  const Ended ended = Program(words, program.c_str()).wait();
  CAPTURE(ended.output);
  REQUIRE(ended.code == 0);
  return read_log_probs(dir.path() / "logits", vocab);
}

// The same positions here.
std::vector<std::vector<float>> here(Engine& engine, const std::vector<TokenId>& tokens) {
  std::vector<std::vector<float>> rows;
  const size_t vocab = engine.model().config.vocab;
  for (size_t chunk = 0; chunk < kChunks; ++chunk) {
    KvSequence sequence = engine.cache().make_sequence();
    const StepSpan span{&sequence, std::span(tokens).subspan(chunk * kContext, kContext), 0};
    engine.step({&span, 1}, [&](size_t first, size_t count, float* logits) {
      for (size_t at = std::max(first, kContext / 2); at < std::min(first + count, kContext - 1);
           ++at) {
        const Floats row(logits + (at - first) * vocab, vocab);
        const float sum = log_sum_exp(row);
        std::vector<float>& values = rows.emplace_back(row.begin(), row.end());
        for (float& value : values) value -= sum;
      }
    });
  }
  return rows;
}

double furthest(const LogProbs& theirs, const std::vector<std::vector<float>>& ours) {
  REQUIRE(theirs.rows.size() == ours.size());
  double worst = 0;
  for (size_t i = 0; i < ours.size(); ++i)
    for (size_t v = 0; v < ours[i].size(); ++v)
      worst = std::max(worst, std::abs(double{theirs.rows[i][v]} -
                                       double{std::max(ours[i][v], theirs.least[i])}));
  return worst;
}

// llama.cpp takes the scale of Gemma 3's attention from the head alone.
std::filesystem::path model_folder(const TempDir& dir, std::string_view name) {
  if (name != "gemma3") return kGolden / name;
  const std::filesystem::path folder = dir.path() / "folder";
  std::filesystem::copy(kGolden / name, folder);
  nlohmann::json config = nlohmann::json::parse(read_file(folder / "config.json"));
  config["query_pre_attn_scalar"] = config["head_dim"];
  dir.file("folder/config.json", config.dump());
  return folder;
}

struct Case {
  const char* name;
  double same;  // the most that logits may differ
};
// llama: rows of q and k in pairs, one key head for three queries; 8.6e-5 at most are measured, the
// rounding of the file that is read. llama_bias: those rows' biases too; 5.1e-5. gemma3: norms of
// queries and keys; 2.6e-3, because llama.cpp takes GELU from a table of f16: with the same
// rounding here it is 1.1e-3.
constexpr Case kCases[] = {{"llama", 1e-3}, {"llama_bias", 1e-3}, {"gemma3", 4e-3}};

}  // namespace

TEST_CASE("adapters and merged models have the same logits in llama.cpp, within 1e-3") {
  const auto program = peers_folder() / "bin/llama-perplexity";
  if (!std::filesystem::exists(program)) {
    MESSAGE("skipped: there is no " << program.string());
    return;
  }
  Pool pool(2);
  for (const auto& [name, same] : kCases) {
    for (const bool rank_stabilised : {false, true}) {
      CAPTURE(name);
      CAPTURE(rank_stabilised);
      const TempDir dir;
      dir.file("text", read_file(MORU_SOURCE_DIR "/README.md"));
      const ModelFiles folder = open_model(model_folder(dir, name));
      const Config& config = folder.config;
      Lora nothing;
      nothing.layers.resize(config.layers);
      lay_out(nothing, config);
      write_merged_gguf(dir.path() / "base.gguf", folder, nothing, DType::f32);
      const ModelFiles files = open_model(dir.path() / "base.gguf");

      Lora lora = make_lora(
          config, {.rank = 4, .alpha = 8, .rank_stabilised = rank_stabilised, .targets = {}}, 1);
      Random random(2);
      for (float& value : lora.values) value += 0.05f * random.normal();
      lora.layers.back()[static_cast<size_t>(Projection::down)].scale *= 3;  // the file knows one
      write_gguf_adapter(dir.path() / "adapter.gguf", files, lora);
      write_merged_gguf(dir.path() / "merged.gguf", files, lora, DType::f32);

      const Model model = load_model(pool, files, {.profile = Profile::f32, .context = kContext});
      const Adapter adapter = make_adapter(lora);
      Engine plain(pool, model, {.cache_tokens = 128, .kv_type = KvType::f32});
      Engine adapted(pool, model,
                     {.cache_tokens = 128, .kv_type = KvType::f32, .adapter = &adapter});
      const LogProbs base = in_llama_cpp(program, dir, config.vocab, "base.gguf", "");
      const auto ours = here(adapted, base.tokens);
      const double of_base = furthest(base, here(plain, base.tokens)),
                   changed = furthest(base, ours),
                   beside = furthest(
                       in_llama_cpp(program, dir, config.vocab, "base.gguf", "adapter.gguf"), ours),
                   merged =
                       furthest(in_llama_cpp(program, dir, config.vocab, "merged.gguf", ""), ours);
      MESSAGE(std::string(name) << std::string(rank_stabilised ? ", rsLoRA" : ", LoRA")
                                << ", furthest log p: base " << of_base << ", adapter " << beside
                                << ", merged " << merged << "; it changes " << changed);
      CHECK(of_base <= same);
      CHECK(beside <= same);
      CHECK(merged <= same);
      CHECK(changed > 1);
    }
  }
}
