#include "engine/quant_matrix.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <mutex>
#include <vector>

#include "base/half.h"
#include "base/random.h"
#include "engine/quant_kernels.h"
#include "engine/quant_pack.h"
#include "formats/blocks.h"
#include "support.h"

using namespace moru;

namespace {

constexpr DType kTypes[] = {DType::q4_0,   DType::q4_1,   DType::q5_0, DType::q5_1, DType::q8_0,
                            DType::q2_k,   DType::q3_k,   DType::q4_k, DType::q5_k, DType::q6_k,
                            DType::iq4_nl, DType::iq4_xs, DType::mxfp4};

// Where the halves (or the exponent) of a type's block stand.
std::vector<size_t> half_offsets(DType type) {
  switch (type) {
    case DType::q4_1:
    case DType::q5_1:
    case DType::q4_k:
    case DType::q5_k:
      return {0, 2};
    case DType::q2_k:
      return {offsetof(BlockQ2K, d), offsetof(BlockQ2K, dmin)};
    case DType::q3_k:
      return {offsetof(BlockQ3K, d)};
    case DType::q6_k:
      return {offsetof(BlockQ6K, d)};
    case DType::mxfp4:
      return {};
    default:
      return {0};
  }
}

// Random blocks with every code and sub-scale possible, and halves within ± 2.
std::vector<std::byte> random_tensor(DType type, size_t rows, size_t cols, uint64_t seed) {
  Random random(seed, static_cast<uint64_t>(type));
  std::vector<std::byte> data(bytes_of(type, rows * cols));
  for (std::byte& b : data) b = static_cast<std::byte>(random.below(256));
  const size_t block_bytes = traits(type).block_bytes;
  for (size_t at = 0; at < data.size(); at += block_bytes) {
    for (const size_t offset : half_offsets(type)) {
      const uint16_t half = f16_from_f32(random.uniform() * 4 - 2);
      std::memcpy(&data[at + offset], &half, sizeof half);
    }
    if (type == DType::mxfp4) data[at] = static_cast<std::byte>(118 + random.below(20));
  }
  return data;
}

std::vector<float> random_floats(size_t n, uint64_t seed) {
  Random random(seed);
  std::vector<float> out(n);
  for (float& v : out) v = random.normal();
  return out;
}

bool same_bits(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size_bytes()) == 0);
}

std::vector<Isa> levels() {  // that this processor has
  std::vector<Isa> out;
  for (const Isa level : {Isa::scalar, Isa::avx2, Isa::avx512})
    if (level <= isa()) out.push_back(level);
  return out;
}

// Activations quantized by the definition, in every form that some level reads.
struct Rows {
  Activations kind;
  size_t m, k;
  std::vector<float> x;
  std::vector<int16_t> codes;
  std::vector<int8_t> digits;
  std::vector<int32_t> sums16, sums32;
  std::vector<float> scales, scaled16, scaled32;

  Rows(size_t rows, size_t cols, uint64_t seed, Activations activations = Activations::int16)
      : kind(activations),
        m(rows),
        k(cols),
        x(random_floats(rows * cols, seed)),
        codes(rows * cols),
        digits(rows * cols * 2),
        sums16(rows * cols / 16),
        sums32(rows * cols / 32),
        scales(rows * cols / 32),
        scaled16(rows * cols / 16),
        scaled32(rows * cols / 32) {
    for (size_t i = 0; i < m; ++i) {
      const size_t at16 = i * k / 16, at32 = i * k / 32;
      if (kind == Activations::int8)
        quant_kernels_scalar().quantize8(
            &x[i * k], k,
            {&codes[i * k], &digits[i * k], &scales[at32], &sums16[at16], &sums32[at32],
             &scaled16[at16], &scaled32[at32]});
      else
        scales[i] = quant_kernels_scalar().quantize(&x[i * k], k, &codes[i * k], &digits[i * 2 * k],
                                                    &sums16[at16], &sums32[at32]);
    }
  }
  Tokens tokens(size_t block, size_t first, size_t count) const {
    const bool narrow = kind == Activations::int8;
    Tokens out{};
    out.codes = codes.data() + first * k;
    out.stride = k;
    out.digits = digits.data() + first * (narrow ? k : 2 * k);
    out.sums = (block == 16 ? sums16.data() : sums32.data()) + first * (k / block);
    out.sums_stride = k / block;
    out.scales = scales.data() + first * (narrow ? k / 32 : 1);
    out.unit_stride = k / 32;
    out.scaled_sums = (block == 16 ? scaled16.data() : scaled32.data()) + first * (k / block);
    out.count = count;
    return out;
  }
};

struct Packed {
  DType type;
  size_t rows, cols;
  PanelSize size;
  std::vector<uint8_t> data;

  Packed(DType t, size_t r, size_t c, std::span<const std::byte> tensor)
      : type(t), rows(r), cols(c), size(panel_size(t, c)), data((r + 15) / 16 * size.bytes) {
    const size_t row_bytes = bytes_of(type, cols);
    for (size_t row = 0; row < rows; row += 16)
      pack_panel(type, tensor.data() + row * row_bytes, std::min<size_t>(16, rows - row), cols,
                 &data[row / 16 * size.bytes]);
  }
  const PanelFormat& format() const { return kPanelFormat[panel_format_index(type)]; }
  Panels panels() const { return {data.data(), size.bytes, size.codes_at, cols / 32, rows}; }
};

// y of every token by the direct kernel, tokens in groups of at most four; y starts as `before`.
std::vector<float> direct(const QuantKernels& kernels, const Packed& w, const Rows& x,
                          const std::vector<float>* before = nullptr) {
  std::vector<float> y = before ? *before : std::vector<float>(x.m * w.rows, -1);
  const FormatKernels& own = kernels.formats[panel_format_index(w.type)];
  const DirectKernel multiply = x.kind == Activations::int8 ? own.direct8 : own.direct;
  for (size_t t = 0; t < x.m; t += kDirectTokens)
    multiply(w.panels(), x.tokens(w.format().block, t, std::min(kDirectTokens, x.m - t)),
             {&y[t * w.rows], w.rows, before != nullptr});
  return y;
}

struct StripeMemory {
  std::vector<int16_t> codes;
  std::vector<float> scales, mins;
  size_t lanes;
  StripeMemory(size_t cols, size_t n)
      : codes(cols * n), scales(cols / 16 * n), mins(cols / 16 * n), lanes(n) {}
  Stripe stripe(size_t lane = 0) {
    return {codes.data() + 2 * lane, scales.data() + lane, mins.data() + lane, lanes};
  }
};

std::vector<float> by_stripes(const QuantKernels& kernels, const Packed& w, const Rows& x,
                              const std::vector<float>* before = nullptr) {
  std::vector<float> y = before ? *before : std::vector<float>(x.m * w.rows, -1);
  StripeMemory memory(w.cols, kStripeRows);
  const bool narrow = x.kind == Activations::int8;
  const FormatKernels& own = kernels.formats[panel_format_index(w.type)];
  const UnpackKernel unpack = narrow ? own.unpack8 : own.unpack;
  const auto& multiply = narrow ? kernels.stripe8 : kernels.stripe;
  for (size_t row = 0; row < w.rows; row += kStripeRows) {
    const size_t rows = std::min(kStripeRows, w.rows - row);
    for (size_t half = 0; 16 * half < rows; ++half) {
      const uint8_t* panel = &w.data[(row / 16 + half) * w.size.bytes];
      unpack(panel, panel + w.size.codes_at, w.cols / 32, memory.stripe(16 * half));
    }
    multiply[w.format().block == 16][w.format().has_min](memory.stripe(), w.cols, rows,
                                                         x.tokens(w.format().block, 0, x.m),
                                                         {&y[row], w.rows, before != nullptr});
  }
  return y;
}

// One row quantized by one level.
struct Quantized {
  std::vector<int16_t> codes;
  std::vector<int8_t> digits;
  std::vector<int32_t> sums16, sums32;
  uint32_t scale_bits;

  Quantized(const std::vector<float>& x, const QuantKernels& kernels)
      : codes(x.size()), digits(2 * x.size()), sums16(x.size() / 16), sums32(x.size() / 32) {
    scale_bits = std::bit_cast<uint32_t>(kernels.quantize(
        x.data(), x.size(), codes.data(), digits.data(), sums16.data(), sums32.data()));
  }
  float scale() const { return std::bit_cast<float>(scale_bits); }
  bool operator==(const Quantized&) const = default;
};

struct Quantized8 {
  std::vector<float> codes;  // as the level's kernels read them, in the order of columns
  std::vector<uint32_t> scales;
  std::vector<int32_t> sums;
  bool operator==(const Quantized8&) const = default;
};

size_t cols_unit(DType type) { return traits(type).block; }

}  // namespace

TEST_CASE("the scalar product is the product of the dequantized weights, within its rounding") {
  for (const DType type : kTypes) {
    CAPTURE(traits(type).name);
    const size_t rows = 33, cols = 512, m = 3;
    const auto tensor = random_tensor(type, rows, cols, 1);
    std::vector<float> values(rows * cols);
    dequantize(type, tensor, values);
    const Packed w(type, rows, cols, tensor);
    const Rows x(m, cols, 2);
    const std::vector<float> y = direct(quant_kernels_scalar(), w, x);
    const size_t block = w.format().block;
    for (size_t r = 0; r < rows; ++r) {
      StripeMemory memory(cols, 16);
      const uint8_t* panel = &w.data[r / 16 * w.size.bytes];
      quant_kernels_scalar().formats[panel_format_index(type)].unpack(
          panel, panel + w.size.codes_at, cols / 32, memory.stripe());
      for (size_t t = 0; t < m; ++t) {
        // With u = 2^-24 and B blocks: each dot becomes a float (u), is scaled and added, its
        // minimum is added (u each, of what was summed so far), and the sum is scaled (u). That is
        // (2B + 3) u of `summed`, the magnitudes of all addends. A value of dequantize() is
        // itself rounded twice: u of scale · code and u of the value, together `decoded`.
        double exact = 0, summed = 0, decoded = 0;
        for (size_t b = 0; b < cols / block; ++b) {
          const double scale = memory.scales[b * 16 + r % 16];
          const double min = w.format().has_min ? memory.mins[b * 16 + r % 16] : 0.0f;
          double dot = 0, sum = 0;
          for (size_t c = b * block; c < (b + 1) * block; ++c) {
            const double code = x.codes[t * cols + c];
            const double weight = memory.codes[2 * (c / 2 * 16 + r % 16) + c % 2];
            exact += double{values[r * cols + c]} * code;
            dot += weight * code;
            sum += code;
            decoded += (2 * std::abs(scale * weight) + std::abs(min)) * std::abs(code);
          }
          summed += std::abs(scale * dot) + std::abs(min * sum);
        }
        const double bound =
            (static_cast<double>(2 * cols / block + 3) * summed + decoded) * 0x1p-24;
        CHECK(std::abs(y[t * rows + r] / x.scales[t] - exact) <= bound);
      }
    }
  }
}

TEST_CASE("with 8 bits, too, the scalar product is that of the dequantized numbers") {
  for (const DType type : kTypes) {
    CAPTURE(traits(type).name);
    const size_t rows = 17, cols = 512, m = 2;
    const auto tensor = random_tensor(type, rows, cols, 1);
    std::vector<float> values(rows * cols);
    dequantize(type, tensor, values);
    const Packed w(type, rows, cols, tensor);
    const Rows x(m, cols, 2, Activations::int8);
    const std::vector<float> y = direct(quant_kernels_scalar(), w, x);
    for (size_t r = 0; r < rows; ++r)
      for (size_t t = 0; t < m; ++t) {
        double exact = 0, summed = 0;
        for (size_t c = 0; c < cols; ++c) {
          const double activation =
              double{x.scales[t * cols / 32 + c / 32]} * double{1.0 * x.codes[t * cols + c]};
          // Half a code of the unit's largest activation, which has code 127.
          CHECK(std::abs(activation - double{x.x[t * cols + c]}) <=
                double{x.scales[t * cols / 32 + c / 32]} * 0.501);
          exact += double{values[r * cols + c]} * activation;
          summed += std::abs(double{values[r * cols + c]} * activation);
        }
        // At most six roundings of a block's part, one addition each for 2 · 32 blocks. Parts of
        // a block with a minimum may be larger than their sum, by 31 to 1 at most.
        CHECK(std::abs(y[t * rows + r] - exact) <= 80 * 32 * summed * 0x1p-24);
      }
  }
}

TEST_CASE("every level and both kernels give the scalar product's bits") {
  for (const DType type : kTypes) {
    for (const Activations kind : {Activations::int16, Activations::int8})
      for (const size_t rows : {1, 15, 16, 17, 31, 32, 33, 50}) {
        for (const size_t blocks : {1, 2, 3}) {
          const size_t cols = blocks * cols_unit(type), m = rows == 17 ? 14 : 5;
          CAPTURE(traits(type).name);
          CAPTURE(rows);
          CAPTURE(cols);
          const auto tensor = random_tensor(type, rows, cols, rows * 10 + blocks);
          const Packed w(type, rows, cols, tensor);
          for (size_t count = 1; count <= m; ++count) {
            const Rows x(count, cols, 3, kind);
            CAPTURE(kind == Activations::int8);
            const std::vector<float> expected = direct(quant_kernels_scalar(), w, x);
            const std::vector<float> before = random_floats(count * rows, 4);
            const std::vector<float> added = direct(quant_kernels_scalar(), w, x, &before);
            for (const Isa level : levels()) {
              CAPTURE(name_of(level));
              CAPTURE(count);
              const QuantKernels& kernels = quant_kernels(level);
              CHECK(same_bits(direct(kernels, w, x), expected));
              CHECK(same_bits(by_stripes(kernels, w, x), expected));
              CHECK(same_bits(direct(kernels, w, x, &before), added));
              CHECK(same_bits(by_stripes(kernels, w, x, &before), added));
            }
          }
        }
      }
  }
}

TEST_CASE("every level dequantizes to the bits of dequantize()") {
  for (const DType type : kTypes) {
    const size_t cols = 2 * cols_unit(type);
    const auto tensor = random_tensor(type, 16, cols, 5);
    std::vector<float> values(16 * cols);
    dequantize(type, tensor, values);
    const Packed w(type, 16, cols, tensor);
    for (const Isa level : levels()) {
      CAPTURE(traits(type).name);
      CAPTURE(name_of(level));
      const QuantKernels& kernels = quant_kernels(level);
      StripeMemory memory(cols, 16);
      kernels.formats[panel_format_index(type)].unpack(
          w.data.data(), w.data.data() + w.size.codes_at, cols / 32, memory.stripe());
      Stripe stripe = memory.stripe();
      if (!w.format().has_min) stripe.mins = nullptr;
      for (const size_t first : {0, 1, 15})
        for (const size_t count : {size_t{1}, 16 - first}) {
          std::vector<float> out(count * cols);
          kernels.dequantize(stripe, cols, w.format().block, first, count, out.data(), cols);
          CHECK(same_bits(out, std::span(values).subspan(first * cols, count * cols)));
        }
    }
  }
}

TEST_CASE("every level quantizes activations alike: ties, zeros, subnormals, infinities") {
  const size_t k = 96;
  std::vector<std::vector<float>> rows;
  for (uint64_t seed = 0; seed < 20; ++seed) rows.push_back(random_floats(k, seed));
  rows.emplace_back(k, 0.0f);
  rows.emplace_back(k, -0.0f);
  rows.emplace_back(k, 0x1p-130f);
  rows.emplace_back(k, 0x1p-99f);
  rows.emplace_back(k, 3e38f);
  rows.push_back(rows[0]);
  rows.back()[70] = INFINITY;
  rows.push_back(rows[0]);
  rows.back()[3] = NAN;
  rows.emplace_back();
  for (size_t i = 0; i < k; ++i)  // codes that end in a half
    rows.back().push_back(i == 0 ? 32639.0f : static_cast<float>(i) - 40.5f);
  for (const auto& x : rows) {
    Quantized expected(x, quant_kernels_scalar());
    for (const Isa level : levels()) {
      CAPTURE(name_of(level));
      CHECK(Quantized(x, quant_kernels(level)) == expected);
    }
    float max = 0;
    for (const float v : x) max = std::max(max, std::abs(v));
    const float scale = expected.scale();
    if (!std::isfinite(scale) || scale == 0) continue;
    CHECK(scale == max / 32639.0f);
    int sum = 0;
    for (size_t i = 0; i < k; ++i) {
      const int code = expected.codes[i];
      // Half a code, and two roundings of a quotient up to 32639.
      CHECK(std::abs(double{x[i]} / scale - code) <= 0.5 + 32639 * 0x1p-22);
      const size_t place = i / 4 * 8 + (i % 4 == 1 ? 2 : i % 4 == 2 ? 1 : i % 4);
      CHECK(expected.digits[place] * 256 + expected.digits[place + 4] == code);
      sum += code;
    }
    CHECK(sum == expected.sums32[0] + expected.sums32[1] + expected.sums32[2]);
  }
  const Quantized ties(rows.back(), quant_kernels_scalar());
  CHECK(ties.scale() == 1.0f);
  CHECK(ties.codes[40] == 0);   // -0.5
  CHECK(ties.codes[41] == 0);   // 0.5
  CHECK(ties.codes[42] == 2);   // 1.5
  CHECK(ties.codes[39] == -2);  // -1.5
}

TEST_CASE("every level quantizes to 8 bits alike, unit by unit") {
  const size_t k = 160;
  std::vector<float> x = random_floats(k, 21);
  std::fill_n(&x[32], 32, -0.0f);
  std::fill_n(&x[64], 32, 0x1p-101f);
  x[100] = INFINITY;
  for (size_t i = 0; i < 32; ++i) x[128 + i] = i == 0 ? 127.0f : static_cast<float>(i) - 16.5f;
  const auto quantized = [&](const QuantKernels& kernels) {
    std::vector<int16_t> codes(k);
    std::vector<int8_t> digits(k);
    std::vector<float> scales(k / 32), scaled16(k / 16), scaled32(k / 32);
    std::vector<int32_t> sums16(k / 16), sums32(k / 32);
    kernels.quantize8(
        x.data(), k,
        {kernels.codes8 ? codes.data() : nullptr, kernels.codes8 ? nullptr : digits.data(),
         scales.data(), sums16.data(), sums32.data(), scaled16.data(), scaled32.data()});
    Quantized8 result;
    for (size_t i = 0; i < k; ++i) {
      const size_t place = i / 4 * 4 + (i % 4 == 1 ? 2 : i % 4 == 2 ? 1 : i % 4);
      result.codes.push_back(kernels.codes8 ? codes[i] : digits[place]);
    }
    for (const auto* floats : {&scales, &scaled16, &scaled32})
      for (const float f : *floats) result.scales.push_back(std::bit_cast<uint32_t>(f));
    for (const auto* sums : {&sums16, &sums32})
      result.sums.insert(result.sums.end(), sums->begin(), sums->end());
    return result;
  };
  const Quantized8 expected = quantized(quant_kernels_scalar());
  for (const Isa level : levels()) {
    CAPTURE(name_of(level));
    CHECK(quantized(quant_kernels(level)) == expected);
  }
  CHECK(expected.codes[128] == 127);
  CHECK(expected.codes[129] == -16);  // −15.5, a tie
  CHECK(expected.codes[130] == -14);  // −14.5
  CHECK(std::isnan(std::bit_cast<float>(expected.scales[3])));
  CHECK(expected.scales[1] == 0);
}

TEST_CASE("packing says once of each part of a tensor that it is no longer needed") {
  for (const size_t rows : {1, 16, 1000, 5003}) {
    CAPTURE(rows);
    constexpr size_t kCols = 512;
    const auto tensor = random_tensor(DType::q4_k, rows, kCols, 8);
    Pool pool(2);
    std::mutex mutex;
    std::vector<int> heard(tensor.size());
    QuantMatrix::pack(pool, DType::q4_k, rows, kCols, tensor, [&](std::span<const std::byte> part) {
      const std::lock_guard lock(mutex);
      for (const std::byte& byte : part) ++heard[static_cast<size_t>(&byte - tensor.data())];
    });
    CHECK(std::ranges::count(heard, 1) == static_cast<std::ptrdiff_t>(heard.size()));
  }
}

TEST_CASE("a product has the same bits for any number of threads, rows beside it and products") {
  for (const Activations kind : {Activations::int16, Activations::int8})
    for (const DType type : {DType::q4_1, DType::q5_0, DType::q8_0, DType::q4_k, DType::q6_k}) {
      CAPTURE(kind == Activations::int8);
      CAPTURE(traits(type).name);
      const size_t rows = 530, cols = 512, m_max = 600;
      const auto tensor = random_tensor(type, rows, cols, 6);
      const Packed packed(type, rows, cols, tensor);
      const std::vector<float> x = random_floats(m_max * cols, 7);
      Pool one(1);
      QuantizedRows quantized(kind);
      std::vector<float> all(m_max * rows);
      const QuantMatrix w = QuantMatrix::pack(one, type, rows, cols, tensor);
      CHECK(w.rows() == rows);
      CHECK(w.cols() == cols);
      quantize_rows(one, x.data(), cols, m_max, cols, quantized);
      matmul(one, quantized, w, all.data(), rows);
      for (const size_t threads : {1, 2, 4}) {
        Pool pool(threads);
        const QuantMatrix again = QuantMatrix::pack(pool, type, rows, cols, tensor);
        for (const size_t m :
             {1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15, 16, 17, 32, 63, 64, 65, 512, 513, 600}) {
          CAPTURE(threads);
          CAPTURE(m);
          quantize_rows(pool, x.data(), cols, m, cols, quantized);
          CHECK(quantized.rows() == m);
          // Two products of one phase, the second into a wider y.
          const size_t ld = rows + 3;
          std::vector<float> first(m * rows), second(m * ld, 0.5f);
          const QuantProduct products[] = {{&w, first.data(), rows}, {&again, second.data(), ld}};
          matmul(pool, quantized, products);
          CHECK(same_bits(first, std::span(all).first(m * rows)));
          bool same = true, untouched = true;
          for (size_t i = 0; i < m; ++i) {
            same &= same_bits(std::span(second).subspan(i * ld, rows),
                              std::span(all).subspan(i * rows, rows));
            for (size_t c = rows; c < ld; ++c) untouched &= second[i * ld + c] == 0.5f;
          }
          CHECK(same);
          CHECK(untouched);
        }
      }
    }
}

TEST_CASE("gated products have the bits of gating two products") {
  constexpr size_t kRows = 75, kCols = 512, kLd = 80;
  for (const Activations kind : {Activations::int16, Activations::int8})
    for (const DType up_type : {DType::q8_0, DType::q6_k})
      for (const size_t threads : {1, 2, 3})
        for (const size_t m : {63, 64, 65, 257, 600}) {
          CAPTURE(m);
          Pool pool(threads);
          const QuantMatrix gate = QuantMatrix::pack(pool, DType::q4_k, kRows, kCols,
                                                     random_tensor(DType::q4_k, kRows, kCols, 1));
          const QuantMatrix up = QuantMatrix::pack(pool, up_type, kRows, kCols,
                                                   random_tensor(up_type, kRows, kCols, 2));
          std::vector<float> x = random_floats(m * kCols, 3);
          for (float& v : x) v *= 0.005f;  // or every gate would be open or shut
          QuantizedRows rows(kind);
          quantize_rows(pool, x.data(), kCols, m, kCols, rows);
          std::vector<float> g(m * kLd, 7), u(m * kLd, 7), h(m * kLd, 7);
          matmul(pool, rows, gate, g.data(), kLd);
          matmul(pool, rows, up, u.data(), kLd);
          for (const Activation act : {Activation::silu, Activation::gelu_tanh}) {
            std::ranges::fill(h, 7.0f);
            const bool done = matmul_gated(pool, rows, gate, up, act, h.data(), kLd);
            CHECK(done == (m >= 64));
            if (!done) continue;
            std::vector<float> wanted(m * kLd, 7);
            gate_rows(pool, act, g.data(), kLd, u.data(), kLd, m, kRows, wanted.data(), kLd);
            CHECK(same_bits(h, wanted));
          }
          CHECK(!matmul_gated(pool, rows, gate, up, Activation::swiglu_oai, h.data(), kLd));
        }
}

TEST_CASE("adding to y is one fused multiply-add after the product") {
  Pool pool(2);
  const size_t rows = 40, cols = 64, m = 20;
  const auto tensor = random_tensor(DType::q5_1, rows, cols, 8);
  const QuantMatrix w = QuantMatrix::pack(pool, DType::q5_1, rows, cols, tensor);
  const std::vector<float> x = random_floats(m * cols, 9);
  QuantizedRows quantized;
  quantize_rows(pool, x.data(), cols, m, cols, quantized);
  std::vector<float> product(m * rows), sum(m * rows, 0.0f);
  matmul(pool, quantized, w, product.data(), rows);
  matmul(pool, quantized, w, sum.data(), rows, Store::add);
  CHECK(same_bits(product, sum));
  std::fill(sum.begin(), sum.end(), 100.0f);
  matmul(pool, quantized, w, sum.data(), rows, Store::add);
  for (size_t i = 0; i < m * rows; ++i)
    CHECK(std::abs(sum[i] - (100.0 + product[i])) <= 0x1p-17 + std::abs(product[i]) * 0x1p-22);
}

TEST_CASE("unpacked rows are dequantize()'s bits, wherever they begin and end") {
  Pool pool(2);
  for (const DType type : kTypes) {
    CAPTURE(traits(type).name);
    const size_t rows = 37, cols = traits(type).block == 256 ? 512 : 288;
    const auto tensor = random_tensor(type, rows, cols, 10);
    std::vector<float> values(rows * cols);
    dequantize(type, tensor, values);
    const QuantMatrix w = QuantMatrix::pack(pool, type, rows, cols, tensor);
    for (const size_t first : {0, 1, 15, 16, 36})
      for (const size_t count :
           {size_t{0}, size_t{1}, std::min<size_t>(18, rows - first), rows - first}) {
        std::vector<float> out(count * cols);
        w.unpack_rows(first, count, out.data());
        CHECK(same_bits(out, std::span(values).subspan(first * cols, count * cols)));
      }
  }
}

TEST_CASE("a row with an infinity gives NaN and does not touch its neighbours") {
  Pool pool(1);
  const size_t rows = 16, cols = 32;
  const auto tensor = random_tensor(DType::q8_0, rows, cols, 11);
  const QuantMatrix w = QuantMatrix::pack(pool, DType::q8_0, rows, cols, tensor);
  std::vector<float> x = random_floats(3 * cols, 12);
  x[cols + 5] = INFINITY;
  QuantizedRows quantized;
  quantize_rows(pool, x.data(), cols, 3, cols, quantized);
  std::vector<float> y(3 * rows);
  matmul(pool, quantized, w, y.data(), rows);
  for (size_t r = 0; r < rows; ++r) {
    CHECK(std::isfinite(y[r]));
    CHECK(std::isnan(y[rows + r]));
    CHECK(std::isfinite(y[2 * rows + r]));
  }
}

TEST_CASE("packed weights take no more room than the file's, but for padding") {
  Pool pool(1);
  for (const DType type : kTypes) {
    CAPTURE(traits(type).name);
    const auto tensor = random_tensor(type, 64, 1536, 13);
    const QuantMatrix w = QuantMatrix::pack(pool, type, 64, 1536, tensor);
    CHECK(w.bytes() >= tensor.size());
    CHECK(w.bytes() <= tensor.size() + 4 * 64);
  }
}
