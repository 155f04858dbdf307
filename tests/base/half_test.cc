#include "base/half.h"

#include <doctest/doctest.h>

#include <cmath>

using namespace moru;

TEST_CASE("every half survives the way to f32 and back") {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float value = f32_from_f16(half);
    if (std::isnan(value)) continue;
    CHECK(f16_from_f32(value) == half);
  }
}

TEST_CASE("rounding to half and to bfloat16 goes to the nearest, ties to even") {
  CHECK(f16_from_f32(1.0f + 0x1p-11f) == f16_from_f32(1.0f));
  CHECK(f16_from_f32(1.0f + 0x1.8p-11f) == f16_from_f32(1.0f + 0x1p-10f));
  CHECK(f16_from_f32(65520.0f) == 0x7c00);
  CHECK(f16_from_f32(0x1p-25f) == 0);
  CHECK(f16_from_f32(0x1.8p-25f) == 1);
  CHECK(bf16_from_f32(1.0f + 0x1p-8f) == bf16_from_f32(1.0f));
  CHECK(f32_from_bf16(bf16_from_f32(1.0f + 0x1.8p-8f)) == 1.0f + 0x1p-7f);
}
