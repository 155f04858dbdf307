// The tokenizer.ggml.* pairs of a GGUF, read and written. Spec: ggml's docs/gguf.md.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/error.h"
#include "base/text.h"
#include "formats/tokenizer_data.h"

namespace moru {
namespace {

constexpr std::string_view kPrefix = "tokenizer.ggml.";
constexpr const char* kConvertAgain = "convert the model again with a current converter";

std::string key_of(std::string_view name) { return fmt::format("{}{}", kPrefix, name); }

void read_pieces(const GgufMetadata& metadata, Tokenizer::Data& data, bool marks_spaces) {
  const TextList& tokens = metadata.texts(key_of("tokens"));
  const std::vector<int64_t> types = metadata.integers(key_of("token_type"));
  if (tokens.empty()) data.refuse(key_of("tokens"), "is missing or empty", kConvertAgain);
  if (tokens.size() > kMaxTokens)
    data.refuse(key_of("tokens"), fmt::format("has more than {} entries", kMaxTokens),
                kConvertAgain);
  if (!types.empty() && types.size() < tokens.size())
    data.refuse(key_of("token_type"),
                fmt::format("has {} entries for {} tokens", types.size(), tokens.size()),
                kConvertAgain);
  data.types.resize(tokens.size(), TokenType::normal);
  data.pieces.reserve(tokens.size(), tokens.bytes());
  for (size_t i = 0; i < tokens.size(); ++i) {
    const auto id = static_cast<TokenId>(i);
    if (!types.empty()) {
      if (types[i] < 0 || types[i] > 6)
        data.refuse(fmt::format("{}[{}]", key_of("token_type"), i),
                    fmt::format("is {}, which is no type of token", types[i]), kConvertAgain);
      data.types[i] = types[i] == 0 ? TokenType::normal : static_cast<TokenType>(types[i]);
    }
    std::string piece(tokens[i]);
    // Files exist that call <|im_end|> user-defined; what a user types must not become it.
    if (data.types[i] == TokenType::user_defined && looks_like_control(piece))
      data.types[i] = TokenType::control;
    if (piece.size() > kMaxPieceBytes)
      data.refuse(fmt::format("{}[{}]", key_of("tokens"), i),
                  fmt::format("is {} bytes long", piece.size()), kConvertAgain);
    if (find_invalid_utf8(piece))
      data.refuse(fmt::format("{}[{}]", key_of("tokens"), i), "is not valid UTF-8", kConvertAgain);
    if (data.types[i] == TokenType::byte && !byte_of_piece(piece))
      data.refuse(fmt::format("{}[{}]", key_of("tokens"), i),
                  fmt::format("is of type byte, but spelled \"{}\"", piece), kConvertAgain);
    // Converters write runs of spaces that users defined as spaces; everywhere else in such a
    // vocabulary a space is spelled ▁.
    if (marks_spaces && data.types[i] == TokenType::user_defined) replace_all(piece, " ", "▁");
    const bool added = piece.empty() ? data.pieces.add_hole(id) : data.pieces.add(id, piece);
    if (!added)
      data.refuse(fmt::format("{}[{}]", key_of("tokens"), i),
                  fmt::format("\"{}\" is already token {}", piece, data.pieces.find(piece)),
                  kConvertAgain);
  }
}

void read_merges(const GgufMetadata& metadata, Tokenizer::Data& data) {
  const TextList& merges = metadata.texts(key_of("merges"));
  if (merges.empty()) data.refuse(key_of("merges"), "is missing or empty", kConvertAgain);
  if (merges.size() > kMaxMerges)
    data.refuse(key_of("merges"), fmt::format("has more than {} entries", kMaxMerges),
                kConvertAgain);
  data.bpe.merges.reserve(merges.size());
  std::string merged;
  for (size_t i = 0; i < merges.size(); ++i) {
    const std::string_view merge = merges[i];
    const auto field = [&] { return fmt::format("{}[{}]", key_of("merges"), i); };
    const size_t space = merge.find(' ', 1);
    if (merge.empty() || space == std::string::npos || space + 1 == merge.size())
      data.refuse(field(), fmt::format("\"{}\" is not two tokens with a space between", merge),
                  kConvertAgain);
    const auto find = [&](std::string_view piece) {
      const TokenId id = data.pieces.find(piece);
      if (id == kNoToken)
        data.refuse(field(), fmt::format("names \"{}\", which is not in the vocabulary", piece),
                    kConvertAgain);
      return id;
    };
    const TokenId left = find(merge.substr(0, space)), right = find(merge.substr(space + 1));
    merged.assign(merge, 0, space).append(merge, space + 1);
    const TokenId both = find(merged);
    data.bpe.merges.add(left, right, {static_cast<uint32_t>(i), both});
  }
}

// A rank for every score: the highest score is rank 0, equal scores share one.
void read_scores(const GgufMetadata& metadata, Tokenizer::Data& data) {
  const std::vector<float> scores = metadata.floats(key_of("scores"));
  const size_t count = data.pieces.size();
  if (scores.size() < count)
    data.refuse(key_of("scores"), fmt::format("has {} entries for {} tokens", scores.size(), count),
                kConvertAgain);
  if (const auto bad =
          std::find_if(scores.begin(), scores.end(), [](float s) { return std::isnan(s); });
      bad != scores.end())
    data.refuse(fmt::format("{}[{}]", key_of("scores"), bad - scores.begin()), "is not a number",
                kConvertAgain);
  std::vector<TokenId> order(count);
  std::iota(order.begin(), order.end(), 0);
  const auto score = [&](TokenId id) { return scores[static_cast<size_t>(id)]; };
  std::sort(order.begin(), order.end(), [&](TokenId a, TokenId b) { return score(a) > score(b); });
  data.bpe.score_rank.assign(count, Bpe::kNoRank);
  uint32_t rank = 0;
  for (size_t i = 0; i < count; ++i) {
    if (i > 0 && score(order[i]) < score(order[i - 1])) ++rank;
    const TokenType type = data.type(order[i]);
    if (type == TokenType::normal || type == TokenType::user_defined || type == TokenType::unused)
      data.bpe.score_rank[static_cast<size_t>(order[i])] = rank;
  }
}

std::optional<TokenId> read_id(const GgufMetadata& metadata, const Tokenizer::Data& data,
                               std::string_view name) {
  const auto id = metadata.integer(key_of(name));
  if (!id || *id == UINT32_MAX) return std::nullopt;  // some converters write -1 for "none"
  if (*id >= data.pieces.size())
    data.refuse(key_of(name),
                fmt::format("is {}, but there are {} tokens", *id, data.pieces.size()),
                kConvertAgain);
  return static_cast<TokenId>(*id);
}

void add_added_tokens(Tokenizer::Data& data, bool marks_spaces) {
  for (size_t i = 0; i < data.types.size(); ++i) {
    const TokenType type = data.types[i];
    const bool control = type == TokenType::control || type == TokenType::unknown;
    if (!control && type != TokenType::user_defined) continue;
    const auto id = static_cast<TokenId>(i);
    AddedToken token{.id = id, .content = std::string(data.pieces[id]), .control = control};
    if (token.content.empty()) continue;
    data.raw_added.add(token);
    // Runs of spaces are such tokens; they have become ▁ when they are looked for.
    if (marks_spaces && !control && token.content.find("▁") != std::string::npos)
      data.normalized_added.add(std::move(token));
  }
}

void spaces_to_marks(Tokenizer::Data& data, bool prepend) {
  if (prepend)
    data.normalizer.add({.kind = NormalizerStep::Kind::prepend, .matcher = {}, .text = "▁"});
  data.normalizer.add(
      {.kind = NormalizerStep::Kind::replace, .matcher = Matcher::of_text(" "), .text = "▁"});
  data.decode_replacements.emplace_back("▁", " ");
  data.strips_first_space = prepend;
}

}  // namespace

Tokenizer Tokenizer::from_gguf(const GgufMetadata& metadata) {
  auto data = std::make_unique<Data>();
  data->where = metadata.where;
  const auto model = metadata.text(key_of("model"));
  if (!model) data->refuse(key_of("model"), "is missing", kConvertAgain);
  Bpe::Options& options = data->bpe.options;

  if (*model == "llama") {
    options = {.alphabet = Bpe::Alphabet::characters,
               .by_score = true,
               .byte_fallback = true,
               .fuse_unknown = true};
    read_pieces(metadata, *data, true);
    read_scores(metadata, *data);
    spaces_to_marks(*data, metadata.boolean(key_of("add_space_prefix")).value_or(true));
    data->adds_bos = true;
    // SentencePiece's own defaults.
    for (const auto& [name, token] :
         {std::pair{"<s>", &data->bos}, {"</s>", &data->eos}, {"<unk>", &data->unknown}})
      if (const TokenId id = data->pieces.find(name);
          id != kNoToken &&
          (data->type(id) == TokenType::control || data->type(id) == TokenType::unknown))
        *token = id;
  } else if (*model == "gemma4") {
    options = {.alphabet = Bpe::Alphabet::characters, .byte_fallback = true, .fuse_unknown = true};
    read_pieces(metadata, *data, true);
    read_merges(metadata, *data);
    spaces_to_marks(*data, false);
    data->adds_bos = true;
  } else if (*model == "gpt2") {
    const auto pre = metadata.text(key_of("pre"));
    if (!pre)
      data->unsupported(key_of("pre"), "is missing, so how to split text is unknown",
                        kConvertAgain);
    const auto pres = known_pres();
    const auto known =
        std::find_if(pres.begin(), pres.end(), [&](const KnownPre& p) { return p.name == *pre; });
    if (known == pres.end())
      data->unsupported(
          key_of("pre"),
          fmt::format("names the pre-tokenizer \"{}\", which moru does not know", *pre),
          *pre == "default" ? kConvertAgain : "");
    options = {.alphabet = Bpe::Alphabet::bytes, .ignore_merges = known->ignore_merges};
    read_pieces(metadata, *data, false);
    read_merges(metadata, *data);
    data->pre_tokenizer = pre_tokenizer_of(*known);
    if (known->nfc) data->normalizer.add({.form = NormalForm::nfc, .matcher = {}, .text = {}});
    data->adds_bos = known->adds_bos;
  } else {
    data->unsupported(key_of("model"),
                      fmt::format("is \"{}\"; gpt2, llama and gemma4 are read", *model));
  }

  for (const auto& [name, token] : {std::pair{"bos_token_id", &data->bos},
                                    {"eos_token_id", &data->eos},
                                    {"padding_token_id", &data->pad},
                                    {"unknown_token_id", &data->unknown}})
    if (const auto id = read_id(metadata, *data, name)) *token = id;
  for (const char* name : {"eot_token_id", "eom_token_id"})
    if (const auto id = read_id(metadata, *data, name)) data->more_stops.push_back(*id);
  if (options.alphabet == Bpe::Alphabet::characters && data->unknown)
    options.unknown = *data->unknown;
  data->adds_bos = metadata.boolean(key_of("add_bos_token")).value_or(data->adds_bos);
  data->adds_eos = metadata.boolean(key_of("add_eos_token")).value_or(data->adds_eos);
  add_added_tokens(*data, options.alphabet == Bpe::Alphabet::characters);
  for (const GgufPair& pair : metadata.pairs)
    if (pair.key.starts_with(kPrefix)) data->own_pairs.push_back(pair);
  data->finish();
  return Tokenizer(std::move(data));
}

namespace {

// --- Writing ---

GgufPair text_pair(std::string_view name, std::string value) {
  return {key_of(name), GgufScalar(std::move(value))};
}
GgufPair array_pair(std::string_view name, GgufArray::Values values) {
  return {key_of(name), GgufArray(std::move(values))};
}

// Scores that give the order of the merges: a piece's is minus the rank of its first merge.
std::vector<float> scores_of(const Tokenizer::Data& data) {
  const auto merges = static_cast<float>(data.merge_list.size());
  std::vector<float> scores(data.pieces.size(), -merges - 1);
  for (size_t rank = data.merge_list.size(); rank-- > 0;) {
    const auto [left, right] = data.merge_list[rank];
    if (const Merge* merge = data.bpe.merges.find(left, right))
      scores[static_cast<size_t>(merge->id)] = -static_cast<float>(rank);
  }
  return scores;
}

// The name of what a byte-level tokenizer does, as a GGUF reader will find it again. Readers that
// ignore normalization split alike, so a name that differs only there is the second choice.
const KnownPre* pre_of(const Tokenizer::Data& data) {
  const std::string splits = data.pre_tokenizer.description();
  const std::string normalizes = data.normalizer.description();
  Normalizer nfc;
  nfc.add({.form = NormalForm::nfc, .matcher = {}, .text = {}});
  const KnownPre* second = nullptr;
  for (const KnownPre& pre : known_pres()) {
    if (pre_tokenizer_of(pre).description() != splits) continue;
    const bool same_normal = normalizes == (pre.nfc ? nfc.description() : "");
    if (same_normal && pre.ignore_merges == data.bpe.options.ignore_merges) return &pre;
    if (same_normal && second == nullptr) second = &pre;
  }
  return second;
}

}  // namespace

std::vector<GgufPair> Tokenizer::gguf_metadata(size_t rows) const {
  const Data& d = *data_;
  std::vector<GgufPair> pairs;
  if (!d.own_pairs.empty()) {
    pairs = d.own_pairs;
  } else {
    const bool bytes = d.bpe.options.alphabet == Bpe::Alphabet::bytes;
    const auto no_gguf = [&](std::string what) {
      d.unsupported("tokenizer.ggml.model", std::move(what),
                    "keep the Hugging Face folder; a GGUF would tokenize differently");
    };
    if (!d.no_gguf.empty()) no_gguf(fmt::format("cannot say that {}", d.no_gguf));
    const size_t count = d.pieces.size();
    TextList tokens;
    std::vector<int32_t> types(count);
    for (size_t i = 0; i < count; ++i) {
      const auto id = static_cast<TokenId>(i);
      tokens.push_back(d.pieces.has(id) ? std::string(d.pieces[id]) : fmt::format("[PAD{}]", i));
      types[i] = static_cast<int32_t>(d.types[i]);
    }
    if (bytes) {
      const KnownPre* pre = pre_of(d);
      if (pre == nullptr)
        no_gguf(fmt::format("has no name for the pre-tokenizer {} after the normalizer \"{}\"",
                            d.pre_tokenizer.description(), d.normalizer.description()));
      pairs.push_back(text_pair("model", "gpt2"));
      pairs.push_back(text_pair("pre", std::string(pre->name)));
    } else {
      // GGUF knows two ways: spaces become ▁, with or without one put first. (Whether also after a
      // control token, where files differ, it leaves to the reader: llama.cpp puts one there.)
      const std::string normalizes = d.normalizer.description();
      const std::string splits = d.pre_tokenizer.description();
      const bool replaces = normalizes == "replace \" \" by \"▁\";" ||
                            normalizes == "prepend \"▁\";replace \" \" by \"▁\";";
      const bool metaspace = normalizes.empty() && splits.starts_with("metaspace");
      // Gemma's files split at spaces that the normalizer has already replaced.
      const bool splits_nothing = splits.empty() || splits == "\" \" 3 false;";
      if (!(replaces && splits_nothing) && !metaspace)
        no_gguf(fmt::format("has no way to say the normalizer \"{}\" and pre-tokenizer \"{}\"",
                            normalizes, splits));
      pairs.push_back(text_pair("model", "llama"));
      pairs.push_back(text_pair("pre", "default"));
      pairs.push_back({key_of("add_space_prefix"), GgufScalar(d.strips_first_space)});
      pairs.push_back(array_pair("scores", scores_of(d)));
    }
    pairs.push_back(array_pair("tokens", std::move(tokens)));
    pairs.push_back(array_pair("token_type", std::move(types)));
    if (bytes) {
      TextList merges;
      for (const auto& [left, right] : d.merge_list)
        merges.push_back(fmt::format("{} {}", d.pieces[left], d.pieces[right]));
      pairs.push_back(array_pair("merges", std::move(merges)));
    }
    for (const auto& [name, id] : {std::pair{"bos_token_id", d.bos},
                                   {"eos_token_id", d.eos},
                                   {"padding_token_id", d.pad},
                                   {"unknown_token_id", d.unknown}})
      if (id) pairs.push_back({key_of(name), GgufScalar(static_cast<uint32_t>(*id))});
    pairs.push_back({key_of("add_bos_token"), GgufScalar(adds_bos())});
    pairs.push_back({key_of("add_eos_token"), GgufScalar(adds_eos())});
  }
  if (rows <= d.pieces.size()) return pairs;
  for (GgufPair& pair : pairs) {
    auto* array = std::get_if<GgufArray>(&pair.value);
    if (array == nullptr) continue;
    GgufArray::Values values = array->values();
    if (pair.key == key_of("tokens")) {
      auto& tokens = std::get<TextList>(values);
      while (tokens.size() < rows) tokens.push_back(fmt::format("[PAD{}]", tokens.size()));
    } else if (pair.key == key_of("token_type")) {
      std::get<std::vector<int32_t>>(values).resize(rows, static_cast<int32_t>(TokenType::unused));
    } else if (pair.key == key_of("scores")) {
      std::get<std::vector<float>>(values).resize(rows, -1e9f);
    } else {
      continue;
    }
    *array = GgufArray(std::move(values));
  }
  return pairs;
}

}  // namespace moru
