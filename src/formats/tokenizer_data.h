// What a Tokenizer consists of, for the files that fill it in (tokenizer_gguf.cc,
// tokenizer_json.cc) and the one that runs it (tokenizer.cc).
#pragma once
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "formats/added_tokens.h"
#include "formats/bpe.h"
#include "formats/normalizer.h"
#include "formats/pretokenizer.h"
#include "formats/tokenizer.h"

namespace moru {

// GGUF's numbers for tokenizer.ggml.token_type.
enum class TokenType : uint8_t {
  normal = 1,
  unknown = 2,
  control = 3,
  user_defined = 4,
  unused = 5,
  byte = 6,
};

// Bounds on outside data, above any real tokenizer.
constexpr size_t kMaxTokens = size_t{1} << 22;
constexpr size_t kMaxMerges = size_t{1} << 24;
constexpr size_t kMaxPieceBytes = size_t{1} << 16;
constexpr size_t kMaxReplacementBytes = 64;  // so that no list of replacements can explode

struct Tokenizer::Data {
  std::string where;  // the file, for errors
  Pieces pieces;
  std::vector<TokenType> types;  // one a piece

  // Encoding, in this order.
  AddedTokens raw_added;  // found in the text as it came
  Normalizer normalizer;
  AddedTokens normalized_added;  // found in normalized text
  PreTokenizer pre_tokenizer;
  Bpe bpe;

  // Decoding.
  std::vector<std::pair<std::string, std::string>> decode_replacements;  // ▁ → space
  bool strips_first_space = false;

  std::optional<TokenId> bos, eos, pad, unknown;
  std::vector<TokenId> more_stops;  // that the files name besides EOS
  bool adds_bos = false, adds_eos = false;

  // For gguf_metadata: merges by rank, or the pairs of the GGUF this came from.
  std::vector<std::pair<TokenId, TokenId>> merge_list;
  std::vector<GgufPair> own_pairs;
  std::string no_gguf;  // why GGUF cannot say what this tokenizer does; empty if it can

  // Scratch of encoders that are not running.
  mutable std::mutex pool_mutex;
  mutable std::vector<std::unique_ptr<Bpe::Scratch>> pool;

  // Appends the ids of `text` from byte `from` on, where an added token ended or the text begins.
  // on_added(byte) hears where each added token ends.
  template <typename OnAdded>
  void encode(std::string_view text, size_t from, std::span<const TextSpan> literal,
              Bpe::Scratch& scratch, std::vector<TokenId>& ids, OnAdded&& on_added) const;

  // Derives what follows from the above: to be called last.
  void finish();
  TokenType type(TokenId id) const { return types[static_cast<size_t>(id)]; }
  // Left out of decoded text.
  bool is_hidden(TokenId id) const {
    return type(id) == TokenType::control || type(id) == TokenType::unknown;
  }
  // What decode appends for an id.
  void append_text(TokenId id, std::string& out) const;
  // `piece` after decode_replacements.
  std::string replaced(std::string_view piece) const;
  bool in_range(int64_t id) const { return id >= 0 && static_cast<uint64_t>(id) < pieces.size(); }
  [[noreturn]] void refuse(std::string_view field, std::string what, std::string cure = "") const;
  [[noreturn]] void unsupported(std::string_view field, std::string what,
                                std::string cure = "") const;
};

// Whether a spelling is a control token's by its look: <|…|>, <｜…｜>, <pad>, <unused7> …
// Converters of GGUF files go by the same, because many files do not mark them as special.
bool looks_like_control(std::string_view piece);

// The byte that "<0x0A>" stands for; nullopt for any other spelling.
std::optional<uint8_t> byte_of_piece(std::string_view piece);

// Every `from` (not empty) in `text` replaced by `to`.
void replace_all(std::string& text, std::string_view from, std::string_view to);

}  // namespace moru
