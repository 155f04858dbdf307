#include "formats/tokenizer_export.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <string>
#include <unordered_map>

#include "base/error.h"
#include "formats/pretokenizer.h"
#include "formats/tokenizer.h"
#include "formats/tokenizer_data.h"

namespace moru {
namespace {

using Json = nlohmann::ordered_json;

// Texts on which the written tokenizer must agree with the one it was made from.
constexpr std::array<std::string_view, 8> kProbes = {
    "The quick brown fox jumps over 13 lazy dogs; it's 12,345.67 m/s² — isn't it?",
    "  leading, trailing  and\t\ttabs\n\n\nlines\r\n   ",
    "다람쥐 헌 쳇바퀴에 타고파. 1234년 ㅋㅋㅋ 훈민정음을 창제하셨다!",
    "ᄒ\u1161\u11ABᄀ\u1173\u11AF e\u0301 Å ﬁ ①",
    "素早い茶色の狐が怠け者の犬を飛び越える。敏捷的棕色狐狸",
    "def f(x):\n    return {'a': [1, 2], \"b\": x**2}  # 注释",
    "👩‍👩‍👧 🇰🇷 ❤️ \u200b\u00a0|<|x|>",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. أبجد"};

// Merges of a vocabulary that ranks its pieces by score: every way to join two pieces into a third,
// the best piece first.
Json merges_by_score(const std::vector<std::string>& pieces, const std::vector<float>& scores) {
  std::unordered_map<std::string_view, int32_t> ids;
  for (size_t i = 0; i < pieces.size(); ++i) ids.emplace(pieces[i], static_cast<int32_t>(i));
  struct Candidate {
    int32_t left, right, whole;
  };
  std::vector<Candidate> all;
  for (size_t whole = 0; whole < pieces.size(); ++whole) {
    const std::string_view piece = pieces[whole];
    const size_t first = all.size();
    for (size_t cut = 1; cut < piece.size(); ++cut) {
      if ((static_cast<unsigned char>(piece[cut]) & 0xC0) == 0x80) continue;
      const auto left = ids.find(piece.substr(0, cut)), right = ids.find(piece.substr(cut));
      if (left != ids.end() && right != ids.end())
        all.push_back({left->second, right->second, static_cast<int32_t>(whole)});
    }
    std::sort(all.begin() + static_cast<std::ptrdiff_t>(first), all.end(),
              [](const Candidate& a, const Candidate& b) {
                return std::pair(a.left, a.right) < std::pair(b.left, b.right);
              });
  }
  std::stable_sort(all.begin(), all.end(), [&](const Candidate& a, const Candidate& b) {
    return scores[static_cast<size_t>(a.whole)] > scores[static_cast<size_t>(b.whole)];
  });
  Json merges = Json::array();
  for (const Candidate& c : all)
    merges.push_back({pieces[static_cast<size_t>(c.left)], pieces[static_cast<size_t>(c.right)]});
  return merges;
}

Json merges_of(const TextList& merges) {
  Json out = Json::array();
  for (size_t i = 0; i < merges.size(); ++i) {
    const std::string_view merge = merges[i];
    const size_t space = merge.find(' ', 1);
    out.push_back({merge.substr(0, space), merge.substr(space + 1)});
  }
  return out;
}

Json sequence(const char* part, Json parts) {
  if (parts.empty()) return nullptr;
  if (parts.size() == 1) return parts[0];
  return {{"type", "Sequence"}, {part, std::move(parts)}};
}

Json replacing(const char* from, const char* to) {
  return {{"type", "Replace"}, {"pattern", {{"String", from}}}, {"content", to}};
}

}  // namespace

TokenizerFolder tokenizer_folder_of(const GgufMetadata& metadata) {
  const Tokenizer original = Tokenizer::from_gguf(metadata);
  const std::string model = metadata.text("tokenizer.ggml.model").value_or("");
  const bool bytes = model == "gpt2";
  const TextList& tokens = metadata.texts("tokenizer.ggml.tokens");
  std::vector<std::string> pieces(tokens.size());
  for (size_t i = 0; i < tokens.size(); ++i) pieces[i] = tokens[i];
  const std::vector<int64_t> types = metadata.integers("tokenizer.ggml.token_type");

  Json vocab = Json::object(), added = Json::array();
  auto& entries = vocab.get_ref<Json::object_t&>();
  entries.reserve(pieces.size());
  for (size_t i = 0; i < pieces.size(); ++i) {
    auto type = static_cast<TokenType>(types.empty() ? 1 : types[i]);
    // As the reader takes it (tokenizer_gguf.cc).
    if (type == TokenType::user_defined && looks_like_control(pieces[i])) type = TokenType::control;
    const bool control = type == TokenType::control || type == TokenType::unknown;
    const bool marks =
        !bytes && type == TokenType::user_defined && pieces[i].find(' ') != std::string::npos;
    if (marks) replace_all(pieces[i], " ", "▁");
    if (pieces[i].empty()) continue;
    entries.Container::emplace_back(pieces[i], i);  // unique: no look-up
    if (!control && type != TokenType::user_defined) continue;
    // Runs of spaces are looked for after spaces have become ▁.
    added.push_back({{"id", i},
                     {"content", pieces[i]},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", !control && !bytes && pieces[i].find("▁") != std::string::npos},
                     {"special", control}});
  }

  const auto spelled = [&](std::optional<TokenId> id) {
    return id ? std::string(original.piece(*id)) : std::string();
  };
  Json bpe = {{"type", "BPE"},
              {"dropout", nullptr},
              {"unk_token", nullptr},
              {"continuing_subword_prefix", nullptr},
              {"end_of_word_suffix", nullptr},
              {"fuse_unk", !bytes},
              {"byte_fallback", !bytes},
              {"ignore_merges", false}};
  Json normalizers = Json::array(), pre = Json::array(), decoder;
  if (bytes) {
    const std::string name = metadata.text("tokenizer.ggml.pre").value_or("");
    const auto pres = known_pres();
    const auto known =
        std::find_if(pres.begin(), pres.end(), [&](const KnownPre& p) { return p.name == name; });
    bpe["ignore_merges"] = known->ignore_merges;
    if (known->nfc) normalizers.push_back({{"type", "NFC"}});
    for (const std::string_view pattern : known->patterns)
      pre.push_back({{"type", "Split"},
                     {"pattern", {{"Regex", pattern}}},
                     {"behavior", "Isolated"},
                     {"invert", false}});
    pre.push_back({{"type", "ByteLevel"},
                   {"add_prefix_space", false},
                   {"trim_offsets", true},
                   {"use_regex", false}});
    decoder = {{"type", "ByteLevel"},
               {"add_prefix_space", true},
               {"trim_offsets", true},
               {"use_regex", true}};
    bpe["vocab"] = std::move(vocab);
    bpe["merges"] = merges_of(metadata.texts("tokenizer.ggml.merges"));
  } else {
    const bool prefix =
        model == "llama" && metadata.boolean("tokenizer.ggml.add_space_prefix").value_or(true);
    if (prefix) normalizers.push_back({{"type", "Prepend"}, {"prepend", "▁"}});
    normalizers.push_back(replacing(" ", "▁"));
    Json steps = {replacing("▁", " "), {{"type", "ByteFallback"}}, {{"type", "Fuse"}}};
    if (prefix) steps.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}});
    decoder = sequence("decoders", std::move(steps));
    for (size_t i = 0; i < pieces.size(); ++i)
      if (!types.empty() && static_cast<TokenType>(types[i]) == TokenType::unknown)
        bpe["unk_token"] = pieces[i];
    bpe["vocab"] = std::move(vocab);
    bpe["merges"] = model == "llama"
                        ? merges_by_score(pieces, metadata.floats("tokenizer.ggml.scores"))
                        : merges_of(metadata.texts("tokenizer.ggml.merges"));
  }

  Json post = nullptr;
  if (original.adds_bos() && original.bos()) {
    const std::string bos = spelled(original.bos());
    const Json first = {{"SpecialToken", {{"id", bos}, {"type_id", 0}}}};
    const auto text = [](const char* id, int type) -> Json {
      return {{"Sequence", {{"id", id}, {"type_id", type}}}};
    };
    post = {
        {"type", "TemplateProcessing"},
        {"single", {first, text("A", 0)}},
        {"pair", {first, text("A", 0), text("B", 1)}},
        {"special_tokens", {{bos, {{"id", bos}, {"ids", {*original.bos()}}, {"tokens", {bos}}}}}}};
  }

  TokenizerFolder out;
  out.tokenizer = {{"version", "1.0"},
                   {"truncation", nullptr},
                   {"padding", nullptr},
                   {"added_tokens", std::move(added)},
                   {"normalizer", sequence("normalizers", std::move(normalizers))},
                   {"pre_tokenizer", sequence("pretokenizers", std::move(pre))},
                   {"post_processor", std::move(post)},
                   {"decoder", std::move(decoder)},
                   {"model", std::move(bpe)}};
  out.config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                {"clean_up_tokenization_spaces", false},
                {"add_bos_token", original.adds_bos()}};
  for (const auto& [key, id] : {std::pair{"bos_token", original.bos()},
                                {"eos_token", original.eos()},
                                {"pad_token", original.pad()}})
    if (id) out.config[key] = spelled(id);
  if (const auto chat = metadata.text("tokenizer.chat_template"))
    out.config["chat_template"] = *chat;

  const Tokenizer written = Tokenizer::from_json(metadata.where, out.tokenizer.dump());
  for (const std::string_view probe : kProbes) {
    if (written.encode(probe) == original.encode(probe)) continue;
    throw Error(ErrorKind::unsupported,
                {.where = metadata.where + ": tokenizer.ggml.model",
                 .what = "tokenizer.json cannot say how this tokenizer works",
                 .cure = "keep the GGUF file"});
  }
  return out;
}

}  // namespace moru
