// How tensor elements are stored: plain numbers, and ggml's blocks of quantized weights.
// Layouts: ggml's ggml-common.h; a row of n elements is n / block blocks.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace moru {

enum class DType : uint8_t {
  f32,
  f16,
  bf16,
  q4_0,
  q4_1,
  q5_0,
  q5_1,
  q8_0,
  q2_k,
  q3_k,
  q4_k,
  q5_k,
  q6_k,
  iq4_nl,
  iq4_xs,
  mxfp4,
  i8,
  i16,
  i32,
  i64,
  f64,  // read and written, never computed with
};

struct DTypeTraits {
  std::string_view name;  // as llama.cpp spells it: "Q4_K"
  uint32_t ggml_id;       // type field of a GGUF tensor
  size_t block;           // elements a block
  size_t block_bytes;
};
const DTypeTraits& traits(DType type);

// nullopt for a type moru does not read.
std::optional<DType> dtype_from_ggml(uint32_t id);
// ggml's name for any id it ever had ("IQ2_XXS"), for refusals; "type 77" where there is none.
std::string ggml_name(uint32_t id);
// By name, ignoring case.
std::optional<DType> dtype_from_name(std::string_view name);

inline bool is_float(DType type) { return type <= DType::bf16; }
inline bool is_quantized(DType type) { return type > DType::bf16 && type <= DType::mxfp4; }

// Bytes of `count` elements; count must be a multiple of the block.
size_t bytes_of(DType type, size_t count);

// out[i] = value of element i. `in` holds out.size() elements, a multiple of the block. The same
// bits as ggml's dequantizers. f32, f16, bf16 and every quantized type.
void dequantize(DType type, std::span<const std::byte> in, std::span<float> out);

}  // namespace moru
