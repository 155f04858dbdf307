#include "base/pieces.h"

#include <doctest/doctest.h>

#include <atomic>
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
