#include "engine/folder_tensors.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "support.h"

using namespace moru;

namespace {

const Family& family(const char* architecture) {
  return family_of_folder("config.json", nlohmann::json{{"architectures", {architecture}}});
}

size_t index_of(const FolderTensors& found, std::string_view name) {
  for (size_t i = 0; i < found.tensors.size(); ++i)
    if (found.tensors[i].name == name) return i;
  FAIL("there is no " << name);
  return 0;
}

std::vector<float> row_of(const FolderTensors& found, std::string_view name, size_t row) {
  const size_t i = index_of(found, name);
  const Tensor& tensor = found.tensors[i];
  std::vector<std::byte> room;
  std::vector<float> values(tensor.shape.back());
  dequantize(tensor.type, assembled_row(*found.assemblies[i], row, room), values);
  return values;
}

Config config_of(size_t experts) {
  Config config;
  config.layers = 1;
  config.experts.count = experts;
  return config;
}

}  // namespace

TEST_CASE("experts in MXFP4 have a folder's values: two neighbours a byte, gate and up in turns") {
  // [2 experts, 4 rows, 1 block]: the code of value i of row r is (r + i) % 16.
  std::vector<uint8_t> blocks(2 * 4 * 16), scales(2 * 4);
  for (size_t r = 0; r < 8; ++r) {
    scales[r] = static_cast<uint8_t>(127 + r);  // 2^r
    for (size_t i = 0; i < 16; ++i)
      blocks[r * 16 + i] = static_cast<uint8_t>((r + 2 * i) % 16 | ((r + 2 * i + 1) % 16) << 4);
  }
  const TempDir temp;
  const std::string prefix = "model.layers.0.mlp.experts.gate_up_proj_";
  const std::vector<Tensor> tensors = {
      {prefix + "blocks", DType::i8, {2, 4, 1, 16}, std::as_bytes(std::span(blocks))},
      {prefix + "scales", DType::i8, {2, 4, 1}, std::as_bytes(std::span(scales))}};
  write_safetensors(temp.path() / "model.safetensors", tensors, {});
  const SafetensorsFolder folder(temp.path());
  const FolderTensors found =
      match_folder_tensors(family("GptOssForCausalLM"), config_of(2), folder);
  CHECK(found.unmatched.empty());
  const Tensor& up = found.tensors[index_of(found, "blk.0.ffn_up_exps.weight")];
  CHECK(up.type == DType::mxfp4);
  CHECK(up.shape == std::vector<size_t>{2, 2, 32});
  constexpr float kValues[] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -.5f, -1, -1.5f, -2, -3, -4, -6};
  for (size_t row = 0; row < 4; ++row)
    for (const auto& [name, stored] : {std::pair{"blk.0.ffn_gate_exps.weight", 2 * row},
                                       {"blk.0.ffn_up_exps.weight", 2 * row + 1}}) {
      const std::vector<float> values = row_of(found, name, row);
      for (size_t i = 0; i < 32; ++i)
        CHECK(values[i] == std::ldexp(kValues[(stored + i) % 16], static_cast<int>(stored)));
    }
}

TEST_CASE("an expert that is missing, and one of another shape, are told by name") {
  std::vector<float> values(64);
  const auto bytes = std::as_bytes(std::span(values));
  const auto name = [](int expert) {
    return "model.layers.0.block_sparse_moe.experts." + std::to_string(expert) + ".w1.weight";
  };
  const auto error_with = [&](std::vector<Tensor> tensors) {
    const TempDir temp;
    write_safetensors(temp.path() / "model.safetensors", tensors, {});
    const SafetensorsFolder folder(temp.path());
    return error_from(
        [&] { match_folder_tensors(family("MixtralForCausalLM"), config_of(2), folder); });
  };
  const Error missing = error_with({{name(0), DType::f32, {4, 16}, bytes}});
  CHECK(missing.kind() == ErrorKind::bad_input);
  CHECK(missing.where() == name(1));
  const Error other =
      error_with({{name(0), DType::f32, {4, 16}, bytes}, {name(1), DType::f32, {16, 4}, bytes}});
  CHECK(other.where() == name(1));
}

TEST_CASE("wrappers' prefixes are taken off, and what nothing uses is listed") {
  std::vector<float> values(16);
  const auto bytes = std::as_bytes(std::span(values));
  const TempDir temp;
  const std::vector<Tensor> tensors = {
      {"language_model.model.norm.weight", DType::f32, {16}, bytes},
      {"model.language_model.layers.0.input_layernorm.weight", DType::f32, {16}, bytes},
      {"vision_tower.patch.weight", DType::f32, {16}, bytes}};
  write_safetensors(temp.path() / "model.safetensors", tensors, {});
  const SafetensorsFolder folder(temp.path());
  const FolderTensors found =
      match_folder_tensors(family("LlamaForCausalLM"), config_of(0), folder);
  REQUIRE(found.tensors.size() == 2);
  CHECK(found.tensors[0].name == "output_norm.weight");
  CHECK(found.tensors[1].name == "blk.0.attn_norm.weight");
  CHECK(found.unmatched == std::vector<std::string>{"vision_tower.patch.weight"});
}
