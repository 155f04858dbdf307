#include "lighten/quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/half.h"
#include "base/random.h"
#include "lighten/pack.h"
#include "support.h"

using namespace moru;

namespace {

constexpr DType kTypes[] = {DType::q4_0, DType::q4_1,   DType::q5_0,   DType::q5_1,
                            DType::q8_0, DType::iq4_nl, DType::iq4_xs, DType::q3_k,
                            DType::q4_k, DType::q5_k,   DType::q6_k};
constexpr size_t kCols = 768;

std::vector<std::byte> quantized(DType type, Floats x, Floats importance = {}) {
  std::vector<std::byte> out(bytes_of(type, x.size()));
  quantize_row(type, x, importance, out);
  return out;
}
std::vector<float> decoded(DType type, std::span<const std::byte> bytes) {
  std::vector<float> y(bytes.size() / traits(type).block_bytes * traits(type).block);
  dequantize(type, bytes, y);
  return y;
}
std::vector<float> round_trip(DType type, Floats x, Floats importance = {}) {
  return decoded(type, quantized(type, x, importance));
}

// Normal weights, of which one in sixteen is four times as large.
std::vector<float> weights(uint64_t seed, float sigma = 0.05f, size_t cols = kCols) {
  Random random(seed);
  std::vector<float> x(cols);
  for (float& v : x) v = sigma * random.normal() * (random.below(16) == 0 ? 4.0f : 1.0f);
  return x;
}
std::vector<float> importances(uint64_t seed, size_t cols = kCols) {
  Random random(seed, 1);
  std::vector<float> e(cols);
  for (float& v : e) v = std::exp(1.5f * random.normal());
  return e;
}

// --- plain rounding: the scale that the largest element asks for ---------------------------------

float half(float v) { return f32_from_f16(f16_from_f32(v)); }
float inverse(float v) { return v == 0 ? 0 : 1 / v; }

float nearest_iq4(float v) {
  const auto* best = &kIq4Values[0];
  for (const int8_t& value : kIq4Values)
    if (std::abs(v - float(value)) < std::abs(v - float(*best))) best = &value;
  return float(*best);
}

struct Symmetric {
  float low, high;  // codes; the extreme element goes to low
  bool iq4;
  size_t sub;       // elements under one scale
  float scale_low;  // integer scales of a super-block, 0 where each scale is a half
};

float extreme(Floats x) {
  return *std::max_element(x.begin(), x.end(),
                           [](float a, float b) { return std::abs(a) < std::abs(b); });
}

std::vector<float> plain_symmetric(const Symmetric& s, Floats x) {
  std::vector<float> y(x.size());
  const size_t block = s.scale_low == 0 ? s.sub : 256;
  for (size_t at = 0; at < x.size(); at += block) {
    std::vector<float> scales;
    for (size_t b = 0; b < block / s.sub; ++b)
      scales.push_back(extreme(x.subspan(at + b * s.sub, s.sub)) / s.low);
    if (s.scale_low == 0) {
      scales[0] = half(scales[0]);
    } else {
      const float d = half(extreme(scales) / s.scale_low);
      for (float& scale : scales)
        scale = d * std::clamp(std::nearbyint(scale * inverse(d)), s.scale_low, -s.scale_low - 1);
    }
    for (size_t j = 0; j < block; ++j) {
      const float scale = scales[j / s.sub], v = x[at + j] * inverse(scale);
      y[at + j] = scale * (s.iq4 ? nearest_iq4(v) : std::clamp(std::nearbyint(v), s.low, s.high));
    }
  }
  return y;
}

std::vector<float> plain_affine(float top, bool super, Floats x) {
  std::vector<float> y(x.size());
  const size_t block = super ? 256 : 32;
  for (size_t at = 0; at < x.size(); at += block) {
    std::vector<float> scales, mins;
    for (size_t b = at; b < at + block; b += 32) {
      const Floats sub = x.subspan(b, 32);
      const auto [low, high] = std::minmax_element(sub.begin(), sub.end());
      mins.push_back(super ? std::min(0.0f, *low) : *low);
      scales.push_back((*high - mins.back()) / top);
    }
    if (super) {
      const float d = half(*std::max_element(scales.begin(), scales.end()) / 63);
      const float dmin = half(-*std::min_element(mins.begin(), mins.end()) / 63);
      for (float& v : scales) v = d * std::clamp(std::nearbyint(v * inverse(d)), 0.0f, 63.0f);
      for (float& v : mins) v = -dmin * std::clamp(std::nearbyint(-v * inverse(dmin)), 0.0f, 63.0f);
    } else {
      scales[0] = half(scales[0]);
      mins[0] = half(mins[0]);
    }
    for (size_t j = 0; j < block; ++j) {
      const float scale = scales[j / 32], min = mins[j / 32];
      const float code = std::nearbyint((x[at + j] - min) * inverse(scale));
      y[at + j] = scale * std::clamp(code, 0.0f, top) + min;
    }
  }
  return y;
}

std::vector<float> plain(DType type, Floats x) {
  switch (type) {
    case DType::q4_0:
      return plain_symmetric({-8, 7, false, 32, 0}, x);
    case DType::q5_0:
      return plain_symmetric({-16, 15, false, 32, 0}, x);
    case DType::q8_0:
      return plain_symmetric({-127, 127, false, 32, 0}, x);
    case DType::iq4_nl:
      return plain_symmetric({-127, 113, true, 32, 0}, x);
    case DType::iq4_xs:
      return plain_symmetric({-127, 113, true, 32, -32}, x);
    case DType::q3_k:
      return plain_symmetric({-4, 3, false, 16, -32}, x);
    case DType::q6_k:
      return plain_symmetric({-32, 31, false, 16, -128}, x);
    case DType::q4_1:
      return plain_affine(15, false, x);
    case DType::q5_1:
      return plain_affine(31, false, x);
    case DType::q4_k:
      return plain_affine(15, true, x);
    default:
      REQUIRE(type == DType::q5_k);
      return plain_affine(31, true, x);
  }
}

// --- blocks whose codes and scales use their whole range, as any quantizer leaves them
// ------------

template <typename Codes>
Codes random_codes(Random& random, uint64_t levels, size_t sub) {
  Codes codes;
  for (uint8_t& c : codes) c = static_cast<uint8_t>(random.below(levels));
  for (size_t b = 0; b < codes.size(); b += sub) {
    codes[b] = 0;
    codes[b + 1] = static_cast<uint8_t>(levels - 1);
  }
  return codes;
}
template <size_t N>
std::array<uint8_t, N> random_scales(Random& random, uint64_t levels) {
  std::array<uint8_t, N> scales;
  for (uint8_t& s : scales) s = static_cast<uint8_t>(random.below(levels));
  scales[random.below(N)] = 0;  // the lowest signed scale is the largest
  return scales;
}
std::array<ScaleMin, 8> random_scale_mins(Random& random) {
  std::array<ScaleMin, 8> values;
  for (ScaleMin& v : values)
    v = {static_cast<uint8_t>(1 + random.below(63)), static_cast<uint8_t>(random.below(64))};
  values[random.below(8)].scale = 63;
  values[random.below(8)].min = 63;
  return values;
}

template <typename Block>
std::vector<std::byte> lattice(Random& random) {
  Block block{};
  block.d = f16_from_f32(0.001f + 0.01f * random.uniform());
  const auto m = f16_from_f32(0.01f * random.normal());
  if constexpr (requires { block.m; }) block.m = m;
  if constexpr (std::is_same_v<Block, BlockQ4K> || std::is_same_v<Block, BlockQ5K>) {
    block.dmin = f16_from_f32(0.01f * random.uniform());
    pack_scale_mins(random_scale_mins(random), block.scales);
    pack_codes(random_codes<Codes256>(random, std::is_same_v<Block, BlockQ5K> ? 32 : 16, 32),
               block);
  } else if constexpr (std::is_same_v<Block, BlockQ3K>) {
    pack_q3k_scales(random_scales<16>(random, 64), block.scales);
    pack_codes(random_codes<Codes256>(random, 8, 16), block);
  } else if constexpr (std::is_same_v<Block, BlockQ6K>) {
    const auto scales = random_scales<16>(random, 256);
    for (size_t b = 0; b < 16; ++b) block.scales[b] = static_cast<int8_t>(scales[b] - 128);
    pack_codes(random_codes<Codes256>(random, 64, 16), block);
  } else if constexpr (std::is_same_v<Block, BlockIq4Xs>) {
    pack_iq4xs_scales(random_scales<8>(random, 64), block);
    pack_codes(random_codes<Codes256>(random, 16, 32), block);
  } else {
    const bool five = std::is_same_v<Block, BlockQ5_0> || std::is_same_v<Block, BlockQ5_1>;
    const uint64_t levels = std::is_same_v<Block, BlockQ8_0> ? 255 : five ? 32 : 16;
    pack_codes(random_codes<Codes32>(random, levels, 32), block);
  }
  std::vector<std::byte> bytes(sizeof block);
  std::memcpy(bytes.data(), &block, sizeof block);
  return bytes;
}

template <typename Block>
void check_lattice(DType type) {
  CAPTURE(traits(type).name);
  Random random(7);
  for (int round = 0; round < 50; ++round) {
    CAPTURE(round);
    const std::vector<float> x = decoded(type, lattice<Block>(random));
    const std::vector<float> e = importances(static_cast<uint64_t>(round), x.size());
    CHECK(round_trip(type, x) == x);
    CHECK(round_trip(type, x, e) == x);
  }
}

}  // namespace

TEST_CASE("weights that lie on a type's lattice already come back unchanged") {
  check_lattice<BlockQ4_0>(DType::q4_0);
  check_lattice<BlockQ4_1>(DType::q4_1);
  check_lattice<BlockQ5_0>(DType::q5_0);
  check_lattice<BlockQ5_1>(DType::q5_1);
  check_lattice<BlockQ8_0>(DType::q8_0);
  check_lattice<BlockIq4Nl>(DType::iq4_nl);
  check_lattice<BlockIq4Xs>(DType::iq4_xs);
  check_lattice<BlockQ3K>(DType::q3_k);
  check_lattice<BlockQ4K>(DType::q4_k);
  check_lattice<BlockQ5K>(DType::q5_k);
  check_lattice<BlockQ6K>(DType::q6_k);
}

TEST_CASE("the weighted error is below that of plain rounding, in every row") {
  for (const DType type : kTypes) {
    CAPTURE(traits(type).name);
    double searched = 0, rounded = 0;
    for (uint64_t seed = 0; seed < 40; ++seed) {
      CAPTURE(seed);
      const std::vector<float> x = weights(seed);
      const std::vector<float> e = seed % 4 == 0 ? std::vector<float>{} : importances(seed);
      const double ours = weighted_error(type, x, e, round_trip(type, x, e));
      const double theirs = weighted_error(type, x, e, plain(type, x));
      CHECK(ours <= theirs * (1 + 1e-5));  // f32 sums inside, double here
      searched += ours;
      rounded += theirs;
    }
    CHECK(searched < 0.9 * rounded);
  }
}

TEST_CASE("importance moves the error to where it matters less") {
  const std::vector<float> x = weights(3), e = importances(3);
  for (const DType type : kTypes) {
    CAPTURE(traits(type).name);
    CHECK(weighted_error(type, x, e, round_trip(type, x, e)) <
          weighted_error(type, x, e, round_trip(type, x)));
  }
}

TEST_CASE("the order of magnitude of weights and of importance changes nothing else") {
  const std::vector<float> x = weights(5), e = importances(5);
  std::vector<float> larger = x, heavier = e;
  for (float& v : larger) v *= 8;
  for (float& v : heavier) v *= 0x1p-30f;
  for (const DType type : kTypes) {
    CAPTURE(traits(type).name);
    std::vector<float> y = round_trip(type, x, e);
    CHECK(quantized(type, x, e) == quantized(type, x, heavier));
    for (float& v : y) v *= 8;
    CHECK(round_trip(type, larger, e) == y);
  }
}

TEST_CASE("hostile weights decode to finite numbers, no larger than they were") {
  const float huge = std::numeric_limits<float>::max();
  std::vector<std::vector<float>> rows(9, std::vector<float>(kCols, 0.0f));
  rows[1].assign(kCols, 1.0f);
  rows[2].assign(kCols, -huge);
  rows[3].assign(kCols, 1e-42f);
  rows[4] = weights(1, 1e30f);
  rows[5] = weights(1, 1e-30f);
  rows[6][17] = huge;
  for (size_t j = 0; j < kCols; ++j) rows[7][j] = j % 2 ? 1e-20f : -3e4f;
  for (size_t j = 0; j < kCols; ++j) rows[8][j] = 1e-6f * static_cast<float>(j % 7);
  std::vector<float> spiky(kCols, 0.0f);
  spiky[0] = huge;
  for (const DType type : kTypes) {
    CAPTURE(traits(type).name);
    for (size_t r = 0; r < rows.size(); ++r) {
      CAPTURE(r);
      const float limit = std::abs(extreme(rows[r]));
      for (const std::vector<float>& e :
           {std::vector<float>{}, std::vector<float>(kCols, 0.0f), spiky}) {
        const std::vector<float> y = round_trip(type, rows[r], e);
        for (const float v : y) {
          REQUIRE(std::isfinite(v));
          REQUIRE(std::abs(v) <= 1.2f * limit);
        }
      }
    }
    CHECK(round_trip(type, rows[0]) == rows[0]);
    CHECK(round_trip(type, rows[2])[9] < -60000.0f);  // the largest there is, not zero
    CHECK(std::abs(round_trip(type, rows[1])[9] - 1.0f) < 0.01f);
  }
}

TEST_CASE("an importance of zero over a whole block still gives it a scale") {
  const std::vector<float> x = weights(9);
  std::vector<float> e(kCols, 0.0f);
  for (size_t j = 512; j < kCols; ++j) e[j] = 1;
  for (const DType type : kTypes) {
    CAPTURE(traits(type).name);
    const std::vector<float> y = round_trip(type, x, e);
    double off = 0, all = 0;
    for (size_t j = 0; j < 256; ++j) {
      off += double{x[j] - y[j]} * (x[j] - y[j]);
      all += double{x[j]} * x[j];
    }
    CHECK(off < 0.06 * all);
  }
}

TEST_CASE("what is not a number is refused by column") {
  std::vector<float> x = weights(2), e = importances(2);
  const auto refusal = [&](DType type) { return error_from([&] { quantized(type, x, e); }); };
  x[70] = std::numeric_limits<float>::quiet_NaN();
  for (const DType type : kTypes) {
    CHECK(refusal(type).kind() == ErrorKind::bad_input);
    CHECK(refusal(type).where() == "column 70");
  }
  x[70] = -std::numeric_limits<float>::infinity();
  CHECK(refusal(DType::bf16).where() == "column 70");
  x[70] = 0;
  e[3] = -1;
  CHECK(refusal(DType::q4_k).where() == "column 3");
  e[3] = std::numeric_limits<float>::infinity();
  CHECK(refusal(DType::q8_0).where() == "column 3");
}

TEST_CASE("float types round to the nearest and never to infinity") {
  const std::vector<float> x = {0.1f, -1e30f, 3.4e38f, 1e-42f};
  CHECK(round_trip(DType::f32, x) == x);
  CHECK(round_trip(DType::f16, x)[0] == f32_from_f16(f16_from_f32(0.1f)));
  CHECK(round_trip(DType::f16, x)[1] == -65504.0f);
  CHECK(round_trip(DType::bf16, x)[2] == 0x1.fep127f);
}
