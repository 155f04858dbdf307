#include "prove/statistics.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

using namespace moru;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct WilsonRow {
  size_t correct, total;
  double confidence, low, high;
};
struct PairedRow {
  PairedCounts counts;
  double exact, mid_p, difference_low, difference_high, ratio_low, ratio_high;
};

#include "prove/statistics_table.inc"

PairedCounts mirrored(const PairedCounts& c) { return {c.both, c.only_b, c.only_a, c.neither}; }

}  // namespace

TEST_CASE("normal quantiles are those of the tables") {
  CHECK(normal_quantile(0.5) == doctest::Approx(0).epsilon(1e-12));
  CHECK(normal_quantile(0.975) == doctest::Approx(1.959963984540054).epsilon(1e-13));
  CHECK(normal_quantile(0.025) == doctest::Approx(-1.959963984540054).epsilon(1e-13));
  CHECK(normal_quantile(1e-12) == doctest::Approx(-7.034483825301132).epsilon(1e-10));
}

TEST_CASE("the Wilson interval agrees with statsmodels") {
  for (const WilsonRow& row : kWilson) {
    CAPTURE(row.correct);
    CAPTURE(row.total);
    const Interval interval = wilson(row.correct, row.total, row.confidence);
    CHECK(std::abs(interval.low - row.low) < 1e-12);
    CHECK(std::abs(interval.high - row.high) < 1e-12);
  }
}

TEST_CASE("the Wilson interval is exact at its ends and says nothing of no questions") {
  CHECK(wilson(0, 7).low == 0);
  CHECK(wilson(7, 7).high == 1);
  CHECK(wilson(0, 0).low == 0);
  CHECK(wilson(0, 0).high == 1);
}

// The reference maximises the likelihood numerically, which leaves it good to about 1e-7.
TEST_CASE("paired tests and intervals agree with statsmodels and with numerical likelihoods") {
  for (const PairedRow& row : kPaired) {
    CAPTURE(row.counts.both);
    CAPTURE(row.counts.only_a);
    CAPTURE(row.counts.only_b);
    CHECK(std::abs(mcnemar_exact(row.counts) - row.exact) < 1e-10 * std::max(1.0, 1 / row.exact));
    CHECK(std::abs(mcnemar_mid_p(row.counts) - row.mid_p) < 1e-10);
    const Interval difference = paired_difference(row.counts);
    CHECK(std::abs(difference.low - row.difference_low) < 1e-6);
    CHECK(std::abs(difference.high - row.difference_high) < 1e-6);
    const Interval ratio = paired_ratio(row.counts);
    CHECK(std::abs(ratio.low - row.ratio_low) < 1e-6);
    if (row.ratio_high == kInfinity)
      CHECK(ratio.high == kInfinity);
    else
      CHECK(std::abs(ratio.high / row.ratio_high - 1) < 1e-6);
  }
}

TEST_CASE("swapping the models mirrors every paired answer") {
  for (const PairedRow& row : kPaired) {
    const PairedCounts swapped = mirrored(row.counts);
    CHECK(mcnemar_exact(swapped) == mcnemar_exact(row.counts));
    CHECK(std::abs(paired_difference(swapped).low + paired_difference(row.counts).high) < 1e-12);
    if (row.counts.correct_a() > 0 && row.counts.correct_b() > 0)
      CHECK(std::abs(paired_ratio(swapped).low * paired_ratio(row.counts).high - 1) < 1e-12);
  }
}

TEST_CASE("identical answers show a ratio near one only where there are many of them") {
  CHECK(!not_worse_than({10, 0, 0, 0}, 0.95));
  CHECK(not_worse_than({100, 0, 0, 20}, 0.95));
  CHECK(!not_worse_than({0, 0, 0, 50}, 0.5));  // two models that know nothing
  CHECK(!not_worse_than({}, 0.5));
}

TEST_CASE("a large split of disagreement neither overflows nor loses its place") {
  const double p = mcnemar_exact({0, 49'000, 51'000, 0});
  CHECK(p == doctest::Approx(2.5887160383468943e-10).epsilon(1e-6));
  CHECK(mcnemar_exact({5, 0, 0, 5}) == 1);
}
