#include "base/threads.h"

#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <stdexcept>
#include <thread>
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

TEST_CASE("an exception of an item reaches the caller, and the pool goes on working") {
  Pool pool(3);
  for (int round = 0; round < 50; ++round) {
    CHECK_THROWS_AS(pool.each(20,
                              [](size_t i) {
                                if (i == 2) throw std::runtime_error("item");
                              }),
                    std::runtime_error);
    std::atomic<int> calls{0};
    pool.each(5, [&](size_t) { ++calls; });
    CHECK(calls == 5);
  }
}

TEST_CASE("phases of any length follow one another without a lost item") {
  Pool pool(4);
  for (size_t round = 0; round < 20000; ++round) {
    std::atomic<size_t> sum{0};
    const size_t count = round % 7;
    pool.each(count, [&](size_t i) { sum += i + 1; });
    REQUIRE(sum == count * (count + 1) / 2);
  }
}

TEST_CASE("threads have numbers of their own, and wait with anything to read ahead") {
  constexpr size_t kThreads = 4;
  Pool pool(kThreads);
  CHECK(Pool::thread() == 0);
  CHECK(pool.shares().size() == kThreads);
  const std::vector<char> memory(1 << 20);
  for (int round = 0; round < 200; ++round) {
    std::atomic<size_t> begun{0};
    std::array<std::atomic<int>, kThreads> times{};
    pool.each(kThreads, [&](size_t) {
      ++begun;
      while (begun != kThreads) std::this_thread::yield();
      ++times[Pool::thread()];
      // Also where nothing is: an address is asked for, never read.
      Pool::read_ahead(round % 2 == 0 ? memory.data() : nullptr, memory.size());
    });
    for (const std::atomic<int>& n : times) CHECK(n == 1);
  }
}
