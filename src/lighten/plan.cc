#include "lighten/plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <tuple>

#include "base/error.h"

namespace moru {
namespace {

// How a family of presets spends its extra bytes.
enum class Mix { none, small, medium, large };

struct PresetRow {
  Preset preset;
  Mix mix;
};
constexpr PresetRow kPresets[] = {
    {{"F32", DType::f32, 0}, Mix::none},        {{"BF16", DType::bf16, 32}, Mix::none},
    {{"F16", DType::f16, 1}, Mix::none},        {{"Q8_0", DType::q8_0, 7}, Mix::none},
    {{"Q6_K", DType::q6_k, 18}, Mix::none},     {{"Q5_1", DType::q5_1, 9}, Mix::none},
    {{"Q5_K_M", DType::q5_k, 17}, Mix::medium}, {{"Q5_K_S", DType::q5_k, 16}, Mix::none},
    {{"Q5_0", DType::q5_0, 8}, Mix::none},      {{"Q4_1", DType::q4_1, 3}, Mix::none},
    {{"Q4_K_M", DType::q4_k, 15}, Mix::medium}, {{"Q4_K_S", DType::q4_k, 14}, Mix::small},
    {{"Q4_0", DType::q4_0, 2}, Mix::none},      {{"IQ4_NL", DType::iq4_nl, 25}, Mix::none},
    {{"IQ4_XS", DType::iq4_xs, 30}, Mix::none}, {{"Q3_K_L", DType::q3_k, 13}, Mix::large},
    {{"Q3_K_M", DType::q3_k, 12}, Mix::medium}, {{"Q3_K_S", DType::q3_k, 11}, Mix::none},
};
constexpr auto kPresetList = [] {
  std::array<Preset, std::size(kPresets)> list{};
  for (size_t i = 0; i < list.size(); ++i) list[i] = kPresets[i].preset;
  return list;
}();

enum class Kind { kept, output, embedding, value, key, attention_output, down, other };

// Tensors that steer rather than weigh: too small to save anything, too touchy to round.
constexpr std::string_view kNeverQuantized[] = {
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ssm_conv1d.weight",
    "shortconv.conv.weight",
    "position_embd.weight",
    "token_types.weight",
    "altup",
    "laurel",
};

Kind kind_of(const Tensor& t) {
  const std::string_view name = t.name;
  if (t.shape.size() < 2 || !name.ends_with("weight")) return Kind::kept;
  for (const std::string_view part : kNeverQuantized)
    if (name.find(part) != std::string_view::npos) return Kind::kept;
  const auto has = [&](std::string_view part) { return name.find(part) != std::string_view::npos; };
  if (name == "output.weight") return Kind::output;
  if (name == "token_embd.weight") return Kind::embedding;
  if (has("attn_v.") || has("attn_qkv.") || has("attn_kv_b.")) return Kind::value;
  if (has("attn_k.")) return Kind::key;
  if (has("attn_output.")) return Kind::attention_output;
  if (has("ffn_down")) return Kind::down;
  return Kind::other;
}

// The first and last eighth of the layers, and every third between.
bool matters_more(size_t i, size_t n) {
  return i < n / 8 || i >= 7 * n / 8 || (i - n / 8) % 3 == 2;
}

struct Choice {
  DType type;
  std::string_view reason;
};

class Rules {
 public:
  Rules(const PresetRow& row, const PlanFacts& facts, bool tied)
      : base_(row.preset.base), mix_(row.mix), facts_(facts), tied_(tied) {}

  // i: this tensor's place among the n of its kind; cols: its row.
  Choice choose(Kind kind, size_t i, size_t n, size_t cols) const {
    if (is_float(base_)) return {base_, "base type"};
    switch (kind) {
      case Kind::output:
        return head(cols);
      case Kind::embedding:
        return tied_ ? head(cols) : base("embedding");
      case Kind::value:
        return value(i, n);
      case Kind::key:
        return eight_experts() ? Choice{DType::q8_0, "key of eight experts"} : base();
      case Kind::attention_output:
        return attention_output();
      case Kind::down:
        return down(i, n);
      default:
        return base();
    }
  }

 private:
  Choice base(std::string_view reason = "base type") const { return {base_, reason}; }
  bool is_iq4() const { return base_ == DType::iq4_nl || base_ == DType::iq4_xs; }
  bool eight_experts() const { return facts_.experts == 8; }

  Choice head(size_t cols) const {
    const std::string_view reason = tied_ ? "embedding and output in one" : "output";
    if (base_ == DType::q8_0 || cols % traits(base_).block != 0) return {DType::q8_0, reason};
    return {DType::q6_k, reason};
  }

  Choice value(size_t i, size_t n) const {
    if (eight_experts()) return {DType::q8_0, "value of eight experts"};
    const std::string_view reason = "value projection";
    if (is_iq4() && facts_.kv_heads > 0 && facts_.heads / facts_.kv_heads >= 4)
      return {DType::q5_k, "value projection shared by many heads"};
    if (base_ == DType::q3_k && mix_ == Mix::medium)
      return {i < 2 ? DType::q5_k : DType::q4_k, reason};
    if (base_ == DType::q3_k && mix_ == Mix::large) return {DType::q5_k, reason};
    if (base_ == DType::q4_k && mix_ == Mix::small && i < 4) return {DType::q5_k, reason};
    return medium(i, n, reason);
  }

  Choice down(size_t i, size_t n) const {
    const std::string_view reason = "feed-forward down";
    const bool early = i < n / 8;
    if (base_ == DType::q4_0 && facts_.calibrated && early) return {DType::q4_1, reason};
    if (base_ == DType::q5_0 && facts_.calibrated && early) return {DType::q5_1, reason};
    if (is_iq4() && !facts_.calibrated && early) return {DType::q5_k, reason};
    if (base_ == DType::q3_k && mix_ == Mix::medium)
      return {i < n / 16 ? DType::q5_k : DType::q4_k, reason};
    if (base_ == DType::q3_k && mix_ == Mix::large) return {DType::q5_k, reason};
    if (base_ == DType::q4_k && mix_ == Mix::small && early) return {DType::q5_k, reason};
    return medium(i, n, reason);
  }

  // Q4_K_M and Q5_K_M.
  Choice medium(size_t i, size_t n, std::string_view reason) const {
    const bool applies = (base_ == DType::q4_k || base_ == DType::q5_k) && mix_ == Mix::medium;
    return applies && matters_more(i, n) ? Choice{DType::q6_k, reason} : base();
  }

  Choice attention_output() const {
    const std::string_view reason = "attention output";
    if (eight_experts()) return {std::max(base_, DType::q5_k), reason};
    if (base_ == DType::q3_k && mix_ == Mix::medium) return {DType::q4_k, reason};
    if (base_ == DType::q3_k && mix_ == Mix::large) return {DType::q5_k, reason};
    return base();
  }

  DType base_;
  Mix mix_;
  const PlanFacts& facts_;
  bool tied_;
};

const PresetRow& row_of(const Preset& preset) {
  const auto* row = std::find_if(std::begin(kPresets), std::end(kPresets),
                                 [&](const PresetRow& r) { return r.preset.name == preset.name; });
  MORU_CHECK(row != std::end(kPresets));
  return *row;
}

// Fallbacks of one sort, told together.
struct Fallback {
  size_t tensors = 0, elements = 0;
};

std::string note_of(DType wanted, DType got, size_t cols, const Fallback& f) {
  const auto size = [&](DType type) {
    return static_cast<double>(f.elements) / static_cast<double>(traits(type).block) *
           static_cast<double>(traits(type).block_bytes) / 1e6;
  };
  return fmt::format("{} {} with rows of {}: {} needs multiples of {}, so {} instead ({:+.1f} MB)",
                     f.tensors, f.tensors == 1 ? "tensor" : "tensors", cols, traits(wanted).name,
                     traits(wanted).block, traits(got).name, size(got) - size(wanted));
}

}  // namespace

std::span<const Preset> presets() { return kPresetList; }

const Preset* find_preset(std::string_view name) {
  const auto lower = [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; };
  for (const Preset& preset : kPresetList)
    if (std::equal(name.begin(), name.end(), preset.name.begin(), preset.name.end(),
                   [&](char a, char b) { return lower(a) == lower(b); }))
      return &preset;
  return nullptr;
}

DType type_for_rows(DType wanted, size_t cols) {
  DType type = wanted;
  if (cols % traits(type).block != 0) {
    switch (type) {
      case DType::iq4_xs:
        type = DType::iq4_nl;
        break;
      case DType::q2_k:
      case DType::q3_k:
        type = DType::q4_0;
        break;
      case DType::q4_k:
        type = DType::q5_0;
        break;
      case DType::q5_k:
        type = DType::q5_1;
        break;
      case DType::q6_k:
        type = DType::q8_0;
        break;
      default:
        break;
    }
  }
  return cols % traits(type).block == 0 ? type : DType::f16;
}

Plan plan_preset(const Preset& preset, std::span<const Tensor> tensors, const PlanFacts& facts) {
  const bool tied = std::none_of(tensors.begin(), tensors.end(),
                                 [](const Tensor& t) { return t.name == "output.weight"; });
  const Rules rules(row_of(preset), facts, tied);
  std::map<Kind, size_t> of_kind, seen;
  for (const Tensor& t : tensors) ++of_kind[kind_of(t)];
  std::map<std::tuple<DType, DType, size_t>, Fallback> fallbacks;
  Plan plan;
  for (const Tensor& t : tensors) {
    const Kind kind = kind_of(t);
    const size_t i = seen[kind]++;
    if (kind == Kind::kept) {
      // Norms, biases and routers are read in f32 by every engine; the rest stays as it is.
      const bool small = t.shape.size() < 2 || t.name.ends_with(".bias") ||
                         t.name.ends_with("ffn_gate_inp.weight");
      const bool plain = small && is_float(t.type);
      plan.tensors.push_back({t.name, plain ? DType::f32 : t.type, "never quantized"});
      continue;
    }
    const size_t cols = t.shape.back();
    const Choice choice = rules.choose(kind, i, of_kind[kind], cols);
    const DType type = type_for_rows(choice.type, cols);
    std::string reason(choice.reason);
    if (type != choice.type) {
      Fallback& f = fallbacks[{choice.type, type, cols}];
      ++f.tensors;
      f.elements += t.count();
      reason += fmt::format(", {} does not fit rows of {}", traits(choice.type).name, cols);
    }
    plan.tensors.push_back({t.name, type, std::move(reason)});
  }
  for (const auto& [key, fallback] : fallbacks)
    plan.notes.push_back(note_of(std::get<0>(key), std::get<1>(key), std::get<2>(key), fallback));
  return plan;
}

uint64_t planned_bytes(const GgufMetadata& metadata, std::span<const Tensor> tensors,
                       const Plan& plan) {
  MORU_CHECK(plan.tensors.size() == tensors.size());
  std::vector<Tensor> planned;
  for (size_t i = 0; i < tensors.size(); ++i)
    planned.push_back({tensors[i].name, plan.tensors[i].type, tensors[i].shape, {}});
  return gguf_bytes(metadata, planned);
}

}  // namespace moru
