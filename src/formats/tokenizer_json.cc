// Hugging Face's tokenizer.json. Its vocabulary and merges (up to 30 MB) stream into the tables;
// the rest, which is small, becomes a JSON value that is then read field by field.
#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/files.h"
#include "formats/tokenizer_data.h"

namespace moru {
namespace {

using Json = nlohmann::json;

constexpr size_t kMaxJsonDepth = 64;
constexpr size_t kMaxSteps = 32;
constexpr const char* kDamaged = "the file is damaged or hostile: fetch it again";

// Takes the parser's events: model.vocab and model.merges into lists, all else into `rest`.
class TokenizerReader : public nlohmann::json_sax<Json> {
 public:
  explicit TokenizerReader(Tokenizer::Data& data) : data_(data) {}

  Json rest;
  // Merges as spelled, to be looked up when the whole vocabulary is known.
  struct SpelledMerge {
    uint64_t at;
    uint32_t left, right;  // bytes
  };
  std::string merge_text;
  std::vector<SpelledMerge> merges;

  bool null() override { return value(nullptr); }
  bool boolean(bool v) override { return value(v); }
  bool number_integer(number_integer_t v) override { return number(v, v >= 0); }
  bool number_unsigned(number_unsigned_t v) override { return number(v, true); }
  bool number_float(number_float_t v, const string_t&) override { return number(v, false); }
  bool binary(binary_t&) override { return false; }

  bool string(string_t& v) override {
    if (place_ == Place::merges) {
      const size_t space = v.find(' ', 1);
      if (space == std::string::npos || v.find(' ', space + 1) != std::string::npos)
        data_.refuse(merge_field(), fmt::format("\"{}\" is not two tokens with a space between", v),
                     kDamaged);
      add_merge(std::string_view(v).substr(0, space), std::string_view(v).substr(space + 1));
      return true;
    }
    if (place_ == Place::merge_pair) {
      if (pair_.size() == 2) data_.refuse(merge_field(), "has more than two tokens", kDamaged);
      pair_.push_back(std::move(v));
      return true;
    }
    return value(std::move(v));
  }

  bool start_object(std::size_t) override {
    if (place_ == Place::rest && path_is("model", "vocab")) {
      place_ = Place::vocab;
      return true;
    }
    if (place_ != Place::rest) misplaced();
    return open(Json::object());
  }
  bool key(string_t& v) override {
    if (place_ == Place::vocab)
      piece_ = std::move(v);
    else
      keys_.back() = std::move(v);
    return true;
  }
  bool end_object() override {
    if (place_ == Place::vocab) {
      place_ = Place::rest;
      return true;
    }
    return close();
  }
  bool start_array(std::size_t) override {
    if (place_ == Place::rest && path_is("model", "merges")) {
      place_ = Place::merges;
      return true;
    }
    if (place_ == Place::merges) {
      place_ = Place::merge_pair;
      pair_.clear();
      return true;
    }
    if (place_ != Place::rest) misplaced();
    return open(Json::array());
  }
  bool end_array() override {
    if (place_ == Place::merge_pair) {
      if (pair_.size() != 2) data_.refuse(merge_field(), "has fewer than two tokens", kDamaged);
      add_merge(pair_[0], pair_[1]);
      place_ = Place::merges;
      return true;
    }
    if (place_ == Place::merges) {
      place_ = Place::rest;
      return true;
    }
    return close();
  }
  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception& e) override {
    data_.refuse(fmt::format("byte {}", position), fmt::format("is not JSON: {}", e.what()),
                 kDamaged);
  }

 private:
  enum class Place { rest, vocab, merges, merge_pair };

  bool path_is(std::string_view first, std::string_view second) const {
    return keys_.size() == 2 && keys_[0] == first && keys_[1] == second;
  }
  std::string merge_field() const { return fmt::format("model.merges[{}]", merges.size()); }
  [[noreturn]] void misplaced() {
    data_.refuse(
        place_ == Place::vocab ? fmt::format("model.vocab[\"{}\"]", piece_) : merge_field(),
        "is of another type than it should be", kDamaged);
  }

  template <typename Number>
  bool number(Number v, bool is_id) {
    if (place_ != Place::vocab) return value(v);
    if (!is_id || static_cast<double>(v) >= static_cast<double>(kMaxTokens))
      data_.refuse(fmt::format("model.vocab[\"{}\"]", piece_),
                   fmt::format("has the id {}, which is not in [0, {})", v, kMaxTokens), kDamaged);
    if (piece_.size() > kMaxPieceBytes)
      data_.refuse("model.vocab", fmt::format("has a token of {} bytes", piece_.size()), kDamaged);
    const auto id = static_cast<TokenId>(v);
    if (piece_.empty()) {
      if (!data_.pieces.add_hole(id)) duplicate(id);
    } else if (!data_.pieces.add(id, piece_)) {
      duplicate(id);
    }
    return true;
  }
  [[noreturn]] void duplicate(TokenId id) {
    data_.refuse(fmt::format("model.vocab[\"{}\"]", piece_),
                 fmt::format("stands twice, or shares the id {} with another token", id), kDamaged);
  }

  void add_merge(std::string_view left, std::string_view right) {
    if (merges.size() == kMaxMerges)
      data_.refuse("model.merges", fmt::format("has more than {} entries", kMaxMerges), kDamaged);
    if (left.size() > kMaxPieceBytes || right.size() > kMaxPieceBytes)
      data_.refuse(merge_field(), "names a token that is too long", kDamaged);
    merges.push_back({merge_text.size(), static_cast<uint32_t>(left.size()),
                      static_cast<uint32_t>(right.size())});
    merge_text += left;
    merge_text += right;
  }

  template <typename T>
  bool value(T&& v) {
    if (place_ != Place::rest) misplaced();
    put(Json(std::forward<T>(v)));
    return true;
  }
  Json* put(Json v) {
    if (open_.empty()) {
      rest = std::move(v);
      return &rest;
    }
    Json& parent = *open_.back();
    if (parent.is_array()) {
      parent.push_back(std::move(v));
      return &parent.back();
    }
    Json& slot = parent[keys_.back()];
    slot = std::move(v);
    return &slot;
  }
  bool open(Json v) {
    if (open_.size() == kMaxJsonDepth)
      data_.refuse("tokenizer.json", "is nested too deeply", kDamaged);
    open_.push_back(put(std::move(v)));
    keys_.emplace_back();
    return true;
  }
  bool close() {
    open_.pop_back();
    keys_.pop_back();
    return true;
  }

  Tokenizer::Data& data_;
  Place place_ = Place::rest;
  std::string piece_;
  std::vector<std::string> pair_;
  std::vector<Json*> open_;
  std::vector<std::string> keys_;  // of each open container, the key being read
};

// Reads fields of the small part, naming them in errors.
class Fields {
 public:
  Fields(const Tokenizer::Data& data, const Json& object, std::string path)
      : data_(data), object_(object), path_(std::move(path)) {
    if (!object_.is_object()) data_.refuse(path_, "is not an object", kDamaged);
  }
  const std::string& path() const { return path_; }
  std::string path(std::string_view key) const { return fmt::format("{}.{}", path_, key); }

  // nullptr where absent or null.
  const Json* find(std::string_view key) const {
    const auto it = object_.find(key);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }
  bool boolean(std::string_view key, bool fallback) const {
    const Json* v = find(key);
    if (v == nullptr) return fallback;
    if (!v->is_boolean()) data_.refuse(path(key), "is not true or false", kDamaged);
    return v->get<bool>();
  }
  std::string text(std::string_view key, std::string_view fallback = "") const {
    const Json* v = find(key);
    if (v == nullptr) return std::string(fallback);
    if (!v->is_string()) data_.refuse(path(key), "is not a string", kDamaged);
    return v->get<std::string>();
  }
  TokenId id(std::string_view key) const {
    const Json* v = find(key);
    if (v == nullptr || !v->is_number_integer() || v->get<double>() < 0 ||
        v->get<double>() >= static_cast<double>(kMaxTokens))
      data_.refuse(path(key), fmt::format("is not a token id in [0, {})", kMaxTokens), kDamaged);
    return v->get<TokenId>();
  }
  // Elements of an array; none where absent.
  const Json& array(std::string_view key) const {
    static const Json none = Json::array();
    const Json* v = find(key);
    if (v == nullptr) return none;
    if (!v->is_array()) data_.refuse(path(key), "is not an array", kDamaged);
    return *v;
  }
  [[noreturn]] void unsupported(std::string_view key, std::string what) const {
    data_.unsupported(path(key), std::move(what), "moru cannot tokenize as this file asks");
  }
  const Tokenizer::Data& data() const { return data_; }

 private:
  const Tokenizer::Data& data_;
  const Json& object_;
  std::string path_;
};

// {"String": "…"} or {"Regex": "…"}, or a plain string.
Matcher read_pattern(const Fields& from, std::string_view key) {
  const Json* pattern = from.find(key);
  if (pattern == nullptr) from.data().refuse(from.path(key), "is missing", kDamaged);
  std::string text;
  if (pattern->is_string()) {
    text = pattern->get<std::string>();
  } else {
    const Fields fields(from.data(), *pattern, from.path(key));
    if (fields.find("Regex") != nullptr)
      return Matcher::of_regex(fmt::format("{}: {}", from.data().where, from.path(key)),
                               fields.text("Regex"));
    text = fields.text("String");
  }
  if (text.empty()) from.data().refuse(from.path(key), "is empty", kDamaged);
  return Matcher::of_text(std::move(text));
}

// What text is replaced by, or prepended with.
std::string read_replacement(const Fields& from, std::string_view key) {
  std::string text = from.text(key);
  if (text.size() > kMaxReplacementBytes)
    from.data().refuse(from.path(key), fmt::format("is {} bytes long", text.size()), kDamaged);
  return text;
}

// Calls `read(step)` for the object at `key` and, where it is a Sequence, for its members.
template <typename Read>
void for_each_step(const Fields& root, std::string_view key, std::string_view members,
                   Read&& read) {
  size_t count = 0;
  const auto visit = [&](const auto& self, const Json& node, const std::string& path,
                         size_t depth) -> void {
    const Fields fields(root.data(), node, path);
    if (fields.text("type") == "Sequence") {
      if (depth > 8) root.data().refuse(path, "is nested too deeply", kDamaged);
      const Json& all = fields.array(members);
      for (size_t i = 0; i < all.size(); ++i)
        self(self, all[i], fmt::format("{}.{}[{}]", path, members, i), depth + 1);
      return;
    }
    if (++count > kMaxSteps)
      root.data().refuse(path, fmt::format("is one of more than {} steps", kMaxSteps), kDamaged);
    read(fields);
  };
  if (const Json* node = root.find(key)) visit(visit, *node, std::string(key), 0);
}

void read_normalizer(const Fields& root, Normalizer& out) {
  for_each_step(root, "normalizer", "normalizers", [&](const Fields& step) {
    const std::string type = step.text("type");
    NormalizerStep s;
    if (type == "NFC" || type == "NFD" || type == "NFKC" || type == "NFKD") {
      s.form = type == "NFC"    ? NormalForm::nfc
               : type == "NFD"  ? NormalForm::nfd
               : type == "NFKC" ? NormalForm::nfkc
                                : NormalForm::nfkd;
    } else if (type == "Replace") {
      s.kind = NormalizerStep::Kind::replace;
      s.matcher = read_pattern(step, "pattern");
      s.text = read_replacement(step, "content");
    } else if (type == "Prepend") {
      s.kind = NormalizerStep::Kind::prepend;
      s.text = read_replacement(step, "prepend");
    } else if (type == "Strip") {
      s.kind = NormalizerStep::Kind::strip;
      s.left = step.boolean("strip_left", true);
      s.right = step.boolean("strip_right", true);
    } else {
      step.unsupported("type", fmt::format("is the normalizer {}", type));
    }
    out.add(std::move(s));
  });
}

PreTokenizerStep::Prepend read_prepend_scheme(const Fields& step) {
  using Prepend = PreTokenizerStep::Prepend;
  // Older files have add_prefix_space in place of prepend_scheme.
  const std::string scheme =
      step.text("prepend_scheme", step.boolean("add_prefix_space", true) ? "always" : "never");
  if (scheme == "always") return Prepend::always;
  if (scheme == "first") return Prepend::first;
  if (scheme == "never") return Prepend::never;
  step.unsupported("prepend_scheme", fmt::format("is {}", scheme));
}

void check_metaspace(const Fields& step) {
  const std::string mark = step.text("replacement", "▁");
  if (mark != "▁") step.unsupported("replacement", fmt::format("is {}", mark));
}

// Returns whether the text is to be seen as bytes.
bool read_pre_tokenizer(const Fields& root, Tokenizer::Data& data) {
  using Kind = PreTokenizerStep::Kind;
  PreTokenizer& out = data.pre_tokenizer;
  bool bytes = false;
  for_each_step(root, "pre_tokenizer", "pretokenizers", [&](const Fields& step) {
    const std::string type = step.text("type");
    if (bytes)
      step.unsupported("type",
                       fmt::format("is {} after ByteLevel, on letters that stand for bytes", type));
    PreTokenizerStep s;
    const auto split_by_regex = [&](std::string_view regex) {
      s.matcher = Matcher::of_regex(fmt::format("{}: {}", data.where, step.path()), regex);
    };
    if (type == "ByteLevel") {
      bytes = true;
      if (step.boolean("add_prefix_space", true)) {
        data.no_gguf = "it puts a space before every text";
        out.add({.kind = Kind::prefix_space, .matcher = {}});
      }
      if (!step.boolean("use_regex", true)) return;
      split_by_regex(known_pres()[0].patterns[0]);  // GPT-2's
    } else if (type == "Split") {
      const std::string behavior = step.text("behavior");
      if (behavior == "Isolated") {
        s.behavior = SplitBehavior::isolated;
      } else if (behavior == "Removed") {
        s.behavior = SplitBehavior::removed;
      } else if (behavior == "Contiguous") {
        s.behavior = SplitBehavior::contiguous;
      } else if (behavior == "MergedWithPrevious") {
        s.behavior = SplitBehavior::merged_with_previous;
      } else if (behavior == "MergedWithNext") {
        s.behavior = SplitBehavior::merged_with_next;
      } else {
        step.unsupported("behavior", fmt::format("is {}", behavior));
      }
      s.invert = step.boolean("invert", false);
      s.matcher = read_pattern(step, "pattern");
    } else if (type == "Digits") {
      split_by_regex(step.boolean("individual_digits", false) ? R"(\p{N})" : R"(\p{N}+)");
    } else if (type == "Punctuation") {
      const std::string behavior = step.text("behavior", "Isolated");
      if (behavior != "Isolated" && behavior != "Contiguous")
        step.unsupported("behavior", fmt::format("is {}", behavior));
      split_by_regex(behavior == "Isolated" ? R"([\p{P}$+<=>^~|`])" : R"([\p{P}$+<=>^~|`]+)");
    } else if (type == "WhitespaceSplit") {
      split_by_regex(R"(\s+)");
      s.behavior = SplitBehavior::removed;
    } else if (type == "Whitespace") {
      split_by_regex(R"(\w+|[^\w\s]+)");
      s.behavior = SplitBehavior::removed;
      s.invert = true;
    } else if (type == "Metaspace") {
      check_metaspace(step);
      s.kind = Kind::metaspace;
      s.prepend = read_prepend_scheme(step);
      s.split_at_spaces = step.boolean("split", true);
    } else {
      step.unsupported("type", fmt::format("is the pre-tokenizer {}", type));
    }
    out.add(std::move(s));
  });
  return bytes;
}

void read_decoder(const Fields& root, bool bytes, Tokenizer::Data& data) {
  bool byte_level = false, fallback = false, any = false;
  for_each_step(root, "decoder", "decoders", [&](const Fields& step) {
    any = true;
    const std::string type = step.text("type");
    if (type == "ByteLevel") {
      byte_level = true;
    } else if (type == "Replace") {
      const Json* pattern = step.find("pattern");
      const std::string from =
          pattern != nullptr ? Fields(data, *pattern, step.path("pattern")).text("String") : "";
      if (from.empty()) step.unsupported("pattern", "is not a string");
      data.decode_replacements.emplace_back(from, read_replacement(step, "content"));
    } else if (type == "ByteFallback") {
      fallback = true;
    } else if (type == "Metaspace") {
      check_metaspace(step);
      data.decode_replacements.emplace_back("▁", " ");
      data.strips_first_space = read_prepend_scheme(step) != PreTokenizerStep::Prepend::never;
    } else if (type == "Strip") {
      const Json* start = step.find("start");
      const Json* stop = step.find("stop");
      if (step.text("content") != " " || start == nullptr || *start != 1 ||
          (stop != nullptr && *stop != 0))
        step.unsupported("type", "is a Strip of something else than one leading space");
      data.strips_first_space = true;
    } else if (type != "Fuse") {
      step.unsupported("type", fmt::format("is the decoder {}", type));
    }
  });
  if (bytes != byte_level)
    data.unsupported("decoder", fmt::format("is {}ByteLevel, unlike the pre-tokenizer",
                                            byte_level ? "" : "not "));
  if (!bytes && !any) data.unsupported("decoder", "is missing");
  if (!bytes && data.bpe.options.byte_fallback && !fallback)
    data.unsupported("decoder", "has no ByteFallback, though the model falls back to bytes");
}

void read_model(const Fields& model, TokenizerReader& reader, bool bytes, Tokenizer::Data& data) {
  Bpe::Options& options = data.bpe.options;
  options.alphabet = bytes ? Bpe::Alphabet::bytes : Bpe::Alphabet::characters;
  options.ignore_merges = model.boolean("ignore_merges", false);
  options.byte_fallback = model.boolean("byte_fallback", false) && !bytes;
  options.fuse_unknown = model.boolean("fuse_unk", false);
  if (const std::string unknown = model.text("unk_token"); !unknown.empty()) {
    options.unknown = data.pieces.find(unknown);
    if (options.unknown == kNoToken)
      data.refuse("model.unk_token", fmt::format("\"{}\" is not in the vocabulary", unknown),
                  kDamaged);
    data.unknown = options.unknown;
  }
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"})
    if (!model.text(key).empty()) model.unsupported(key, fmt::format("is \"{}\"", model.text(key)));
  if (const Json* dropout = model.find("dropout"); dropout != nullptr && *dropout != 0.0)
    model.unsupported("dropout", "makes tokens random");

  data.bpe.merges.reserve(reader.merges.size());
  data.merge_list.reserve(reader.merges.size());
  for (size_t i = 0; i < reader.merges.size(); ++i) {
    const auto [at, left_bytes, right_bytes] = reader.merges[i];
    const std::string_view both =
        std::string_view(reader.merge_text).substr(at, left_bytes + size_t{right_bytes});
    const auto find = [&](std::string_view piece) {
      const TokenId id = data.pieces.find(piece);
      if (id == kNoToken)
        data.refuse(fmt::format("model.merges[{}]", i),
                    fmt::format("names \"{}\", which is not in the vocabulary", piece), kDamaged);
      return id;
    };
    const TokenId left = find(both.substr(0, left_bytes)), right = find(both.substr(left_bytes));
    data.bpe.merges.add(left, right, {static_cast<uint32_t>(i), find(both)});
    data.merge_list.emplace_back(left, right);
  }
}

void read_added_tokens(const Fields& root, Tokenizer::Data& data) {
  const Json& all = root.array("added_tokens");
  std::vector<AddedToken> tokens;
  for (size_t i = 0; i < all.size(); ++i) {
    const Fields fields(data, all[i], fmt::format("added_tokens[{}]", i));
    AddedToken token;
    token.content = fields.text("content");
    token.id = fields.id("id");
    if (token.content.empty() || token.content.size() > kMaxPieceBytes)
      data.refuse(fields.path("content"), "is empty or too long", kDamaged);
    // Where the vocabulary has the token, its id there counts, as it does for `tokenizers`.
    const TokenId in_vocab = data.pieces.find(token.content);
    if (in_vocab != kNoToken)
      token.id = in_vocab;
    else if (!data.pieces.add(token.id, token.content))
      data.refuse(fields.path("id"), fmt::format("{} is taken by another token", token.id),
                  kDamaged);
    token.single_word = fields.boolean("single_word", false);
    token.lstrip = fields.boolean("lstrip", false);
    token.rstrip = fields.boolean("rstrip", false);
    const bool special = fields.boolean("special", false);
    token.control = special || looks_like_control(token.content);
    token.normalized = fields.boolean("normalized", !special);
    tokens.push_back(std::move(token));
  }
  data.types.assign(data.pieces.size(), TokenType::normal);
  for (size_t id = 0; id < data.pieces.size(); ++id) {
    const std::string_view piece = data.pieces[static_cast<TokenId>(id)];
    if (piece.empty())
      data.types[id] = TokenType::unused;
    else if (data.bpe.options.byte_fallback && byte_of_piece(piece))
      data.types[id] = TokenType::byte;
  }
  for (AddedToken& token : tokens) {
    const auto id = static_cast<size_t>(token.id);
    data.types[id] = !token.control             ? TokenType::user_defined
                     : data.unknown == token.id ? TokenType::unknown
                                                : TokenType::control;
    if (token.normalized) {
      token.content = data.normalizer.run(token.content);
      if (!token.content.empty()) data.normalized_added.add(std::move(token));
    } else {
      data.raw_added.add(std::move(token));
    }
  }
}

// The special tokens at the ends of the template that encoders fill in.
void read_post_processor(const Fields& root, Tokenizer::Data& data) {
  const auto known_id = [&](const Json& id) -> std::optional<TokenId> {
    if (!id.is_number_integer() || !data.in_range(id.get<int64_t>())) return std::nullopt;
    return id.get<TokenId>();
  };
  for_each_step(root, "post_processor", "processors", [&](const Fields& step) {
    const std::string type = step.text("type");
    if (type == "TemplateProcessing") {
      bool before = true;
      const Json& single = step.array("single");
      for (size_t i = 0; i < single.size(); ++i) {
        const Fields part(data, single[i], fmt::format("{}.single[{}]", step.path(), i));
        const Json* special = part.find("SpecialToken");
        if (special == nullptr) {
          before = false;
          continue;
        }
        const std::string name = Fields(data, *special, part.path("SpecialToken")).text("id");
        const TokenId id = data.pieces.find(name);
        if (id == kNoToken)
          data.refuse(part.path("SpecialToken"), fmt::format("\"{}\" is no token", name), kDamaged);
        if (before ? data.adds_bos : data.adds_eos)
          part.unsupported("SpecialToken", "is a second token at the same end of every text");
        (before ? data.adds_bos : data.adds_eos) = true;
        (before ? data.bos : data.eos) = id;
      }
    } else if (type == "BertProcessing" || type == "RobertaProcessing") {
      // ["<s>", 0]
      for (const auto& [key, adds, token] :
           {std::tuple{"cls", &data.adds_bos, &data.bos}, {"sep", &data.adds_eos, &data.eos}}) {
        const Json& pair = step.array(key);
        if (pair.size() != 2) data.refuse(step.path(key), "is not a token and its id", kDamaged);
        *token = known_id(pair[1]);
        *adds = token->has_value();
      }
    } else if (type != "ByteLevel") {
      step.unsupported("type", fmt::format("is the post-processor {}", type));
    }
  });
}

Json parse_small(const std::filesystem::path& path) {
  const std::string text = read_file(path);
  Json value = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!value.is_object())
    throw Error(ErrorKind::bad_input,
                {.where = path.string(), .what = "is not a JSON object", .cure = kDamaged});
  return value;
}

// "<s>" or {"content": "<s>", …}; nullopt where absent or not a token of the vocabulary.
std::optional<TokenId> named_token(const Json& config, const char* key, const Pieces& pieces) {
  const auto it = config.find(key);
  if (it == config.end()) return std::nullopt;
  const Json* text = &*it;
  if (text->is_object() && text->contains("content")) text = &(*text)["content"];
  if (!text->is_string()) return std::nullopt;
  const TokenId id = pieces.find(text->get_ref<const std::string&>());
  if (id == kNoToken) return std::nullopt;
  return id;
}

std::unique_ptr<Tokenizer::Data> read_tokenizer_json(std::string where, std::string_view text) {
  auto data = std::make_unique<Tokenizer::Data>();
  data->where = std::move(where);
  TokenizerReader reader(*data);
  Json::sax_parse(text.begin(), text.end(), &reader);
  const Fields root(*data, reader.rest, "tokenizer.json");
  const Json* model_value = root.find("model");
  if (model_value == nullptr) data->refuse("model", "is missing", kDamaged);
  const Fields model(*data, *model_value, "model");
  // The oldest files do not name the type; only BPE has merges.
  const std::string type = model.text("type", reader.merges.empty() ? "unnamed" : "BPE");
  if (type != "BPE")
    data->unsupported("model.type", fmt::format("is {}, and only BPE is read", type));
  if (data->pieces.size() == 0) data->refuse("model.vocab", "is empty", kDamaged);

  read_normalizer(root, data->normalizer);
  const bool bytes = read_pre_tokenizer(root, *data);
  read_model(model, reader, bytes, *data);
  read_decoder(root, bytes, *data);
  read_added_tokens(root, *data);
  read_post_processor(root, *data);
  return data;
}

}  // namespace

Tokenizer Tokenizer::from_json(std::string where, std::string_view tokenizer_json) {
  auto data = read_tokenizer_json(std::move(where), tokenizer_json);
  data->finish();
  return Tokenizer(std::move(data));
}

Tokenizer Tokenizer::from_folder(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / "tokenizer.json";
  const MappedFile file(path);
  auto data = read_tokenizer_json(
      path.string(), {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()});

  for (const char* name : {"special_tokens_map.json", "tokenizer_config.json"}) {
    if (!std::filesystem::exists(folder / name)) continue;
    const Json config = parse_small(folder / name);
    for (const auto& [key, token] :
         {std::pair{"bos_token", &data->bos}, {"eos_token", &data->eos}, {"pad_token", &data->pad}})
      if (const auto id = named_token(config, key, data->pieces)) *token = id;
    for (const auto& [key, adds] :
         {std::pair{"add_bos_token", &data->adds_bos}, {"add_eos_token", &data->adds_eos}})
      if (const auto it = config.find(key); it != config.end() && it->is_boolean())
        *adds = it->get<bool>();
  }
  // "eos_token_id": 2 or [2, 32000]: whatever may end an answer.
  if (std::filesystem::exists(folder / "generation_config.json")) {
    const Json config = parse_small(folder / "generation_config.json");
    if (const auto it = config.find("eos_token_id"); it != config.end())
      for (const Json& id : it->is_array() ? *it : Json::array({*it}))
        if (id.is_number_integer() && data->in_range(id.get<int64_t>()))
          data->more_stops.push_back(id.get<TokenId>());
  }
  data->finish();
  return Tokenizer(std::move(data));
}

}  // namespace moru
