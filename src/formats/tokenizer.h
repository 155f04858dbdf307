// Text to token ids and back, as Hugging Face `tokenizers` and SentencePiece do it.
//
// Two algorithms: byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM …: a pre-tokenizer splits the text,
// ranked merges join bytes) and SentencePiece-style BPE (Llama 2, Gemma: no splitting, spaces
// become ▁, unknown characters fall back to bytes). Data comes from a GGUF's metadata or a
// tokenizer.json.
#pragma once
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "formats/gguf.h"

namespace moru {

using TokenId = int32_t;

// Bytes [begin, end) of a text.
struct TextSpan {
  size_t begin = 0, end = 0;
  bool operator==(const TextSpan&) const = default;
};

class Tokenizer {
 public:
  // Errors: bad_input, unsupported (an unknown pre-tokenizer or model, by name).
  static Tokenizer from_gguf(const GgufMetadata& metadata);
  // Reads tokenizer.json, and tokenizer_config.json (add_bos_token …), special_tokens_map.json and
  // generation_config.json (further stop ids) where present.
  static Tokenizer from_folder(const std::filesystem::path& folder);
  static Tokenizer from_json(std::string where, std::string_view tokenizer_json);
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;

  enum class Specials {
    parse,    // "<|im_end|>" in the text becomes its control token: for rendered templates
    literal,  // it stays text: for what a user typed
  };
  // Ids of `text` without BOS or EOS. Invalid UTF-8 is taken as U+FFFD as `tokenizers` does.
  std::vector<TokenId> encode(std::string_view text, Specials specials = Specials::parse) const;

  // As above with `parse`, except that no control token is found where it would touch one of the
  // `literal` spans of the text, which stand in order and apart.
  std::vector<TokenId> encode(std::string_view text, std::span<const TextSpan> literal) const;
  // Its ids, and how many of them each text.first(cut) has: none where that text alone has ids with
  // which those of the whole do not begin. Only what follows the last added token before a cut is
  // encoded again. `cuts` ascend and stand between characters.
  struct CutIds {
    std::vector<TokenId> ids;
    std::vector<std::optional<size_t>> counts;  // one a cut
  };
  CutIds encode(std::string_view text, std::span<const TextSpan> literal,
                std::span<const size_t> cuts) const;
  // Where `text` spells control tokens, in order.
  std::vector<TextSpan> control_spans(std::string_view text) const;

  // Text of the ids; control tokens and the unknown token are left out unless `with_specials`. May
  // end inside a character: streams use TextStream.
  std::string decode(std::span<const TokenId> ids, bool with_specials = false) const;
  // Bytes of one token as they appear in text ("" for those that decode leaves out).
  std::string bytes_of(TokenId id) const;
  void append_bytes_of(TokenId id, std::string& text) const;
  // The token as the vocabulary spells it: "Ġthe", "▁the", "<0x0A>".
  std::string_view piece(TokenId id) const;
  std::optional<TokenId> id_of(std::string_view piece) const;

  size_t vocab_size() const;
  bool is_control(TokenId id) const;
  std::optional<TokenId> bos() const;
  std::optional<TokenId> eos() const;
  std::optional<TokenId> pad() const;
  bool adds_bos() const;  // whether encoders put BOS first by default
  bool adds_eos() const;
  // Ids that end an answer: EOS, and the end-of-turn tokens that the vocabulary is known to have
  // (<|im_end|>, <|eot_id|>, <end_of_turn>, <|endofturn|>, <|end|> …).
  std::vector<TokenId> stop_ids() const;

  // Metadata pairs (tokenizer.ggml.*) that a GGUF of this tokenizer needs: those of the GGUF it
  // came from, or made anew; padded with unused tokens to `rows`, the rows of the embedding.
  // Error unsupported: GGUF has no name for the way this tokenizer splits or normalizes text.
  std::vector<GgufPair> gguf_metadata(size_t rows = 0) const;

  struct Data;  // tokenizer.cc

 private:
  explicit Tokenizer(std::unique_ptr<Data> data);
  std::unique_ptr<Data> data_;
};

// Turns a stream of ids into whole UTF-8: a character split over tokens is held back until it is
// complete; bytes that can no longer become a character come out as U+FFFD.
class TextStream {
 public:
  explicit TextStream(const Tokenizer& tokenizer) : tokenizer_(&tokenizer) {}
  std::string push(TokenId id);  // what has become whole; may be empty
  std::string finish();          // what is left

 private:
  const Tokenizer* tokenizer_;
  std::string held_;
  bool first_ = true;
};

}  // namespace moru
