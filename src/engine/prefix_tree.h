// Beginnings that have been computed, for prompts that begin alike: a radix tree over the blocks
// of the KV cache, which it owns by reference beside the sequences.
//
// A node is one block of 64 tokens, or the shorter end of a sequence, under the node of what comes
// before. The tree has no memory of its own to speak of: it keeps pages for as long as nobody else
// needs them. The least recently used go first, leaves before what they follow.
//
// With windowed layers a beginning can be resumed where the window's pages are still there. As a
// sequence moves on, the tree keeps the windowed pages that it leaves behind; they go before
// everything else, but for those where a prompt or an answer ended or a sequence was resumed.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "engine/kv_cache.h"
#include "formats/tokenizer.h"

namespace moru {

inline constexpr size_t kMinCopiedTokens = 16;

class PrefixTree {
 public:
  // `cache` must outlive it. Takes its memory now.
  explicit PrefixTree(KvCache& cache);
  ~PrefixTree();
  PrefixTree(const PrefixTree&) = delete;
  PrefixTree& operator=(const PrefixTree&) = delete;

  // The length of the longest beginning of `tokens` that a sequence can go on from. A part of a
  // block counts only from kMinCopiedTokens on, since it is copied.
  size_t known(std::span<const TokenId> tokens);
  // `into` becomes a sequence with that beginning, or with the whole blocks of it where there is no
  // room for a copy. Returns its length.
  size_t resume(std::span<const TokenId> tokens, KvSequence& into);
  // Where a sequence stands when it is kept: on its way, at the end of its prompt, or at its own
  // end, where nobody writes to it any more.
  enum class At { way, prompt_end, end };
  // Keeps the whole blocks of `sequence`, at its end also what follows them. `tokens` are the
  // sequence's, at least.
  void keep(std::span<const TokenId> tokens, const KvSequence& sequence, At at);
  // Frees at least one page; false if sequences use all that is left.
  bool evict();
  void clear();
  bool empty() const { return nodes_[kRoot].child == kNone; }

 private:
  static constexpr uint32_t kNone = UINT32_MAX;
  static constexpr uint32_t kRoot = 0;
  struct Node {
    uint32_t parent = kNone, child = kNone, next = kNone;  // next: sibling, or free node
    uint32_t count = 0;                                    // tokens
    uint64_t used = 0, window_used = 0;                    // a parent is never older than its child
    std::array<TokenId, kPageTokens> tokens;
  };

  std::span<uint32_t> pages(uint32_t node);
  bool has_window(uint32_t node);
  uint32_t take_node(uint32_t parent);  // kNone: there is none
  void remove(uint32_t leaf);           // and what it followed, where that is of no use alone
  void drop_window(uint32_t node);
  // Whether the tree alone owns a page of it; `windowed`: of those of windowed groups.
  bool frees_pages(uint32_t node, bool windowed);
  struct Step {
    uint32_t node;
    size_t common;
  };
  Step best_child(uint32_t node, std::span<const TokenId> tokens);
  // The first `blocks` nodes of path_, and `part` tokens of `next`.
  struct Beginning {
    size_t blocks, part;
    uint32_t next;
  };
  Beginning find(std::span<const TokenId> tokens);

  KvCache& cache_;
  const size_t groups_, full_groups_;
  std::vector<Node> nodes_;
  std::vector<uint32_t> pages_;  // [nodes, groups]
  std::vector<uint32_t> path_;   // scratch
  uint32_t free_ = kNone;
  uint64_t now_ = 0;
};

}  // namespace moru
