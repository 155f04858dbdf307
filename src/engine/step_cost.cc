#include "engine/step_cost.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace moru {
namespace {

constexpr size_t kTrusted = 32;          // tokens that a step may have in any case
constexpr size_t kRounds = 4;            // of reweighting
constexpr double kTolerated = 0.2;       // relative error from which on an observation counts less
constexpr size_t kTerms = 3;             // fixed, per token, per pair
constexpr double kPairUnit = 1 / 256.0;  // brings pairs to the size of tokens

using Terms = std::array<double, kTerms>;
using Square = std::array<Terms, kTerms>;

Terms terms_of(const StepWork& work) {
  return {1, static_cast<double>(work.tokens), work.pairs * kPairUnit};
}
double product(const Terms& a, const Terms& b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }

// Solves a · x = b over the terms of `chosen` (a bit each), the others 0; false if singular.
bool solve(Square a, Terms b, unsigned chosen, Terms& x) {
  for (size_t i = 0; i < kTerms; ++i) {
    if ((chosen >> i & 1) != 0) continue;
    a[i] = {};
    for (Terms& row : a) row[i] = 0;
    a[i][i] = 1;
    b[i] = 0;
  }
  for (size_t i = 0; i < kTerms; ++i) {  // positive semidefinite: no pivoting
    const double scale = a[i][i];
    if (!(scale > 1e-9)) return false;
    for (size_t j = i + 1; j < kTerms; ++j) {
      const double factor = a[j][i] / scale;
      for (size_t k = i; k < kTerms; ++k) a[j][k] -= factor * a[i][k];
      b[j] -= factor * b[i];
    }
  }
  for (size_t i = kTerms; i-- > 0;) {
    for (size_t j = i + 1; j < kTerms; ++j) b[i] -= a[i][j] * x[j];
    x[i] = b[i] / a[i][i];
  }
  return true;
}

}  // namespace

void StepCost::learn(const StepWork& work, double seconds) {
  if (work.tokens == 0 || !(seconds > 0)) return;
  const size_t size = std::min<size_t>(std::bit_width(work.tokens) - 1, kSizes - 1);
  kept_[size][seen_[size]++ % kPerSize] = {work, seconds};
  largest_ = std::max(largest_, work.tokens);
  fit();
}

void StepCost::fit() {
  const auto each = [&](auto&& use) {
    for (size_t size = 0; size < kSizes; ++size)
      for (size_t i = 0; i < std::min(seen_[size], kPerSize); ++i) use(kept_[size][i]);
  };
  Terms now{fixed_, per_token_, per_pair_ / kPairUnit};
  for (size_t round = 0; round < kRounds; ++round) {
    // Normal equations of the relative error; after the first fit, Huber's weights.
    Square a{};
    Terms b{};
    each([&](const Observation& o) {
      const Terms t = terms_of(o.work);
      const double off = std::abs(product(t, now) / o.seconds - 1);
      const double trust = round == 0 || off <= kTolerated ? 1 : kTolerated / off;
      const double weight = trust / (o.seconds * o.seconds);
      for (size_t i = 0; i < kTerms; ++i) {
        for (size_t j = 0; j < kTerms; ++j) a[i][j] += weight * t[i] * t[j];
        b[i] += weight * t[i] * o.seconds;
      }
    });
    // No term can be negative. Of the choices of terms the one that fits best; the first is what a
    // single observation means.
    Terms best{};
    double best_loss = 0;  // of all terms 0
    for (const unsigned chosen : {0b010u, 0b011u, 0b110u, 0b111u, 0b001u, 0b101u, 0b100u}) {
      // Columns of one size make "singular" mean something.
      Square scaled = a;
      Terms right = b, root{}, x{};
      for (size_t i = 0; i < kTerms; ++i) root[i] = std::sqrt(std::max(a[i][i], 1e-300));
      for (size_t i = 0; i < kTerms; ++i) {
        for (size_t j = 0; j < kTerms; ++j) scaled[i][j] /= root[i] * root[j];
        right[i] /= root[i];
      }
      if (!solve(scaled, right, chosen, x)) continue;
      for (size_t i = 0; i < kTerms; ++i) x[i] /= root[i];
      if (std::min({x[0], x[1], x[2]}) < 0) continue;
      const double loss =
          product(x, {product(a[0], x), product(a[1], x), product(a[2], x)}) - 2 * product(b, x);
      if (loss >= best_loss - 1e-9) continue;  // of the number of observations
      best_loss = loss;
      best = x;
    }
    now = best;
  }
  fixed_ = now[0];
  per_token_ = now[1];
  per_pair_ = now[2] * kPairUnit;
}

double StepCost::seconds(const StepWork& work) const {
  return fixed_ + per_token_ * static_cast<double>(work.tokens) + per_pair_ * work.pairs;
}

size_t StepCost::affordable(const StepWork& work, size_t position, size_t most,
                            double seconds_max) const {
  const size_t trusted = std::max(2 * largest_, kTrusted);
  size_t low = 0, high = work.tokens < trusted ? std::min(most, trusted - work.tokens) : 0;
  while (low < high) {
    const size_t middle = low + (high - low + 1) / 2;
    StepWork all = work;
    all.add(middle, position);
    if (seconds(all) <= seconds_max) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

}  // namespace moru
