#include "base/threads.h"

#include <doctest/doctest.h>

#include <stdexcept>
#include <vector>

using namespace moru;

TEST_CASE("every item runs once, whatever the number of threads") {
  for (const size_t threads : {1, 2, 4}) {
    Pool pool(threads);
    for (int round = 0; round < 200; ++round) {
      std::vector<int> seen(37, 0);
      pool.each(seen.size(), [&](size_t i) { ++seen[i]; });
      for (const int n : seen) CHECK(n == 1);
    }
  }
}

TEST_CASE("an exception on a worker reaches the caller, and the pool goes on working") {
  Pool pool(3);
  CHECK_THROWS_AS(pool.run([](size_t i) {
    if (i == 2) throw std::runtime_error("worker");
  }),
                  std::runtime_error);
  int calls = 0;
  pool.each(1, [&](size_t) { ++calls; });
  CHECK(calls == 1);
}
