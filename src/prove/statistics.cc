#include "prove/statistics.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/error.h"

namespace moru {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

double square(double x) { return x * x; }

// Where `falling`, which is positive at `low` and negative at `high`, crosses zero. 200 halvings
// leave neighbouring doubles whatever the range was.
template <typename Function>
double crossing(Function&& falling, double low, double high) {
  for (int i = 0; i < 200; ++i) {
    const double middle = low + (high - low) / 2;
    (falling(middle) > 0 ? low : high) = middle;
  }
  return low + (high - low) / 2;
}

double two_sided_z(double confidence) {
  MORU_CHECK(confidence > 0 && confidence < 1);
  return normal_quantile(0.5 + confidence / 2);
}

// P(X = k), X binomial with n trials of probability 1/2; by logarithms, since n may be 100,000.
double half_binomial(size_t k, size_t n) {
  const auto kk = static_cast<double>(k), nn = static_cast<double>(n);
  return std::exp(std::lgamma(nn + 1) - std::lgamma(kk + 1) - std::lgamma(nn - kk + 1) -
                  nn * std::log(2.0));
}

// The larger root of a·x² + b·x + c; a > 0.
double larger_root(double a, double b, double c) {
  return (-b + std::sqrt(std::max(0.0, b * b - 4 * a * c))) / (2 * a);
}

// Score statistic of "accuracy a - accuracy b = difference": the surplus over it, divided by its
// standard error under the most likely probabilities with that difference. Positive where the data
// show more.
double difference_score(const PairedCounts& counts, double difference) {
  const auto n = static_cast<double>(counts.total());
  const auto b = static_cast<double>(counts.only_a), c = static_cast<double>(counts.only_b);
  const double surplus = b - c - n * difference;
  const double only_b =
      larger_root(2 * n, -b - c + (2 * n - b + c) * difference, -c * difference * (1 - difference));
  const double variance = n * (2 * only_b + difference * (1 - difference));
  if (variance <= 0) return surplus == 0 ? 0 : std::copysign(kInfinity, surplus);
  return surplus / std::sqrt(variance);
}

// Score statistic of "accuracy a = ratio · accuracy b", in the same sense.
//
// Under the hypothesis the likelihood factors: P(neither) keeps its own estimate, and among the
// other m questions the share w that only b answers solves a quadratic whose larger root lies in
// [max(0, 1 - ratio), 1 / (1 + ratio)].
double ratio_score(const PairedCounts& counts, double ratio) {
  const auto x11 = static_cast<double>(counts.both);
  const auto x12 = static_cast<double>(counts.only_a), x21 = static_cast<double>(counts.only_b);
  const double m = x11 + x12 + x21;
  const double surplus = x11 + x12 - ratio * (x11 + x21);
  const double w =
      larger_root(m * (1 + ratio), (x11 + x21) * square(ratio) - (m + x21), x21 * (1 - ratio));
  const double variance = m * ((1 + ratio) * w + ratio - 1);
  if (variance <= 0) return surplus == 0 ? 0 : std::copysign(kInfinity, surplus);
  return surplus / std::sqrt(variance);
}

}  // namespace

double normal_quantile(double p) {
  MORU_CHECK(p > 0 && p < 1);
  // erfc(40 / √2) underflows: no double probability reaches further.
  return crossing([&](double z) { return p - 0.5 * std::erfc(-z / std::sqrt(2.0)); }, -40, 40);
}

Interval wilson(size_t correct, size_t total, double confidence) {
  MORU_CHECK(correct <= total);
  if (total == 0) return {};
  const auto n = static_cast<double>(total);
  const double p = static_cast<double>(correct) / n, z = two_sided_z(confidence);
  const double shrink = 1 + z * z / n, centre = (p + z * z / (2 * n)) / shrink;
  const double half = z / shrink * std::sqrt(p * (1 - p) / n + z * z / (4 * n * n));
  // At the ends the algebra gives exactly 0 and 1; rounding must not say 0.9999.
  return {correct == 0 ? 0 : centre - half, correct == total ? 1 : centre + half};
}

double mcnemar_exact(const PairedCounts& counts) {
  const size_t n = counts.only_a + counts.only_b, k = std::min(counts.only_a, counts.only_b);
  double tail = 0;
  for (size_t i = 0; i <= k; ++i) tail += half_binomial(i, n);
  return std::min(1.0, 2 * tail);
}

double mcnemar_mid_p(const PairedCounts& counts) {
  const size_t n = counts.only_a + counts.only_b, k = std::min(counts.only_a, counts.only_b);
  // An even split is the single likeliest one; any other has a mirror image just as likely.
  if (2 * k == n) return 1 - half_binomial(k, n) / 2;
  return mcnemar_exact(counts) - half_binomial(k, n);
}

Interval paired_difference(const PairedCounts& counts, double confidence) {
  if (counts.total() == 0) return {-1, 1};
  const double z = two_sided_z(confidence);
  const double estimate =
      (static_cast<double>(counts.only_a) - static_cast<double>(counts.only_b)) /
      static_cast<double>(counts.total());
  return {
      crossing([&](double d) { return difference_score(counts, d) - z; }, -1, estimate),
      crossing([&](double d) { return difference_score(counts, d) + z; }, estimate, 1),
  };
}

Interval paired_ratio(const PairedCounts& counts, double confidence) {
  const auto a = static_cast<double>(counts.correct_a()),
             b = static_cast<double>(counts.correct_b());
  const double z = two_sided_z(confidence);
  Interval interval{0, kInfinity};
  if (a > 0)
    interval.low =
        crossing([&](double r) { return ratio_score(counts, r) - z; }, 0, b > 0 ? a / b : 1e9);
  if (b > 0) {
    // The upper end is the lower end of the mirrored question.
    const PairedCounts mirrored{counts.both, counts.only_b, counts.only_a, counts.neither};
    interval.high = 1 / crossing([&](double r) { return ratio_score(mirrored, r) - z; }, 0,
                                 a > 0 ? b / a : 1e9);
  }
  return interval;
}

}  // namespace moru
