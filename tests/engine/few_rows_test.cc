#include "engine/few_rows.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "base/cpu.h"
#include "base/half.h"
#include "base/random.h"
#include "engine/few_rows_kernels.h"

using namespace moru;

namespace {

std::vector<uint16_t> random_bf16(size_t count, uint64_t stream) {
  Random random(11, stream);
  std::vector<uint16_t> values(count);
  for (uint16_t& value : values) value = bf16_from_f32(random.normal());
  return values;
}

struct Level {
  Isa isa;
  FewRowsKernel kernel;
};
std::vector<Level> levels() {  // that this processor has
  std::vector<Level> out;
  for (const Level level : {Level{Isa::scalar, few_rows_scalar}, Level{Isa::avx2, few_rows_avx2},
                            Level{Isa::avx512, few_rows_avx512}})
    if (level.isa <= isa()) out.push_back(level);
  return out;
}

bool same_bits(float a, float b) { return std::memcmp(&a, &b, sizeof a) == 0; }

}  // namespace

TEST_CASE("few rows times bf16 weights equal their definition, at every level") {
  for (const Level& level : levels())
    for (const size_t k : {1, 15, 16, 31, 32, 33, 64, 576})
      for (size_t m = 1; m <= kFewRows; ++m)
        for (const size_t rows : {1, 3, 4, 5, 9})
          for (const bool add : {false, true}) {
            CAPTURE(name_of(level.isa));
            CAPTURE(k);
            CAPTURE(m);
            CAPTURE(rows);
            const auto x = random_bf16(m * k, 1), w = random_bf16(rows * k, 2);
            const size_t ldy = rows + 2;
            std::vector<float> y(m * ldy, 0.5f);
            level.kernel(x.data(), m, w.data(), rows, k, y.data(), ldy, add);
            for (size_t t = 0; t < m; ++t) {
              for (size_t r = 0; r < rows; ++r) {
                double sum = add ? 0.5 : 0, size = 1;
                for (size_t i = 0; i < k; ++i) {
                  const double term =
                      double{f32_from_bf16(x[t * k + i])} * double{f32_from_bf16(w[r * k + i])};
                  sum += term;
                  size += std::abs(term);
                }
                // k f32 roundings of sums that never exceed `size`.
                const double allowed = size * static_cast<double>(k) * 0x1p-24;
                CHECK(std::abs(double{y[t * ldy + r]} - sum) <= allowed);
              }
              for (size_t r = rows; r < ldy; ++r) CHECK(y[t * ldy + r] == 0.5f);
            }
          }
}

TEST_CASE("a row's product has the same bits beside any others, for any number of threads") {
  constexpr size_t kCols = 96, kRows = 1000;
  const auto x = random_bf16(kFewRows * kCols, 3), w = random_bf16(kRows * kCols, 4);
  Pool one(1);
  std::vector<float> alone(kFewRows * kRows);
  for (size_t t = 0; t < kFewRows; ++t) {
    const FewRowsProduct product{w.data(), kRows, alone.data() + t * kRows, kRows, false};
    multiply_few_rows(one, x.data() + t * kCols, 1, kCols, {&product, 1});
  }
  for (const size_t threads : {1, 2, 3})
    for (size_t m = 2; m <= kFewRows; ++m) {
      Pool pool(threads);
      // The same weights as two products of one phase.
      std::vector<float> y(m * kRows);
      const FewRowsProduct products[] = {
          {w.data(), 333, y.data(), kRows, false},
          {w.data() + 333 * kCols, kRows - 333, y.data() + 333, kRows, false}};
      multiply_few_rows(pool, x.data(), m, kCols, products);
      for (size_t i = 0; i < y.size(); ++i) REQUIRE(same_bits(y[i], alone[i]));
    }
}
