// Sharing out many small items in pieces. A thread that asks for its next item waits for the
// counter; where threads share no cache that takes as long as reading 10 KB, so a product whose
// items are small goes out in pieces instead of item by item.
#pragma once
#include <atomic>
#include <cstddef>

#include "base/threads.h"

namespace moru {

// Calls piece(begin, end) for pieces that cover [0, count), each of at least `least` items but the
// last: large ones first, so that a thread mostly goes on where its prefetches have been, then ever
// smaller ones, so that threads finish together even if one of them is slow. Results must not
// depend on the pieces that items come in.
template <typename Piece>
void each_piece(Pool& pool, size_t count, size_t least, Piece&& piece) {
  if (count == 0) return;
  if (count <= least || pool.size() == 1) return piece(size_t{0}, count);
  std::atomic<size_t> next{0};
  pool.each(pool.size(), [&](size_t) {
    size_t begin = next.load(std::memory_order_relaxed);
    while (begin < count) {
      const size_t share = (count - begin) / (2 * pool.size());
      const size_t wanted = share > least ? share : least;
      const size_t end = wanted < count - begin ? begin + wanted : count;
      if (!next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
      piece(begin, end);
      begin = next.load(std::memory_order_relaxed);
    }
  });
}

}  // namespace moru
