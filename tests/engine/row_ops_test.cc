#include "engine/row_ops.h"

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "base/cpu.h"
#include "base/half.h"
#include "base/random.h"
#include "engine/float_kernels.h"

using namespace moru;

namespace {

// One rounding of f32.
constexpr double kUlp = 0x1p-24;
const size_t kLengths[] = {1, 7, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 129, 576, 1000};

std::vector<float> normals(size_t count, uint64_t seed, float spread = 1) {
  Random random(seed);
  std::vector<float> x(count);
  for (float& v : x) v = spread * random.normal();
  return x;
}
std::vector<uint16_t> rounded(const std::vector<float>& x) {
  std::vector<uint16_t> y(x.size());
  for (size_t i = 0; i < x.size(); ++i) y[i] = bf16_from_f32(x[i]);
  return y;
}
std::vector<float> widened(const std::vector<uint16_t>& x) {
  std::vector<float> y(x.size());
  for (size_t i = 0; i < x.size(); ++i) y[i] = f32_from_bf16(x[i]);
  return y;
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// The levels that this processor has besides the scalar definition.
std::vector<Isa> levels() {
  std::vector<Isa> all;
  for (const Isa level : {Isa::avx2, Isa::avx512})
    if (level <= isa()) all.push_back(level);
  return all;
}

double silu(double x) { return x / (1 + std::exp(-x)); }
// ½x(1 + tanh u) without its cancellation: x · sigmoid(2u).
double gelu_argument(double x) { return 2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x); }
double gelu(double x) { return x / (1 + std::exp(-gelu_argument(x))); }
double slope(double (*f)(double), double x) { return (f(x + 1e-5) - f(x - 1e-5)) / 2e-5; }

// Rows of n elements, ld apart, something else between them.
std::vector<uint16_t> apart(const std::vector<uint16_t>& rows, size_t n, size_t ld) {
  std::vector<uint16_t> all(rows.size() / n * ld, 0x1234);
  for (size_t i = 0; i < rows.size(); ++i) all[i / n * ld + i % n] = rows[i];
  return all;
}

}  // namespace

TEST_CASE("rms_norm_rows is x · w / sqrt(mean(x²) + eps), strided and in place") {
  Pool pool(2);
  for (const size_t n : kLengths) {
    CAPTURE(n);
    const size_t m = 5, ldx = n + 3, ldy = n + 1;
    const float eps = 1e-5f;
    const std::vector<float> x = normals(m * ldx, n, 3), w = normals(n, n + 1);
    std::vector<float> y(m * ldy), inverse(m);
    rms_norm_rows(pool, x.data(), ldx, m, n, w.data(), eps, y.data(), ldy, inverse.data());
    std::vector<uint16_t> half(m * ldy);
    rms_norm_rows_bf16(pool, x.data(), ldx, m, n, w.data(), eps, half.data(), ldy);
    std::vector<float> in_place = x;
    rms_norm_rows(pool, in_place.data(), ldx, m, n, w.data(), eps, in_place.data(), ldx);
    for (size_t r = 0; r < m; ++r) {
      double squares = 0;
      for (size_t i = 0; i < n; ++i) squares += double{x[r * ldx + i]} * x[r * ldx + i];
      const double scale = 1 / std::sqrt(squares / double(n) + double{eps});
      // The sum is a tree of chains of at most n/64 + 6 roundings, halved by the root; four more.
      const double tolerance = (double(n) / 128 + 3 + 4) * kUlp;
      CHECK(std::abs(inverse[r] - scale) <= tolerance * scale);
      for (size_t i = 0; i < n; ++i) {
        const double want = x[r * ldx + i] * scale * w[i];
        CHECK(std::abs(y[r * ldy + i] - want) <= tolerance * std::abs(want) + 1e-37);
        CHECK(half[r * ldy + i] == bf16_from_f32(y[r * ldy + i]));
        CHECK(in_place[r * ldx + i] == y[r * ldy + i]);
      }
    }
  }
}

TEST_CASE("a normed sub-layer joins the stream as its norm and an addition do, and back again") {
  Pool pool(2);
  for (const size_t n : kLengths)
    for (const float factor : {1.0f, 0.22f}) {
      CAPTURE(n);
      CAPTURE(factor);
      const size_t m = 5;
      const float eps = 1e-5f;
      const std::vector<float> wide = normals(m * n, n, 3), w = normals(n, n + 1),
                               x = normals(m * n, n + 2), dy = normals(m * n, n + 3);
      std::vector<uint16_t> half(m * n);
      round_to_bf16(pool, wide.data(), m * n, half.data());
      std::vector<float> sub(m * n), normed(m * n), inverse(m), found_inverse(m);
      widen_rows_bf16(pool, half.data(), n, m, n, sub.data());
      rms_norm_rows(pool, sub.data(), n, m, n, w.data(), eps, normed.data(), n, inverse.data());
      std::vector<float> want = x;
      add_rows(pool, normed.data(), n, m, n, factor, want.data(), n);

      std::vector<float> y(m * n), in_place = x;
      add_normed_rows(pool, sub.data(), n, m, n, w.data(), eps, factor, x.data(), y.data(),
                      found_inverse.data());
      CHECK(same_bits(y, want));
      CHECK(same_bits(found_inverse, inverse));
      const std::vector<uint16_t> strided = apart(half, n, n + 7);
      add_normed_rows(pool, strided.data(), n + 7, m, n, w.data(), eps, factor, in_place.data(),
                      in_place.data(), nullptr);
      CHECK(same_bits(in_place, want));

      std::vector<float> dx(m * n);
      rms_norm_backward(pool, sub.data(), n, inverse.data(), dy.data(), n, m, n, w.data(),
                        dx.data(), n);
      std::vector<uint16_t> found(m * (n + 3), 0x1234);
      add_normed_backward_bf16(pool, strided.data(), n + 7, inverse.data(), dy.data(), m, n,
                               w.data(), factor, found.data(), n + 3);
      std::vector<uint16_t> rounded;
      for (const float v : dx) rounded.push_back(bf16_from_f32(factor == 1 ? v : factor * v));
      CHECK(found == apart(rounded, n, n + 3));
    }
}

TEST_CASE("rms_norm_backward agrees with central differences and adds to what is there") {
  Pool pool(3);
  const size_t m = 130, n = 37;
  const float eps = 1e-5f;
  const std::vector<float> x = normals(m * n, 1), w = normals(n, 2), dy = normals(m * n, 3);
  std::vector<float> y(m * n), inverse(m), dx(m * n, 1.0f), dw(n, 2.0f);
  rms_norm_rows(pool, x.data(), n, m, n, w.data(), eps, y.data(), n, inverse.data());
  rms_norm_backward(pool, x.data(), n, inverse.data(), dy.data(), n, m, n, w.data(), dx.data(), n,
                    dw.data());
  std::vector<float> dx_only(m * n, 1.0f);
  rms_norm_backward(pool, x.data(), n, inverse.data(), dy.data(), n, m, n, w.data(), dx_only.data(),
                    n);
  CHECK(same_bits(dx, dx_only));

  const auto row_loss = [&](const std::vector<double>& row, size_t r) {
    double squares = 0, loss = 0;
    for (const double v : row) squares += v * v;
    const double scale = 1 / std::sqrt(squares / double(n) + double{eps});
    for (size_t i = 0; i < n; ++i) loss += dy[r * n + i] * row[i] * scale * w[i];
    return loss;
  };
  for (const size_t r : {size_t{0}, size_t{63}, size_t{64}, m - 1}) {
    std::vector<double> row(x.begin() + ptrdiff_t(r * n), x.begin() + ptrdiff_t((r + 1) * n));
    for (size_t i = 0; i < n; ++i) {
      const double at = row[i];
      row[i] = at + 1e-5;
      const double up = row_loss(row, r);
      row[i] = at - 1e-5;
      const double down = row_loss(row, r);
      row[i] = at;
      // Terms of size up to 10 cancel: 20 roundings of 10, and h² of the difference.
      CHECK(std::abs(dx[r * n + i] - 1 - (up - down) / 2e-5) <= 200 * kUlp + 1e-7);
    }
  }
  for (size_t i = 0; i < n; ++i) {
    double want = 2, size = 0;
    for (size_t r = 0; r < m; ++r) {
      const double term = double{dy[r * n + i]} * x[r * n + i] * inverse[r];
      want += term;
      size += std::abs(term);
    }
    CHECK(std::abs(dw[i] - want) <= 70 * kUlp * size);
  }
}

TEST_CASE("rope_rows turns pairs half a head apart, leaves the rest, and turns back") {
  Pool pool(2);
  for (const size_t dims : {size_t{6}, size_t{16}, size_t{40}, size_t{64}}) {
    CAPTURE(dims);
    const size_t m = 9, heads = 3, head_dim = 64, ld = heads * head_dim + 2, half = dims / 2;
    std::vector<float> cosines(20 * half), sines(20 * half);
    for (size_t p = 0; p < 20; ++p)
      for (size_t i = 0; i < half; ++i) {
        const double angle = double(p) * std::pow(10000.0, -2.0 * double(i) / double(dims));
        cosines[p * half + i] = float(std::cos(angle));
        sines[p * half + i] = float(std::sin(angle));
      }
    const std::vector<int32_t> positions = {0, 1, 2, 19, 5, 5, 3, 7, 11};
    const std::vector<float> x = normals(m * ld, dims);
    std::vector<float> y = x;
    const RopeTable table{cosines.data(), sines.data(), dims};
    rope_rows(pool, table, positions, y.data(), ld, heads, head_dim);
    for (size_t r = 0; r < m; ++r)
      for (size_t h = 0; h < heads; ++h)
        for (size_t i = 0; i < head_dim; ++i) {
          const size_t at = r * ld + h * head_dim + i;
          if (i >= dims) {
            CHECK(y[at] == x[at]);
            continue;
          }
          const size_t j = i % half, t = size_t(positions[r]) * half + j;
          const double a = x[at - i + j], b = x[at - i + j + half];
          const double want =
              i < half ? a * cosines[t] - b * sines[t] : b * cosines[t] + a * sines[t];
          CHECK(std::abs(y[at] - want) <= 2 * kUlp * (std::abs(a) + std::abs(b)));
        }
    rope_rows(pool, table, positions, y.data(), ld, heads, head_dim, true);
    for (size_t i = 0; i < x.size(); ++i) CHECK(std::abs(y[i] - x[i]) <= 1e-5);
  }
}

TEST_CASE("gates agree with silu and gelu in double, forward and backward") {
  Pool pool(2);
  for (const Activation act : {Activation::silu, Activation::gelu_tanh}) {
    double (*f)(double) = act == Activation::silu ? silu : gelu;
    for (const size_t n : kLengths) {
      CAPTURE(n);
      const size_t m = 3;
      std::vector<float> gate = normals(m * n, n, 3);
      gate[0] = 40;
      gate[n] = -40;
      gate[2 * n] = 0;
      const std::vector<float> up = normals(m * n, n + 1), dh = normals(m * n, n + 2);
      std::vector<float> h(m * n), d_gate(m * n), d_up(m * n);
      gate_rows(pool, act, gate.data(), n, up.data(), n, m, n, h.data(), n);
      gate_backward(pool, act, gate.data(), up.data(), dh.data(), m, n, d_gate.data(), d_up.data());
      for (size_t i = 0; i < m * n; ++i) {
        const double x = gate[i], size = 1 + std::abs(x);
        const double argument = act == Activation::silu ? x : gelu_argument(x);
        // The argument of exp has up to 4 roundings, which exp makes relative; exp itself has 3,
        // and a few operations follow.
        const double tolerance = (8 + 4 * std::abs(argument)) * kUlp;
        CHECK(std::abs(h[i] - f(x) * up[i]) <= tolerance * std::abs(f(x) * up[i]) + 1e-30);
        CHECK(std::abs(d_up[i] - f(x) * dh[i]) <= tolerance * std::abs(f(x) * dh[i]) + 1e-30);
        const double want = slope(f, x) * dh[i] * up[i];
        CHECK(std::abs(d_gate[i] - want) <=
              (30 * kUlp * size * size + 1e-8) * std::abs(dh[i] * up[i]));
      }
      // bf16 is the same arithmetic between two roundings.
      const std::vector<uint16_t> gate16 = rounded(gate), up16 = rounded(up);
      const std::vector<float> gate32 = widened(gate16), up32 = widened(up16);
      std::vector<uint16_t> h16(m * n), dg16(m * n), du16(m * n);
      gate_rows(pool, act, gate32.data(), n, up32.data(), n, m, n, h.data(), n);
      gate_rows_bf16(pool, act, gate16.data(), up16.data(), n, m, n, h16.data());
      CHECK(same_bits(h16, rounded(h)));
      gate_backward(pool, act, gate32.data(), up32.data(), dh.data(), m, n, d_gate.data(),
                    d_up.data());
      gate_backward_bf16(pool, act, gate16.data(), up16.data(), n, dh.data(), m, n, dg16.data(),
                         du16.data());
      CHECK(same_bits(dg16, rounded(d_gate)));
      CHECK(same_bits(du16, rounded(d_up)));
      std::vector<uint16_t> g_alias = gate16, u_alias = up16;
      gate_backward_bf16(pool, act, g_alias.data(), u_alias.data(), n, dh.data(), m, n,
                         g_alias.data(), u_alias.data());
      CHECK(same_bits(g_alias, dg16));
      CHECK(same_bits(u_alias, du16));
      // Rows that stand apart: what is between them stays.
      const size_t ld = n + 3;
      std::vector<uint16_t> g_apart = apart(gate16, n, ld), u_apart = apart(up16, n, ld),
                            h_apart = apart(std::vector<uint16_t>(m * n), n, ld);
      gate_rows_bf16(pool, act, g_apart.data(), u_apart.data(), ld, m, n, h_apart.data());
      CHECK(same_bits(h_apart, apart(h16, n, ld)));
      gate_backward_bf16(pool, act, g_apart.data(), u_apart.data(), ld, dh.data(), m, n,
                         g_apart.data(), u_apart.data());
      CHECK(same_bits(g_apart, apart(dg16, n, ld)));
      CHECK(same_bits(u_apart, apart(du16, n, ld)));
    }
  }
}

TEST_CASE("biases and scaled rows are added") {
  Pool pool(2);
  const size_t m = 700, n = 33, ld = 40;
  const std::vector<float> x = normals(m * ld, 1), bias = normals(n, 2), y = normals(m * ld, 3);
  std::vector<float> a = y, b = y;
  add_bias_rows(pool, a.data(), ld, m, n, bias.data());
  add_rows(pool, x.data(), ld, m, n, 0.3f, b.data(), ld);
  for (size_t i = 0; i < m * ld; ++i) {
    const bool inside = i % ld < n;
    CHECK(a[i] == (inside ? y[i] + bias[i % ld] : y[i]));
    CHECK(b[i] == (inside ? std::fma(x[i], 0.3f, y[i]) : y[i]));
  }
}

TEST_CASE("bf16 rounds to nearest even and keeps NaN, infinities and subnormals") {
  Pool pool(2);
  std::vector<float> x = normals(100'001, 1);
  const float special[] = {0.0f,
                           -0.0f,
                           1e-40f,
                           -3e-45f,
                           3.4e38f,
                           std::numeric_limits<float>::max(),
                           std::numeric_limits<float>::infinity(),
                           -std::numeric_limits<float>::infinity(),
                           std::numeric_limits<float>::quiet_NaN(),
                           1.00390625f,
                           1.01171875f};
  for (const Isa level : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    if (level > isa()) continue;
    std::vector<uint16_t> y(11);
    float_kernels(level).round_to_bf16(special, 11, y.data());
    for (size_t i = 0; i < 11; ++i) CHECK(y[i] == bf16_from_f32(special[i]));
  }
  std::vector<uint16_t> y(x.size());
  round_to_bf16(pool, x.data(), x.size(), y.data());
  CHECK(same_bits(y, rounded(x)));
  std::vector<float> back(x.size());
  widen_rows_bf16(pool, y.data(), y.size(), 1, y.size(), back.data());
  CHECK(same_bits(back, widened(y)));
  // Rows that stand apart: what is between them stays.
  constexpr size_t kRows = 11, kCols = 9091, kLd = kCols + 5;
  static_assert(kRows * kCols == 100'001);
  std::vector<uint16_t> spread = apart(std::vector<uint16_t>(y.size()), kCols, kLd);
  round_rows_to_bf16(pool, x.data(), kRows, kCols, spread.data(), kLd);
  CHECK(same_bits(spread, apart(y, kCols, kLd)));
  std::ranges::fill(back, 0.0f);
  widen_rows_bf16(pool, spread.data(), kLd, kRows, kCols, back.data());
  CHECK(same_bits(back, widened(y)));
}

TEST_CASE("softcap_rows is cap · tanh(x / cap), with relative accuracy near zero") {
  Pool pool(2);
  for (const float cap : {1.0f, 30.0f, 50.0f}) {
    std::vector<float> x = normals(20'003, 5, 40);
    for (size_t i = 0; i < 1000; ++i) x[i] *= 1e-4f;
    x[0] = 1e30f;
    x[1] = -1e30f;
    x[2] = 0;
    std::vector<float> y = x;
    softcap_rows(pool, y.data(), y.size(), cap);
    for (size_t i = 0; i < x.size(); ++i) {
      const double want = double{cap} * std::tanh(double{x[i]} / double{cap});
      CHECK(std::abs(y[i] - want) <= 8 * kUlp * std::abs(want));
    }
  }
}

TEST_CASE("log_sum_exp is exact for one value, for huge values and for −∞") {
  const float inf = std::numeric_limits<float>::infinity();
  CHECK(log_sum_exp(std::vector<float>{3.5f}) == 3.5f);
  CHECK(log_sum_exp(std::vector<float>{-inf, -inf}) == -inf);
  CHECK(log_sum_exp(std::vector<float>{1e30f, -inf, -1e30f}) == 1e30f);
  CHECK(std::isnan(log_sum_exp(std::vector<float>{1, std::nanf(""), 2})));
  for (const size_t n : {size_t{5}, size_t{4096}, size_t{4097}, size_t{49'152}, size_t{262'144}}) {
    const std::vector<float> x = normals(n, n, 4);
    double sum = 0;
    for (const float v : x) sum += std::exp(double{v});
    // Sums of at most 4,096/64 positive terms per accumulator and 3-ulp exponentials: relative
    // error of the sum below 70 ulp, absolute in its logarithm; then one rounding.
    CHECK(std::abs(log_sum_exp(x) - std::log(sum)) <= 70 * kUlp + kUlp * std::log(sum));
  }
}

TEST_CASE("cross_entropy_rows gives −log p and its gradient, for few rows and many") {
  for (const size_t m : {1, 3, 40}) {
    for (const size_t n : {size_t{1}, size_t{17}, size_t{4096}, size_t{9001}}) {
      CAPTURE(m);
      CAPTURE(n);
      const size_t ld = n + 3;
      std::vector<float> logits = normals(m * ld, n, 3);
      if (n > 5000) {  // a chunk of the vocabulary that is masked away
        for (size_t i = 4096; i < 8192; ++i) logits[i] = -std::numeric_limits<float>::infinity();
      }
      std::vector<int32_t> targets(m);
      for (size_t r = 0; r < m; ++r) targets[r] = static_cast<int32_t>((n - 1) - r * 7 % n);
      std::vector<std::vector<float>> gradients, losses;
      for (const size_t threads : {1, 2, 5}) {
        Pool pool(threads);
        std::vector<float> x = logits, nll(m), nll_only(m);
        cross_entropy_rows(pool, x.data(), ld, m, n, targets.data(), nll_only.data(), 0);
        CHECK(same_bits(x, logits));
        cross_entropy_rows(pool, x.data(), ld, m, n, targets.data(), nll.data(), 0.25f);
        CHECK(same_bits(nll, nll_only));
        gradients.push_back(x);
        losses.push_back(nll);
      }
      CHECK(same_bits(gradients[0], gradients[1]));
      CHECK(same_bits(gradients[0], gradients[2]));
      CHECK(same_bits(losses[0], losses[2]));
      for (size_t r = 0; r < m; ++r) {
        const float* x = logits.data() + r * ld;
        double sum = 0;
        for (size_t i = 0; i < n; ++i) sum += std::exp(double{x[i]});
        const double lse = std::log(sum);
        // As for log_sum_exp, and the rounding of the difference.
        CHECK(std::abs(losses[0][r] - (lse - double{x[targets[r]]})) <= 100 * kUlp + 40 * kUlp);
        for (size_t i = 0; i < n; ++i) {
          const double want =
              0.25 * (std::exp(x[i] - lse) - (static_cast<int32_t>(i) == targets[r] ? 1 : 0));
          CHECK(std::abs(gradients[0][r * ld + i] - want) <= 0.25 * 100 * kUlp);
        }
        for (size_t i = n; i < ld; ++i) CHECK(gradients[0][r * ld + i] == x[i]);
      }
    }
  }
}

TEST_CASE("every level of the instruction set gives the bits of the scalar definition") {
  const FloatKernels& scalar = float_kernels(Isa::scalar);
  for (const Isa level : levels()) {
    const FloatKernels& fast = float_kernels(level);
    CAPTURE(name_of(level));
    for (const size_t n : kLengths) {
      CAPTURE(n);
      const size_t m = 3;
      const std::vector<float> x = normals(m * n, n, 4), w = normals(n, n + 1),
                               dy = normals(m * n, n + 2);
      const std::vector<uint16_t> x16 = rounded(x), dy16 = rounded(dy);
      const auto both = [&](size_t count, auto call) {
        std::vector<float> a(count, 0.5f), b(count, 0.5f);
        call(scalar, a.data());
        call(fast, b.data());
        return same_bits(a, b);
      };
      const auto both16 = [&](size_t count, auto call) {
        std::vector<uint16_t> a(count), b(count);
        call(scalar, a.data());
        call(fast, b.data());
        return same_bits(a, b);
      };
      const auto inputs = x.data();
      CHECK(both(m * n + m, [&](const FloatKernels& f, float* y) {
        f.rms_norm(inputs, n, m, n, w.data(), 1e-6f, y, n, y + m * n);
      }));
      CHECK(both16(m * n, [&](const FloatKernels& f, uint16_t* y) {
        f.rms_norm_bf16(inputs, n, m, n, w.data(), 1e-6f, y, n, nullptr);
      }));
      const std::vector<float> inverse(m, 0.7f);
      CHECK(both(m * n + n, [&](const FloatKernels& f, float* y) {
        f.rms_norm_backward(inputs, n, inverse.data(), dy.data(), n, m, n, w.data(), y, n,
                            y + m * n);
      }));
      for (const bool gelu_tanh : {false, true}) {
        CHECK(both(n, [&](const FloatKernels& f, float* y) {
          f.gate(gelu_tanh, inputs, dy.data(), n, y);
        }));
        CHECK(both16(n, [&](const FloatKernels& f, uint16_t* y) {
          f.gate_bf16(gelu_tanh, x16.data(), dy16.data(), n, y);
        }));
        CHECK(both(2 * n, [&](const FloatKernels& f, float* y) {
          f.gate_backward(gelu_tanh, inputs, dy.data(), w.data(), n, y, y + n);
        }));
        CHECK(both16(2 * n, [&](const FloatKernels& f, uint16_t* y) {
          f.gate_backward_bf16(gelu_tanh, x16.data(), dy16.data(), w.data(), n, y, y + n);
        }));
      }
      CHECK(both(n, [&](const FloatKernels& f, float* y) { f.add_scaled(inputs, n, 0.3f, y); }));
      CHECK(both(n, [&](const FloatKernels& f, float* y) { f.scale(inputs, n, 0.3f, y); }));
      CHECK(both(n, [&](const FloatKernels& f, float* y) { f.widen_bf16(x16.data(), n, y); }));
      CHECK(both16(n, [&](const FloatKernels& f, uint16_t* y) { f.round_to_bf16(inputs, n, y); }));
      CHECK(both(n, [&](const FloatKernels& f, float* y) {
        std::memcpy(y, inputs, n * sizeof(float));
        f.softcap(y, n, 5);
      }));
      CHECK(both(1, [&](const FloatKernels& f, float* y) { *y = f.dot(inputs, w.data(), n); }));
      CHECK(both(n + 2, [&](const FloatKernels& f, float* y) {
        f.exp_sum(inputs, n, y, y + n, y + n + 1);
      }));
      CHECK(both(3 * n, [&](const FloatKernels& f, float* y) {
        std::memcpy(y, inputs, n * sizeof(float));
        for (size_t i = 0; i < n; ++i) y[n + i] = std::fabs(w[i]);
        const AdamWStep step{.beta1 = 0.9f,
                             .rest1 = 0.1f,
                             .beta2 = 0.99f,
                             .rest2 = 0.01f,
                             .scale = 0.7f,
                             .decay = 0.999f,
                             .rate = 0.02f,
                             .root = 0.3f,
                             .eps = 1e-8f};
        f.adamw(step, dy.data(), n, y, y + n, y + 2 * n);
      }));
      if (n % 2 == 0) {
        const std::vector<int32_t> positions = {1, 0, 1};
        CHECK(both(m * n, [&](const FloatKernels& f, float* y) {
          std::memcpy(y, inputs, m * n * sizeof(float));
          f.rope(w.data(), dy.data(), n, positions.data(), 1, y + n, n, 1, n, n % 4 == 0);
        }));
      }
    }
  }
}

TEST_CASE("exp is within 2e-7 of the truth over its whole range, at every level") {
  std::vector<float> x;
  for (double v = -87; v <= 0; v += 0.00137) x.push_back(static_cast<float>(v));
  std::vector<float> first(x.size());
  for (const Isa level : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    if (level > isa()) continue;
    std::vector<float> padded = x, y(x.size() + 1);
    padded.push_back(0);  // the maximum: so that exp_sum subtracts nothing
    float top = 0, sum = 0;
    float_kernels(level).exp_sum(padded.data(), padded.size(), y.data(), &top, &sum);
    CHECK(y.back() == 1.0f);
    double worst = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const double want = std::exp(double{x[i]});
      worst = std::max(worst, std::abs(y[i] - want) / want);
    }
    CHECK(worst < 2e-7);
  }
}

TEST_CASE("the number of threads does not change a bit of any row operation") {
  const size_t m = 300, n = 577;
  const std::vector<float> x = normals(m * n, 1), w = normals(n, 2), dy = normals(m * n, 3);
  std::vector<std::vector<float>> results;
  for (const size_t threads : {1, 2, 4}) {
    Pool pool(threads);
    std::vector<float> all(m * n), inverse(m), dx(m * n), dw(n);
    rms_norm_rows(pool, x.data(), n, m, n, w.data(), 1e-5f, all.data(), n, inverse.data());
    rms_norm_backward(pool, x.data(), n, inverse.data(), dy.data(), n, m, n, w.data(), dx.data(), n,
                      dw.data());
    gate_rows(pool, Activation::silu, x.data(), n, dy.data(), n, m, n, all.data(), n);
    add_rows(pool, dx.data(), n, m, n, 1, all.data(), n);
    softcap_rows(pool, all.data(), m * n, 3);
    all.insert(all.end(), dw.begin(), dw.end());
    results.push_back(all);
  }
  CHECK(same_bits(results[0], results[1]));
  CHECK(same_bits(results[0], results[2]));
}
