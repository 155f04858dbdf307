// LoRA adapters as files: new ones, PEFT folders in and out, and merging into the base model.
//
// PEFT: adapter_config.json beside adapter_model.safetensors, whose tensors are named
// base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight [r, in] and lora_B.weight [out,
// r], and of DoRA lora_magnitude_vector [out]. What was learnt whole (modules_to_save) stands there
// as it is: base_model.model.lm_head.weight.
#pragma once
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "engine/lora.h"
#include "engine/model_files.h"

namespace moru {

struct AdapterOptions {
  size_t rank = 16;
  float alpha = 32;
  bool rank_stabilised = false;     // PEFT's use_rslora
  bool dora = false;                // PEFT's use_dora
  std::vector<Projection> targets;  // empty: all seven
  std::vector<size_t> layers;       // PEFT's layers_to_transform; empty: all
};

// "all-linear", or PEFT's names separated by commas: "q_proj,v_proj". Error: usage.
std::vector<Projection> parse_target_modules(std::string_view text);
// "0-3,7" as layers in ascending order; "" is none. Error: usage.
std::vector<size_t> parse_layers(std::string_view text);

// A new adapter: A uniform within ±1/√in (Kaiming, a = √5), another stream of the seed for each
// tensor; B = 0, so that it changes nothing yet (DoRA's magnitudes: take_magnitudes). Error: usage
// for layers that the model does not have.
Lora make_lora(const Config& config, const AdapterOptions& options, uint64_t seed);

// Reads a PEFT folder for a model of this shape; whether the model has the weights that were learnt
// whole, finds out who puts them there. A model that ties its head to the embedding may get a head
// of its own ("output.weight"). Errors: not_found; bad_input (a tensor that does not fit the model,
// half a pair); unsupported (trained biases).
Lora read_peft_adapter(const std::filesystem::path& folder, const Config& config);
// `base_model`: what adapter_config.json names as the base. Errors: io, no_space; unsupported for
// weights learnt whole and no pairs, which PEFT does not know.
void write_peft_adapter(const std::filesystem::path& folder, const Lora& lora, const Config& config,
                        const std::string& base_model);
// The PEFT module ("model.norm") of a weight by its GGUF name; "" where a folder has none.
std::string peft_module_of(const Config& config, std::string_view weight);

// One tensor of `files` as f32, W + s·B·A where the adapter has a pair for it (its rows of length m
// where that is DoRA's), rows in the file's own order. out: [count of the tensor].
void merged_values(const ModelFiles& files, const Lora& lora, const Tensor& tensor,
                   std::span<float> out);

// The merged model as one GGUF: every matrix in `type` (f32, f16 or bf16), vectors in f32. Runs in
// whatever runs the base model. Errors: io, no_space; bad_input for weights learnt whole that the
// model does not have.
void write_merged_gguf(const std::filesystem::path& path, const ModelFiles& files, const Lora& lora,
                       DType type);
// The merged model as a Hugging Face folder, in shards of at most `shard_bytes`, tensor by tensor.
// Of a folder the other files are copied; of a GGUF config.json, tokenizer.json,
// tokenizer_config.json and generation_config.json are made from its metadata. Error: unsupported
// where a folder cannot say what the GGUF does.
void write_merged_folder(const std::filesystem::path& folder, const ModelFiles& files,
                         const Lora& lora, DType type, size_t shard_bytes = size_t{5} << 30);

// The adapter as a GGUF file for llama.cpp's --lora, f32. Readers know one alpha and scale =
// alpha/r, so other scales are folded into B, and alpha·√r stands for a rank-stabilised scale. Rows
// of B follow the file's order of q and k. Errors: io, no_space; unsupported for what an adapter
// file cannot say.
void write_gguf_adapter(const std::filesystem::path& path, const ModelFiles& files,
                        const Lora& lora);

}  // namespace moru
