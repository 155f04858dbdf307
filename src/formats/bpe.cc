#include "formats/bpe.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "base/error.h"
#include "base/text.h"
#include "formats/unicode.h"

namespace moru {
namespace {

constexpr std::string_view kSpaceMark = "▁";
constexpr char32_t kSpaceMarkCode = 0x2581;

// Up to this many symbols, scanning for the best pair beats a heap.
constexpr size_t kShortWord = 48;

bool is_printable_byte(unsigned b) {
  return (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
}

struct ByteLetters {
  std::array<char32_t, 256> letter;
  std::array<int16_t, 324> byte;  // letters end at U+0143
  ByteLetters() {
    byte.fill(-1);
    char32_t next = 256;
    for (unsigned b = 0; b < 256; ++b) {
      letter[b] = is_printable_byte(b) ? b : next++;
      byte[letter[b]] = static_cast<int16_t>(b);
    }
  }
};
const ByteLetters& byte_letters() {
  static const ByteLetters table;
  return table;
}

}  // namespace

char32_t byte_letter(uint8_t byte) { return byte_letters().letter[byte]; }

std::optional<uint8_t> byte_of_letter(char32_t letter) {
  const auto& table = byte_letters().byte;
  if (letter >= table.size() || table[letter] < 0) return std::nullopt;
  return static_cast<uint8_t>(table[letter]);
}

uint64_t hash_of(std::string_view text) {
  constexpr uint64_t kMultiplier = 0x9fb21c651e98df25u;
  uint64_t hash = text.size() * 0x9e3779b97f4a7c15u;
  const auto mix = [&](uint64_t bits) {
    hash = (hash ^ bits) * kMultiplier;
    hash ^= hash >> 32;
  };
  uint64_t bits = 0;
  for (; text.size() >= 8; text.remove_prefix(8)) {
    std::memcpy(&bits, text.data(), 8);
    mix(bits);
  }
  if (!text.empty()) {
    bits = 0;
    std::memcpy(&bits, text.data(), text.size());
    mix(bits);
  }
  return hash ^ hash >> 29;
}

// --- Pieces ---

void Pieces::grow() {
  std::vector<TokenId> bigger(std::max<size_t>(slots_.size() * 2, 1024), kNoToken);
  const size_t mask = bigger.size() - 1;
  for (const TokenId id : slots_) {
    if (id == kNoToken) continue;
    size_t i = hash_of((*this)[id]) & mask;
    while (bigger[i] != kNoToken) i = (i + 1) & mask;
    bigger[i] = id;
  }
  slots_.swap(bigger);
}

bool Pieces::add(TokenId id, std::string_view piece) {
  MORU_CHECK(id >= 0 && !piece.empty() && piece.size() < size_t{1} << 24);
  if (has(id)) return false;
  if (used_ * 4 >= slots_.size() * 3) grow();
  const size_t mask = slots_.size() - 1;
  size_t i = hash_of(piece) & mask;
  for (; slots_[i] != kNoToken; i = (i + 1) & mask)
    if ((*this)[slots_[i]] == piece) return false;
  if (static_cast<size_t>(id) >= places_.size()) places_.resize(static_cast<size_t>(id) + 1);
  Place& place = places_[static_cast<size_t>(id)];
  place.at = text_.size() & ((uint64_t{1} << 40) - 1);
  place.length = piece.size() & ((uint64_t{1} << 24) - 1);
  text_ += piece;
  slots_[i] = id;
  ++used_;
  return true;
}

bool Pieces::add_hole(TokenId id) {
  if (has(id)) return false;
  if (static_cast<size_t>(id) >= places_.size()) places_.resize(static_cast<size_t>(id) + 1);
  return true;
}

void Pieces::reserve(size_t count, size_t bytes) {
  places_.reserve(count);
  text_.reserve(bytes);
}

void Pieces::shrink_to_fit() {
  text_.shrink_to_fit();
  places_.shrink_to_fit();
}

TokenId Pieces::find(std::string_view piece) const {
  if (slots_.empty() || piece.empty()) return kNoToken;
  const size_t mask = slots_.size() - 1;
  for (size_t i = hash_of(piece) & mask; slots_[i] != kNoToken; i = (i + 1) & mask)
    if ((*this)[slots_[i]] == piece) return slots_[i];
  return kNoToken;
}

// --- MergeTable ---

void MergeTable::reserve(size_t count) {
  const size_t size = std::bit_ceil(std::max<size_t>(count * 2, 2));
  slots_.assign(size, Slot{});
  mask_ = size - 1;
  shift_ = 64 - static_cast<unsigned>(std::countr_zero(size));
}

void MergeTable::add(TokenId left, TokenId right, Merge merge) {
  const uint64_t key = key_of(left, right);
  size_t i = place_of(key);
  for (; slots_[i].key != kEmpty; i = (i + 1) & mask_)
    if (slots_[i].key == key) return;
  slots_[i] = {key, merge};
}

void MergeTable::forbid(const std::vector<bool>& reserved) {
  for (Slot& slot : slots_)
    if (slot.key != kEmpty && reserved[static_cast<size_t>(slot.merge.id)])
      slot.merge.rank = Bpe::kNoRank;
}

// --- Bpe ---

void Bpe::prepare(const Pieces& pieces) {
  pieces_ = &pieces;
  merges.forbid(reserved);
  byte_ids_.fill(kNoToken);
  whole_fallback_ = true;
  for (unsigned b = 0; b < 256; ++b) {
    std::string spelled;
    if (options.alphabet == Alphabet::bytes)
      append_utf8(spelled, byte_letter(static_cast<uint8_t>(b)));
    else
      spelled = fmt::format("<0x{:02X}>", b);
    byte_ids_[b] = pieces.find(spelled);
    whole_fallback_ = whole_fallback_ && byte_ids_[b] != kNoToken;
  }
  if (options.alphabet == Alphabet::bytes) return;

  // No merge crosses from a character that no piece has before a ▁ to that ▁. So a text may be cut
  // there and its words encoded one by one, with the same result; and words repeat.
  splits_at_spaces_ = pieces.find(kSpaceMark) != kNoToken && !options.ignore_merges &&
                      (options.unknown != kNoToken || (options.byte_fallback && whole_fallback_));
  for (size_t id = 0; id < pieces.size(); ++id) {
    const std::string_view piece = pieces[static_cast<TokenId>(id)];
    if (reserved[id]) continue;
    for (size_t at = piece.find(kSpaceMark, 1); at != std::string_view::npos;
         at = piece.find(kSpaceMark, at + 1)) {
      if (find_invalid_utf8(piece.substr(0, at))) continue;
      const char32_t before = last_character(piece.substr(0, at)).code;
      if (before != kSpaceMarkCode) joins_space_.insert(before);
    }
  }
}

void Bpe::encode(std::string_view word, Scratch& scratch, std::vector<TokenId>& out) const {
  if (options.alphabet == Alphabet::bytes || !splits_at_spaces_)
    return encode_word(word, scratch, out);
  while (!word.empty()) {
    size_t end = word.find(kSpaceMark, 1);
    for (; end != std::string_view::npos; end = word.find(kSpaceMark, end + 1)) {
      const char32_t before = last_character(word.substr(0, end)).code;
      if (before != kSpaceMarkCode && joins_space_.count(before) == 0) break;
    }
    end = std::min(end, word.size());
    encode_word(word.substr(0, end), scratch, out);
    word.remove_prefix(end);
  }
}

void Bpe::encode_word(std::string_view word, Scratch& scratch, std::vector<TokenId>& out) const {
  if (word.size() > Scratch::kWordBytes) return merge_word(word, scratch, out);
  Scratch::Word& known = scratch.words[hash_of(word) % Scratch::kWords];
  if (known.bytes == word.size() && std::memcmp(known.text.data(), word.data(), word.size()) == 0) {
    out.insert(out.end(), known.tokens.begin(), known.tokens.begin() + known.ids);
    return;
  }
  const size_t before = out.size();
  merge_word(word, scratch, out);
  const size_t count = out.size() - before;
  if (count > Scratch::kWordIds) return;
  known.bytes = static_cast<uint8_t>(word.size());
  known.ids = static_cast<uint8_t>(count);
  std::memcpy(known.text.data(), word.data(), word.size());
  std::copy(out.begin() + static_cast<ptrdiff_t>(before), out.end(), known.tokens.begin());
}

void Bpe::merge_word(std::string_view word, Scratch& scratch, std::vector<TokenId>& out) const {
  if (options.ignore_merges) {
    std::string_view spelled = word;
    if (options.alphabet == Alphabet::bytes) {
      scratch.spelled.clear();
      for (const char c : word) append_utf8(scratch.spelled, byte_letter(static_cast<uint8_t>(c)));
      spelled = scratch.spelled;
    }
    const TokenId id = pieces_->find(spelled);
    if (id != kNoToken && !reserved[static_cast<size_t>(id)]) {
      out.push_back(id);
      return;
    }
  }
  start(word, scratch);
  if (scratch.symbols.size() <= kShortWord)
    merge_short(word, scratch);
  else
    merge_long(word, scratch);
  finish(word, scratch, out);
}

// The first symbols. With scores, an unknown character may yet merge into a piece, and is kept as
// kNoToken; with ranks it cannot, and is replaced at once.
void Bpe::start(std::string_view word, Scratch& scratch) const {
  std::vector<Scratch::Symbol>& symbols = scratch.symbols;
  symbols.clear();
  const auto push = [&](TokenId id, size_t begin, size_t end) {
    symbols.push_back({id, static_cast<uint32_t>(begin), static_cast<uint32_t>(end), 0, 0});
  };
  bool unknown_before = false;
  const auto push_unknown = [&](size_t begin, size_t end) {
    if (options.unknown == kNoToken) return;  // left out, so that its neighbours meet
    if (options.fuse_unknown && unknown_before)
      symbols.back().end = static_cast<uint32_t>(end);
    else
      push(options.unknown, begin, end);
    unknown_before = true;
  };
  if (options.alphabet == Alphabet::bytes) {
    for (size_t i = 0; i < word.size(); ++i) {
      const TokenId id = byte_ids_[static_cast<uint8_t>(word[i])];
      if (id == kNoToken) {
        push_unknown(i, i + 1);
      } else {
        push(id, i, i + 1);
        unknown_before = false;
      }
    }
    return;
  }
  for (size_t i = 0; i < word.size();) {
    const size_t bytes = first_character(word.substr(i)).bytes;
    TokenId id = pieces_->find(word.substr(i, bytes));
    if (id != kNoToken && reserved[static_cast<size_t>(id)]) id = kNoToken;
    const auto spells = [&](size_t k) { return byte_ids_[static_cast<uint8_t>(word[k])]; };
    if (id != kNoToken || options.by_score) {
      push(id, i, i + bytes);
      unknown_before = false;
    } else if (options.byte_fallback && (whole_fallback_ || [&] {
                 for (size_t k = i; k < i + bytes; ++k)
                   if (spells(k) == kNoToken) return false;
                 return true;
               }())) {
      for (size_t k = i; k < i + bytes; ++k) push(spells(k), k, k + 1);
      unknown_before = false;
    } else {
      push_unknown(i, i + bytes);
    }
    i += bytes;
  }
}

// How the neighbours `left` and `right`, together word[begin, end), merge; rank kNoRank if not.
Merge Bpe::merge_of(std::string_view word, TokenId left, TokenId right, size_t begin,
                    size_t end) const {
  if (!options.by_score) {
    const Merge* merge = merges.find(left, right);
    return merge != nullptr ? *merge : Merge{kNoRank, kNoToken};
  }
  const TokenId id = pieces_->find(word.substr(begin, end - begin));
  return id == kNoToken ? Merge{kNoRank, kNoToken} : Merge{score_rank[static_cast<size_t>(id)], id};
}

void Bpe::merge_short(std::string_view word, Scratch& scratch) const {
  std::vector<Scratch::Symbol>& symbols = scratch.symbols;
  std::vector<Merge>& pairs = scratch.pairs;  // pairs[i]: of symbols i and i + 1
  const auto pair_at = [&](size_t i) {
    return merge_of(word, symbols[i].id, symbols[i + 1].id, symbols[i].begin, symbols[i + 1].end);
  };
  pairs.clear();
  for (size_t i = 0; i + 1 < symbols.size(); ++i) pairs.push_back(pair_at(i));
  while (!pairs.empty()) {
    size_t best = 0;
    for (size_t i = 1; i < pairs.size(); ++i)
      if (pairs[i].rank < pairs[best].rank) best = i;
    if (pairs[best].rank == kNoRank) return;
    symbols[best].id = pairs[best].id;
    symbols[best].end = symbols[best + 1].end;
    symbols.erase(symbols.begin() + static_cast<ptrdiff_t>(best) + 1);
    pairs.erase(pairs.begin() + static_cast<ptrdiff_t>(best));
    if (best > 0) pairs[best - 1] = pair_at(best - 1);
    if (best < pairs.size()) pairs[best] = pair_at(best);
  }
}

// The same by a heap of candidates over a linked list: n log n for a word of n symbols.
void Bpe::merge_long(std::string_view word, Scratch& scratch) const {
  std::vector<Scratch::Symbol>& symbols = scratch.symbols;
  std::vector<Scratch::Candidate>& heap = scratch.heap;
  const auto worse = [](const Scratch::Candidate& a, const Scratch::Candidate& b) {
    return a.rank != b.rank ? a.rank > b.rank : a.at > b.at;
  };
  const auto offer = [&](int32_t at) {
    const Scratch::Symbol& left = symbols[static_cast<size_t>(at)];
    if (left.next < 0) return;
    const Scratch::Symbol& right = symbols[static_cast<size_t>(left.next)];
    const Merge merge = merge_of(word, left.id, right.id, left.begin, right.end);
    if (merge.rank == kNoRank) return;
    heap.push_back({merge.rank, at, left.begin, right.end, merge.id});
    std::push_heap(heap.begin(), heap.end(), worse);
  };
  const auto count = static_cast<int32_t>(symbols.size());
  for (int32_t i = 0; i < count; ++i) {
    symbols[static_cast<size_t>(i)].previous = i - 1;
    symbols[static_cast<size_t>(i)].next = i + 1 < count ? i + 1 : -1;
  }
  heap.clear();
  for (int32_t i = 0; i + 1 < count; ++i) offer(i);
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), worse);
    const Scratch::Candidate best = heap.back();
    heap.pop_back();
    Scratch::Symbol& left = symbols[static_cast<size_t>(best.at)];
    // A symbol only grows, so the pair is the one that was offered if it still ends there and
    // neither side was swallowed (a swallowed symbol has begin == end).
    if (left.begin == left.end || left.next < 0) continue;
    Scratch::Symbol& right = symbols[static_cast<size_t>(left.next)];
    if (right.end != best.end) continue;
    left.id = best.id;
    left.end = right.end;
    left.next = right.next;
    right.begin = right.end;
    if (left.next >= 0) symbols[static_cast<size_t>(left.next)].previous = best.at;
    offer(best.at);
    if (left.previous >= 0) offer(left.previous);
  }
  std::erase_if(symbols, [](const Scratch::Symbol& s) { return s.begin == s.end; });
}

void Bpe::finish(std::string_view word, Scratch& scratch, std::vector<TokenId>& out) const {
  bool unknown_before = false;
  for (const Scratch::Symbol& s : scratch.symbols) {
    if (s.id != kNoToken) {
      out.push_back(s.id);
      unknown_before = false;
    } else if (options.byte_fallback && whole_fallback_) {
      for (uint32_t i = s.begin; i < s.end; ++i)
        out.push_back(byte_ids_[static_cast<uint8_t>(word[i])]);
      unknown_before = false;
    } else if (options.unknown != kNoToken) {
      if (!(options.fuse_unknown && unknown_before)) out.push_back(options.unknown);
      unknown_before = true;
    }
  }
}

}  // namespace moru
