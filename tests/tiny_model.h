// A small random model as a GGUF file: two layers, byte-level vocabulary, any block type. Enough to
// run every path of the engine in milliseconds.
#pragma once
#include <cmath>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "base/half.h"
#include "base/random.h"
#include "formats/dtype.h"
#include "formats/gguf.h"

namespace moru {

struct TinyModelOptions {
  std::string family = "llama";  // or "gemma3": sandwich norms, QK norm, windows
  DType type = DType::q8_0;      // of the matrices
  size_t layers = 2, width = 256, ffn_width = 512, heads = 4, kv_heads = 2, head_dim = 64;
  size_t window = 24;        // gemma3
  size_t unused_tokens = 0;  // of the vocabulary, besides
  // Of the embedding, which is the head too: 4 makes a model that mostly says its last token again,
  // 1 one that says anything.
  float embedding_gain = 4;
  uint64_t seed = 1;
  std::string chat_template;  // empty: none
};

// Blocks of random codes whose f16 scales are such that values are about 1/√cols.
inline std::vector<std::byte> random_blocks(DType type, size_t count, float spread,
                                            Random& random) {
  std::vector<std::byte> bytes(bytes_of(type, count));
  if (is_float(type)) {
    for (size_t i = 0; i < count; ++i) {
      const float value = random.normal() * spread;
      const uint16_t half = type == DType::bf16 ? bf16_from_f32(value) : f16_from_f32(value);
      if (type == DType::f32) std::memcpy(&bytes[4 * i], &value, 4);
      if (type != DType::f32) std::memcpy(&bytes[2 * i], &half, 2);
    }
    return bytes;
  }
  for (std::byte& b : bytes) b = static_cast<std::byte>(random.u32());
  const DTypeTraits& t = traits(type);
  // Where a block keeps its half-precision scales (quantization formats of ggml).
  struct Scales {
    DType type;
    std::vector<size_t> at;
    float code;  // typical magnitude of code times sub-scale
  };
  static const std::vector<Scales> kScales = {
      {DType::q8_0, {0}, 74},     {DType::q4_0, {0}, 5},      {DType::q4_1, {0, 2}, 8},
      {DType::q5_0, {0}, 9},      {DType::q5_1, {0, 2}, 16},  {DType::q2_k, {80, 82}, 13},
      {DType::q3_k, {108}, 42},   {DType::q4_k, {0, 2}, 280}, {DType::q5_k, {0, 2}, 560},
      {DType::q6_k, {208}, 1360}, {DType::iq4_nl, {0}, 70},   {DType::iq4_xs, {0}, 1300}};
  for (size_t block = 0; block < count / t.block; ++block) {
    std::byte* start = &bytes[block * t.block_bytes];
    if (type == DType::mxfp4) start[0] = static_cast<std::byte>(123 + random.below(3));
    for (const Scales& s : kScales) {
      if (s.type != type) continue;
      for (const size_t at : s.at) {
        const uint16_t half = f16_from_f32(spread / s.code * (0.5f + random.uniform()));
        std::memcpy(start + at, &half, 2);
      }
    }
  }
  return bytes;
}

// Writes the model to `path`.
inline void write_tiny_model(const std::filesystem::path& path, const TinyModelOptions& o = {}) {
  GgufMetadata m;
  const auto u32 = [&](const std::string& key, size_t value) {
    m.set(o.family + "." + key, GgufScalar{static_cast<uint32_t>(value)});
  };
  m.set("general.architecture", GgufScalar{o.family});
  m.set("general.name", GgufScalar{std::string("tiny")});
  u32("block_count", o.layers);
  u32("context_length", 2048);
  u32("embedding_length", o.width);
  u32("feed_forward_length", o.ffn_width);
  u32("attention.head_count", o.heads);
  u32("attention.head_count_kv", o.kv_heads);
  u32("attention.key_length", o.head_dim);
  u32("attention.value_length", o.head_dim);
  m.set(o.family + ".attention.layer_norm_rms_epsilon", GgufScalar{1e-5f});
  m.set(o.family + ".rope.freq_base", GgufScalar{10000.0f});
  if (o.family == "gemma3") u32("attention.sliding_window", o.window);

  // GPT-2's letters for bytes, one merge, then two control tokens.
  std::vector<std::string> tokens;
  std::vector<int32_t> types;
  unsigned extra = 0;
  for (unsigned b = 0; b < 256; ++b) {
    const bool visible = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    const unsigned code = visible ? b : 256 + extra++;
    std::string letter;
    if (code < 128) {
      letter = static_cast<char>(code);
    } else {
      letter = {static_cast<char>(0xC0 | code >> 6), static_cast<char>(0x80 | (code & 63))};
    }
    tokens.push_back(letter);
    types.push_back(1);
  }
  tokens.push_back("th");
  types.push_back(1);
  for (const char* control : {"<|im_start|>", "<|im_end|>"}) {
    tokens.push_back(control);
    types.push_back(3);
  }
  for (size_t i = 0; i < o.unused_tokens; ++i) {
    tokens.push_back("<unused" + std::to_string(i) + ">");
    types.push_back(5);
  }
  const size_t vocab = tokens.size();
  m.set("tokenizer.ggml.model", GgufScalar{std::string("gpt2")});
  m.set("tokenizer.ggml.pre", GgufScalar{std::string("gpt-2")});
  m.set("tokenizer.ggml.tokens", GgufArray(tokens));
  m.set("tokenizer.ggml.token_type", GgufArray(types));
  m.set("tokenizer.ggml.merges", GgufArray(std::vector<std::string>{"t h"}));
  m.set("tokenizer.ggml.eos_token_id",
        GgufScalar{static_cast<uint32_t>(vocab - o.unused_tokens - 1)});
  m.set("tokenizer.ggml.add_bos_token", GgufScalar{false});
  if (!o.chat_template.empty()) m.set("tokenizer.chat_template", GgufScalar{o.chat_template});

  std::vector<std::vector<std::byte>> data;
  std::vector<Tensor> tensors;
  Random random(o.seed);
  const auto matrix = [&](const std::string& name, size_t rows, size_t cols, float gain = 1) {
    data.push_back(
        random_blocks(o.type, rows * cols, gain / std::sqrt(static_cast<float>(cols)), random));
    tensors.push_back({name, o.type, {rows, cols}, {}});
  };
  const auto norm = [&](const std::string& name, size_t size) {
    std::vector<std::byte> bytes(4 * size);
    for (size_t i = 0; i < size; ++i) {
      const float value = 1 + 0.1f * random.normal();
      std::memcpy(&bytes[4 * i], &value, 4);
    }
    data.push_back(std::move(bytes));
    tensors.push_back({name, DType::f32, {size}, {}});
  };
  matrix("token_embd.weight", vocab, o.width, o.embedding_gain);
  norm("output_norm.weight", o.width);
  for (size_t i = 0; i < o.layers; ++i) {
    const std::string block = "blk." + std::to_string(i) + ".";
    norm(block + "attn_norm.weight", o.width);
    matrix(block + "attn_q.weight", o.heads * o.head_dim, o.width);
    matrix(block + "attn_k.weight", o.kv_heads * o.head_dim, o.width);
    matrix(block + "attn_v.weight", o.kv_heads * o.head_dim, o.width);
    matrix(block + "attn_output.weight", o.width, o.heads * o.head_dim);
    if (o.family == "gemma3") {
      norm(block + "attn_q_norm.weight", o.head_dim);
      norm(block + "attn_k_norm.weight", o.head_dim);
      norm(block + "post_attention_norm.weight", o.width);
      norm(block + "post_ffw_norm.weight", o.width);
    }
    norm(block + "ffn_norm.weight", o.width);
    matrix(block + "ffn_gate.weight", o.ffn_width, o.width);
    matrix(block + "ffn_up.weight", o.ffn_width, o.width);
    matrix(block + "ffn_down.weight", o.width, o.ffn_width);
  }
  for (size_t i = 0; i < tensors.size(); ++i) tensors[i].data = data[i];
  write_gguf(path, m, tensors);
}

}  // namespace moru
