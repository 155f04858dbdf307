#include "engine/families.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>
#include <vector>

#include "base/error.h"

namespace moru {

using Json = nlohmann::json;

struct NamePair {
  std::string_view gguf, folder;  // within a block, or of the whole model
};

struct Family {
  std::string_view gguf;          // general.architecture
  std::string_view architecture;  // config.json's architectures[0]
  std::string_view model_type;
  bool interleaves_qk = false;
  float norm_offset = 0;
  NormLayout norm_layout = NormLayout::pre;
  QkNorm qk_norm = QkNorm::none;
  Activation activation = Activation::silu;
  std::string_view activation_key = "hidden_act";
  bool scales_embedding = false;  // by √width
  bool tied_by_default = false;
  double local_theta = 0;    // of windowed layers; 0: the family has none
  size_t window_period = 0;  // every n-th layer sees everything, the others a window
  double default_theta = 10000;
  std::span<const NamePair> block_names;
};

namespace {

constexpr std::array<NamePair, 3> kModelNames = {{
    {"token_embd.weight", "model.embed_tokens.weight"},
    {"output_norm.weight", "model.norm.weight"},
    {"output.weight", "lm_head.weight"},
}};

constexpr std::array<NamePair, 13> kLlamaNames = {{
    {"attn_norm.weight", "input_layernorm.weight"},
    {"attn_q.weight", "self_attn.q_proj.weight"},
    {"attn_k.weight", "self_attn.k_proj.weight"},
    {"attn_v.weight", "self_attn.v_proj.weight"},
    {"attn_output.weight", "self_attn.o_proj.weight"},
    {"attn_q.bias", "self_attn.q_proj.bias"},
    {"attn_k.bias", "self_attn.k_proj.bias"},
    {"attn_v.bias", "self_attn.v_proj.bias"},
    {"attn_output.bias", "self_attn.o_proj.bias"},
    {"ffn_norm.weight", "post_attention_layernorm.weight"},
    {"ffn_gate.weight", "mlp.gate_proj.weight"},
    {"ffn_up.weight", "mlp.up_proj.weight"},
    {"ffn_down.weight", "mlp.down_proj.weight"},
}};

constexpr std::array<NamePair, 13> kGemma3Names = {{
    {"attn_norm.weight", "input_layernorm.weight"},
    {"attn_q.weight", "self_attn.q_proj.weight"},
    {"attn_k.weight", "self_attn.k_proj.weight"},
    {"attn_v.weight", "self_attn.v_proj.weight"},
    {"attn_output.weight", "self_attn.o_proj.weight"},
    {"attn_q_norm.weight", "self_attn.q_norm.weight"},
    {"attn_k_norm.weight", "self_attn.k_norm.weight"},
    {"post_attention_norm.weight", "post_attention_layernorm.weight"},
    {"ffn_norm.weight", "pre_feedforward_layernorm.weight"},
    {"ffn_gate.weight", "mlp.gate_proj.weight"},
    {"ffn_up.weight", "mlp.up_proj.weight"},
    {"ffn_down.weight", "mlp.down_proj.weight"},
    {"post_ffw_norm.weight", "post_feedforward_layernorm.weight"},
}};

constexpr std::array<Family, 2> kFamilies = {{
    {.gguf = "llama",
     .architecture = "LlamaForCausalLM",
     .model_type = "llama",
     .interleaves_qk = true,
     .block_names = kLlamaNames},
    {.gguf = "gemma3",
     .architecture = "Gemma3ForCausalLM",
     .model_type = "gemma3_text",
     .norm_offset = 1,
     .norm_layout = NormLayout::sandwich,
     .qk_norm = QkNorm::rms_before_rope,
     .activation = Activation::gelu_tanh,
     .activation_key = "hidden_activation",
     .scales_embedding = true,
     .tied_by_default = true,
     .local_theta = 10000,
     .window_period = 6,
     .default_theta = 1e6,
     .block_names = kGemma3Names},
}};

[[noreturn]] void unknown_family(const std::string& where, std::string_view name) {
  std::string known;
  for (const Family& family : kFamilies)
    known += fmt::format("{}{}", known.empty() ? "" : ", ", family.gguf);
  throw Error(ErrorKind::unsupported,
              {.where = where,
               .what = fmt::format("the model family '{}' is not supported", name),
               .cure = fmt::format("take a model of one of: {}", known)});
}

// Reads required and optional numbers, and says which key is at fault.
struct Keys {
  std::string where;

  [[noreturn]] void refuse(std::string_view key, std::string what, std::string cure = "") const {
    throw Error(ErrorKind::bad_input, {.where = fmt::format("{}: {}", where, key),
                                       .what = std::move(what),
                                       .cure = std::move(cure)});
  }
  [[noreturn]] void unsupported(std::string_view key, std::string_view value) const {
    throw Error(ErrorKind::unsupported, {.where = fmt::format("{}: {}", where, key),
                                         .what = fmt::format("'{}' is not supported", value),
                                         .cure = "take another model"});
  }
  size_t size(std::string_view key, std::optional<uint64_t> value, uint64_t max) const {
    if (!value) refuse(key, "is missing", "the file is incomplete: convert the model again");
    if (*value == 0 || *value > max)
      refuse(key, fmt::format("is {}, not 1 to {}", *value, max), "the file is damaged");
    return static_cast<size_t>(*value);
  }
  float positive(std::string_view key, double value) const {
    if (!(value > 0) || !std::isfinite(value))
      refuse(key, fmt::format("is {}, not a positive number", value), "the file is damaged");
    return static_cast<float>(value);
  }
};

constexpr uint64_t kMaxLayers = 1024, kMaxWidth = 1 << 20, kMaxVocab = 1 << 24, kMaxHeads = 4096,
                   kMaxContext = 1 << 28;

// What holds for every source once the numbers are in.
void finish(const Family& family, const Keys& keys, Config& config) {
  config.norm_layout = family.norm_layout;
  config.qk_norm = family.qk_norm;
  config.activation = family.activation;
  if (family.scales_embedding) config.embedding_scale = std::sqrt(static_cast<float>(config.width));
  if (config.heads % config.kv_heads != 0)
    keys.refuse("head counts", fmt::format("{} query heads are not a multiple of {} KV heads",
                                           config.heads, config.kv_heads));
  if (config.head_dim % 16 != 0) keys.unsupported("head_dim", std::to_string(config.head_dim));
  if (config.rope.dims == 0) config.rope.dims = config.head_dim;
  if (config.rope.dims > config.head_dim || config.rope.dims % 2 != 0)
    keys.refuse("rope dimensions",
                fmt::format("{} do not fit a head of {}", config.rope.dims, config.head_dim));
  if (config.attn_scale == 0)
    config.attn_scale = 1 / std::sqrt(static_cast<float>(config.head_dim));
  config.local_rope = {.theta = static_cast<float>(family.local_theta), .dims = config.rope.dims};
  if (config.window != 0 && config.windowed.empty() && family.window_period != 0) {
    for (size_t i = 0; i < config.layers; ++i)
      config.windowed.push_back((i + 1) % family.window_period != 0);
  }
}

// Which layers are windowed: a flag for each, or a period of which the last sees everything.
void read_window_pattern(const Keys& keys, const GgufMetadata& m, const std::string& key,
                         Config& config) {
  const GgufValue* value = m.find(key);
  if (value == nullptr || config.window == 0) return;
  if (const auto* list = std::get_if<GgufArray>(value)) {
    const auto* flags = std::get_if<std::vector<bool>>(&list->values);
    if (flags == nullptr || flags->size() != config.layers)
      keys.refuse(key, fmt::format("does not hold a flag for each of {} layers", config.layers));
    config.windowed = *flags;
    return;
  }
  const size_t period = keys.size(key, m.integer(key), kMaxLayers);
  for (size_t i = 0; i < config.layers; ++i) config.windowed.push_back((i + 1) % period != 0);
}

}  // namespace

const Family& family_of_gguf(const GgufMetadata& metadata) {
  const auto name = metadata.text("general.architecture");
  if (!name)
    throw Error(ErrorKind::bad_input, {.where = metadata.where + ": general.architecture",
                                       .what = "is missing",
                                       .cure = "this is not a model, or it is damaged"});
  for (const Family& family : kFamilies)
    if (family.gguf == *name) return family;
  unknown_family(metadata.where, *name);
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
  unknown_family(where, name);
}

std::string_view name_of(const Family& family) { return family.gguf; }
bool interleaves_qk(const Family& family) { return family.interleaves_qk; }
float norm_offset_of(const Family& family) { return family.norm_offset; }

Config config_of_gguf(const Family& family, const GgufMetadata& m) {
  const Keys keys{m.where};
  const auto key = [&](std::string_view name) { return fmt::format("{}.{}", family.gguf, name); };
  const auto size = [&](std::string_view name, uint64_t max) {
    return keys.size(key(name), m.integer(key(name)), max);
  };
  Config c;
  c.family = family.gguf;
  c.layers = size("block_count", kMaxLayers);
  c.width = size("embedding_length", kMaxWidth);
  c.ffn_width = size("feed_forward_length", kMaxWidth);
  c.heads = size("attention.head_count", kMaxHeads);
  c.kv_heads = m.integer(key("attention.head_count_kv"))
                   ? size("attention.head_count_kv", kMaxHeads)
                   : c.heads;
  c.context = size("context_length", kMaxContext);
  c.head_dim = m.integer(key("attention.key_length")) ? size("attention.key_length", kMaxWidth)
                                                      : c.width / c.heads;
  if (const auto value = m.integer(key("attention.value_length")); value && *value != c.head_dim)
    keys.unsupported(key("attention.value_length"), std::to_string(*value));
  c.norm_eps = keys.positive(key("attention.layer_norm_rms_epsilon"),
                             m.number(key("attention.layer_norm_rms_epsilon")).value_or(1e-5));
  c.rope.theta = keys.positive(key("rope.freq_base"),
                               m.number(key("rope.freq_base")).value_or(family.default_theta));
  if (const auto dims = m.integer(key("rope.dimension_count"))) c.rope.dims = *dims;
  const std::string scaling = m.text(key("rope.scaling.type")).value_or("none");
  if (scaling == "linear") {
    c.rope.scaling = RopeConfig::Scaling::linear;
    c.rope.factor =
        keys.positive(key("rope.scaling.factor"), m.number(key("rope.scaling.factor")).value_or(1));
  } else if (scaling != "none") {
    keys.unsupported(key("rope.scaling.type"), scaling);
  }
  if (const auto scale = m.number(key("attention.scale")))
    c.attn_scale = keys.positive(key("attention.scale"), *scale);
  if (const auto window = m.integer(key("attention.sliding_window"))) c.window = *window;
  read_window_pattern(keys, m, key("attention.sliding_window_pattern"), c);
  if (const auto n = m.integer("tokenizer.ggml.tokens.count")) c.vocab = *n;
  if (const auto n = m.integer(key("vocab_size"))) c.vocab = *n;
  if (const GgufValue* tokens = m.find("tokenizer.ggml.tokens");
      tokens != nullptr && std::holds_alternative<GgufArray>(*tokens))
    c.vocab = std::visit([](const auto& list) { return list.size(); },
                         std::get<GgufArray>(*tokens).values);
  finish(family, keys, c);
  if (const auto theta = m.number(key("rope.freq_base_swa")))
    c.local_rope.theta = keys.positive(key("rope.freq_base_swa"), *theta);
  return c;
}

namespace {

// A value of config.json that is absent or null counts as not given.
const Json* given(const Json& config, std::string_view key) {
  const auto found = config.find(std::string(key));
  return found == config.end() || found->is_null() ? nullptr : &*found;
}

std::optional<uint64_t> integer(const Keys& keys, const Json& config, std::string_view key) {
  const Json* value = given(config, key);
  if (value == nullptr) return std::nullopt;
  if (!value->is_number_integer() || (value->is_number_integer() && *value < 0))
    keys.refuse(key, "is not a whole number ≥ 0");
  return value->get<uint64_t>();
}

double number(const Keys& keys, const Json& config, std::string_view key, double otherwise) {
  const Json* value = given(config, key);
  if (value == nullptr) return otherwise;
  if (!value->is_number()) keys.refuse(key, "is not a number");
  return value->get<double>();
}

bool flag(const Keys& keys, const Json& config, std::string_view key, bool otherwise) {
  const Json* value = given(config, key);
  if (value == nullptr) return otherwise;
  if (!value->is_boolean()) keys.refuse(key, "is neither true nor false");
  return value->get<bool>();
}

// rope_scaling, or transformers 5's rope_parameters, whose form for windowed models is one object
// per kind of layer.
void read_rope(const Keys& keys, const Json& rope, RopeConfig& out) {
  if (!rope.is_object()) keys.refuse("rope_parameters", "is not an object");
  out.theta = keys.positive("rope_theta", number(keys, rope, "rope_theta", double{out.theta}));
  std::string type = "default";
  for (const char* key : {"rope_type", "type"}) {
    const Json* value = given(rope, key);
    if (value == nullptr) continue;
    if (!value->is_string()) keys.refuse(key, "is not a text");
    type = value->get<std::string>();
    break;
  }
  if (type == "default") return;
  if (type != "linear" && type != "llama3") keys.unsupported("rope_type", type);
  out.factor = keys.positive("factor", number(keys, rope, "factor", 1));
  out.scaling = type == "linear" ? RopeConfig::Scaling::linear : RopeConfig::Scaling::llama3;
  if (type == "llama3") {
    out.low_freq_factor =
        keys.positive("low_freq_factor", number(keys, rope, "low_freq_factor", 1));
    out.high_freq_factor =
        keys.positive("high_freq_factor", number(keys, rope, "high_freq_factor", 4));
    out.original_context =
        keys.size("original_max_position_embeddings",
                  integer(keys, rope, "original_max_position_embeddings"), kMaxContext);
  }
}

}  // namespace

Config config_of_folder(const Family& family, const std::string& where, const Json& j) {
  const Keys keys{where};
  const auto size = [&](std::string_view key, uint64_t max) {
    return keys.size(key, integer(keys, j, key), max);
  };
  Config c;
  c.family = family.gguf;
  c.layers = size("num_hidden_layers", kMaxLayers);
  c.width = size("hidden_size", kMaxWidth);
  c.ffn_width = size("intermediate_size", kMaxWidth);
  c.vocab = size("vocab_size", kMaxVocab);
  c.heads = size("num_attention_heads", kMaxHeads);
  c.kv_heads =
      integer(keys, j, "num_key_value_heads") ? size("num_key_value_heads", kMaxHeads) : c.heads;
  const uint64_t head_dim = integer(keys, j, "head_dim").value_or(0);
  c.head_dim = head_dim != 0 ? size("head_dim", kMaxWidth) : c.width / c.heads;
  c.context = size("max_position_embeddings", kMaxContext);
  c.norm_eps = keys.positive("rms_norm_eps", number(keys, j, "rms_norm_eps", 1e-6));
  c.tied_head = flag(keys, j, "tie_word_embeddings", family.tied_by_default);
  if (flag(keys, j, "mlp_bias", false)) keys.unsupported("mlp_bias", "true");
  if (number(keys, j, "pretraining_tp", 1) != 1)
    keys.unsupported("pretraining_tp", std::to_string(number(keys, j, "pretraining_tp", 1)));
  for (const char* key : {"hidden_activation", "hidden_act"}) {
    const Json* act = given(j, key);
    if (act == nullptr) continue;
    const std::string name = act->is_string() ? act->get<std::string>() : act->dump();
    const bool gelu = name == "gelu_pytorch_tanh" || name == "gelu_tanh";
    if (family.activation == Activation::gelu_tanh ? !gelu : name != "silu")
      keys.unsupported(key, name);
    break;
  }
  if (const double cap = number(keys, j, "attn_logit_softcapping", 0); cap != 0)
    c.attn_softcap = keys.positive("attn_logit_softcapping", cap);
  if (const double cap = number(keys, j, "final_logit_softcapping", 0); cap != 0)
    c.final_softcap = keys.positive("final_logit_softcapping", cap);
  if (const double scalar = number(keys, j, "query_pre_attn_scalar", 0); scalar != 0)
    c.attn_scale = 1 / std::sqrt(keys.positive("query_pre_attn_scalar", scalar));
  c.rope.theta = keys.positive("rope_theta", number(keys, j, "rope_theta", family.default_theta));
  const double partial = number(keys, j, "partial_rotary_factor", 1);
  c.rope.dims = static_cast<size_t>(static_cast<double>(c.head_dim) * partial);

  RopeConfig local;
  double local_theta = number(keys, j, "rope_local_base_freq", family.local_theta);
  if (const Json* scaling = given(j, "rope_scaling")) read_rope(keys, *scaling, c.rope);
  if (const Json* rope = given(j, "rope_parameters")) {
    if (const Json* full = given(*rope, "full_attention")) {
      read_rope(keys, *full, c.rope);
      if (const Json* sliding = given(*rope, "sliding_attention")) {
        local.theta = 1;
        read_rope(keys, *sliding, local);
        local_theta = double{local.theta};
      }
    } else {
      read_rope(keys, *rope, c.rope);
    }
  }
  if (family.local_theta != 0 || flag(keys, j, "use_sliding_window", false))
    c.window = integer(keys, j, "sliding_window").value_or(0);
  if (const Json* types = given(j, "layer_types"); types != nullptr && c.window != 0) {
    if (!types->is_array() || types->size() != c.layers)
      keys.refuse("layer_types", fmt::format("does not list {} layers", c.layers));
    for (const Json& type : *types) {
      if (type != "sliding_attention" && type != "full_attention")
        keys.unsupported("layer_types", type.dump());
      c.windowed.push_back(type == "sliding_attention");
    }
  }
  finish(family, keys, c);
  if (local_theta > 0) c.local_rope.theta = static_cast<float>(local_theta);
  return c;
}

GgufMetadata gguf_metadata_of(const Family& family, const Config& c) {
  GgufMetadata m;
  const auto key = [&](std::string_view name) { return fmt::format("{}.{}", family.gguf, name); };
  const auto u32 = [&](std::string_view name, size_t value) {
    m.set(key(name), GgufScalar{static_cast<uint32_t>(value)});
  };
  m.set("general.architecture", GgufScalar{std::string(family.gguf)});
  u32("block_count", c.layers);
  u32("context_length", c.context);
  u32("embedding_length", c.width);
  u32("feed_forward_length", c.ffn_width);
  u32("attention.head_count", c.heads);
  u32("attention.head_count_kv", c.kv_heads);
  u32("attention.key_length", c.head_dim);
  u32("attention.value_length", c.head_dim);
  m.set(key("attention.layer_norm_rms_epsilon"), GgufScalar{c.norm_eps});
  m.set(key("rope.freq_base"), GgufScalar{c.rope.theta});
  u32("rope.dimension_count", c.rope.dims);
  u32("vocab_size", c.vocab);
  if (c.rope.scaling == RopeConfig::Scaling::linear) {
    m.set(key("rope.scaling.type"), GgufScalar{std::string("linear")});
    m.set(key("rope.scaling.factor"), GgufScalar{c.rope.factor});
  }
  if (c.window != 0) {
    u32("attention.sliding_window", c.window);
    m.set(key("rope.freq_base_swa"), GgufScalar{c.local_rope.theta});
    constexpr uint32_t kBool = 7;  // GGUF's id of the element type
    if (!c.windowed.empty())
      m.set(key("attention.sliding_window_pattern"), GgufArray{kBool, c.windowed});
  }
  if (c.attn_scale != 1 / std::sqrt(static_cast<float>(c.head_dim)))
    m.set(key("attention.scale"), GgufScalar{c.attn_scale});
  return m;
}

nlohmann::ordered_json folder_config_of(const Family& family, const Config& c) {
  nlohmann::ordered_json j = {
      {"architectures", {family.architecture}},
      {"model_type", family.model_type},
      {"hidden_size", c.width},
      {"intermediate_size", c.ffn_width},
      {"num_hidden_layers", c.layers},
      {"num_attention_heads", c.heads},
      {"num_key_value_heads", c.kv_heads},
      {"head_dim", c.head_dim},
      {"vocab_size", c.vocab},
      {"max_position_embeddings", c.context},
      {"rms_norm_eps", c.norm_eps},
      {"rope_theta", c.rope.theta},
      {"tie_word_embeddings", c.tied_head},
  };
  j[std::string(family.activation_key)] =
      c.activation == Activation::silu ? "silu" : "gelu_pytorch_tanh";
  if (c.rope.scaling == RopeConfig::Scaling::linear)
    j["rope_scaling"] = {{"rope_type", "linear"}, {"factor", c.rope.factor}};
  if (c.rope.scaling == RopeConfig::Scaling::llama3)
    j["rope_scaling"] = {{"rope_type", "llama3"},
                         {"factor", c.rope.factor},
                         {"low_freq_factor", c.rope.low_freq_factor},
                         {"high_freq_factor", c.rope.high_freq_factor},
                         {"original_max_position_embeddings", c.rope.original_context}};
  if (c.window != 0) {
    j["sliding_window"] = c.window;
    j["rope_local_base_freq"] = c.local_rope.theta;
    j["query_pre_attn_scalar"] = 1 / (c.attn_scale * c.attn_scale);
    for (const bool windowed : c.windowed)
      j["layer_types"].push_back(windowed ? "sliding_attention" : "full_attention");
  }
  return j;
}

std::string gguf_name_of(const Family& family, std::string_view name) {
  // Wrappers of multimodal models put the text model one level down.
  if (name.starts_with("language_model.")) name.remove_prefix(15);
  for (const NamePair& pair : kModelNames)
    if (pair.folder == name) return std::string(pair.gguf);
  constexpr std::string_view kPrefix = "model.layers.";
  if (!name.starts_with(kPrefix)) return "";
  name.remove_prefix(kPrefix.size());
  size_t layer = 0;
  const auto [end, code] = std::from_chars(name.data(), name.data() + name.size(), layer);
  if (code != std::errc() || end == name.data() + name.size() || *end != '.') return "";
  name.remove_prefix(static_cast<size_t>(end - name.data()) + 1);
  for (const NamePair& pair : family.block_names)
    if (pair.folder == name) return fmt::format("blk.{}.{}", layer, pair.gguf);
  return "";
}

std::string folder_name_of(const Family& family, std::string_view name) {
  for (const NamePair& pair : kModelNames)
    if (pair.gguf == name) return std::string(pair.folder);
  if (!name.starts_with("blk.")) return "";
  name.remove_prefix(4);
  const size_t dot = name.find('.');
  if (dot == std::string_view::npos) return "";
  const std::string_view layer = name.substr(0, dot), rest = name.substr(dot + 1);
  for (const NamePair& pair : family.block_names)
    if (pair.gguf == rest) return fmt::format("model.layers.{}.{}", layer, pair.folder);
  return "";
}

}  // namespace moru
