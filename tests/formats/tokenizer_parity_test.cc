// Token ids and decoded text against Hugging Face `tokenizers`, on 5,600 lines. The expected hashes
// come from tests/parity/expect_tokenizers.py; the models stand in $MORU_PEERS
// (~/.cache/moru-peers) and in ../shared ($MORU_SHARED), and what is not there is skipped, saying
// so.
#include <doctest/doctest.h>
#include <fmt/format.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>

#include "base/error.h"
#include "base/files.h"
#include "base/text.h"
#include "formats/gguf.h"
#include "formats/tokenizer.h"

using namespace moru;

namespace {

namespace fs = std::filesystem;

fs::path from_environment(const char* name, const fs::path& fallback) {
  const char* value = std::getenv(name);
  return value != nullptr ? fs::path(value) : fallback;
}
fs::path peers() {
  const char* home = std::getenv("HOME");
  return from_environment("MORU_PEERS",
                          fs::path(home != nullptr ? home : "/") / ".cache/moru-peers");
}
fs::path shared() {
  return from_environment("MORU_SHARED", fs::path(MORU_SOURCE_DIR).parent_path() / "shared");
}

fs::path model_path(const std::string& path) {
  constexpr std::string_view kShared = "shared/";
  if (!path.starts_with(kShared)) return peers() / path;
  return shared() / "data/tokenizers" / path.substr(kShared.size());
}

Tokenizer open_tokenizer(const fs::path& path) {
  if (path.extension() == ".gguf") return Tokenizer::from_gguf(GgufFile(path).metadata());
  if (path.extension() == ".json") return Tokenizer::from_json(path.string(), read_file(path));
  return Tokenizer::from_folder(path);
}

uint64_t fnv(uint64_t state, const void* data, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i)
    state = (state ^ static_cast<const uint8_t*>(data)[i]) * 0x100000001b3u;
  return state;
}
constexpr uint64_t kFnvStart = 0xcbf29ce484222325u;

std::vector<std::string> read_corpus(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);)
    lines.push_back(nlohmann::json::parse(line).get<std::string>());
  return lines;
}

// Blocks of lines whose hashes differ from the oracle's.
std::vector<size_t> differing_blocks(const Tokenizer& tokenizer,
                                     const std::vector<std::string>& lines, size_t block,
                                     const std::vector<std::string>& expected) {
  std::vector<size_t> differing;
  for (size_t i = 0; i < expected.size(); ++i) {
    uint64_t state = kFnvStart;
    for (size_t line = i * block; line < std::min((i + 1) * block, lines.size()); ++line) {
      const std::vector<TokenId> ids = tokenizer.encode(lines[line]);
      const auto count = static_cast<uint32_t>(ids.size());
      state = fnv(state, &count, sizeof count);
      state = fnv(state, ids.data(), ids.size() * sizeof(TokenId));
      const std::string text = repair_utf8(tokenizer.decode(ids, true));
      state = fnv(state, text.data(), text.size());
    }
    if (fmt::format("{:016x}", state) != expected[i]) differing.push_back(i * block);
  }
  return differing;
}

}  // namespace

TEST_CASE("ids and decoded text are those of Hugging Face tokenizers") {
  const fs::path folder = fs::path(MORU_SOURCE_DIR) / "tests/parity/tokenizers";
  const std::string corpus = read_file(folder / "corpus.jsonl");
  const auto expected = nlohmann::json::parse(read_file(folder / "expected.json"));
  REQUIRE(fmt::format("{:016x}", fnv(kFnvStart, corpus.data(), corpus.size())) ==
          expected["corpus"].get<std::string>());
  const std::vector<std::string> lines = read_corpus(corpus);
  const auto block = expected["block"].get<size_t>();
  REQUIRE(lines.size() >= 5000);

  for (const auto& [name, model] : expected["models"].items()) {
    const fs::path path = model_path(model["path"]);
    if (!fs::exists(path)) {
      MESSAGE("skipped ", name, ": ", path.string(), " is not here");
      continue;
    }
    CAPTURE(name);
    std::istringstream in(model["hashes"].get<std::string>());
    const std::vector<std::string> hashes{std::istream_iterator<std::string>(in), {}};
    REQUIRE(hashes.size() == (lines.size() + block - 1) / block);
    const Tokenizer tokenizer = open_tokenizer(path);
    CHECK(differing_blocks(tokenizer, lines, block, hashes) == std::vector<size_t>{});

    // Through a GGUF's metadata and back the ids stay the same, where GGUF has the words for it.
    GgufMetadata metadata;
    metadata.where = fmt::format("{} as GGUF", name);
    try {
      metadata.pairs = tokenizer.gguf_metadata();
    } catch (const Error& e) {
      CHECK(e.kind() == ErrorKind::unsupported);
      CHECK(name == "claude");  // NFKC
      continue;
    }
    const Tokenizer again = Tokenizer::from_gguf(metadata);
    size_t different = 0;
    for (const std::string& line : lines) different += again.encode(line) != tokenizer.encode(line);
    CHECK(different == 0);
    CHECK(again.bos() == tokenizer.bos());
    CHECK(again.eos() == tokenizer.eos());
    CHECK(again.adds_bos() == tokenizer.adds_bos());
    CHECK(again.stop_ids() == tokenizer.stop_ids());
  }
}

// llama.cpp's source carries vocabularies as GGUF files beside texts and the ids that Hugging
// Face's tokenizers give for them.
TEST_CASE("the vocabularies in llama.cpp's source tokenize as their ids beside them say") {
  std::optional<fs::path> models;
  if (fs::exists(peers() / "unpacked"))
    for (const auto& entry : fs::directory_iterator(peers() / "unpacked"))
      if (fs::exists(entry.path() / "vendor/llama.cpp/models"))
        models = entry.path() / "vendor/llama.cpp/models";
  if (!models) {
    MESSAGE("skipped: no llama.cpp source in ", peers().string());
    return;
  }
  for (const char* name : {"command-r", "deepseek-coder", "gemma-4", "gpt-2", "llama-bpe",
                           "llama-spm", "mpt", "phi-3", "qwen2", "qwen35", "refact", "starcoder"}) {
    const fs::path gguf = *models / fmt::format("ggml-vocab-{}.gguf", name);
    if (!fs::exists(gguf)) {
      MESSAGE("skipped: ", gguf.string(), " is not here");
      continue;
    }
    CAPTURE(name);
    const Tokenizer tokenizer = open_tokenizer(gguf);
    const std::string texts = read_file(gguf.string() + ".inp");
    std::istringstream ids_of_lines(read_file(gguf.string() + ".out"));
    constexpr std::string_view kBetween = "\n__ggml_vocab_test__\n";
    for (size_t begin = 0; begin <= texts.size();) {
      const size_t end = std::min(texts.find(kBetween, begin), texts.size());
      const std::string text = texts.substr(begin, end - begin);
      begin = end + kBetween.size();
      std::string line;
      std::getline(ids_of_lines, line);
      std::istringstream in(line);
      const std::vector<TokenId> expected{std::istream_iterator<TokenId>(in), {}};
      // The ids for qwen35 come from llama.cpp itself, which does not normalize as the family does.
      if (std::string_view(name) == "qwen35" && nfc(text) != text) continue;
      CAPTURE(text);
      CHECK(tokenizer.encode(text, Tokenizer::Specials::literal) == expected);
    }
  }
}
