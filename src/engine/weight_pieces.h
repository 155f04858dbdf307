// Products of few tokens, where the speed of memory is the limit: weights lie in items of equal
// bytes (panels, or a few rows) that are read once, in order, each thread its share of a phase.
#pragma once
#include <algorithm>
#include <cstddef>
#include <span>

#include "base/pieces.h"
#include "base/threads.h"

namespace moru {

struct WeightItems {
  const void* data;
  size_t count, item_bytes;
};
inline constexpr size_t kPhaseProducts = 8;  // at most, of one phase

// The next product's beginning of a thread's share that is asked for while it waits: what memory
// delivers during the norms, rotations and quantizations between two products, and a small part of
// any second-level cache.
inline constexpr size_t kReadAheadBytes = 128 << 10;
// No piece of a thread's work is smaller than this many bytes of weights.
inline constexpr size_t kLeastWeightBytes = 16 << 10;

// run(product, begin, end, until) for pieces that cover the items of all products. The thread goes
// on with those before item `until` of the product, which may lie behind its end: memory up to
// there may be prefetched. `next`: weights of the phase that comes after this one.
template <typename Run>
void each_weight_piece(Pool& pool, std::span<const WeightItems> products,
                       std::span<const WeightItems> next, Run&& run) {
  struct Sizes {
    size_t count = 0, least = 1;
  };
  const auto sizes_of = [](std::span<const WeightItems> list) {
    Sizes out;
    for (const WeightItems& w : list) {
      out.count += w.count;
      out.least = std::max(out.least, kLeastWeightBytes / w.item_bytes);
    }
    return out;
  };
  const Sizes now = sizes_of(products), later = sizes_of(next);
  const size_t threads = pool.size();
  each_piece(pool, now.count, now.least, [&](size_t begin, size_t end) {
    const size_t thread = Pool::thread() % threads;
    const PieceRange own = share_of(now.count, now.least, thread, threads);
    const bool alone = threads == 1;  // what lies behind the products is this thread's too
    const size_t until = (begin >= own.begin && end <= own.end ? own.end : end) + (alone ? 1 : 0);
    size_t first = 0;  // of a product's items
    for (size_t p = 0; p < products.size(); ++p) {
      const size_t count = products[p].count;
      const size_t from = std::max(begin, first), to = std::min(end, first + count);
      if (from < to) run(p, from - first, to - first, until - first);
      first += count;
    }
    PieceRange share = share_of(later.count, later.least, thread, threads);
    for (const WeightItems& w : next) {
      if (share.begin < w.count) {
        const size_t items = std::min(share.end, w.count) - share.begin;
        Pool::read_ahead(static_cast<const std::byte*>(w.data) + share.begin * w.item_bytes,
                         std::min(kReadAheadBytes, items * w.item_bytes));
        break;
      }
      share = {share.begin - w.count, share.end - w.count};
    }
  });
}

}  // namespace moru
