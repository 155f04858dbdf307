#include "engine/prefix_tree.h"

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace moru {
PrefixTree::PrefixTree(KvCache& cache)
    : cache_(cache),
      groups_(cache.groups()),
      full_groups_(cache.full_groups()),
      nodes_(cache.total_pages() + 1),
      pages_(nodes_.size() * groups_, kNoPage) {
  path_.reserve(nodes_.size());
  for (uint32_t node = static_cast<uint32_t>(nodes_.size() - 1); node > kRoot; --node)
    nodes_[node].next = std::exchange(free_, node);
}
PrefixTree::~PrefixTree() { clear(); }

std::span<uint32_t> PrefixTree::pages(uint32_t node) {
  return std::span(pages_).subspan(node * groups_, groups_);
}
bool PrefixTree::has_window(uint32_t node) {
  return full_groups_ == groups_ || pages(node).back() != kNoPage;
}

uint32_t PrefixTree::take_node(uint32_t parent) {
  if (free_ == kNone) {
    // Only where all layers are windowed do nodes outnumber their pages.
    uint32_t oldest = kNone;
    for (uint32_t n = kRoot + 1; n < nodes_.size(); ++n)
      if (nodes_[n].child == kNone && n != parent && nodes_[n].parent != parent &&
          (oldest == kNone || nodes_[n].used < nodes_[oldest].used))
        oldest = n;
    if (oldest == kNone) return kNone;
    remove(oldest);
  }
  const uint32_t node = std::exchange(free_, nodes_[free_].next);
  Node& n = nodes_[node];
  n.parent = parent;
  n.child = kNone;
  n.next = std::exchange(nodes_[parent].child, node);
  n.count = 0;
  return node;
}

void PrefixTree::remove(uint32_t leaf) {
  while (leaf != kRoot) {
    Node& n = nodes_[leaf];
    MORU_DCHECK(n.child == kNone && n.count > 0);
    for (uint32_t& page : pages(leaf)) {
      if (page != kNoPage) cache_.let_go(page);
      page = kNoPage;
    }
    uint32_t* link = &nodes_[n.parent].child;
    while (*link != leaf) link = &nodes_[*link].next;
    *link = n.next;
    n.count = 0;
    n.next = std::exchange(free_, leaf);
    // What is now a leaf and has no window can never be resumed.
    leaf = n.parent;
    if (nodes_[leaf].child != kNone || has_window(leaf)) return;
  }
}

void PrefixTree::drop_window(uint32_t node) {
  if (nodes_[node].child == kNone) return remove(node);
  for (uint32_t& page : pages(node).subspan(full_groups_))
    cache_.let_go(std::exchange(page, kNoPage));
}

bool PrefixTree::frees_pages(uint32_t node, bool windowed) {
  for (const uint32_t page : pages(node).subspan(windowed ? full_groups_ : 0))
    if (page != kNoPage && cache_.owners(page) == 1) return true;
  return false;
}

PrefixTree::Step PrefixTree::best_child(uint32_t node, std::span<const TokenId> tokens) {
  Step best{kNone, 0};
  for (uint32_t c = nodes_[node].child; c != kNone; c = nodes_[c].next) {
    const Node& n = nodes_[c];
    const size_t most = std::min<size_t>(n.count, tokens.size());
    const auto differs = std::mismatch(n.tokens.begin(), n.tokens.begin() + most, tokens.begin());
    const auto common = static_cast<size_t>(differs.first - n.tokens.begin());
    if (common > best.common) best = {c, common};
  }
  return best;
}

PrefixTree::Beginning PrefixTree::find(std::span<const TokenId> tokens) {
  path_.clear();
  Step step = best_child(kRoot, tokens);
  while (step.common == kPageTokens) {
    path_.push_back(step.node);
    step = best_child(step.node, tokens.subspan(path_.size() * kPageTokens));
  }
  // Going back from `block`, the first block without its window's pages, plus one.
  const auto gap_before = [&](size_t block) {
    while (block > 0 && has_window(path_[block - 1])) --block;
    return block;
  };
  size_t blocks = path_.size();
  const size_t part = step.common, ends = blocks * kPageTokens + part;
  if (part >= kMinCopiedTokens && has_window(step.node) &&
      gap_before(blocks) <= cache_.first_windowed_block(ends))
    return {blocks, part, step.node};
  if (full_groups_ == groups_) return {blocks, 0, kNone};
  size_t gap = gap_before(blocks);
  while (blocks > 0 && gap > cache_.first_windowed_block(blocks * kPageTokens)) {
    blocks = gap - 1;
    gap = gap_before(blocks);
  }
  return {blocks, 0, kNone};
}

size_t PrefixTree::known(std::span<const TokenId> tokens) {
  const Beginning b = find(tokens);
  return b.blocks * kPageTokens + b.part;
}

size_t PrefixTree::resume(std::span<const TokenId> tokens, KvSequence& into) {
  const Beginning from = find(tokens);
  ++now_;
  into = cache_.make_sequence();
  const size_t seen = cache_.first_windowed_block(from.blocks * kPageTokens + from.part);
  for (size_t b = 0; b < from.blocks; ++b) {
    Node& n = nodes_[path_[b]];
    n.used = now_;
    if (b >= seen) n.window_used = now_;
    cache_.append_block(into, pages(path_[b]));
  }
  cache_.trim(into);
  if (from.part == 0) return into.tokens();
  // The block is held while others make room for its copy.
  nodes_[from.next].used = nodes_[from.next].window_used = now_;
  path_.assign(pages(from.next).begin(), pages(from.next).end());
  for (const uint32_t page : path_) cache_.hold(page);
  bool copied = cache_.append_copy(into, path_, from.part);
  while (!copied && evict()) copied = cache_.append_copy(into, path_, from.part);
  for (const uint32_t page : path_) cache_.let_go(page);
  return into.tokens();
}

void PrefixTree::keep(std::span<const TokenId> tokens, const KvSequence& sequence, At at) {
  const size_t count = sequence.tokens();
  MORU_CHECK(tokens.size() >= count);
  // From here on windows are worth keeping: the last whole block may be resumed too.
  const size_t first_seen =
      at == At::way ? SIZE_MAX : cache_.first_windowed_block(count / kPageTokens * kPageTokens);
  ++now_;
  uint32_t node = kRoot;
  for (size_t b = 0; b * kPageTokens < count; ++b) {
    const size_t size = std::min(kPageTokens, count - b * kPageTokens);
    if (size < kPageTokens && (at != At::end || size < kMinCopiedTokens)) break;
    const std::span<const TokenId> block = tokens.subspan(b * kPageTokens, size);
    const std::span<const uint32_t> own = sequence.pages().subspan(b * groups_, groups_);
    const Step step = best_child(node, block);
    uint32_t next = step.node;
    const bool known = step.common == size;
    if (!known) {
      // The end of another sequence that this one continues gives way to it.
      const bool continues = next != kNone && nodes_[next].count == step.common;
      if (!continues) next = take_node(node);
      if (next == kNone) return;
      Node& n = nodes_[next];
      n.count = static_cast<uint32_t>(size);
      std::copy(block.begin(), block.end(), n.tokens.begin());
      for (uint32_t& page : pages(next))
        if (page != kNoPage) cache_.let_go(std::exchange(page, kNoPage));
    }
    const std::span<uint32_t> held = pages(next);
    for (size_t group = 0; group < groups_ && nodes_[next].count == size; ++group) {
      if (held[group] != kNoPage || own[group] == kNoPage) continue;
      cache_.hold(held[group] = own[group]);
      if (group >= full_groups_) nodes_[next].window_used = 0;
    }
    nodes_[next].used = now_;
    if (b >= first_seen) nodes_[next].window_used = now_;
    node = next;
  }
}

bool PrefixTree::evict() {
  // A walk over all nodes: a few microseconds for a page that took milliseconds to compute.
  uint32_t oldest = kNone;
  uint64_t age = UINT64_MAX;
  bool window_alone = false;
  for (uint32_t n = kRoot + 1; n < nodes_.size(); ++n) {
    const Node& node = nodes_[n];
    if (node.count == 0) continue;
    if (node.child == kNone && node.used < age && frees_pages(n, false)) {
      oldest = n;
      age = node.used;
      window_alone = false;
    }
    if (full_groups_ < groups_ && node.window_used < age && frees_pages(n, true)) {
      oldest = n;
      age = node.window_used;
      window_alone = true;
    }
  }
  if (oldest == kNone) return false;
  window_alone ? drop_window(oldest) : remove(oldest);
  return true;
}

void PrefixTree::clear() {
  for (uint32_t n = kRoot + 1; n < nodes_.size(); ++n)
    while (nodes_[n].count > 0) {
      uint32_t leaf = n;
      while (nodes_[leaf].child != kNone) leaf = nodes_[leaf].child;
      remove(leaf);
    }
}

}  // namespace moru
