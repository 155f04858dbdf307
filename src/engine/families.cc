// The rows. What a field means stands in family_table.h; what a family is, in its own papers.
#include "engine/families.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "engine/family_table.h"

namespace moru {
namespace {

using Json = nlohmann::json;

constexpr NamePair kModelNames[] = {
    {"token_embd.weight", "model.embed_tokens.weight"},
    {"output_norm.weight", "model.norm.weight"},
    {"output.weight", "lm_head.weight"},
};

constexpr NamePair kAttention[] = {
    {"attn_q.weight", "self_attn.q_proj.weight"}, {"attn_k.weight", "self_attn.k_proj.weight"},
    {"attn_v.weight", "self_attn.v_proj.weight"}, {"attn_output.weight", "self_attn.o_proj.weight"},
    {"attn_q.bias", "self_attn.q_proj.bias"},     {"attn_k.bias", "self_attn.k_proj.bias"},
    {"attn_v.bias", "self_attn.v_proj.bias"},     {"attn_output.bias", "self_attn.o_proj.bias"},
};
constexpr NamePair kFusedAttention[] = {
    {"attn_qkv.weight", "self_attn.qkv_proj.weight"},
    {"attn_output.weight", "self_attn.o_proj.weight"},
};
constexpr NamePair kQkNorms[] = {
    {"attn_q_norm.weight", "self_attn.q_norm.weight"},
    {"attn_k_norm.weight", "self_attn.k_norm.weight"},
};
constexpr NamePair kQkLayerNorms[] = {
    {"attn_q_norm.weight", "self_attn.query_layernorm.weight"},
    {"attn_k_norm.weight", "self_attn.key_layernorm.weight"},
};
constexpr NamePair kFfn[] = {
    {"ffn_gate.weight", "mlp.gate_proj.weight"},
    {"ffn_up.weight", "mlp.up_proj.weight"},
    {"ffn_down.weight", "mlp.down_proj.weight"},
};
constexpr NamePair kFusedFfn[] = {
    {"ffn_up.weight", "mlp.gate_up_proj.weight"},
    {"ffn_down.weight", "mlp.down_proj.weight"},
};
constexpr NamePair kPreNorms[] = {
    {"attn_norm.weight", "input_layernorm.weight"},
    {"ffn_norm.weight", "post_attention_layernorm.weight"},
};
constexpr NamePair kPostNorms[] = {
    {"post_attention_norm.weight", "post_attention_layernorm.weight"},
    {"post_ffw_norm.weight", "post_feedforward_layernorm.weight"},
};
constexpr NamePair kSandwichNorms[] = {
    {"attn_norm.weight", "input_layernorm.weight"},
    {"post_attention_norm.weight", "post_attention_layernorm.weight"},
    {"ffn_norm.weight", "pre_feedforward_layernorm.weight"},
    {"post_ffw_norm.weight", "post_feedforward_layernorm.weight"},
};
constexpr NamePair kPeriNorms[] = {
    {"attn_norm.weight", "input_layernorm.weight"},
    {"post_attention_norm.weight", "post_norm1.weight"},
    {"ffn_norm.weight", "post_attention_layernorm.weight"},
    {"post_ffw_norm.weight", "post_norm2.weight"},
};
constexpr NamePair kOneNorm[] = {{"attn_norm.weight", "input_layernorm.weight"}};
constexpr NamePair kMixtralExperts[] = {
    {"ffn_gate_inp.weight", "block_sparse_moe.gate.weight"},
    {"ffn_gate_exps.weight", "block_sparse_moe.experts.*.w1.weight", FolderForm::per_expert},
    {"ffn_up_exps.weight", "block_sparse_moe.experts.*.w3.weight", FolderForm::per_expert},
    {"ffn_down_exps.weight", "block_sparse_moe.experts.*.w2.weight", FolderForm::per_expert},
};
constexpr NamePair kQwenExperts[] = {
    {"ffn_gate_inp.weight", "mlp.gate.weight"},
    {"ffn_gate_exps.weight", "mlp.experts.*.gate_proj.weight", FolderForm::per_expert},
    {"ffn_up_exps.weight", "mlp.experts.*.up_proj.weight", FolderForm::per_expert},
    {"ffn_down_exps.weight", "mlp.experts.*.down_proj.weight", FolderForm::per_expert},
    {"ffn_gate_inp_shexp.weight", "mlp.shared_expert_gate.weight"},
    {"ffn_gate_shexp.weight", "mlp.shared_expert.gate_proj.weight"},
    {"ffn_up_shexp.weight", "mlp.shared_expert.up_proj.weight"},
    {"ffn_down_shexp.weight", "mlp.shared_expert.down_proj.weight"},
};
constexpr NamePair kGptOssBlock[] = {
    {"attn_norm.weight", "input_layernorm.weight"},
    {"post_attention_norm.weight", "post_attention_layernorm.weight"},
    {"attn_sinks.weight", "self_attn.sinks"},
    {"ffn_gate_inp.weight", "mlp.router.weight"},
    {"ffn_gate_inp.bias", "mlp.router.bias"},
    {"ffn_gate_exps.weight", "mlp.experts.gate_up_proj", FolderForm::even_columns},
    {"ffn_up_exps.weight", "mlp.experts.gate_up_proj", FolderForm::odd_columns},
    {"ffn_down_exps.weight", "mlp.experts.down_proj", FolderForm::columns},
    {"ffn_gate_exps.bias", "mlp.experts.gate_up_proj_bias", FolderForm::even_values},
    {"ffn_up_exps.bias", "mlp.experts.gate_up_proj_bias", FolderForm::odd_values},
    {"ffn_down_exps.bias", "mlp.experts.down_proj_bias"},
};

constexpr Family kFamilies[] = {
    {.name = "llama",
     .gguf = "llama",
     .architecture = "LlamaForCausalLM",
     .gguf_interleaves_qk = true,
     .block_names = {kAttention, kFfn, kPreNorms}},
    {.name = "mistral",
     .gguf = "llama",
     .architecture = "MistralForCausalLM",
     .gguf_interleaves_qk = true,
     .windows = Windows::always,
     .block_names = {kAttention, kFfn, kPreNorms}},
    {.name = "mixtral",
     .gguf = "llama",
     .architecture = "MixtralForCausalLM",
     .gguf_interleaves_qk = true,
     .default_theta = 1e6,
     .windows = Windows::always,
     .has_experts = true,
     .block_names = {kAttention, kMixtralExperts, kPreNorms}},
    {.name = "qwen2",
     .gguf = "qwen2",
     .architecture = "Qwen2ForCausalLM",
     .windows = Windows::late,
     .block_names = {kAttention, kFfn, kPreNorms}},
    {.name = "qwen2moe",
     .gguf = "qwen2moe",
     .architecture = "Qwen2MoeForCausalLM",
     .windows = Windows::late,
     .has_experts = true,
     .renormalises = false,
     .block_names = {kAttention, kFfn, kQwenExperts, kPreNorms}},
    {.name = "qwen3",
     .gguf = "qwen3",
     .architecture = "Qwen3ForCausalLM",
     .qk_norm = QkNorm::rms_before_rope,
     .windows = Windows::late,
     .block_names = {kAttention, kQkNorms, kFfn, kPreNorms}},
    {.name = "qwen3moe",
     .gguf = "qwen3moe",
     .architecture = "Qwen3MoeForCausalLM",
     .qk_norm = QkNorm::rms_before_rope,
     .windows = Windows::late,
     .has_experts = true,
     .block_names = {kAttention, kQkNorms, kFfn, kQwenExperts, kPreNorms}},
    {.name = "gemma",
     .gguf = "gemma",
     .architecture = "GemmaForCausalLM",
     .norm_offset = 1,
     .activation = Activation::gelu_tanh,
     .scales_embedding = true,
     .tied_by_default = true,
     .block_names = {kAttention, kFfn, kPreNorms}},
    {.name = "gemma2",
     .gguf = "gemma2",
     .architecture = "Gemma2ForCausalLM",
     .norm_offset = 1,
     .norm_layout = NormLayout::sandwich,
     .activation = Activation::gelu_tanh,
     .scales_embedding = true,
     .tied_by_default = true,
     .windows = Windows::periodic,
     .window_period = 2,
     .default_window = 4096,
     .default_attn_softcap = 50,
     .default_final_softcap = 30,
     .scale_of_width_layers = 46,
     .features = kSoftcaps | kQueryScalar,
     .block_names = {kAttention, kFfn, kSandwichNorms}},
    {.name = "gemma3",
     .gguf = "gemma3",
     .architecture = "Gemma3ForCausalLM",
     .norm_offset = 1,
     .norm_layout = NormLayout::sandwich,
     .qk_norm = QkNorm::rms_before_rope,
     .activation = Activation::gelu_tanh,
     .scales_embedding = true,
     .tied_by_default = true,
     .default_theta = 1e6,
     .windows = Windows::periodic,
     .window_period = 6,
     .local_theta = 10000,
     .scale_of_width_layers = 62,
     .features = kSoftcaps | kQueryScalar,
     .block_names = {kAttention, kQkNorms, kFfn, kSandwichNorms}},
    {.name = "phi3",
     .gguf = "phi3",
     .architecture = "Phi3ForCausalLM",
     .windows = Windows::always,
     .features = kPartialRotary,
     .block_names = {kFusedAttention, kFusedFfn, kPreNorms}},
    {.name = "granite",
     .gguf = "granite",
     .architecture = "GraniteForCausalLM",
     .gguf_interleaves_qk = true,
     .logit_scale = LogitScale::divides,
     .logit_scale_key = "logits_scaling",
     .features = kMultipliers,
     .block_names = {kAttention, kFfn, kPreNorms}},
    {.name = "hyperclovax",
     .gguf = "hyperclovax",
     .architecture = "HyperCLOVAXForCausalLM",
     .norm_layout = NormLayout::sandwich,
     .logit_scale = LogitScale::multiplies,
     .logit_scale_key = "logits_scaling",
     .features = kMultipliers | kOptionalPostNorm,
     .block_names = {kAttention, kFfn, kPeriNorms}},
    {.name = "command-r",
     .gguf = "command-r",
     .architecture = "CohereForCausalLM",
     .gguf_interleaves_qk = true,
     .folder_interleaves_qk = true,
     .norm_layout = NormLayout::parallel,
     .norm = NormKind::layer,
     .tied_by_default = true,
     .default_theta = 10000,
     .logit_scale = LogitScale::multiplies,
     .logit_scale_key = "logit_scale",
     .default_logit_scale = 0.0625,
     .block_names = {kAttention, kFfn, kOneNorm}},
    {.name = "cohere2",
     .gguf = "cohere2",
     .architecture = "Cohere2ForCausalLM",
     .gguf_interleaves_qk = true,
     .folder_interleaves_qk = true,
     .norm_layout = NormLayout::parallel,
     .norm = NormKind::layer,
     .tied_by_default = true,
     .windows = Windows::periodic,
     .window_period = 4,
     .default_window = 4096,
     .placeless = Placeless::full_layers,
     .logit_scale = LogitScale::multiplies,
     .logit_scale_key = "logit_scale",
     .default_logit_scale = 0.0625,
     .block_names = {kAttention, kFfn, kOneNorm}},
    {.name = "olmo2",
     .gguf = "olmo2",
     .architecture = "Olmo2ForCausalLM",
     .norm_layout = NormLayout::post,
     .qk_norm = QkNorm::rms_whole_before_rope,
     .block_names = {kAttention, kQkNorms, kFfn, kPostNorms}},
    {.name = "smollm3",
     .gguf = "smollm3",
     .architecture = "SmolLM3ForCausalLM",
     .gguf_interleaves_qk = true,
     .tied_by_default = true,
     .default_theta = 2e6,
     .window_period = 4,
     .placeless = Placeless::listed,
     .block_names = {kAttention, kFfn, kPreNorms}},
    {.name = "exaone4",
     .gguf = "exaone4",
     .architecture = "Exaone4ForCausalLM",
     .norm_layout = NormLayout::post,
     .qk_norm = QkNorm::rms_before_rope,
     .windows = Windows::periodic,
     .window_period = 4,
     .placeless = Placeless::full_layers,
     .block_names = {kAttention, kQkNorms, kFfn, kPostNorms}},
    {.name = "hunyuan",
     .gguf = "hunyuan-dense",
     .architecture = "HunYuanDenseV1ForCausalLM",
     .qk_norm = QkNorm::rms_after_rope,
     .features = kRopeAlpha,
     .block_names = {kAttention, kQkLayerNorms, kFfn, kPreNorms}},
    {.name = "gpt-oss",
     .gguf = "gpt-oss",
     .architecture = "GptOssForCausalLM",
     .activation = Activation::swiglu_oai,
     .default_theta = 150000,
     .windows = Windows::periodic,
     .window_period = 2,
     .default_window = 128,
     .yarn_truncates = false,
     .has_sinks = true,
     .has_experts = true,
     .block_names = {kAttention, kGptOssBlock}},
};

// Families that are known by name and not computed, each with what stands nearest to it.
struct KnownFamily {
  std::string_view gguf, architecture, name, cure;
};
constexpr KnownFamily kKnown[] = {
    {"llama4", "Llama4ForConditionalGeneration", "Llama 4", "Llama 3.1, 3.2 or 3.3"},
    {"llama4", "Llama4ForCausalLM", "Llama 4", "Llama 3.1, 3.2 or 3.3"},
    {"grok", "Grok1ForCausalLM", "Grok", "gpt-oss or Mixtral"},
    {"grok", "GrokForCausalLM", "Grok", "gpt-oss or Mixtral"},
    {"deepseek", "DeepseekForCausalLM", "DeepSeek", "a DeepSeek-R1 distillation (qwen2, llama)"},
    {"deepseek2", "DeepseekV2ForCausalLM", "DeepSeek V2",
     "a DeepSeek-R1 distillation (qwen2, llama)"},
    {"deepseek2", "DeepseekV3ForCausalLM", "DeepSeek V3",
     "a DeepSeek-R1 distillation (qwen2, llama)"},
    {"phi2", "PhiForCausalLM", "Phi-2", "Phi-3 or Phi-4"},
    {"phimoe", "PhiMoEForCausalLM", "Phi-3.5-MoE", "Phi-3 or Phi-4"},
    {"qwen", "QWenLMHeadModel", "Qwen 1", "Qwen2.5 or Qwen3"},
    {"qwen3next", "Qwen3NextForCausalLM", "Qwen3-Next", "Qwen3"},
    {"qwen35", "Qwen3_5ForConditionalGeneration", "Qwen 3.5", "Qwen3"},
    {"qwen35moe", "Qwen3_5MoeForConditionalGeneration", "Qwen 3.5 MoE", "Qwen3 MoE"},
    {"qwen2vl", "Qwen2VLForConditionalGeneration", "Qwen2-VL", "Qwen2.5, for text alone"},
    {"qwen2vl", "Qwen2_5_VLForConditionalGeneration", "Qwen2.5-VL", "Qwen2.5, for text alone"},
    {"cohere2moe", "Cohere2MoeForCausalLM", "Cohere2 MoE", "Command R7B or Command A"},
    {"gemma3n", "Gemma3nForConditionalGeneration", "Gemma 3n", "Gemma 3"},
    {"gemma4", "Gemma4ForConditionalGeneration", "Gemma 4", "Gemma 3"},
    {"gemma4", "Gemma4ForCausalLM", "Gemma 4", "Gemma 3"},
    {"gemma-embedding", "Gemma3TextModel", "EmbeddingGemma", "Gemma 3, to generate"},
    {"mistral3", "Mistral3ForConditionalGeneration", "Mistral Small 3.1 and later",
     "Mistral Small 3 or Nemo"},
    {"mistral3", "Ministral3ForCausalLM", "Ministral 3", "Mistral 7B or Nemo"},
    {"mistral4", "Mistral4ForCausalLM", "Mistral 4", "Mistral Small 3 or Nemo"},
    {"hunyuan-moe", "HunYuanMoEV1ForCausalLM", "Hunyuan MoE", "a dense Hunyuan"},
    {"hy_v3", "HYV3ForCausalLM", "Hy3", "a dense Hunyuan"},
    {"", "HCXVisionV2ForCausalLM", "HyperCLOVA X SEED Think 32B", "HyperCLOVA X SEED Think 14B"},
    {"granitemoe", "GraniteMoeForCausalLM", "Granite MoE", "a dense Granite"},
    {"granitehybrid", "GraniteMoeHybridForCausalLM", "Granite 4 hybrid", "Granite 3"},
    {"exaone", "ExaoneForCausalLM", "EXAONE 3", "EXAONE 4"},
    {"exaone-moe", "ExaoneMoEForCausalLM", "EXAONE MoE", "EXAONE 4"},
    {"olmo", "OlmoForCausalLM", "OLMo 1", "OLMo 2"},
    {"olmo2", "Olmo3ForCausalLM", "OLMo 3", "OLMo 2"},
    {"olmoe", "OlmoeForCausalLM", "OLMoE", "OLMo 2 or Qwen3 MoE"},
    {"glm4", "Glm4ForCausalLM", "GLM-4", "Qwen3"},
    {"glm4moe", "Glm4MoeForCausalLM", "GLM-4.5", "Qwen3 MoE"},
    {"falcon", "FalconForCausalLM", "Falcon", "Falcon 3 (llama)"},
    {"gptneox", "GPTNeoXForCausalLM", "GPT-NeoX", "Llama 3.2"},
    {"gpt2", "GPT2LMHeadModel", "GPT-2", "Llama 3.2"},
    {"gptj", "GPTJForCausalLM", "GPT-J", "Llama 3.2"},
    {"bloom", "BloomForCausalLM", "BLOOM", "Llama 3.2"},
    {"mpt", "MPTForCausalLM", "MPT", "Llama 3.2"},
    {"stablelm", "StableLmForCausalLM", "StableLM", "Llama 3.2"},
    {"starcoder2", "Starcoder2ForCausalLM", "StarCoder2", "Qwen2.5-Coder"},
    {"mamba", "MambaForCausalLM", "Mamba", "Llama 3.2"},
    {"mamba2", "Mamba2ForCausalLM", "Mamba 2", "Llama 3.2"},
    {"bert", "BertModel", "BERT", "a model that generates text"},
    {"t5", "T5ForConditionalGeneration", "T5", "a model that generates text"},
};

[[noreturn]] void refuse_family(const std::string& where, std::string_view name,
                                std::string_view KnownFamily::*by) {
  for (const KnownFamily& known : kKnown)
    if (known.*by == name)
      throw Error(ErrorKind::unsupported,
                  {.where = where,
                   .what = fmt::format("the family {} ({}) is not supported", known.name, name),
                   .cure = fmt::format("take {}", known.cure)});
  std::string all;
  for (const Family& family : kFamilies)
    all += fmt::format("{}{}", all.empty() ? "" : ", ", family.name);
  throw Error(ErrorKind::unsupported,
              {.where = where,
               .what = fmt::format("the model family '{}' is not supported", name),
               .cure = fmt::format("take a model of one of: {}", all)});
}

}  // namespace

std::span<const NamePair> model_names() { return kModelNames; }

const Family& family_of_gguf(const GgufMetadata& metadata) {
  const auto name = metadata.text("general.architecture");
  if (!name)
    throw Error(ErrorKind::bad_input, {.where = metadata.where + ": general.architecture",
                                       .what = "is missing",
                                       .cure = "this is not a model, or it is damaged"});
  // Several families may share an architecture: the first that has what the file speaks of.
  const bool experts = metadata.integer(*name + ".expert_count").value_or(0) != 0;
  const bool window = metadata.integer(*name + ".attention.sliding_window").value_or(0) != 0;
  const Family* found = nullptr;
  for (const Family& family : kFamilies) {
    if (family.gguf != *name) continue;
    if (found == nullptr) found = &family;
    if (family.has_experts == experts && (!window || family.windows != Windows::never))
      return family;
  }
  if (found == nullptr) refuse_family(metadata.where, *name, &KnownFamily::gguf);
  return *found;
}

const Family& family_of_folder(const std::string& where, const Json& config) {
  const auto list = config.find("architectures");
  if (list == config.end() || !list->is_array() || list->empty() || !list->front().is_string())
    throw Error(ErrorKind::bad_input, {.where = where + ": architectures",
                                       .what = "is missing",
                                       .cure = "config.json must name the model's class"});
  const auto name = list->front().get<std::string>();
  for (const Family& family : kFamilies)
    if (family.architecture == name) return family;
  refuse_family(where, name, &KnownFamily::architecture);
}

const Family& family_of(const Config& config) {
  for (const Family& family : kFamilies)
    if (family.name == config.family) return family;
  MORU_CHECK(false);
}

bool gguf_interleaves_qk(const Family& family) { return family.gguf_interleaves_qk; }
bool folder_interleaves_qk(const Family& family) { return family.folder_interleaves_qk; }
float norm_offset_of(const Family& family) { return family.norm_offset; }

std::string folder_name_of(const Family& family, std::string_view name) {
  for (const NamePair& pair : kModelNames)
    if (pair.gguf == name) return std::string(pair.folder);
  if (!name.starts_with("blk.")) return "";
  name.remove_prefix(4);
  const size_t dot = name.find('.');
  if (dot == std::string_view::npos) return "";
  const std::string_view layer = name.substr(0, dot), rest = name.substr(dot + 1);
  for (const auto& group : family.block_names)
    for (const NamePair& pair : group)
      if (pair.gguf == rest && pair.form == FolderForm::plain)
        return fmt::format("model.layers.{}.{}", layer, pair.folder);
  return "";
}

std::string gguf_name_of(const Family& family, std::string_view name) {
  for (const NamePair& pair : kModelNames)
    if (pair.folder == name) return std::string(pair.gguf);
  constexpr std::string_view kLayers = "model.layers.";
  if (!name.starts_with(kLayers)) return "";
  name.remove_prefix(kLayers.size());
  const size_t dot = name.find('.');
  if (dot == std::string_view::npos) return "";
  const std::string_view layer = name.substr(0, dot), rest = name.substr(dot + 1);
  for (const auto& group : family.block_names)
    for (const NamePair& pair : group)
      if (pair.folder == rest && pair.form == FolderForm::plain)
        return fmt::format("blk.{}.{}", layer, pair.gguf);
  return "";
}

// ---- what all sources of a Config share ---------------------------------------------------------

void Keys::refuse(std::string_view key, std::string what, std::string cure) const {
  throw Error(ErrorKind::bad_input, {.where = fmt::format("{}: {}", where, key),
                                     .what = std::move(what),
                                     .cure = std::move(cure)});
}
void Keys::unsupported(std::string_view key, std::string_view value) const {
  throw Error(ErrorKind::unsupported, {.where = fmt::format("{}: {}", where, key),
                                       .what = fmt::format("'{}' is not supported", value),
                                       .cure = "take another model"});
}
size_t Keys::size(std::string_view key, std::optional<uint64_t> value, uint64_t max) const {
  if (!value) refuse(key, "is missing", "the file is incomplete: convert the model again");
  if (*value == 0 || *value > max)
    refuse(key, fmt::format("is {}, not 1 to {}", *value, max), "the file is damaged");
  return static_cast<size_t>(*value);
}
float Keys::positive(std::string_view key, double value) const {
  if (!(value > 0) || !std::isfinite(value))
    refuse(key, fmt::format("is {}, not a positive number", value), "the file is damaged");
  return static_cast<float>(value);
}

Config begin_config(const Family& family) {
  Config config;
  config.family = family.name;
  config.norm_layout = family.norm_layout;
  config.norm = family.norm;
  config.qk_norm = family.qk_norm;
  config.activation = family.activation;
  config.attn_sinks = family.has_sinks;
  config.experts.renormalise = family.renormalises;
  config.rope.truncate = family.yarn_truncates;
  return config;
}

std::vector<bool> periodic_windows(size_t layers, size_t period) {
  std::vector<bool> windowed(layers);
  for (size_t i = 0; i < layers; ++i) windowed[i] = (i + 1) % period != 0;
  return windowed;
}
std::vector<bool> late_windows(size_t layers, size_t first) {
  std::vector<bool> windowed(layers);
  for (size_t i = first; i < layers; ++i) windowed[i] = true;
  return windowed;
}

void finish_config(const Family& family, const Keys& keys, Config& config) {
  if (family.scales_embedding) config.embedding_scale = std::sqrt(static_cast<float>(config.width));
  if (config.heads % config.kv_heads != 0)
    keys.refuse("head counts", fmt::format("{} query heads are not a multiple of {} KV heads",
                                           config.heads, config.kv_heads));
  if (config.head_dim % 16 != 0) keys.unsupported("head_dim", std::to_string(config.head_dim));
  if (config.rope.dims == 0) config.rope.dims = config.head_dim;
  if (config.rope.dims > config.head_dim || config.rope.dims % 2 != 0)
    keys.refuse("rope dimensions",
                fmt::format("{} do not fit a head of {}", config.rope.dims, config.head_dim));
  for (const std::vector<float>* divisors : {&config.rope.divisors, &config.rope.long_divisors})
    if (!divisors->empty() && divisors->size() != config.rope.dims / 2)
      keys.refuse("rope factors", fmt::format("{} do not fit {} rotary dimensions",
                                              divisors->size(), config.rope.dims));
  if (config.attn_scale == 0)
    config.attn_scale = 1 / std::sqrt(static_cast<float>(config.head_dim));
  if (config.experts.chosen > config.experts.count)
    keys.refuse("experts", fmt::format("a token takes {} of {} experts", config.experts.chosen,
                                       config.experts.count));
  if (config.window == 0 ||
      std::none_of(config.windowed.begin(), config.windowed.end(), [](bool w) { return w; })) {
    config.window = 0;
    config.windowed.clear();
  }
  config.local_rope = config.rope;
  if (family.local_theta != 0)
    config.local_rope = {.theta = static_cast<float>(family.local_theta), .dims = config.rope.dims};
  if (family.placeless == Placeless::full_layers && config.window != 0) {
    config.placeless = config.windowed;
    config.placeless.flip();
  }
}

}  // namespace moru
