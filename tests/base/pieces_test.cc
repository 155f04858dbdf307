#include "base/pieces.h"

#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <thread>
#include <vector>

using namespace moru;

TEST_CASE("pieces cover every item once, none but the last smaller than the least") {
  for (const size_t threads : {1, 2, 3})
    for (const size_t count : {0, 1, 2, 7, 8, 9, 100, 1000})
      for (const size_t least : {1, 3, 8, 2000}) {
        CAPTURE(threads);
        CAPTURE(count);
        CAPTURE(least);
        Pool pool(threads);
        std::vector<std::atomic<int>> times(count);
        std::atomic<int> small{0};
        each_piece(pool, count, least, [&](size_t begin, size_t end) {
          if (end - begin < least && end != count) ++small;
          for (size_t i = begin; i < end; ++i) ++times[i];
        });
        CHECK(small == 0);
        for (const std::atomic<int>& n : times) CHECK(n == 1);
      }
}

TEST_CASE("a thread's share is the same items in phase after phase, in order") {
  constexpr size_t kThreads = 3, kCount = 301, kLeast = 4;
  Pool pool(kThreads);
  for (int round = 0; round < 100; ++round) {
    std::atomic<size_t> waiting{kThreads};
    std::atomic<int> foreign{0};
    std::array<size_t, kThreads> last{};
    each_piece(pool, kCount, kLeast, [&](size_t begin, size_t end) {
      // Nobody goes on before all have begun, so that nobody is done while another sleeps.
      const size_t thread = Pool::thread();
      const PieceRange own = share_of(kCount, kLeast, thread, kThreads);
      if (last[thread] == 0) {
        if (begin != own.begin) ++foreign;
        --waiting;
        while (waiting != 0) std::this_thread::yield();
      } else if (begin >= own.begin && begin < own.end && begin != last[thread]) {
        ++foreign;
      }
      last[thread] = end;
    });
    CHECK(foreign == 0);
  }
}

TEST_CASE("shares cover all items, whole groups each but the last") {
  for (const size_t threads : {1, 2, 5})
    for (const size_t count : {1, 4, 5, 17, 1000})
      for (const size_t least : {1, 4, 7}) {
        CAPTURE(threads);
        CAPTURE(count);
        CAPTURE(least);
        size_t at = 0;
        for (size_t t = 0; t < threads; ++t) {
          const PieceRange share = share_of(count, least, t, threads);
          CHECK(share.begin == at);
          CHECK((share.end % least == 0 || share.end == count));
          at = share.end;
        }
        CHECK(at == count);
      }
}

TEST_CASE("a thread that stays away is not waited for: others do its share") {
  Pool pool(2);
  for (int round = 0; round < 20; ++round) {
    std::atomic<int> items{0};
    each_piece(pool, 64, 1, [&](size_t begin, size_t end) {
      items += static_cast<int>(end - begin);
      // The pool's own thread is held up in its first piece until all else is done.
      if (Pool::thread() != 0) {
        while (items != 64) std::this_thread::yield();
      }
    });
    CHECK(items == 64);
  }
}
