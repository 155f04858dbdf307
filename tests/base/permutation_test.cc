#include "base/permutation.h"

#include <cmath>
#include <vector>

#include "support.h"

using namespace moru;

TEST_CASE("a permutation has every element once, whether it is a list or computed") {
  for (const size_t count : {size_t{0}, size_t{1}, size_t{1000}, Permutation::kListed,
                             Permutation::kListed + 1, size_t{3'000'017}}) {
    CAPTURE(count);
    const Permutation order(count, 7, 3);
    REQUIRE(order.size() == count);
    std::vector<bool> seen(count);
    size_t unmoved = 0;
    for (size_t i = 0; i < count; ++i) {
      REQUIRE(order[i] < count);
      REQUIRE(!seen[order[i]]);
      seen[order[i]] = true;
      unmoved += order[i] == i;
    }
    if (count > 1) CHECK(unmoved < 10);  // one is expected
  }
}

TEST_CASE("seeds and streams give other permutations, the same ones the same") {
  for (const size_t count : {size_t{1000}, size_t{5'000'000}}) {
    const auto start = [&](uint64_t seed, uint64_t stream) {
      const Permutation order(count, seed, stream);
      std::vector<size_t> first;
      for (size_t i = 0; i < 100; ++i) first.push_back(order[i]);
      return first;
    };
    CHECK(start(1, 2) == start(1, 2));
    CHECK(start(1, 2) != start(1, 3));
    CHECK(start(1, 2) != start(2, 2));
  }
}

TEST_CASE("what is computed is as mixed as what is shuffled") {
  // Neighbours land anywhere: the mean distance of two uniform places is a third of the whole.
  // 20,000 distances have a standard deviation of 0.24 / √20000 = 0.0017 of it.
  constexpr size_t kCount = 2'000'003;
  const Permutation order(kCount, 42, 1);
  double distance = 0, upper = 0;
  constexpr size_t kPairs = 20'000;
  for (size_t i = 0; i < kPairs; ++i) {
    const auto a = static_cast<double>(order[100 * i]), b = static_cast<double>(order[100 * i + 1]);
    distance += std::abs(a - b) / kCount / kPairs;
    upper += a > kCount / 2.0 ? 1.0 / kPairs : 0;
  }
  CHECK(std::abs(distance - 1.0 / 3) < 0.01);
  CHECK(std::abs(upper - 0.5) < 0.02);
}
