// From a GGUF's metadata to Config, and back.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "base/error.h"
#include "engine/family_table.h"

namespace moru {
namespace {

// A flag for each layer, or a period of which the last layer sees everything.
void read_windows(const Family& family, const Keys& keys, const GgufMetadata& m,
                  const std::string& prefix, Config& config) {
  const std::string window = prefix + "attention.sliding_window";
  config.window = m.integer(window).value_or(family.default_window);
  if (config.window == 0) return;
  if (family.windows == Windows::never) keys.unsupported(window, std::to_string(config.window));
  const std::string key = prefix + "attention.sliding_window_pattern";
  const GgufValue* value = m.find(key);
  if (value != nullptr && std::holds_alternative<GgufArray>(*value)) {
    const auto* flags = std::get_if<std::vector<bool>>(&std::get<GgufArray>(*value).values());
    if (flags == nullptr || flags->size() != config.layers)
      keys.refuse(key, fmt::format("does not hold a flag for each of {} layers", config.layers));
    config.windowed = *flags;
  } else if (value != nullptr) {
    config.windowed = periodic_windows(config.layers, keys.size(key, m.integer(key), kMaxLayers));
  } else if (family.window_period != 0) {
    config.windowed = periodic_windows(config.layers, family.window_period);
  } else {
    config.windowed.assign(config.layers, true);
  }
}

// A flag for each layer that rotates, or all but every n-th.
void read_placeless(const Family& family, const Keys& keys, const GgufMetadata& m,
                    const std::string& prefix, Config& config) {
  const std::string key = prefix + "attention.rope_pattern";
  if (const GgufValue* value = m.find(key)) {
    const auto* array = std::get_if<GgufArray>(value);
    const auto* flags =
        array == nullptr ? nullptr : std::get_if<std::vector<bool>>(&array->values());
    if (flags == nullptr || flags->size() != config.layers)
      keys.refuse(key, fmt::format("does not hold a flag for each of {} layers", config.layers));
    config.placeless = *flags;
  } else {
    config.placeless = periodic_windows(config.layers, family.window_period);
  }
  config.placeless.flip();
}

void read_rope(const Family& family, const Keys& keys, const GgufMetadata& m,
               const std::string& prefix, RopeConfig& rope) {
  const auto key = [&](std::string_view name) { return fmt::format("{}rope.{}", prefix, name); };
  const auto number = [&](std::string_view name, double otherwise) {
    return keys.positive(key(name), m.number(key(name)).value_or(otherwise));
  };
  rope.theta = number("freq_base", family.default_theta);
  rope.dims = m.integer(key("dimension_count")).value_or(0);
  const std::string scaling = m.text(key("scaling.type")).value_or("none");
  const auto original = m.integer(key("scaling.original_context_length"));
  if (original) rope.original_context = *original;
  if (scaling == "linear") {
    rope.scaling = RopeConfig::Scaling::linear;
    rope.factor = number("scaling.factor", 1);
  } else if (scaling == "yarn") {
    rope.scaling = RopeConfig::Scaling::yarn;
    rope.factor = number("scaling.factor", 1);
    rope.original_context =
        keys.size(key("scaling.original_context_length"), original, kMaxContext);
    rope.beta_fast = number("scaling.yarn_beta_fast", 32);
    rope.beta_slow = number("scaling.yarn_beta_slow", 1);
    const double usual = rope.factor <= 1 ? 1 : 0.1 * std::log(double{rope.factor}) + 1;
    rope.magnitude = static_cast<float>(double{number("scaling.yarn_attn_factor", 1)} *
                                        double{number("scaling.attn_factor", 1)} * usual);
  } else if (scaling == "longrope") {
    rope.magnitude = number("scaling.attn_factor", 1);
  } else if (scaling != "none") {
    keys.unsupported(key("scaling.type"), scaling);
  } else {
    // Files of Phi say nothing of their scaling but this; the factors are tensors.
    rope.magnitude = number("scaling.attn_factor", 1);
  }
}

void read_experts(const Family& family, const Keys& keys, const GgufMetadata& m,
                  const std::string& prefix, Config& config) {
  if (!family.has_experts) {
    if (const auto count = m.integer(prefix + "expert_count"); count && *count != 0)
      keys.unsupported(prefix + "expert_count", std::to_string(*count));
    return;
  }
  const auto size = [&](std::string_view name, uint64_t max) {
    return keys.size(fmt::format("{}{}", prefix, name),
                     m.integer(fmt::format("{}{}", prefix, name)), max);
  };
  ExpertsConfig& experts = config.experts;
  experts.count = size("expert_count", kMaxExperts);
  experts.chosen = size("expert_used_count", kMaxExperts);
  experts.width = m.integer(prefix + "expert_feed_forward_length")
                      ? size("expert_feed_forward_length", kMaxWidth)
                      : config.ffn_width;
  experts.shared_width = m.integer(prefix + "expert_shared_feed_forward_length").value_or(0);
  experts.renormalise = m.boolean(prefix + "expert_weights_norm").value_or(family.renormalises);
  if (const double scale = m.number(prefix + "expert_weights_scale").value_or(1);
      scale != 1 && scale != 0)
    keys.unsupported(prefix + "expert_weights_scale", fmt::format("{}", scale));
  // 1: softmax over all, 3: over the chosen, which is the same where the weights are renormalised.
  const uint64_t gating = m.integer(prefix + "expert_gating_func").value_or(1);
  if (gating != 1 && !(gating == 3 && experts.renormalise))
    keys.unsupported(prefix + "expert_gating_func", std::to_string(gating));
}

}  // namespace

Config config_of_gguf(const Family& family, const GgufMetadata& m, RopeFactors factors) {
  const Keys keys{m.where};
  const std::string prefix = std::string(family.gguf) + ".";
  const auto key = [&](std::string_view name) { return fmt::format("{}{}", prefix, name); };
  const auto size = [&](std::string_view name, uint64_t max) {
    return keys.size(key(name), m.integer(key(name)), max);
  };
  const auto number = [&](std::string_view name, double otherwise) {
    return keys.positive(key(name), m.number(key(name)).value_or(otherwise));
  };
  Config c = begin_config(family);
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
  c.norm_eps = number(family.norm == NormKind::layer ? "attention.layer_norm_epsilon"
                                                     : "attention.layer_norm_rms_epsilon",
                      1e-5);
  read_rope(family, keys, m, prefix, c.rope);
  if (!factors.all.empty()) c.rope.divisors = std::move(factors.all);
  if (!factors.long_context.empty()) {
    const std::string original = key("rope.scaling.original_context_length");
    c.rope.scaling = RopeConfig::Scaling::longrope;
    c.rope.original_context = keys.size(original, m.integer(original), kMaxContext);
    c.rope.divisors = std::move(factors.short_context);
    c.rope.long_divisors = std::move(factors.long_context);
  }
  if (family.scale_of_width_layers != 0 && c.layers == family.scale_of_width_layers)
    c.attn_scale = 1 / std::sqrt(static_cast<float>(c.width / c.heads));
  if (m.number(key("attention.scale"))) c.attn_scale = number("attention.scale", 1);
  c.embedding_scale = number("embedding_scale", 1);
  c.residual_scale = number("residual_scale", 1);
  const float logit_scale = number("logit_scale", family.default_logit_scale);
  if (family.logit_scale == LogitScale::none && logit_scale != 1)
    keys.unsupported(key("logit_scale"), fmt::format("{}", logit_scale));
  c.logit_scale = family.logit_scale == LogitScale::divides ? 1 / logit_scale : logit_scale;
  const auto cap = [&](std::string_view name, float otherwise) {
    const double value = m.number(key(name)).value_or(double{otherwise});
    return value == 0 ? 0 : keys.positive(key(name), value);
  };
  c.attn_softcap = cap("attn_logit_softcapping", family.default_attn_softcap);
  c.final_softcap = cap("final_logit_softcapping", family.default_final_softcap);
  if ((family.features & kOptionalPostNorm) != 0 && !m.boolean(key("use_post_norm")).value_or(true))
    c.norm_layout = NormLayout::pre;
  read_windows(family, keys, m, prefix, c);
  if (family.placeless == Placeless::listed) read_placeless(family, keys, m, prefix, c);
  read_experts(family, keys, m, prefix, c);
  if (const auto n = m.integer(key("vocab_size"))) c.vocab = *n;
  if (const GgufValue* tokens = m.find("tokenizer.ggml.tokens");
      tokens != nullptr && std::holds_alternative<GgufArray>(*tokens))
    c.vocab = std::visit([](const auto& list) { return list.size(); },
                         std::get<GgufArray>(*tokens).values());
  finish_config(family, keys, c);
  if (m.number(key("rope.freq_base_swa"))) c.local_rope.theta = number("rope.freq_base_swa", 1);
  return c;
}

GgufMetadata gguf_metadata_of(const Family& family, const Config& c) {
  GgufMetadata m;
  const auto key = [&](std::string_view name) { return fmt::format("{}.{}", family.gguf, name); };
  const auto u32 = [&](std::string_view name, size_t value) {
    m.set(key(name), GgufScalar{static_cast<uint32_t>(value)});
  };
  const auto f32 = [&](std::string_view name, float value) { m.set(key(name), GgufScalar{value}); };
  const auto text = [&](std::string_view name, const char* value) {
    m.set(key(name), GgufScalar{std::string(value)});
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
  f32(c.norm == NormKind::layer ? "attention.layer_norm_epsilon"
                                : "attention.layer_norm_rms_epsilon",
      c.norm_eps);
  f32("rope.freq_base", c.rope.theta);
  u32("rope.dimension_count", c.rope.dims);
  u32("vocab_size", c.vocab);
  switch (c.rope.scaling) {
    case RopeConfig::Scaling::none:
    case RopeConfig::Scaling::llama3:  // the tensor rope_freqs.weight says it
      break;
    case RopeConfig::Scaling::linear:
      text("rope.scaling.type", "linear");
      f32("rope.scaling.factor", c.rope.factor);
      break;
    case RopeConfig::Scaling::yarn: {
      text("rope.scaling.type", "yarn");
      f32("rope.scaling.factor", c.rope.factor);
      u32("rope.scaling.original_context_length", c.rope.original_context);
      f32("rope.scaling.yarn_beta_fast", c.rope.beta_fast);
      f32("rope.scaling.yarn_beta_slow", c.rope.beta_slow);
      const double usual = c.rope.factor <= 1 ? 1 : 0.1 * std::log(double{c.rope.factor}) + 1;
      if (std::abs(double{c.rope.magnitude} - usual) > 1e-6)
        f32("rope.scaling.yarn_attn_factor", static_cast<float>(double{c.rope.magnitude} / usual));
      break;
    }
    case RopeConfig::Scaling::longrope:
      text("rope.scaling.type", "longrope");
      u32("rope.scaling.original_context_length", c.rope.original_context);
      f32("rope.scaling.attn_factor", c.rope.magnitude);
      break;
  }
  if ((family.features & kOptionalPostNorm) != 0)
    m.set(key("use_post_norm"), GgufScalar{c.norm_layout == NormLayout::sandwich});
  if (family.placeless == Placeless::listed) {
    std::vector<bool> rotates = c.placeless;
    rotates.flip();
    m.set(key("attention.rope_pattern"), GgufArray(rotates));
  }
  if (c.window != 0) {
    u32("attention.sliding_window", c.window);
    f32("rope.freq_base_swa", c.local_rope.theta);
    m.set(key("attention.sliding_window_pattern"), GgufArray(c.windowed));
  } else if (family.default_window != 0 || family.windows == Windows::always) {
    u32("attention.sliding_window", 0);
  }
  if (c.attn_scale != 1 / std::sqrt(static_cast<float>(c.head_dim)))
    f32("attention.scale", c.attn_scale);
  if (!family.scales_embedding && c.embedding_scale != 1) f32("embedding_scale", c.embedding_scale);
  if (c.residual_scale != 1) f32("residual_scale", c.residual_scale);
  if (family.logit_scale != LogitScale::none)
    f32("logit_scale",
        family.logit_scale == LogitScale::divides ? 1 / c.logit_scale : c.logit_scale);
  if (c.attn_softcap != family.default_attn_softcap || c.attn_softcap != 0)
    f32("attn_logit_softcapping", c.attn_softcap);
  if (c.final_softcap != family.default_final_softcap || c.final_softcap != 0)
    f32("final_logit_softcapping", c.final_softcap);
  if (c.experts.count != 0) {
    u32("expert_count", c.experts.count);
    u32("expert_used_count", c.experts.chosen);
    u32("expert_feed_forward_length", c.experts.width);
    if (c.experts.shared_width != 0)
      u32("expert_shared_feed_forward_length", c.experts.shared_width);
    if (c.experts.renormalise != family.renormalises)
      m.set(key("expert_weights_norm"), GgufScalar{c.experts.renormalise});
  }
  return m;
}

}  // namespace moru
