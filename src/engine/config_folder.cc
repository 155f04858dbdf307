// From a folder's config.json to Config.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>
#include <vector>

#include "base/error.h"
#include "engine/family_table.h"

namespace moru {
namespace {

using Json = nlohmann::json;

// Keys that change the result, each with the feature that reads it; kNoFeature: nothing does.
struct MeaningfulKey {
  std::string_view key;
  unsigned feature;
};
constexpr MeaningfulKey kMeaningful[] = {
    {"embedding_multiplier", kMultipliers},
    {"attention_multiplier", kMultipliers},
    {"residual_multiplier", kMultipliers},
    {"attn_logit_softcapping", kSoftcaps},
    {"final_logit_softcapping", kSoftcaps},
    {"query_pre_attn_scalar", kQueryScalar},
    {"partial_rotary_factor", kPartialRotary},
    {"pretraining_tp", kNoFeature},
    {"mlp_bias", kNoFeature},
    {"use_cla", kNoFeature},
    {"use_qk_norm", kNoFeature},
    {"use_mla", kNoFeature},
    {"kv_lora_rank", kNoFeature},
    {"q_lora_rank", kNoFeature},
    {"use_parallel_residual", kNoFeature},
    {"use_bidirectional_attention", kNoFeature},
    {"attention_chunk_size", kNoFeature},
    {"alibi", kNoFeature},
    {"clip_qkv", kNoFeature},
    {"add_cross_attention", kNoFeature},
    {"embedding_multiplier_scale", kNoFeature},
    {"attn_output_multiplier", kNoFeature},
    {"output_multiplier_scale", kNoFeature},
    {"router_logit_softcapping", kNoFeature},
    {"first_k_dense_replace", kNoFeature},
    {"routed_scaling_factor", kNoFeature},
    {"router_scaling_factor", kNoFeature},
    {"moe_router_use_sigmoid", kNoFeature},
    {"n_group", kNoFeature},
};

// A value of config.json that is absent or null counts as not given.
const Json* given(const Json& config, std::string_view key) {
  const auto found = config.find(std::string(key));
  return found == config.end() || found->is_null() ? nullptr : &*found;
}

std::optional<uint64_t> integer(const Keys& keys, const Json& config, std::string_view key) {
  const Json* value = given(config, key);
  if (value == nullptr) return std::nullopt;
  if (!value->is_number_integer() || *value < 0) keys.refuse(key, "is not a whole number ≥ 0");
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

// What a value is that changes nothing: absent, off, a factor of 1, no cap.
bool is_neutral(const Json& value) {
  return value.is_null() || value == false || value == 0 || value == 1 ||
         (value.is_string() && value.get_ref<const std::string&>().empty());
}

void refuse_strange_keys(const Family& family, const Keys& keys, const Json& j) {
  for (const MeaningfulKey& meaningful : kMeaningful) {
    const Json* value = given(j, meaningful.key);
    if (value == nullptr || (family.features & meaningful.feature) != 0 || is_neutral(*value))
      continue;
    keys.unsupported(meaningful.key, value->dump());
  }
  for (const char* key : {"logits_scaling", "logit_scale"}) {
    const Json* value = given(j, key);
    if (value != nullptr && family.logit_scale_key != key && !is_neutral(*value))
      keys.unsupported(key, value->dump());
  }
  if (!family.has_experts)
    for (const char* key : {"num_local_experts", "num_experts"})
      if (integer(keys, j, key).value_or(0) > 1)
        keys.unsupported(key, std::to_string(*integer(keys, j, key)));
}

std::vector<float> factors(const Keys& keys, const Json& rope, const char* key, size_t count) {
  const Json* list = given(rope, key);
  if (list == nullptr || !list->is_array() || list->size() != count)
    keys.refuse(key, fmt::format("does not list {} factors", count));
  std::vector<float> values;
  for (const Json& value : *list) {
    if (!value.is_number()) keys.refuse(key, "holds what is no number");
    values.push_back(keys.positive(key, value.get<double>()));
  }
  return values;
}

// How strongly YaRN (arXiv:2309.00071) sharpens attention, and cosines and sines with it.
double yarn_magnitude(double factor, double scale = 1) {
  return factor <= 1 ? 1 : 0.1 * scale * std::log(factor) + 1;
}

// rope_scaling, or transformers 5's rope_parameters, whose form for windowed models is one object
// per kind of layer. `c` has its width, heads and context.
void read_rope(const Family& family, const Keys& keys, const Json& j, const Json& rope,
               const Config& c, RopeConfig& out) {
  if (!rope.is_object()) keys.refuse("rope_parameters", "is not an object");
  out.theta = keys.positive("rope_theta", number(keys, rope, "rope_theta", double{out.theta}));
  if (const double part = number(keys, rope, "partial_rotary_factor", 1); part != 1) {
    if ((family.features & kPartialRotary) == 0)
      keys.unsupported("partial_rotary_factor", fmt::format("{}", part));
    out.dims = static_cast<size_t>(static_cast<double>(c.head_dim) * part);
  }
  std::string type = "default";
  for (const char* key : {"rope_type", "type"}) {
    const Json* value = given(rope, key);
    if (value == nullptr) continue;
    if (!value->is_string()) keys.refuse(key, "is not a text");
    type = value->get<std::string>();
    break;
  }
  if (type == "default") return;
  if (type == "su") type = "longrope";
  const auto original = [&] {
    const char* key = "original_max_position_embeddings";
    const auto value = integer(keys, rope, key);
    return keys.size(key, value ? value : integer(keys, j, key), kMaxContext);
  };
  if (type == "linear") {
    out.scaling = RopeConfig::Scaling::linear;
    out.factor = keys.positive("factor", number(keys, rope, "factor", 1));
  } else if (type == "llama3") {
    out.scaling = RopeConfig::Scaling::llama3;
    out.factor = keys.positive("factor", number(keys, rope, "factor", 1));
    out.low_freq_factor =
        keys.positive("low_freq_factor", number(keys, rope, "low_freq_factor", 1));
    out.high_freq_factor =
        keys.positive("high_freq_factor", number(keys, rope, "high_freq_factor", 4));
    if (out.high_freq_factor <= out.low_freq_factor)
      keys.refuse("high_freq_factor", "is not above low_freq_factor");
    out.original_context = original();
  } else if (type == "yarn") {
    out.scaling = RopeConfig::Scaling::yarn;
    out.original_context = original();
    out.factor = keys.positive("factor", number(keys, rope, "factor",
                                                static_cast<double>(c.context) /
                                                    static_cast<double>(out.original_context)));
    out.beta_fast = keys.positive("beta_fast", number(keys, rope, "beta_fast", 32));
    out.beta_slow = keys.positive("beta_slow", number(keys, rope, "beta_slow", 1));
    out.truncate = flag(keys, rope, "truncate", true);
    const double factor = double{out.factor}, scale = number(keys, rope, "mscale", 0),
                 all = number(keys, rope, "mscale_all_dim", 0);
    const double usual = scale != 0 && all != 0
                             ? yarn_magnitude(factor, scale) / yarn_magnitude(factor, all)
                             : yarn_magnitude(factor);
    out.magnitude =
        keys.positive("attention_factor", number(keys, rope, "attention_factor", usual));
  } else if (type == "longrope") {
    out.scaling = RopeConfig::Scaling::longrope;
    out.original_context = original();
    const double before = static_cast<double>(out.original_context);
    const double factor = number(keys, rope, "factor", static_cast<double>(c.context) / before);
    const double usual = factor <= 1 ? 1 : std::sqrt(1 + std::log(factor) / std::log(before));
    out.magnitude =
        keys.positive("attention_factor", number(keys, rope, "attention_factor", usual));
    const size_t half = (out.dims != 0 ? out.dims : c.head_dim) / 2;
    out.divisors = factors(keys, rope, "short_factor", half);
    out.long_divisors = factors(keys, rope, "long_factor", half);
  } else if (type == "dynamic" && (family.features & kRopeAlpha) != 0 && given(rope, "alpha")) {
    // A fixed alpha stretches theta, whatever the length.
    const double d = static_cast<double>(c.head_dim);
    const double alpha = double{keys.positive("alpha", number(keys, rope, "alpha", 1))};
    out.theta = static_cast<float>(double{out.theta} * std::pow(alpha, d / (d - 2)));
  } else {
    keys.unsupported("rope_type", type);
  }
}

void read_ropes(const Family& family, const Keys& keys, const Json& j, Config& c,
                std::optional<RopeConfig>& local) {
  c.rope.theta = keys.positive("rope_theta", number(keys, j, "rope_theta", family.default_theta));
  if (const double part = number(keys, j, "partial_rotary_factor", 1); part != 1)
    c.rope.dims = static_cast<size_t>(static_cast<double>(c.head_dim) * part);
  if (const Json* scaling = given(j, "rope_scaling"))
    read_rope(family, keys, j, *scaling, c, c.rope);
  if (const double theta = number(keys, j, "rope_local_base_freq", 0); theta != 0)
    local = RopeConfig{.theta = keys.positive("rope_local_base_freq", theta), .dims = c.rope.dims};
  const Json* rope = given(j, "rope_parameters");
  if (rope == nullptr) return;
  const Json* full = given(*rope, "full_attention");
  if (full == nullptr) return read_rope(family, keys, j, *rope, c, c.rope);
  read_rope(family, keys, j, *full, c, c.rope);
  if (const Json* sliding = given(*rope, "sliding_attention")) {
    local = RopeConfig{.dims = c.rope.dims};
    read_rope(family, keys, j, *sliding, c, *local);
  }
}

// The period of sliding_window_pattern: a number, or letters that repeat ("LLLG").
size_t pattern_period(const Family& family, const Keys& keys, const Json& j, size_t layers) {
  const Json* pattern = given(j, "sliding_window_pattern");
  if (pattern == nullptr) return family.window_period;
  if (!pattern->is_string())
    return keys.size("sliding_window_pattern", integer(keys, j, "sliding_window_pattern"), layers);
  const std::string text = pattern->get<std::string>();
  if (text.find_first_not_of('L') + 1 != text.size() || text.back() != 'G')
    keys.unsupported("sliding_window_pattern", text);
  return text.size();
}

void read_windows(const Family& family, const Keys& keys, const Json& j, Config& c) {
  const Json* value = given(j, "sliding_window");
  const bool absent = j.find("sliding_window") == j.end();
  c.window = absent ? family.default_window : integer(keys, j, "sliding_window").value_or(0);
  const bool wanted = flag(keys, j, "use_sliding_window", family.windows != Windows::late);
  if (family.windows == Windows::never && wanted && c.window != 0)
    keys.unsupported("sliding_window", value->dump());
  if (!wanted || family.windows == Windows::never) c.window = 0;
  if (c.window == 0) return;
  if (const Json* types = given(j, "layer_types")) {
    if (!types->is_array() || types->size() != c.layers)
      keys.refuse("layer_types", fmt::format("does not list {} layers", c.layers));
    for (const Json& type : *types) {
      if (type != "sliding_attention" && type != "full_attention")
        keys.unsupported("layer_types", type.dump());
      c.windowed.push_back(type == "sliding_attention");
    }
  } else if (family.windows == Windows::always) {
    c.windowed.assign(c.layers, true);
  } else if (family.windows == Windows::late) {
    const uint64_t first = integer(keys, j, "max_window_layers").value_or(28);
    c.windowed = late_windows(c.layers, static_cast<size_t>(first));
  } else {
    c.windowed = periodic_windows(c.layers, pattern_period(family, keys, j, c.layers));
  }
}

// no_rope_layers: 1 for a layer that rotates; or every n-th layer does not.
void read_placeless(const Family& family, const Keys& keys, const Json& j, Config& c) {
  if (family.placeless != Placeless::listed) return;
  if (const Json* list = given(j, "no_rope_layers")) {
    if (!list->is_array() || list->size() < c.layers)
      keys.refuse("no_rope_layers", fmt::format("does not list {} layers", c.layers));
    for (size_t i = 0; i < c.layers; ++i) c.placeless.push_back((*list)[i] == 0);
    return;
  }
  const size_t period = integer(keys, j, "no_rope_layer_interval")
                            ? keys.size("no_rope_layer_interval",
                                        integer(keys, j, "no_rope_layer_interval"), kMaxLayers)
                            : family.window_period;
  c.placeless = periodic_windows(c.layers, period);
  c.placeless.flip();
}

void read_experts(const Family& family, const Keys& keys, const Json& j, Config& c) {
  if (!family.has_experts) return;
  const char* count = given(j, "num_local_experts") ? "num_local_experts" : "num_experts";
  c.experts.count = keys.size(count, integer(keys, j, count), kMaxExperts);
  c.experts.chosen =
      keys.size("num_experts_per_tok", integer(keys, j, "num_experts_per_tok"), kMaxExperts);
  c.experts.width =
      integer(keys, j, "moe_intermediate_size")
          ? keys.size("moe_intermediate_size", integer(keys, j, "moe_intermediate_size"), kMaxWidth)
          : c.ffn_width;
  c.experts.shared_width = integer(keys, j, "shared_expert_intermediate_size").value_or(0);
  // transformers' classes say false where the key is absent, those without the key renormalise.
  const bool has_key = given(j, "norm_topk_prob") != nullptr;
  c.experts.renormalise = has_key ? flag(keys, j, "norm_topk_prob", false) : family.renormalises;
}

void read_activation(const Family& family, const Keys& keys, const Json& j) {
  for (const char* key : {"hidden_activation", "hidden_act"}) {
    const Json* act = given(j, key);
    if (act == nullptr) continue;
    const std::string name = act->is_string() ? act->get<std::string>() : act->dump();
    const bool gelu = name == "gelu_pytorch_tanh" || name == "gelu_tanh";
    // Early Gemma files say "gelu" and mean its approximation by tanh.
    const bool meant = name == "gelu" && family.norm_offset != 0;
    if (family.activation == Activation::gelu_tanh ? !gelu && !meant : name != "silu")
      keys.unsupported(key, name);
    break;
  }
  if (family.activation != Activation::swiglu_oai) return;
  if (const double limit = number(keys, j, "swiglu_limit", 7); limit != 7)
    keys.unsupported("swiglu_limit", fmt::format("{}", limit));
  if (const double alpha = number(keys, j, "swiglu_alpha", 1.702); std::abs(alpha - 1.702) > 1e-9)
    keys.unsupported("swiglu_alpha", fmt::format("{}", alpha));
}

}  // namespace

Config config_of_folder(const Family& family, const std::string& where, const Json& j) {
  const Keys keys{where};
  const auto size = [&](std::string_view key, uint64_t max) {
    return keys.size(key, integer(keys, j, key), max);
  };
  refuse_strange_keys(family, keys, j);
  Config c = begin_config(family);
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
  const char* eps = family.norm == NormKind::layer ? "layer_norm_eps" : "rms_norm_eps";
  c.norm_eps = keys.positive(eps, number(keys, j, eps, 1e-6));
  c.tied_head = flag(keys, j, "tie_word_embeddings", family.tied_by_default);
  read_activation(family, keys, j);
  if ((family.features & kSoftcaps) != 0) {
    const auto cap = [&](const char* key, float otherwise) {
      const double value = j.contains(key) ? number(keys, j, key, 0) : double{otherwise};
      return value == 0 ? 0 : keys.positive(key, value);
    };
    c.attn_softcap = cap("attn_logit_softcapping", family.default_attn_softcap);
    c.final_softcap = cap("final_logit_softcapping", family.default_final_softcap);
  }
  if (const double scalar = number(keys, j, "query_pre_attn_scalar", 0); scalar != 0)
    c.attn_scale = 1 / std::sqrt(keys.positive("query_pre_attn_scalar", scalar));
  if (given(j, "attention_multiplier"))
    c.attn_scale =
        keys.positive("attention_multiplier", number(keys, j, "attention_multiplier", 1));
  c.embedding_scale =
      keys.positive("embedding_multiplier", number(keys, j, "embedding_multiplier", 1));
  c.residual_scale =
      keys.positive("residual_multiplier", number(keys, j, "residual_multiplier", 1));
  if (family.logit_scale != LogitScale::none) {
    const float scale =
        keys.positive(family.logit_scale_key,
                      number(keys, j, family.logit_scale_key, family.default_logit_scale));
    c.logit_scale = family.logit_scale == LogitScale::divides ? 1 / scale : scale;
  }
  if ((family.features & kOptionalPostNorm) != 0 && !flag(keys, j, "use_post_norm", true))
    c.norm_layout = NormLayout::pre;
  std::optional<RopeConfig> local;
  read_ropes(family, keys, j, c, local);
  read_windows(family, keys, j, c);
  read_placeless(family, keys, j, c);
  read_experts(family, keys, j, c);
  finish_config(family, keys, c);
  if (local) c.local_rope = *local;
  if (c.local_rope.dims == 0) c.local_rope.dims = c.rope.dims;
  return c;
}

}  // namespace moru
