#include "engine/filtered_product.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
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

struct Picked {
  std::vector<uint16_t> kept = std::vector<uint16_t>(kFilterRows * kKeptStride);
  std::vector<uint32_t> places = std::vector<uint32_t>(kKeptStride);
  size_t count = 0;
};
Picked pick(const std::vector<float>& dy, size_t rows, size_t n, size_t ldw) {
  std::vector<float> negligible;
  for (size_t r = 0; r < rows; ++r) negligible.push_back(negligible_avx512(&dy[r * n], n));
  Picked p;
  p.count =
      pick_avx512(dy.data(), n, rows, n, negligible.data(), ldw, p.kept.data(), p.places.data());
  return p;
}

}  // namespace

TEST_CASE("what a row loses is at most the 1024th part of its magnitudes, and most columns go") {
  if (isa() != Isa::avx512) return;
  Random random(3);
  for (const size_t rows : {1, 5, 12})
    for (const size_t n : {4096, 4001}) {
      CAPTURE(rows);
      CAPTURE(n);
      const std::vector<float> dy = softmax_rows(random, rows, n, 5);
      const Picked p = pick(dy, rows, n, 1);
      CHECK(p.count < n / 2);
      CHECK(p.count > 0);
      for (size_t r = 0; r < rows; ++r) {
        double left = 0;
        for (size_t i = 0; i < p.count; ++i) {
          const float value = dy[r * n + p.places[i]];
          left += std::fabs(double{value});
          CHECK(p.kept[r * kKeptStride + i] == bf16_from_f32(value));
        }
        const double all = magnitudes(&dy[r * n], n);
        CHECK(all - left <= all / 1024 * (1 + 1e-4));
      }
    }
}

TEST_CASE("a row whose softmax is flat loses nothing, nor do those beside it") {
  if (isa() != Isa::avx512) return;
  Random random(4);
  constexpr size_t kRows = 3, kColumns = 4000;
  std::vector<float> dy = softmax_rows(random, kRows, kColumns, 5);
  const std::vector<float> flat = softmax_rows(random, 1, kColumns, 0);
  std::copy(flat.begin(), flat.end(), dy.begin() + kColumns);
  CHECK(negligible_avx512(flat.data(), kColumns) < *std::ranges::max_element(flat));
  CHECK(pick(dy, kRows, kColumns, 1).count == kColumns);
}

TEST_CASE("a row of zeros goes, a number that is none stays") {
  if (isa() != Isa::avx512) return;
  CHECK(pick(std::vector<float>(100), 1, 100, 1).count == 0);
  Random random(5);
  std::vector<float> dy = softmax_rows(random, 1, 100, 8);
  dy[37] = std::numeric_limits<float>::quiet_NaN();
  const Picked p = pick(dy, 1, 100, 1);
  CHECK(std::count(p.places.begin(), p.places.begin() + static_cast<std::ptrdiff_t>(p.count), 37) ==
        1);
}

TEST_CASE("the product is that of all columns within what rounding and leaving out may cost") {
  if (isa() != Isa::avx512) return;
  Random random(6);
  for (const size_t rows : {1, 4, 12})
    for (const size_t cols : {1, 16, 23, 32})
      for (const size_t n : {1, 50, 2047}) {
        CAPTURE(rows);
        CAPTURE(cols);
        CAPTURE(n);
        const size_t ldw = cols + 8, ldy = cols + 3;
        std::vector<uint16_t> w(n * ldw + 32);
        double largest = 0;
        for (uint16_t& v : w) {
          v = bf16_from_f32(random.normal());
          largest = std::max(largest, std::fabs(double{f32_from_bf16(v)}));
        }
        const std::vector<float> dy = softmax_rows(random, rows, n, 4);
        const Picked p = pick(dy, rows, n, ldw);
        std::vector<float> y(rows * ldy, 0.5f);  // is added to
        multiply_picked_avx512(p.kept.data(), p.places.data(), p.count, w.data(), rows, cols,
                               y.data(), ldy);
        for (size_t r = 0; r < rows; ++r) {
          // Elements are rounded by up to 2⁻⁹ of themselves and left out as far as the bound says;
          // f32 sums of n products lose much less than as much again.
          const double all = magnitudes(&dy[r * n], n);
          const double most = (1.0 / 512 + 1.0 / 1024) * 1.1 * all * largest + 1e-6;
          for (size_t c = 0; c < ldy; ++c) {
            double exact = 0.5;
            for (size_t j = 0; c < cols && j < n; ++j)
              exact += double{dy[r * n + j]} * double{f32_from_bf16(w[j * ldw + c])};
            if (std::fabs(double{y[r * ldy + c]} - exact) > most) {
              CAPTURE(r);
              CAPTURE(c);
              CHECK(double{y[r * ldy + c]} == doctest::Approx(exact));
            }
          }
        }
      }
}
