// Sharing out many small items in pieces. A thread that asks for its next item of a common list
// waits for the other's cache line; where threads share no cache that takes as long as reading 10
// KB. So every thread has a share of its own, the same part of the items in phase after phase:
// rows that it wrote in one it reads in the next, and what a share begins with can be asked for
// before the phase opens (Pool::read_ahead). A thread whose share is done takes from the end of
// another's, so that all finish together even if one of them is slow or has not woken.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "base/threads.h"

namespace moru {

struct PieceRange {
  size_t begin = 0, end = 0;
};

// The share of a thread of `threads` in each_piece(count, least).
inline PieceRange share_of(size_t count, size_t least, size_t thread, size_t threads) {
  const size_t groups = (count + least - 1) / least;
  return {std::min(count, groups * thread / threads * least),
          std::min(count, groups * (thread + 1) / threads * least)};
}

// Calls piece(begin, end) for pieces that cover [0, count), each of at least `least` ≥ 1 items but
// the last; count / least < 2^32. A thread's own come in order, large ones first. Results must not
// depend on the pieces that items come in.
template <typename Piece>
void each_piece(Pool& pool, size_t count, size_t least, Piece&& piece) {
  if (count == 0) return;
  const size_t threads = pool.size();
  if (count <= least || threads == 1) return piece(size_t{0}, count);
  // A share's state: the first group of `least` items that is left, and above it the end of them.
  const auto both = [](uint64_t first, uint64_t end) { return first | end << 32; };
  const std::span<Pool::Share> shares = pool.shares();
  const size_t groups = (count + least - 1) / least;
  for (size_t t = 0; t < threads; ++t)
    shares[t].left.store(both(groups * t / threads, groups * (t + 1) / threads),
                         std::memory_order_relaxed);
  pool.each(threads, [&](size_t) {
    const size_t own = Pool::thread() % threads;
    for (size_t i = 0; i < threads; ++i) {
      std::atomic<uint64_t>& left = shares[(own + i) % threads].left;
      uint64_t seen = left.load(std::memory_order_relaxed);
      for (;;) {
        const uint64_t first = seen & 0xffffffff, end = seen >> 32;
        if (first >= end) break;
        // A quarter of one's own from its front, half of another's from its back.
        const uint64_t take = i == 0 ? (end - first + 3) / 4 : (end - first + 1) / 2;
        const uint64_t rest = i == 0 ? both(first + take, end) : both(first, end - take);
        if (!left.compare_exchange_weak(seen, rest, std::memory_order_relaxed)) continue;
        const uint64_t from = i == 0 ? first : end - take;
        piece(from * least, std::min(count, (from + take) * least));
        seen = left.load(std::memory_order_relaxed);
      }
    }
  });
}

}  // namespace moru
