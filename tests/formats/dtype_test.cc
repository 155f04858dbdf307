#include "formats/dtype.h"

#include <cstring>
#include <string>
#include <vector>

#include "base/files.h"
#include "formats/blocks.h"
#include "support.h"

using namespace moru;

namespace {
constexpr auto kLast = static_cast<size_t>(DType::f64);
}

TEST_CASE("every type decodes golden blocks to the bits that the gguf package gives") {
  for (size_t i = 1; i <= static_cast<size_t>(DType::mxfp4); ++i) {
    const auto type = static_cast<DType>(i);
    const DTypeTraits& t = traits(type);
    CAPTURE(t.name);
    const std::string golden = read_file(std::string(MORU_SOURCE_DIR "/tests/golden/dequantize/") +
                                         std::string(t.name) + ".bin");
    const size_t blocks = golden.size() / (t.block_bytes + t.block * sizeof(float));
    REQUIRE(blocks > 0);
    REQUIRE(blocks * (t.block_bytes + t.block * sizeof(float)) == golden.size());
    std::vector<float> values(blocks * t.block);
    const auto bytes = std::as_bytes(std::span(golden));
    dequantize(type, bytes.first(blocks * t.block_bytes), values);
    const char* wanted = golden.data() + blocks * t.block_bytes;
    for (size_t e = 0; e < values.size(); ++e) {
      CAPTURE(e);
      REQUIRE(std::memcmp(&values[e], wanted + e * sizeof(float), sizeof(float)) == 0);
    }
  }
}

TEST_CASE("f32 passes through, at any address") {
  std::vector<std::byte> bytes(1 + 3 * sizeof(float));
  const float values[] = {1.5f, -0.0f, 3e38f};
  std::memcpy(bytes.data() + 1, values, sizeof values);
  float out[3];
  dequantize(DType::f32, std::span(bytes).subspan(1), out);
  CHECK(std::memcmp(out, values, sizeof values) == 0);
  dequantize(DType::q4_k, {}, {});
}

TEST_CASE("ids and names lead to the type and back, in any case") {
  for (size_t i = 0; i <= kLast; ++i) {
    const auto type = static_cast<DType>(i);
    CHECK(dtype_from_ggml(traits(type).ggml_id) == type);
    CHECK(dtype_from_name(traits(type).name) == type);
    CHECK(ggml_name(traits(type).ggml_id) == traits(type).name);
  }
  CHECK(dtype_from_name("q4_k") == DType::q4_k);
  CHECK(!dtype_from_name("Q4_KK"));
  CHECK(!dtype_from_name(""));
  CHECK(!dtype_from_ggml(16));
  CHECK(ggml_name(16) == "IQ2_XXS");
  CHECK(ggml_name(77) == "type 77");
}

TEST_CASE("bytes follow the blocks") {
  CHECK(bytes_of(DType::q4_k, 512) == 288);
  CHECK(bytes_of(DType::bf16, 3) == 6);
  CHECK(bytes_of(DType::mxfp4, 64) == 34);
  CHECK(bytes_of(DType::f32, 0) == 0);
}

TEST_CASE("packed scales unpack to themselves") {
  std::array<ScaleMin, 8> pairs;
  std::array<uint8_t, 16> scales;
  for (unsigned round = 0; round < 64; ++round) {
    for (unsigned b = 0; b < 8; ++b)
      pairs[b] = {static_cast<uint8_t>((round + 7 * b) & 63),
                  static_cast<uint8_t>((5 * round + 11 * b) & 63)};
    for (unsigned j = 0; j < 16; ++j) scales[j] = static_cast<uint8_t>((round + 13 * j) & 63);
    uint8_t packed[12];
    pack_scale_mins(pairs, packed);
    for (size_t b = 0; b < 8; ++b) {
      CHECK(scale_min_of(packed, b).scale == pairs[b].scale);
      CHECK(scale_min_of(packed, b).min == pairs[b].min);
    }
    pack_q3k_scales(scales, packed);
    CHECK(unpack_q3k_scales(packed) == scales);
  }
}
