// Holds an answer to a language: which tokens may come next, so that the whole is JSON that a
// schema allows, or a text that a regular expression matches.
//
//   Language    what an answer may be; made once from its source, for any model
//   Vocabulary  a model's tokens as a tree of their bytes
//   TokenMasks  the two together: for each state of the language, the tokens that may come next
//   Constraint  one answer's place in its language
//
// A mask is made when its state is first met and kept: in layers, tokens of few bytes apart from
// long ones, as few bytes do not tell "19 more letters" from "18 more". The language is one of
// bytes, so tokens may end inside a character.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "engine/automaton.h"
#include "formats/tokenizer.h"

namespace moru {

// Where a language comes from.
struct ConstraintSource {
  enum class Kind { json_object, json_schema, regex };
  Kind kind;
  std::string text;  // of the schema or the expression; empty for json_object: any JSON object
  bool operator==(const ConstraintSource&) const = default;
};

class Language {
 public:
  // Errors: bad_input (no JSON, no schema, no expression), unsupported; `where` of the error is
  // the place in the source: "json_schema: /properties/age/not". docs/constraints.md lists what is
  // supported.
  explicit Language(const ConstraintSource& source);
  const Program& program() const { return program_; }
  // Whether `text` is of the language.
  bool accepts(std::string_view text) const;

 private:
  Program program_;
};

// The languages last asked for, so that requests with the same schema share one and its masks. Any
// thread.
class LanguageCache {
 public:
  // Errors: Language's.
  std::shared_ptr<const Language> find(const ConstraintSource& source);

 private:
  std::mutex mutex_;
  std::deque<std::pair<ConstraintSource, std::shared_ptr<const Language>>> known_;
};

class Vocabulary {
 public:
  // Tokens that decode to nothing (control tokens) are left out: no text can ask for them.
  explicit Vocabulary(const Tokenizer& tokenizer, size_t vocab);

  size_t vocab() const { return vocab_; }

  // Tokens in the order of their bytes, as a tree in one array: a node's descendants follow it.
  struct TreeNode {
    uint32_t after;  // the first node that is not below this one
    uint32_t first;  // tokens[first, first of the next node) end here
    uint16_t depth;  // bytes read with this one
    uint8_t byte;
  };
  struct Tree {
    std::vector<TreeNode> nodes;  // and one at the end with `first` alone
    std::vector<TokenId> tokens;
  };
  // Tokens of at most so many bytes that are of no layer before. Nearly all are short, and for
  // short ones most places in a counted repeat are alike.
  static constexpr size_t kLayers = 3;
  static constexpr size_t kLayerBytes[kLayers] = {6, 12, SIZE_MAX};
  static constexpr size_t kPlainCharacters = 16;
  struct Layer {
    size_t longest = 1;  // bytes of a token
    Tree plain, others;  // of 1 to kPlainCharacters plain characters (grammar.h), and all others
    // Bits of the plain tokens of at most so many characters.
    std::span<const uint64_t> plain_up_to(size_t characters) const;
    std::vector<uint64_t> plain_bits;  // [kPlainCharacters + 1, words]
  };
  std::span<const Layer> layers() const { return layers_; }

 private:
  size_t vocab_;
  std::array<Layer, kLayers> layers_;
};

// One thread at a time.
class TokenMasks {
 public:
  TokenMasks(std::shared_ptr<const Language> language,
             std::shared_ptr<const Vocabulary> vocabulary);

  const Language& language() const { return *language_; }
  const Vocabulary& vocabulary() const { return *vocabulary_; }
  // A bit for each token that may come next. Valid until the next call.
  std::span<const uint64_t> mask(const Automaton& exact, Automaton::State state);

 private:
  // The tokens of a layer, with the states that they can tell apart.
  struct Layer {
    Automaton automaton;  // looks as far ahead as the layer's longest token
    std::unordered_map<Automaton::State, std::vector<uint64_t>> masks;
  };
  void make_layers();
  const std::vector<uint64_t>& layer_mask(size_t layer, const Automaton& exact,
                                          Automaton::State state);
  void add_tokens(const Vocabulary::Tree& tree, Automaton& automaton, Automaton::State state,
                  std::vector<uint64_t>& bits);

  std::shared_ptr<const Language> language_;
  std::shared_ptr<const Vocabulary> vocabulary_;
  std::vector<Layer> layers_;
  std::vector<uint64_t> mask_;
  std::vector<Automaton::State> path_;
};

class Constraint {
 public:
  explicit Constraint(std::shared_ptr<TokenMasks> masks);

  // A bit for each token that may come next; none where accepts() and nothing can follow, or where
  // the vocabulary has no token for what must.
  std::span<const uint64_t> mask() { return masks_->mask(exact_, state_); }
  bool accepts() const { return exact_.accepts(state_); }    // the answer may end here
  bool complete() const { return exact_.is_final(state_); }  // and nothing can follow
  // The answer goes on with `bytes`; false, and the place stays, where it may not.
  bool take(std::string_view bytes);
  // The bytes that must come next, up to the first place with a choice; at most `most`.
  std::string forced(size_t most);

 private:
  std::shared_ptr<TokenMasks> masks_;
  Automaton exact_;
  Automaton::State state_;
};

// logits of tokens whose bit is not set become −∞.
void apply_mask(std::span<const uint64_t> mask, std::span<float> logits);

}  // namespace moru
