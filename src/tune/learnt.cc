#include "tune/learnt.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"
#include "engine/weights.h"
#include "tune/adapter.h"

namespace moru {
namespace {

// The name of the weight that PEFT's module name stands for.
std::string weight_name(const std::string& module) {
  if (module == "embed_tokens") return "token_embd.weight";
  if (module == "lm_head") return "output.weight";
  if (module == "norm") return "output_norm.weight";
  return module;
}

// Whether a weight belongs to a block below `layers`, or is the embedding.
bool is_below(const std::string& name, size_t layers) {
  if (layers == 0) return false;
  if (name == "token_embd.weight") return true;
  for (size_t l = 0; l < layers; ++l)
    if (name.starts_with(fmt::format("blk.{}.", l))) return true;
  return false;
}

// A weight that an adapter already learnt whole is one of the model.
void check_present(std::span<const NamedWeight> weights, const WholeWeight& whole) {
  const auto found =
      std::ranges::find_if(weights, [&](const NamedWeight& w) { return w.name == whole.name; });
  if (found == weights.end() || found->rows() != whole.rows || found->cols() != whole.cols)
    throw Error(
        ErrorKind::bad_input,
        {.where = "--adapter",
         .what = fmt::format("the model has no {} of [{}, {}], which the adapter learnt whole",
                             whole.name, whole.rows, whole.cols),
         .cure = "use the model that it was trained on, or merge the adapter first"});
}

// What is learnt whole beside pairs ends in a PEFT folder, where a module is one or the other.
void check_peft(const Config& config, const Lora& lora) {
  const auto refuse = [](const WholeWeight& whole, const char* what, const char* cure) {
    throw Error(ErrorKind::usage,
                {.where = "--modules-to-save: " + whole.name, .what = what, .cure = cure});
  };
  for (const WholeWeight& whole : lora.whole) {
    const std::string module = peft_module_of(config, whole.name);
    if (module.empty())
      refuse(whole, "is no module of the model's Hugging Face folder", "use --full");
    for (size_t l = 0; l < lora.layers.size(); ++l)
      for (size_t p = 0; p < kProjections; ++p)
        if (lora.layers[l][p].rank != 0 &&
            module ==
                fmt::format("model.layers.{}.{}", l, traits(static_cast<Projection>(p)).module))
          refuse(whole, "has an adapter already", "leave it out, or out of --target-modules");
  }
}

}  // namespace

void add_whole(Pool& pool, Model& model, const LearntOptions& options, DType type, Lora& lora) {
  const std::vector<NamedWeight> weights = weights_of(model);
  for (const WholeWeight& had : lora.whole) check_present(weights, had);
  const auto add = [&](const NamedWeight& w) {
    lora.whole.push_back({.name = w.name, .rows = w.rows(), .cols = w.cols()});
  };
  if (options.full) {
    if (options.frozen_layers >= model.config.layers)
      throw Error(ErrorKind::usage, {.where = "--freeze-layers",
                                     .what = fmt::format("the model has {} layers, one of which "
                                                         "must learn",
                                                         model.config.layers),
                                     .cure = "give a smaller number"});
    for (const NamedWeight& w : weights)
      if (!is_below(w.name, options.frozen_layers)) add(w);
  }
  for (const std::string& module : options.modules_to_save) {
    const std::string name = weight_name(module);
    const auto found = std::find_if(weights.begin(), weights.end(),
                                    [&](const NamedWeight& w) { return w.name == name; });
    if (found == weights.end()) {
      const bool tied = name == "output.weight" && model.head.empty();
      throw Error(
          ErrorKind::usage,
          {.where = "--modules-to-save",
           .what = tied ? fmt::format("\"{}\" is the embedding itself in this model", module)
                        : fmt::format("the model has no \"{}\"", module),
           .cure = tied ? "name embed_tokens, which is learnt both ways"
                        : "name embed_tokens, lm_head, norm or a tensor of moru info"});
    }
    if (lora.find_whole(name) == nullptr) add(*found);
  }
  if (lora.has_pairs()) check_peft(model.config, lora);
  // What was there stands first, so its values keep their places.
  const std::vector<float> had = std::move(lora.values);
  lay_out(lora, model.config);
  take_whole(pool, model, type, lora);
  std::ranges::copy(had, lora.values.begin());
}

std::vector<ParameterGroup> parameter_groups(const Lora& lora, const LearntOptions& options) {
  std::vector<ParameterGroup> groups;
  const auto add = [&](size_t first, size_t count, double ratio, bool decays) {
    if (count == 0) return;
    if (!groups.empty() && groups.back().end == first && groups.back().lr_ratio == ratio &&
        groups.back().decays == decays)
      groups.back().end = first + count;
    else
      groups.push_back({first, first + count, ratio, decays});
  };
  for (const LoraLayer& layer : lora.layers) {
    for (const LoraPair& p : layer) add(p.a, p.rank * p.in, 1, true);
    for (const LoraPair& p : layer) add(p.b, p.rank * p.out, options.lora_plus_ratio, true);
  }
  // PEFT counts vectors among the fast ones.
  for (const LoraLayer& layer : lora.layers)
    for (const LoraPair& p : layer)
      add(p.magnitude, lora.magnitude(p).size(), options.lora_plus_ratio, true);
  for (const WholeWeight& w : lora.whole) add(w.at, w.count(), 1, w.rows > 1);
  return groups;
}

}  // namespace moru
