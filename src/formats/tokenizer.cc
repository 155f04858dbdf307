#include "formats/tokenizer.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "base/error.h"
#include "base/text.h"
#include "formats/tokenizer_data.h"

namespace moru {
namespace {

// Words are counted in 32 bits, and a normalizer may lengthen a text.
constexpr size_t kMaxTextBytes = size_t{1} << 28;

constexpr size_t kMaxKeptSymbols = size_t{1} << 18;

// Control tokens that end an answer, as the families spell them.
constexpr std::array<std::string_view, 22> kStopPieces = {"<|im_end|>",
                                                          "<|eot_id|>",
                                                          "<|eom_id|>",
                                                          "<end_of_turn>",
                                                          "<|endofturn|>",
                                                          "[|endofturn|]",
                                                          "<|end|>",
                                                          "<|return|>",
                                                          "<|call|>",
                                                          "<|stop|>",
                                                          "<|eot|>",
                                                          "<|eos|>",
                                                          "<|endoftext|>",
                                                          "<|end_of_text|>",
                                                          "<|END_OF_TURN_TOKEN|>",
                                                          "<｜end▁of▁sentence｜>",
                                                          "</s>",
                                                          "<eos>",
                                                          "<EOT>",
                                                          "[EOT]",
                                                          "<turn|>",
                                                          "<|eot_token|>"};

// A Scratch from the pool, returned when the encoder is done.
class Borrowed {
 public:
  explicit Borrowed(const Tokenizer::Data& data) : data_(data) {
    {
      const std::lock_guard lock(data_.pool_mutex);
      if (!data_.pool.empty()) {
        scratch_ = std::move(data_.pool.back());
        data_.pool.pop_back();
      }
    }
    if (!scratch_) scratch_ = std::make_unique<Bpe::Scratch>();
  }
  ~Borrowed() {
    // What a giant text grew is not kept.
    if (scratch_->symbols.capacity() > kMaxKeptSymbols) return;
    const std::lock_guard lock(data_.pool_mutex);
    data_.pool.push_back(std::move(scratch_));
  }
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  Bpe::Scratch& operator*() const { return *scratch_; }

 private:
  const Tokenizer::Data& data_;
  std::unique_ptr<Bpe::Scratch> scratch_;
};

bool begins_with(std::span<const TokenId> ids, std::span<const TokenId> start) {
  return start.size() <= ids.size() && std::equal(start.begin(), start.end(), ids.begin());
}

}  // namespace

bool looks_like_control(std::string_view piece) {
  const auto framed = [&](std::string_view left, std::string_view right) {
    return piece.size() > left.size() + right.size() && piece.starts_with(left) &&
           piece.ends_with(right);
  };
  return piece == "<pad>" || piece == "<mask>" || framed("<|", "|>") || framed("<｜", "｜>") ||
         framed("<unused", ">");
}

std::optional<uint8_t> byte_of_piece(std::string_view piece) {
  if (piece.size() != 6 || !piece.starts_with("<0x") || piece[5] != '>') return std::nullopt;
  unsigned value = 0;
  for (const char c : piece.substr(3, 2)) {
    if (c >= '0' && c <= '9')
      value = value * 16 + static_cast<unsigned>(c - '0');
    else if (c >= 'A' && c <= 'F')
      value = value * 16 + static_cast<unsigned>(c - 'A' + 10);
    else
      return std::nullopt;
  }
  return static_cast<uint8_t>(value);
}

void replace_all(std::string& text, std::string_view from, std::string_view to) {
  for (size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size())
    text.replace(at, from.size(), to);
}

void Tokenizer::Data::refuse(std::string_view field, std::string what, std::string cure) const {
  throw Error(ErrorKind::bad_input, {.where = fmt::format("{}: {}", where, field),
                                     .what = std::move(what),
                                     .cure = std::move(cure)});
}

void Tokenizer::Data::unsupported(std::string_view field, std::string what,
                                  std::string cure) const {
  throw Error(ErrorKind::unsupported, {.where = fmt::format("{}: {}", where, field),
                                       .what = std::move(what),
                                       .cure = std::move(cure)});
}

void Tokenizer::Data::finish() {
  const size_t count = pieces.size();
  types.resize(count, TokenType::normal);
  bpe.reserved.resize(count);
  for (size_t i = 0; i < count; ++i)
    bpe.reserved[i] = types[i] == TokenType::control || types[i] == TokenType::unknown;
  bpe.prepare(pieces);

  pieces.shrink_to_fit();
  if (!decode_replacements.empty())  // refuses those that explode
    for (size_t i = 0; i < count; ++i) replaced(pieces[static_cast<TokenId>(i)]);
}

std::string Tokenizer::Data::replaced(std::string_view piece) const {
  std::string text(piece);
  for (const auto& [from, to] : decode_replacements) {
    replace_all(text, from, to);
    if (text.size() > 4 * kMaxPieceBytes)
      refuse("decoder", fmt::format("makes {} bytes of one token", text.size()));
  }
  return text;
}

void Tokenizer::Data::append_text(TokenId id, std::string& out) const {
  std::string_view piece = pieces[id];
  const TokenType kind = type(id);
  if (kind == TokenType::byte) {
    out.push_back(static_cast<char>(byte_of_piece(piece).value()));
    return;
  }
  const bool spelled_as_is =
      kind == TokenType::control || kind == TokenType::unknown || kind == TokenType::user_defined;
  if (spelled_as_is || bpe.options.alphabet != Bpe::Alphabet::bytes) {
    if (decode_replacements.empty())
      out += piece;
    else
      out += replaced(piece);
    return;
  }
  const size_t before = out.size();
  while (!piece.empty()) {
    const Character letter = first_character(piece);
    const auto byte = byte_of_letter(letter.code);
    if (!byte) {  // not spelled in letters for bytes after all
      out.resize(before);
      out += pieces[id];
      return;
    }
    out.push_back(static_cast<char>(*byte));
    piece.remove_prefix(letter.bytes);
  }
}

// `text` is valid UTF-8; no control token is found where it would touch a literal span.
template <typename OnAdded>
void Tokenizer::Data::encode(std::string_view text, size_t from, std::span<const TextSpan> literal,
                             Bpe::Scratch& scratch, std::vector<TokenId>& ids,
                             OnAdded&& on_added) const {
  // Whether no literal span touches [begin, end).
  const auto free_of_literals = [&](size_t begin, size_t end) {
    const auto next = std::partition_point(literal.begin(), literal.end(),
                                           [&](const TextSpan& span) { return span.end <= begin; });
    return next == literal.end() || next->begin >= end;
  };
  raw_added.split(
      text, from, free_of_literals,
      [&](std::string_view raw) {
        std::string normal;
        const auto offset = static_cast<size_t>(raw.data() - text.data());
        std::string_view piece = raw;
        if (!normalizer.empty()) piece = normal = normalizer.run(raw);
        normalized_added.split(
            piece, 0,
            [&](size_t begin, size_t end) {
              // A normalizer moves what follows, so a piece counts as a whole.
              return normalizer.empty() ? free_of_literals(offset + begin, offset + end)
                                        : free_of_literals(offset, offset + raw.size());
            },
            [&](std::string_view words) {
              pre_tokenizer.split(words, offset == 0 && words.data() == piece.data(),
                                  [&](std::string_view word) { bpe.encode(word, scratch, ids); });
            },
            [&](TokenId id, size_t) { ids.push_back(id); });
      },
      [&](TokenId id, size_t end) {
        ids.push_back(id);
        on_added(end);
      });
}

Tokenizer::Tokenizer(std::unique_ptr<Data> data) : data_(std::move(data)) {}
Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;

std::vector<TokenId> Tokenizer::encode(std::string_view text, Specials specials) const {
  const TextSpan whole{0, text.size()};
  return encode(text, std::span(&whole, specials == Specials::literal ? 1u : 0u));
}

std::vector<TokenId> Tokenizer::encode(std::string_view text,
                                       std::span<const TextSpan> literal) const {
  return encode(text, literal, {}).ids;
}

Tokenizer::CutIds Tokenizer::encode(std::string_view text, std::span<const TextSpan> literal,
                                    std::span<const size_t> cuts) const {
  const Data& d = *data_;
  if (text.size() > kMaxTextBytes)
    throw Error(ErrorKind::bad_input, {.where = "text",
                                       .what = fmt::format("is {} bytes long", text.size()),
                                       .cure = "split it into parts below 256 MiB"});
  const Borrowed scratch(d);
  CutIds out;
  if (find_invalid_utf8(text)) {
    // Repaired bytes moved what spans count: a text with any keeps all its control tokens literal.
    const TextSpan all{0, std::string::npos};
    d.encode(repair_utf8(text), 0, std::span(&all, literal.empty() ? 0u : 1u), *scratch, out.ids,
             [](size_t) {});
    for (const size_t cut : cuts) {
      std::vector<TextSpan> before;
      for (const TextSpan& span : literal)
        if (span.begin < cut) before.push_back({span.begin, std::min(span.end, cut)});
      const std::vector<TokenId> start = encode(text.substr(0, cut), before);
      out.counts.push_back(begins_with(out.ids, start) ? std::optional(start.size())
                                                       : std::nullopt);
    }
    return out;
  }

  // Where an added token ends, what stands before it has its ids whatever follows.
  struct Anchor {
    size_t byte, ids;
  };
  std::vector<Anchor> anchors = {{0, 0}};
  out.ids.reserve(text.size() / 4 + 8);
  d.encode(text, 0, literal, *scratch, out.ids, [&](size_t byte) {
    if (!cuts.empty()) anchors.push_back({byte, out.ids.size()});
  });
  std::vector<TokenId> rest;
  size_t anchor = 0;
  for (const size_t cut : cuts) {
    while (anchor + 1 < anchors.size() && anchors[anchor + 1].byte <= cut) ++anchor;
    const auto [byte, count] = anchors[anchor];
    rest.clear();
    d.encode(text.substr(0, cut), byte, literal, *scratch, rest, [](size_t) {});
    out.counts.push_back(begins_with(std::span(out.ids).subspan(count), rest)
                             ? std::optional(count + rest.size())
                             : std::nullopt);
  }
  return out;
}

std::vector<TextSpan> Tokenizer::control_spans(std::string_view text) const {
  std::vector<TextSpan> found;
  const Data& d = *data_;
  const auto ignore = [](const auto&...) {};
  const auto note = [&](size_t begin, size_t end) {
    found.push_back({begin, end});
    return false;
  };
  d.raw_added.split(text, 0, note, ignore, ignore);
  if (!found.empty() || d.normalized_added.empty()) return found;
  // Those looked for in normalized text are found, their places are not: the whole text is.
  const std::string normal = d.normalizer.run(text);
  d.normalized_added.split(normal, 0, note, ignore, ignore);
  if (!found.empty()) found = {{0, text.size()}};
  return found;
}

std::string Tokenizer::decode(std::span<const TokenId> ids, bool with_specials) const {
  const Data& d = *data_;
  std::string text;
  for (const TokenId id : ids) {
    if (!d.in_range(id)) continue;
    if (!with_specials && d.is_hidden(id)) continue;
    d.append_text(id, text);
  }
  if (d.strips_first_space && text.starts_with(' ')) text.erase(0, 1);
  return text;
}

std::string Tokenizer::bytes_of(TokenId id) const {
  std::string text;
  append_bytes_of(id, text);
  return text;
}

void Tokenizer::append_bytes_of(TokenId id, std::string& text) const {
  if (data_->in_range(id) && !data_->is_hidden(id)) data_->append_text(id, text);
}

std::string_view Tokenizer::piece(TokenId id) const {
  return data_->in_range(id) ? data_->pieces[id] : std::string_view();
}

std::optional<TokenId> Tokenizer::id_of(std::string_view piece) const {
  const TokenId id = data_->pieces.find(piece);
  if (id == kNoToken) return std::nullopt;
  return id;
}

size_t Tokenizer::vocab_size() const { return data_->pieces.size(); }
bool Tokenizer::is_control(TokenId id) const {
  return data_->in_range(id) && data_->type(id) == TokenType::control;
}
std::optional<TokenId> Tokenizer::bos() const { return data_->bos; }
std::optional<TokenId> Tokenizer::eos() const { return data_->eos; }
std::optional<TokenId> Tokenizer::pad() const { return data_->pad; }
bool Tokenizer::adds_bos() const { return data_->adds_bos && data_->bos; }
bool Tokenizer::adds_eos() const { return data_->adds_eos && data_->eos; }

std::vector<TokenId> Tokenizer::stop_ids() const {
  std::vector<TokenId> ids = data_->more_stops;
  if (data_->eos) ids.push_back(*data_->eos);
  for (const std::string_view piece : kStopPieces)
    if (const auto id = id_of(piece); id && is_control(*id)) ids.push_back(*id);
  // Harmony ends a message with <|end|>, and an answer, of several messages, with <|return|>.
  if (const auto end = id_of("<|end|>"); end && id_of("<|return|>") && id_of("<|call|>"))
    std::erase(ids, *end);
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  return ids;
}

std::string TextStream::push(TokenId id) {
  std::string text = tokenizer_->bytes_of(id);
  if (text.empty()) return "";
  // The first token with text loses its leading space where decoding strips it.
  if (first_) text = tokenizer_->decode(std::span(&id, 1));
  first_ = false;
  held_ += text;
  std::string whole;
  size_t at = 0;
  while (at < held_.size()) {
    const CodePoint c = code_point_at(held_, at);
    // The start of a character at the end of what is known may yet be completed.
    const auto lead = static_cast<uint8_t>(held_[at]);
    if (!c.well_formed && at + c.bytes == held_.size() && lead >= 0xc2 && lead <= 0xf4) break;
    append_utf8(whole, c.value);
    at += c.bytes;
  }
  held_.erase(0, at);
  return whole;
}

std::string TextStream::finish() {
  std::string rest = repair_utf8(held_);
  held_.clear();
  first_ = true;
  return rest;
}

}  // namespace moru
