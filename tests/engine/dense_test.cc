#include "engine/dense.h"

#include <doctest/doctest.h>

#include <algorithm>
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

// A bf16 matrix of small whole numbers, rows `ld` apart, with something else between them: sums of
// their products are exact in f32, in any order.
struct Whole {
  size_t rows, cols, ld;
  std::vector<uint16_t> data;

  Whole(size_t rows_, size_t cols_, size_t gap, uint64_t stream)
      : rows(rows_), cols(cols_), ld(cols_ + gap), data(rows_ * ld, bf16_from_f32(1e6f)) {
    Random random(11, stream);
    for (size_t r = 0; r < rows; ++r)
      for (size_t c = 0; c < cols; ++c)
        data[r * ld + c] = bf16_from_f32(static_cast<float>(random.below(17)) - 8);
  }
  DenseView view() const { return DenseView::bf16(data.data(), rows, cols, ld); }
  int64_t at(size_t r, size_t c) const {
    return static_cast<int64_t>(f32_from_bf16(data[r * ld + c]));
  }
};

// y [m, n] with a column beside it that no product may write to.
struct Result {
  size_t m, n;
  std::vector<float> f32;
  std::vector<uint16_t> bf16;

  Result(size_t m_, size_t n_) : m(m_), n(n_), f32(m * (n + 1), 3.0f), bf16(m * (n + 1), 7) {}
  DenseTarget floats(bool accumulate, float scale = 1) {
    return {DType::f32, f32.data(), n + 1, accumulate, scale};
  }
  DenseTarget halves(float scale = 1) { return {DType::bf16, bf16.data(), n + 1, false, scale}; }

  // wanted(r, c): the sum of products, exact.
  template <typename Wanted>
  void check_floats(Wanted&& wanted, float scale, float before) const {
    size_t wrong = 0;
    for (size_t r = 0; r < m; ++r) {
      for (size_t c = 0; c < n; ++c)
        wrong += f32[r * (n + 1) + c] != before + scale * static_cast<float>(wanted(r, c)) ? 1 : 0;
      wrong += f32[r * (n + 1) + n] != 3 ? 1 : 0;
    }
    CHECK(wrong == 0);
  }
  template <typename Wanted>
  void check_halves(Wanted&& wanted, float scale) const {
    size_t wrong = 0;
    for (size_t r = 0; r < m; ++r) {
      for (size_t c = 0; c < n; ++c)
        wrong += bf16[r * (n + 1) + c] != bf16_from_f32(scale * static_cast<float>(wanted(r, c)))
                     ? 1
                     : 0;
      wrong += bf16[r * (n + 1) + n] != 7 ? 1 : 0;
    }
    CHECK(wrong == 0);
  }
};

// Every form and target of y [m, n] with sums of k products.
void check_products(Pool& pool, size_t m, size_t n, size_t k, size_t gap) {
  CAPTURE(m);
  CAPTURE(n);
  CAPTURE(k);
  CAPTURE(gap);
  const Whole x(m, k, gap, 1), w(n, k, gap, 2), w_rows(k, n, gap, 3), x_rows(k, m, gap, 4);
  // Another term of its own k, 19.
  const Whole u(m, 19, gap, 5), b(n, 19, gap, 6), b_rows(19, n, gap, 7);
  const auto sum = [](size_t count, auto&& a, auto&& c) {
    int64_t total = 0;
    for (size_t i = 0; i < count; ++i) total += a(i) * c(i);
    return total;
  };
  std::vector<int64_t> nt(m * n), nn(m * n), tn(m * n), nt_more(m * n), nn_more(m * n);
  for (size_t r = 0; r < m; ++r)
    for (size_t c = 0; c < n; ++c) {
      const size_t at = r * n + c;
      const auto x_at = [&](size_t i) { return x.at(r, i); };
      const auto u_at = [&](size_t i) { return u.at(r, i); };
      const auto w_rows_at = [&](size_t i) { return w_rows.at(i, c); };
      nt[at] = sum(k, x_at, [&](size_t i) { return w.at(c, i); });
      nn[at] = sum(k, x_at, w_rows_at);
      tn[at] = sum(
          k, [&](size_t i) { return x_rows.at(i, r); }, w_rows_at);
      nt_more[at] = 2 * nt[at] + sum(19, u_at, [&](size_t i) { return b.at(c, i); });
      nn_more[at] = 2 * nn[at] + sum(19, u_at, [&](size_t i) { return b_rows.at(i, c); });
    }
  const auto of = [&](const std::vector<int64_t>& sums) {
    return [&sums, n](size_t r, size_t c) { return sums[r * n + c]; };
  };

  Result y(m, n);
  matmul_nt(pool, x.view(), w.view(), y.floats(false, 0.5f));
  y.check_floats(of(nt), 0.5f, 0);
  y = Result(m, n);
  matmul_nt(pool, x.view(), w.view(), y.floats(true));
  y.check_floats(of(nt), 1, 3);
  matmul_nt(pool, x.view(), w.view(), y.halves(2));
  y.check_halves(of(nt), 2);

  y = Result(m, n);
  matmul_nn(pool, x.view(), w_rows.view(), y.floats(true));
  y.check_floats(of(nn), 1, 3);
  matmul_nn(pool, x.view(), w_rows.view(), y.halves());
  y.check_halves(of(nn), 1);

  y = Result(m, n);
  matmul_tn(pool, x_rows.view(), w_rows.view(), y.floats(true));
  y.check_floats(of(tn), 1, 3);
  y = Result(m, n);
  matmul_tn(pool, x_rows.view(), w_rows.view(), y.floats(false));
  y.check_floats(of(tn), 1, 0);

  // The small term stands between the large ones.
  const DenseTerm nt_terms[] = {{x.view(), w.view()}, {u.view(), b.view()}, {x.view(), w.view()}};
  const DenseTerm nn_terms[] = {
      {x.view(), w_rows.view()}, {u.view(), b_rows.view()}, {x.view(), w_rows.view()}};
  y = Result(m, n);
  matmul_nt(pool, nt_terms, y.floats(true));
  y.check_floats(of(nt_more), 1, 3);
  matmul_nt(pool, nt_terms, y.halves());
  y.check_halves(of(nt_more), 1);
  // Added to what stands elsewhere, which stays; where sums are transposed too (tn of few columns).
  Result base(m, n);
  for (size_t i = 0; i < base.f32.size(); ++i) base.f32[i] = static_cast<float>(i % 509);
  const std::vector<float> kept = base.f32;
  const auto check_onto = [&](auto&& multiply, const std::vector<int64_t>& sums) {
    y = Result(m, n);
    for (size_t i = 0; i < y.f32.size(); ++i)
      if (i % (n + 1) != n) y.f32[i] = NAN;
    DenseTarget onto = y.floats(true);
    onto.base = base.f32.data();
    multiply(onto);
    CHECK(base.f32 == kept);
    for (size_t i = 0; i < y.f32.size(); ++i)
      if (i % (n + 1) != n) y.f32[i] -= kept[i];
    y.check_floats(of(sums), 1, 0);
  };
  check_onto([&](const DenseTarget& to) { matmul_nt(pool, nt_terms, to); }, nt_more);
  check_onto([&](const DenseTarget& to) { matmul_tn(pool, x_rows.view(), w_rows.view(), to); }, tn);
  y = Result(m, n);
  matmul_nn(pool, nn_terms, y.floats(false));
  y.check_floats(of(nn_more), 1, 0);
  matmul_nn(pool, nn_terms, y.halves());
  y.check_halves(of(nn_more), 1);
}

}  // namespace

TEST_CASE("bf16 products of whole numbers are exact at every size around tiles and blocks") {
  // Twelve rows, two vectors of columns and pairs of k at a time; tiles of 264 and 192 rows, 192
  // columns; blocks of 1,600 of k; gaps that make rows odd, and rows a multiple of 2 KB.
  Pool pool(2);
  for (const size_t m : {1, 2, 11, 12, 13, 47, 48, 49, 95, 96, 97, 191, 193, 263, 265, 529})
    check_products(pool, m, 33, 34, 0);
  for (const size_t n : {1, 2, 15, 16, 17, 31, 32, 64, 65, 191, 192, 193, 385})
    check_products(pool, 13, n, 33, 1);
  for (const size_t k : {1, 2, 15, 16, 31, 32, 63, 64, 65, 768, 1599, 1600, 1601, 3199, 3201})
    check_products(pool, 25, 50, k, 0);
  check_products(pool, 40, 40, 512, 512);
  check_products(pool, 150, 200, 1024, 0);
  check_products(pool, 110, 50, 1601, 1);
}

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

TEST_CASE("gradients that read the same rows are the gradients alone, for any number of threads") {
  Pool one(1), three(3);
  for (const auto& [k, n] : {std::pair<size_t, size_t>{1100, 70}, {33, 576}}) {
    CAPTURE(k);
    const Whole x(k, n, 3, 1);
    for (const std::vector<size_t>& widths :
         {std::vector<size_t>{576, 192, 100}, {97, 96}, {5, 200}, {300}}) {
      std::vector<Whole> a;
      std::vector<Result> alone, together;
      for (const size_t m : widths) {
        a.emplace_back(k, m, 1, m);
        alone.emplace_back(m, n);
        together.emplace_back(m, n);
      }
      std::vector<DenseGradient> gradients;
      for (size_t i = 0; i < widths.size(); ++i) {
        matmul_tn(one, a[i].view(), x.view(), alone[i].floats(true));
        gradients.push_back({a[i].view(), together[i].floats(true)});
      }
      matmul_tn(three, gradients, x.view());
      for (size_t i = 0; i < widths.size(); ++i) CHECK(together[i].f32 == alone[i].f32);
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
  const auto x_bf16 = rounded(x), w_bf16 = rounded(w);
  std::vector<std::vector<float>> first;
  for (const size_t threads : {1, 2, 4}) {
    Pool pool(threads);
    std::vector<std::vector<float>> y(5);
    const auto target = [&](size_t i, size_t rows, size_t cols) {
      y[i].assign(rows * cols, 0);
      return DenseTarget{.data = y[i].data(), .ld = cols};
    };
    matmul_nt(pool, DenseView::f32(x.data(), m, k), DenseView::f32(w.data(), n, k),
              target(0, m, n));
    matmul_nt(pool, DenseView::bf16(x_bf16.data(), m, k), DenseView::bf16(w_bf16.data(), n, k),
              target(1, m, n));
    // The same numbers as matrices of other shapes.
    matmul_nn(pool, DenseView::bf16(x_bf16.data(), m, k), DenseView::bf16(w_bf16.data(), k, n),
              target(2, m, n));
    matmul_tn(pool, DenseView::bf16(w_bf16.data(), n, k), DenseView::bf16(x_bf16.data(), n, k),
              target(3, k, k));
    matmul_tn(pool, DenseView::bf16(x_bf16.data(), k, m), DenseView::bf16(w_bf16.data(), k, 16),
              target(4, m, 16));
    if (first.empty()) first = y;
    CHECK(first == y);
  }
}
