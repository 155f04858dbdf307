// Keys and values of past tokens, in pages of 64 positions that sequences own by reference.
//
// A page holds one span of positions for all layers and KV heads. Sequences that share a prefix
// share its full pages; a page is freed when the last sequence lets go of it. Memory is taken once,
// when the cache is made, and never grows. One thread at a time, but for write() and the reading.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace moru {

inline constexpr size_t kPageTokens = 64;

enum class KvType { f16, f32 };

struct KvShape {
  size_t layers = 0, kv_heads = 0, head_dim = 0;  // head_dim: a multiple of 16
  KvType type = KvType::f16;
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
  std::span<const uint32_t> pages() const { return pages_; }

 private:
  friend class KvCache;
  KvCache* cache_ = nullptr;
  std::vector<uint32_t> pages_;
  size_t tokens_ = 0;
};

class KvCache {
 public:
  // Room for `pages` pages. Error: no_space.
  KvCache(const KvShape& shape, size_t pages);
  ~KvCache();
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  static size_t page_bytes(const KvShape& shape);
  const KvShape& shape() const;
  size_t free_pages() const;
  size_t total_pages() const;

  KvSequence make_sequence();
  // `into` becomes another sequence with the first `tokens` of `from`: full pages by reference, the
  // last partial page by copy. False, and `into` unchanged, if that copy finds no free page.
  bool fork(const KvSequence& from, size_t tokens, KvSequence& into);
  // The free pages that reserve() would take.
  size_t pages_for(const KvSequence& sequence, size_t count) const;
  // Makes room for `count` more tokens; false, and nothing taken, if too few pages are free.
  bool reserve(KvSequence& sequence, size_t count);
  // Forgets all but the first `tokens`.
  void truncate(KvSequence& sequence, size_t tokens);

  // Writes keys and values of `count` tokens at positions [first, first + count) of one layer,
  // rounding to the cache's type (f16 saturates); reserve() came before. k, v: [count, kv_heads ·
  // head_dim], rows `ld` apart. Different tokens may be written from different threads at a time.
  void write(const KvSequence& sequence, size_t layer, size_t first, size_t count, const float* k,
             const float* v, size_t ld);
  // Counts the tokens as present, after all layers have been written.
  void advance(KvSequence& sequence, size_t count);

  // For attention kernels: the start of K and of V of one page, layer and KV head; the layout is
  // described in kv_cache.cc.
  const void* keys(uint32_t page, size_t layer, size_t kv_head) const;
  const void* values(uint32_t page, size_t layer, size_t kv_head) const;

 private:
  friend class KvSequence;
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace moru
