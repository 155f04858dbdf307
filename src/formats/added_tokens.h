// Tokens that are found in the text before anything else happens to it: control tokens such as
// <|im_end|>, and tokens that users defined (tags, runs of spaces). The leftmost match wins, and
// of those that begin together the longest, as `tokenizers` has it.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "formats/bpe.h"

namespace moru {

struct AddedToken {
  TokenId id = kNoToken;
  std::string content;
  bool control = false;      // no text that a user typed may become it
  bool single_word = false;  // matches only where no word character touches it
  bool lstrip = false;       // takes the white space before it
  bool rstrip = false;       // and after it
  bool normalized = false;   // is looked for in normalized text
};

class AddedTokens {
 public:
  // `token.content` is not empty; the first of equal contents stays.
  void add(AddedToken token);
  bool empty() const { return tokens_.empty(); }

  // Calls `on_text(piece)` and `on_token(id, end)` for what `text` consists of from byte `done` on,
  // in order; `end` is that of what the token takes. A control token at [begin, end) of the text
  // stays text where `is_control(begin, end)` is false.
  template <typename IsControl, typename OnText, typename OnToken>
  void split(std::string_view text, size_t done, IsControl&& is_control, OnText&& on_text,
             OnToken&& on_token) const {
    for (size_t from = done; const AddedToken* token = find(text, from);) {
      const size_t begin = from, end = from + token->content.size();
      from = end;
      if (token->control && !is_control(begin, end)) continue;
      if (token->single_word && touches_word(text, begin, end)) continue;
      const auto [wide_begin, wide_end] = strip(*token, text, begin, end, done);
      if (wide_begin < done) continue;  // an earlier rstrip took it
      if (wide_begin > done) on_text(text.substr(done, wide_begin - done));
      on_token(token->id, wide_end);
      done = wide_end;
    }
    if (done < text.size()) on_text(text.substr(done));
  }

 private:
  // The next token at `from` or later; `from` becomes where it begins.
  const AddedToken* find(std::string_view text, size_t& from) const;
  static bool touches_word(std::string_view text, size_t begin, size_t end);
  static std::pair<size_t, size_t> strip(const AddedToken& token, std::string_view text,
                                         size_t begin, size_t end, size_t done);
  uint32_t child(uint32_t node, uint8_t byte) const;  // 0 if absent

  // A trie: node 0 is the root; edges stand in a hash table keyed by (node, byte).
  std::vector<AddedToken> tokens_;
  std::vector<int32_t> token_of_node_ = {-1};
  std::array<bool, 256> begins_{};  // bytes that some token begins with
  char first_ = 0;                  // the one that all begin with, if there is but one
  bool one_first_ = false;
  struct Edge {
    uint64_t key = 0;  // node << 8 | byte, plus one
    uint32_t child = 0;
  };
  std::vector<Edge> edges_ = std::vector<Edge>(64);
  size_t edge_count_ = 0;
};

}  // namespace moru
