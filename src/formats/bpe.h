// Byte pair encoding of one word (arXiv:1508.07909) over a vocabulary and its merges.
//
// A word begins as its bytes or its characters; again and again the pair of neighbours with the
// lowest rank, the leftmost of equals, becomes one symbol, until no pair has a rank. Ranks stand in
// a list of merges (GPT-2 and later), or follow from the scores of pieces (SentencePiece): then any
// two neighbours that together spell a piece may merge, the best score first.
#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "formats/tokenizer.h"  // TokenId

namespace moru {

constexpr TokenId kNoToken = -1;

// The vocabulary: ids and how they are spelled. Ids may leave holes, which spell "".
class Pieces {
 public:
  // False, and nothing is added, if the id or the spelling is taken. `piece` is not empty.
  bool add(TokenId id, std::string_view piece);
  // An id that spells nothing; false if it is taken.
  bool add_hole(TokenId id);
  void reserve(size_t count, size_t bytes);  // of all pieces
  // Gives back what was kept for more pieces.
  void shrink_to_fit();
  TokenId find(std::string_view piece) const;  // kNoToken if absent
  std::string_view operator[](TokenId id) const {
    const Place place = places_[static_cast<size_t>(id)];
    return std::string_view(text_).substr(place.at, place.length);
  }
  size_t size() const { return places_.size(); }  // the largest id, plus one
  bool has(TokenId id) const {
    return id >= 0 && static_cast<size_t>(id) < places_.size() &&
           places_[static_cast<size_t>(id)].length > 0;
  }

 private:
  struct Place {
    uint64_t at : 40 = 0, length : 24 = 0;  // 24 bits hold the longest piece that readers accept
  };
  void grow();

  std::string text_;
  std::vector<Place> places_;
  std::vector<TokenId> slots_;  // open addressing by hash of the spelling
  size_t used_ = 0;
};

struct Merge {
  uint32_t rank;
  TokenId id;  // of the merged symbol
};

// (left, right) → Merge, in open addressing.
class MergeTable {
 public:
  void reserve(size_t count);
  // The first merge of a pair stays. At most as many as were reserved.
  void add(TokenId left, TokenId right, Merge merge);
  // Takes out the merges that would make an id that is in `reserved`.
  void forbid(const std::vector<bool>& reserved);
  // nullptr if there is none.
  const Merge* find(TokenId left, TokenId right) const {
    if (slots_.empty()) return nullptr;
    const uint64_t key = key_of(left, right);
    for (size_t i = place_of(key);; i = (i + 1) & mask_) {
      if (slots_[i].key == key) return &slots_[i].merge;
      if (slots_[i].key == kEmpty) return nullptr;
    }
  }

 private:
  static constexpr uint64_t kEmpty = ~uint64_t{0};
  struct Slot {
    uint64_t key = kEmpty;
    Merge merge{};
  };
  static uint64_t key_of(TokenId left, TokenId right) {
    return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
  }
  size_t place_of(uint64_t key) const {
    return static_cast<size_t>((key * 0x9e3779b97f4a7c15u) >> shift_);
  }

  std::vector<Slot> slots_;
  size_t mask_ = 0;
  unsigned shift_ = 63;
};

class Bpe {
 public:
  // What a word's first symbols are.
  enum class Alphabet {
    bytes,       // every byte, spelled by GPT-2's printable stand-in (byte_letter)
    characters,  // every character, spelled as itself
  };
  struct Options {
    Alphabet alphabet = Alphabet::bytes;
    bool by_score = false;       // merges come from scores, not from the table
    bool ignore_merges = false;  // a word that is a piece is taken whole
    bool byte_fallback = false;  // unknown characters become <0x00> … <0xFF>
    bool fuse_unknown = false;   // neighbouring unknowns become one
    TokenId unknown = kNoToken;  // kNoToken: what is unknown is left out
  };

  Options options;
  MergeTable merges;
  std::vector<uint32_t> score_rank;  // by_score: rank of each id, kNoRank for what never merges
  static constexpr uint32_t kNoRank = UINT32_MAX;
  std::vector<bool> reserved;  // ids that no text may spell: control tokens

  // Call when all the above is set; `pieces` must outlive the object.
  void prepare(const Pieces& pieces);

  // Working memory, and the encodings of recent words. Not for two threads at once.
  class Scratch;
  void encode(std::string_view word, Scratch& scratch, std::vector<TokenId>& out) const;

 private:
  void encode_word(std::string_view word, Scratch& scratch, std::vector<TokenId>& out) const;
  void merge_word(std::string_view word, Scratch& scratch, std::vector<TokenId>& out) const;
  void start(std::string_view word, Scratch& scratch) const;
  Merge merge_of(std::string_view word, TokenId left, TokenId right, size_t begin,
                 size_t end) const;
  void merge_short(std::string_view word, Scratch& scratch) const;
  void merge_long(std::string_view word, Scratch& scratch) const;
  void finish(std::string_view word, Scratch& scratch, std::vector<TokenId>& out) const;

  const Pieces* pieces_ = nullptr;
  std::array<TokenId, 256> byte_ids_{};  // bytes: the letters' ids; characters: of <0x00> …
  bool whole_fallback_ = false;          // all 256 byte tokens are there
  bool splits_at_spaces_ = false;
  std::unordered_set<char32_t> joins_space_;  // characters that some piece has before a ▁
};

class Bpe::Scratch {
 public:
  struct Symbol {
    TokenId id;
    uint32_t begin, end;     // bytes of the word
    int32_t previous, next;  // merge_long's list
  };
  struct Candidate {
    uint32_t rank;
    int32_t at;
    uint32_t begin, end;  // of the merged text: tells whether the pair is still there
    TokenId id;
  };
  // Long enough for nearly all words; a slot is a line of the processor's cache.
  static constexpr size_t kWordBytes = 30, kWordIds = 8, kWords = 8192;
  struct alignas(64) Word {
    uint8_t bytes = 0, ids = 0;
    std::array<char, kWordBytes> text;
    std::array<TokenId, kWordIds> tokens;
  };

  static_assert(sizeof(Word) == 64);

  std::vector<Symbol> symbols;
  std::vector<Merge> pairs;
  std::vector<Candidate> heap;
  std::vector<Word> words = std::vector<Word>(kWords);
  std::string spelled;
};

// GPT-2's spelling of a byte as a printable character: itself where printable, else U+0100 and up.
char32_t byte_letter(uint8_t byte);
// The byte that `letter` spells.
std::optional<uint8_t> byte_of_letter(char32_t letter);

// A fast hash of a short text; the same on every machine.
uint64_t hash_of(std::string_view text);

}  // namespace moru
