#include "engine/dense.h"

#include <doctest/doctest.h>

#include <cmath>
#include <vector>

#include "base/half.h"
#include "base/random.h"

using namespace moru;

namespace {

std::vector<float> random_values(size_t count, uint64_t stream) {
  Random random(7, stream);
  std::vector<float> values(count);
  for (float& value : values) value = random.normal();
  return values;
}

std::vector<uint16_t> rounded(const std::vector<float>& values) {
  std::vector<uint16_t> result;
  for (const float value : values) result.push_back(bf16_from_f32(value));
  return result;
}

// Sum over i of a(i) · b(i), in double: the definition.
template <typename A, typename B>
double dot(size_t count, A&& a, B&& b) {
  double sum = 0;
  for (size_t i = 0; i < count; ++i) sum += double{a(i)} * double{b(i)};
  return sum;
}

}  // namespace

TEST_CASE("products that share a phase are the products alone, for any number of threads") {
  const size_t m = 300, k = 96, rows[] = {1, 192, 250};
  const auto x = rounded(random_values(m * k, 1)), w = rounded(random_values(443 * k, 2));
  std::vector<float> alone(m * 443), together(m * 443);
  for (const size_t threads : {1, 2, 3}) {
    Pool pool(threads);
    std::vector<DenseProduct> products;
    for (size_t i = 0, row = 0; i < 3; row += rows[i++]) {
      const DenseView view = DenseView::bf16(w.data() + row * k, rows[i], k);
      products.push_back({view, {.data = together.data() + row, .ld = 443}});
      if (threads > 1) continue;
      const DenseProduct single{view, {.data = alone.data() + row, .ld = 443}};
      matmul_nt(pool, DenseView::bf16(x.data(), m, k), {&single, 1});
    }
    matmul_nt(pool, DenseView::bf16(x.data(), m, k), products);
    REQUIRE(together == alone);
    for (const size_t t : {size_t{0}, size_t{255}, size_t{256}, m - 1})
      for (const size_t r : {0, 1, 192, 193, 442}) {
        const double exact = dot(
            k, [&](size_t i) { return f32_from_bf16(x[t * k + i]); },
            [&](size_t i) { return f32_from_bf16(w[r * k + i]); });
        CHECK(together[t * 443 + r] == doctest::Approx(exact).epsilon(1e-4));
      }
  }
}

TEST_CASE("the three products equal their definitions") {
  // Sums of k normal products: the rounding of f32 partial sums stays far below 1e-3 at k ≤ 700.
  for (const auto [m, n, k] : {std::array<size_t, 3>{1, 5, 3}, {17, 200, 64}, {600, 193, 65}}) {
    CAPTURE(m);
    const auto x = random_values(m * k, 1), w = random_values(n * k, 2),
               d = random_values(m * n, 3);
    for (const size_t threads : {1, 2}) {
      Pool pool(threads);
      std::vector<float> y(m * n), dx(m * k), dw(n * k, 1.0f);
      matmul_nt(pool, DenseView::f32(x.data(), m, k), DenseView::f32(w.data(), n, k),
                {.data = y.data(), .ld = n});
      matmul_nn(pool, DenseView::f32(d.data(), m, n), DenseView::f32(w.data(), n, k),
                {.data = dx.data(), .ld = k});
      matmul_tn(pool, DenseView::f32(d.data(), m, n), DenseView::f32(x.data(), m, k),
                {.data = dw.data(), .ld = k, .accumulate = true});
      for (size_t at = 0; at < m * n; at += 7) {
        const size_t r = at / n, c = at % n;
        CHECK(y[at] == doctest::Approx(dot(
                                           k, [&](size_t i) { return x[r * k + i]; },
                                           [&](size_t i) { return w[c * k + i]; }))
                           .epsilon(1e-3));
      }
      for (size_t at = 0; at < m * k; at += 7) {
        const double wanted = dot(
            n, [&](size_t i) { return d[at / k * n + i]; },
            [&](size_t i) { return w[i * k + at % k]; });
        CHECK(std::abs(dx[at] - wanted) < 1e-3);
      }
      for (size_t at = 0; at < n * k; at += 7) {
        const double wanted = 1 + dot(
                                      m, [&](size_t i) { return d[i * n + at / k]; },
                                      [&](size_t i) { return x[i * k + at % k]; });
        CHECK(std::abs(dw[at] - wanted) < 1e-3);
      }
    }
  }
}

TEST_CASE("bf16 operands are multiplied exactly and summed in f32") {
  const size_t m = 33, n = 70, k = 130;
  const auto x = rounded(random_values(m * k, 4)), w = rounded(random_values(n * k, 5));
  Pool pool(2);
  std::vector<float> y(m * n);
  std::vector<uint16_t> y_bf16(m * n);
  matmul_nt(pool, DenseView::bf16(x.data(), m, k), DenseView::bf16(w.data(), n, k),
            {.data = y.data(), .ld = n});
  matmul_nt(pool, DenseView::bf16(x.data(), m, k), DenseView::bf16(w.data(), n, k),
            {.type = DType::bf16, .data = y_bf16.data(), .ld = n});
  for (size_t at = 0; at < m * n; ++at) {
    const double wanted = dot(
        k, [&](size_t i) { return f32_from_bf16(x[at / n * k + i]); },
        [&](size_t i) { return f32_from_bf16(w[at % n * k + i]); });
    CHECK(std::abs(y[at] - wanted) < 1e-3);
    CHECK(std::abs(f32_from_bf16(y_bf16[at]) - wanted) < 1e-3 + std::abs(wanted) * 0x1p-8);
  }
}

TEST_CASE("the number of threads does not change a bit") {
  const size_t m = 700, n = 400, k = 96;
  const auto x = random_values(m * k, 6), w = random_values(n * k, 7);
  std::vector<float> first;
  for (const size_t threads : {1, 2, 4}) {
    Pool pool(threads);
    std::vector<float> y(m * n);
    matmul_nt(pool, DenseView::f32(x.data(), m, k), DenseView::f32(w.data(), n, k),
              {.data = y.data(), .ld = n});
    if (first.empty()) first = y;
    CHECK(first == y);
  }
}
