#include "formats/dtype.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "base/error.h"
#include "formats/blocks.h"

namespace moru {
namespace {

template <typename Block>
constexpr DTypeTraits block_traits(std::string_view name, uint32_t id) {
  return {name, id, Block::kElements, sizeof(Block)};
}

// In the order of DType.
constexpr std::array<DTypeTraits, 21> kTraits = {{
    {"F32", 0, 1, 4},
    {"F16", 1, 1, 2},
    {"BF16", 30, 1, 2},
    block_traits<BlockQ4_0>("Q4_0", 2),
    block_traits<BlockQ4_1>("Q4_1", 3),
    block_traits<BlockQ5_0>("Q5_0", 6),
    block_traits<BlockQ5_1>("Q5_1", 7),
    block_traits<BlockQ8_0>("Q8_0", 8),
    block_traits<BlockQ2K>("Q2_K", 10),
    block_traits<BlockQ3K>("Q3_K", 11),
    block_traits<BlockQ4K>("Q4_K", 12),
    block_traits<BlockQ5K>("Q5_K", 13),
    block_traits<BlockQ6K>("Q6_K", 14),
    block_traits<BlockIq4Nl>("IQ4_NL", 20),
    block_traits<BlockIq4Xs>("IQ4_XS", 23),
    block_traits<BlockMxfp4>("MXFP4", 39),
    {"I8", 24, 1, 1},
    {"I16", 25, 1, 2},
    {"I32", 26, 1, 4},
    {"I64", 27, 1, 8},
    {"F64", 28, 1, 8},
}};
static_assert(kTraits[static_cast<size_t>(DType::f64)].ggml_id == 28);

// Types that ggml or a fork of it has or had, and that moru does not read.
struct OtherType {
  uint32_t id;
  std::string_view name;
};
constexpr OtherType kOtherTypes[] = {
    {4, "Q4_2"},    {5, "Q4_3"},        {9, "Q8_1"},        {15, "Q8_K"},       {16, "IQ2_XXS"},
    {17, "IQ2_XS"}, {18, "IQ3_XXS"},    {19, "IQ1_S"},      {21, "IQ3_S"},      {22, "IQ2_S"},
    {29, "IQ1_M"},  {31, "Q4_0_4_4"},   {32, "Q4_0_4_8"},   {33, "Q4_0_8_8"},   {34, "TQ1_0"},
    {35, "TQ2_0"},  {36, "IQ4_NL_4_4"}, {37, "IQ4_NL_4_8"}, {38, "IQ4_NL_8_8"}, {40, "NVFP4"},
    {41, "Q1_0"},   {42, "Q2_0"},       {133, "Q6_0"},      {137, "IQ2_K"},     {138, "IQ3_K"},
    {139, "IQ4_K"}, {140, "IQ5_K"},     {141, "IQ6_K"},
};

bool same_ignoring_case(std::string_view a, std::string_view b) {
  const auto lower = [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; };
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [&](char x, char y) { return lower(x) == lower(y); });
}

}  // namespace

const DTypeTraits& traits(DType type) { return kTraits[static_cast<size_t>(type)]; }

std::optional<DType> dtype_from_ggml(uint32_t id) {
  for (size_t i = 0; i < kTraits.size(); ++i)
    if (kTraits[i].ggml_id == id) return static_cast<DType>(i);
  return std::nullopt;
}

std::string ggml_name(uint32_t id) {
  if (const auto type = dtype_from_ggml(id)) return std::string(traits(*type).name);
  for (const OtherType& other : kOtherTypes)
    if (other.id == id) return std::string(other.name);
  return fmt::format("type {}", id);
}

std::optional<DType> dtype_from_name(std::string_view name) {
  for (size_t i = 0; i < kTraits.size(); ++i)
    if (same_ignoring_case(kTraits[i].name, name)) return static_cast<DType>(i);
  return std::nullopt;
}

size_t bytes_of(DType type, size_t count) {
  const DTypeTraits& t = traits(type);
  MORU_CHECK(count % t.block == 0);
  return count / t.block * t.block_bytes;
}

}  // namespace moru
