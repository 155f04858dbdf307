// Keys and values of past tokens, in pages of 64 positions that sequences own by reference.
//
// Layers are cut into groups of equal size, each of full layers or of windowed ones alone, so that
// all pages have one size whatever they hold: a page is 64 positions of one group, for all KV
// heads. 64 positions of all groups are a block. A sequence lets go of a windowed group's pages
// once no token can come that sees them:
//
//   block      0    1    2    3    4      a page each; window 128, 300 tokens so far
//   full       p0   p3   p6   p9   p12
//   windowed   –    p4   p7   p10  p13
//
// Sequences that share a prefix share its full blocks; a page is freed when its last owner lets go
// of it. Memory is taken once, when the cache is made, and never grows. One thread at a time, but
// for write() and the reading.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace moru {

inline constexpr size_t kPageTokens = 64;
// A sequence may always be cut back by so many tokens: a windowed layer keeps them beyond its
// window.
inline constexpr size_t kKeptTokens = 64;
inline constexpr uint32_t kNoPage = UINT32_MAX;

// What keys and values are rounded to. i16, 16-bit codes with one f32 scale per token and head, is
// as good as exact, and attention multiplies the codes as they are; f16 keeps 11 bits, bf16 8; q8_0
// halves the memory: 8-bit codes with such scales. f32 is for references.
enum class KvType { i16, f16, bf16, q8_0, f32 };
const char* name_of(KvType type);

struct KvShape {
  size_t layers = 0, kv_heads = 0, head_dim = 0;  // head_dim: a multiple of 16
  KvType type = KvType::i16;
  size_t window = 0;           // positions that a windowed layer sees; 0: no layer is windowed
  std::vector<bool> windowed;  // by layer; empty: none
  size_t longest = 0;          // tokens for which a sequence has its table of pages from the start
};

class KvCache;

// One sequence's pages, in order of position. Made by KvCache, which must outlive it.
class KvSequence {
 public:
  KvSequence() = default;
  ~KvSequence();
  KvSequence(KvSequence&& other) noexcept;
  KvSequence& operator=(KvSequence&& other) noexcept;

  size_t tokens() const { return tokens_; }
  // [blocks, groups]; kNoPage where a windowed group has let go.
  std::span<const uint32_t> pages() const { return pages_; }

 private:
  friend class KvCache;
  KvCache* cache_ = nullptr;
  std::vector<uint32_t> pages_;
  size_t tokens_ = 0;
  size_t window_block_ = 0;  // windowed groups have pages from this block on
};

class KvCache {
 public:
  // Room for `pages` pages. Error: no_space.
  KvCache(const KvShape& shape, size_t pages);
  ~KvCache();
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  static size_t page_bytes(const KvShape& shape);
  static size_t groups(const KvShape& shape);  // pages of a block
  const KvShape& shape() const;
  size_t groups() const;
  size_t full_groups() const;  // the first ones; the others are windowed
  size_t free_pages() const;
  size_t total_pages() const;
  size_t bytes() const;  // of all pages
  // The longest sequence that the whole cache holds, fed at most `step_tokens` at a time.
  size_t longest_sequence(size_t step_tokens) const;

  KvSequence make_sequence();
  // `into` becomes another sequence with the first `tokens` of `from`: full blocks by reference,
  // the last partial block by copy. False, and `into` unchanged, if that copy finds too few free
  // pages or `from` has let go of pages that the next token would see.
  bool fork(const KvSequence& from, size_t tokens, KvSequence& into);
  // The free pages that reserve() would take.
  size_t pages_for(const KvSequence& sequence, size_t count) const;
  // Makes room for `count` more tokens; false, and nothing taken, if too few pages are free.
  bool reserve(KvSequence& sequence, size_t count);
  // Lets go of windowed pages that no later token sees.
  void trim(KvSequence& sequence);
  // Forgets all but the first `tokens`, or all of them if the pages that the next token would see
  // are gone. Returns how many are left.
  size_t truncate(KvSequence& sequence, size_t tokens);

  // For the tree of prefixes. The first block whose windowed pages a token at position `tokens`
  // sees.
  size_t first_windowed_block(size_t tokens) const;
  void hold(uint32_t page);    // one more owner
  void let_go(uint32_t page);  // one less
  size_t owners(uint32_t page) const;
  // `into`, an empty sequence, gets the pages of one more whole block, [groups], by reference; from
  // a block on, windowed groups must have theirs.
  void append_block(KvSequence& into, std::span<const uint32_t> pages);
  // The same with a copy of the first `count` positions of a block; false if too few pages are
  // free.
  bool append_copy(KvSequence& into, std::span<const uint32_t> pages, size_t count);

  // Writes keys and values of `count` tokens at positions [first, first + count) of one layer,
  // rounding to the cache's type (all but f32 saturate); reserve() came before. k, v: [count,
  // kv_heads · head_dim], rows `ld` apart. Different tokens may be written from different threads
  // at a time.
  void write(const KvSequence& sequence, size_t layer, size_t first, size_t count, const float* k,
             const float* v, size_t ld);
  // Counts the tokens as present, after all layers have been written.
  void advance(KvSequence& sequence, size_t count);

  // For attention kernels: the start of K and of V of one block, layer and KV head; the layout is
  // described in kv_cache.cc. Where the page is gone they point to memory of no meaning.
  const void* keys(const KvSequence& sequence, size_t block, size_t layer, size_t kv_head) const;
  const void* values(const KvSequence& sequence, size_t block, size_t layer, size_t kv_head) const;
  // A block of bf16 or q8_0 as f32: [head_dim][64] and [64][head_dim].
  void widen(const KvSequence& sequence, size_t block, size_t layer, size_t kv_head, float* keys_to,
             float* values_to) const;

 private:
  friend class KvSequence;
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace moru
