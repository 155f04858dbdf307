#include "engine/filtered_product.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "base/cpu.h"
#include "base/half.h"
#include "base/random.h"

using namespace moru;

namespace {

// Rows of softmax(z) − onehot, z normal with deviation `spread`, two thirds of its variance common
// to all rows: 0 makes them flat.
std::vector<float> softmax_rows(Random& random, size_t rows, size_t n, double spread) {
  std::vector<float> dy(rows * n), common(n);
  for (float& z : common) z = random.normal();
  for (size_t r = 0; r < rows; ++r) {
    std::vector<double> p(n);
    double sum = 0;
    for (size_t j = 0; j < n; ++j)
      sum += p[j] = std::exp(spread * (0.82 * double{common[j]} + 0.57 * double{random.normal()}));
    for (size_t j = 0; j < n; ++j) dy[r * n + j] = static_cast<float>(p[j] / sum);
    dy[r * n + random.below(n)] -= 1;
  }
  return dy;
}

double magnitudes(const float* row, size_t n) {
  double sum = 0;
  for (size_t j = 0; j < n; ++j) sum += std::fabs(double{row[j]});
  return sum;
}

struct Kept {
  size_t column;
  uint16_t value;
};
struct List {
  std::vector<uint32_t> words;
  std::vector<uint32_t> starts;
  size_t count() const { return starts.back(); }
  std::vector<Kept> kept() const {
    std::vector<Kept> all;
    for (size_t stripe = 0; stripe + 1 < starts.size(); ++stripe)
      for (size_t i = starts[stripe]; i < starts[stripe + 1]; ++i)
        all.push_back(
            {stripe * kFilterStripe + (words[i] & 0xffff), static_cast<uint16_t>(words[i] >> 16)});
    return all;
  }
};
List list_of(std::span<const float> row) {
  const size_t n = row.size();
  List list{std::vector<uint32_t>(n + 16), std::vector<uint32_t>(filter_stripes(n) + 1)};
  list_kept_avx512(row.data(), n, negligible_avx512(row.data(), n), list.words.data(),
                   list.starts.data());
  return list;
}

}  // namespace

TEST_CASE("what a row loses is at most the 1024th part of its magnitudes, and most columns go") {
  if (isa() != Isa::avx512) return;
  Random random(3);
  // From rows whose softmax is one token's to those that leave little out.
  for (const double spread : {14.0, 8.0, 5.0, 3.0})
    for (const size_t n : {1, 17, 1024, 1025, 4096, 40001}) {
      CAPTURE(spread);
      CAPTURE(n);
      const std::vector<float> row = softmax_rows(random, 1, n, spread);
      const List list = list_of(row);
      if (n > 4000 && spread >= 5) CHECK(list.count() < n / 2);
      double left = 0;
      size_t next = 0;
      for (const auto& [column, value] : list.kept()) {
        REQUIRE(column < n);
        CHECK(column >= next);
        next = column + 1;
        CHECK(value == bf16_from_f32(row[column]));
        left += std::fabs(double{row[column]});
      }
      const double all = magnitudes(row.data(), n);
      CHECK(all - left <= all / 1024 * (1 + 1e-4));
    }
}

TEST_CASE("the bound is the largest power of two that loses little enough") {
  if (isa() != Isa::avx512) return;
  Random random(7);
  for (const double spread : {12.0, 6.0, 4.0, 3.0, 2.0, 1.0}) {
    CAPTURE(spread);
    const std::vector<float> row = softmax_rows(random, 1, 30000, spread);
    const double all = magnitudes(row.data(), row.size());
    const auto below = [&](double bound) {
      double sum = 0;
      for (const float v : row) sum += std::fabs(v) < bound ? std::fabs(double{v}) : 0;
      return sum;
    };
    const double bound = double{negligible_avx512(row.data(), row.size())};
    CHECK(bound > 0);
    CHECK(below(bound) <= all / 1024);
    CHECK((bound > all / 9000 || below(2 * bound) > all / 1024));
    CHECK(std::abs(std::log2(all / bound) - std::round(std::log2(all / bound))) < 1e-3);
  }
}

TEST_CASE("a row whose softmax is flat loses nothing") {
  if (isa() != Isa::avx512) return;
  Random random(4);
  const std::vector<float> flat = softmax_rows(random, 1, 4000, 0);
  CHECK(negligible_avx512(flat.data(), flat.size()) < *std::ranges::max_element(flat));
  CHECK(list_of(flat).count() == 4000);
}

TEST_CASE("a row of zeros goes, a number that is none stays") {
  if (isa() != Isa::avx512) return;
  CHECK(list_of(std::vector<float>(100)).count() == 0);
  Random random(5);
  std::vector<float> dy = softmax_rows(random, 1, 100, 8);
  dy[37] = std::numeric_limits<float>::quiet_NaN();
  const std::vector<Kept> kept = list_of(dy).kept();
  CHECK(std::ranges::count(kept, size_t{37}, &Kept::column) == 1);
}

TEST_CASE("the list of a stripe in bf16 is all of it") {
  if (isa() != Isa::avx512) return;
  const std::vector<uint16_t> row = {0x3f80, 0, 0xbf80, 0x7fc0, 1};
  std::vector<uint32_t> list(row.size());
  list_stripe_avx512(row.data(), row.size(), list.data());
  for (size_t i = 0; i < row.size(); ++i) CHECK(list[i] == (uint32_t{row[i]} << 16 | i));
}

TEST_CASE("the product is that of all columns within what rounding and leaving out may cost") {
  if (isa() != Isa::avx512) return;
  Random random(6);
  for (const size_t cols : {1, 16, 23, 32, 33, 100, 288, 320, 383, 384})
    for (const size_t n : {1, 2, 50, 1023, 2047}) {
      CAPTURE(cols);
      CAPTURE(n);
      const size_t ldw = cols + 8;
      std::vector<uint16_t> w(n * ldw);
      double largest = 0;
      for (uint16_t& v : w) {
        v = bf16_from_f32(random.normal());
        largest = std::max(largest, std::fabs(double{f32_from_bf16(v)}));
      }
      const std::vector<float> dy = softmax_rows(random, 1, n, 4);
      List list = list_of(dy);
      // What stands behind a list is not looked at.
      for (size_t i = list.count(); i < list.words.size(); ++i) list.words[i] = 0xffffffff;
      std::vector<float> y(cols + 3, 0.5f);  // is added to
      for (size_t stripe = 0; stripe < filter_stripes(n); ++stripe)
        multiply_kept_avx512(list.words.data() + list.starts[stripe],
                             list.starts[stripe + 1] - list.starts[stripe],
                             w.data() + stripe * kFilterStripe * ldw, ldw, cols, y.data());
      // Elements are rounded by up to 2⁻⁹ of themselves and left out as far as the bound says; f32
      // sums of n products lose much less than as much again.
      const double most =
          (1.0 / 512 + 1.0 / 1024) * 1.1 * magnitudes(dy.data(), n) * largest + 1e-6;
      for (size_t c = 0; c < y.size(); ++c) {
        double exact = 0.5;
        for (size_t j = 0; c < cols && j < n; ++j)
          exact += double{dy[j]} * double{f32_from_bf16(w[j * ldw + c])};
        if (std::fabs(double{y[c]} - exact) > most) {
          CAPTURE(c);
          CHECK(double{y[c]} == doctest::Approx(exact));
        }
      }
    }
}
