#include "tune/adapter.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "base/error.h"
#include "base/files.h"
#include "base/half.h"
#include "base/random.h"
#include "engine/families.h"
#include "formats/regex.h"
#include "formats/safetensors.h"
#include "formats/tokenizer_export.h"

namespace moru {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

constexpr std::string_view kConfigName = "adapter_config.json";
constexpr std::string_view kWeightsName = "adapter_model.safetensors";
constexpr std::string_view kPeftPrefix = "base_model.model.";
constexpr std::string_view kEmbedding = "token_embd.weight", kHead = "output.weight";

std::string names_of_all_targets() {
  std::string all;
  for (size_t p = 0; p < kProjections; ++p) {
    if (p != 0) all += ", ";
    all += traits(static_cast<Projection>(p)).name;
  }
  return all;
}

// The layer and projection that "….layers.3.self_attn.q_proj" (any prefix) names.
struct Place {
  size_t layer;
  Projection projection;
};
std::optional<Place> place_of_module(std::string_view module) {
  constexpr std::string_view kLayers = "layers.";
  const size_t at = module.rfind(kLayers);
  if (at == std::string_view::npos || (at != 0 && module[at - 1] != '.')) return std::nullopt;
  const std::string_view rest = module.substr(at + kLayers.size());
  size_t layer = 0;
  const auto [end, failed] = std::from_chars(rest.data(), rest.data() + rest.size(), layer);
  const auto digits = static_cast<size_t>(end - rest.data());
  if (failed != std::errc{} || digits >= rest.size() || rest[digits] != '.') return std::nullopt;
  for (size_t p = 0; p < kProjections; ++p)
    if (traits(static_cast<Projection>(p)).module == rest.substr(digits + 1))
      return Place{layer, static_cast<Projection>(p)};
  return std::nullopt;
}

// The layer of "blk.3.attn_qkv.weight", if that is the block's tensor `part`.
std::optional<size_t> layer_of_gguf_name(std::string_view name, std::string_view part) {
  constexpr std::string_view kBlock = "blk.";
  if (!name.starts_with(kBlock)) return std::nullopt;
  name.remove_prefix(kBlock.size());
  size_t layer = 0;
  const auto [end, failed] = std::from_chars(name.data(), name.data() + name.size(), layer);
  const auto digits = static_cast<size_t>(end - name.data());
  if (failed != std::errc{} || digits >= name.size() || name[digits] != '.') return std::nullopt;
  return name.substr(digits + 1) == part ? std::optional(layer) : std::nullopt;
}

// "blk.3.attn_q.weight"
std::optional<Place> place_of_gguf_name(std::string_view name) {
  for (size_t p = 0; p < kProjections; ++p) {
    const auto projection = static_cast<Projection>(p);
    const std::string part = fmt::format("{}.weight", traits(projection).gguf);
    if (const auto layer = layer_of_gguf_name(name, part)) return Place{*layer, projection};
  }
  return std::nullopt;
}

std::string module_name(size_t layer, Projection projection) {
  return fmt::format("model.layers.{}.{}", layer, traits(projection).module);
}

[[noreturn]] void refuse_config(const std::filesystem::path& file, std::string_view field,
                                std::string what, ErrorKind kind = ErrorKind::unsupported) {
  throw Error(kind, {.where = fmt::format("{}: {}", file.string(), field),
                     .what = std::move(what),
                     .cure = "train a plain LoRA adapter of the linear layers"});
}

// What of adapter_config.json changes the computation.
struct PeftConfig {
  double alpha = 8;
  bool rank_stabilised = false, dora = false, ties = false;
  std::vector<std::pair<Regex, double>> alpha_pattern;  // of module names; the first match counts
};

PeftConfig read_config(const std::filesystem::path& file) {
  // In the file's order: of patterns that match, PEFT takes the first.
  const ordered_json j = ordered_json::parse(read_file(file), nullptr, false);
  if (!j.is_object()) refuse_config(file, "file", "not a JSON object", ErrorKind::bad_input);
  const auto truthy = [&](const char* key) {
    const auto found = j.find(key);
    if (found == j.end() || found->is_null()) return false;
    if (found->is_boolean()) return found->get<bool>();
    return found->is_number() || !found->empty();
  };
  if (j.value("peft_type", "LORA") != "LORA")
    refuse_config(file, "peft_type", "is " + j["peft_type"].dump());
  for (const char* key : {"use_qalora", "fan_in_fan_out", "lora_bias", "target_parameters",
                          "trainable_token_indices", "layer_replication"})
    if (truthy(key)) refuse_config(file, key, "is set, which moru does not compute");
  if (const auto bias = j.find("bias"); bias != j.end() && *bias != "none")
    refuse_config(file, "bias", "trained biases are not computed");

  PeftConfig config;
  if (const auto alpha = j.find("lora_alpha"); alpha != j.end()) {
    if (!alpha->is_number())
      refuse_config(file, "lora_alpha", "not a number", ErrorKind::bad_input);
    config.alpha = alpha->get<double>();
  }
  config.rank_stabilised = truthy("use_rslora");
  config.dora = truthy("use_dora");
  // Without modules of its own, PEFT puts what it finds into the model itself.
  config.ties = truthy("ensure_weight_tying") || !truthy("modules_to_save");
  if (const auto pattern = j.find("alpha_pattern"); pattern != j.end() && pattern->is_object()) {
    for (const auto& [key, value] : pattern->items()) {
      if (!value.is_number())
        refuse_config(file, "alpha_pattern", "not a number", ErrorKind::bad_input);
      // As PEFT matches it: the whole name, or what follows a dot in it.
      config.alpha_pattern.emplace_back(Regex(fmt::format("{}: alpha_pattern", file.string()),
                                              fmt::format("^(.*\\.)?({})$", key)),
                                        value.get<double>());
    }
  }
  return config;
}

double alpha_of(const PeftConfig& config, const std::string& module) {
  for (const auto& [pattern, alpha] : config.alpha_pattern)
    if (pattern.find(module, 0)) return alpha;
  return config.alpha;
}

void copy_values(const Tensor& tensor, std::span<float> out) {
  dequantize(tensor.type, tensor.data, out);
}

// Of a model whose head is its embedding: an adapter that has learnt both at once has learnt the
// embedding; one that has not leaves the model with a head of its own.
void tie_head(const std::filesystem::path& file, bool ties, Lora& lora) {
  const WholeWeight *embedding = lora.find_whole(kEmbedding), *head = lora.find_whole(kHead);
  if (embedding == nullptr) return;
  if (head == nullptr && !ties)
    refuse_config(file, "ensure_weight_tying",
                  "is not set: the adapter learnt the embedding and kept the head as it was, which "
                  "are one in this model");
  if (head == nullptr || !std::ranges::equal(lora.of(*embedding), lora.of(*head))) return;
  const size_t from = head->at, count = head->count();
  const auto at = lora.values.begin() + static_cast<std::ptrdiff_t>(from);
  lora.values.erase(at, at + static_cast<std::ptrdiff_t>(count));
  std::erase_if(lora.whole, [](const WholeWeight& w) { return w.name == kHead; });
  for (WholeWeight& weight : lora.whole)
    if (weight.at > from) weight.at -= count;
}

// GGUF's llama order of rows within a head (adjacent pairs) to the half-split order of B's rows.
size_t half_split_row(size_t row, size_t head_dim) {
  const size_t head = row / head_dim, at = row % head_dim;
  return head * head_dim + at / 2 + (at % 2) * (head_dim / 2);
}

}  // namespace

std::vector<Projection> parse_target_modules(std::string_view text) {
  std::vector<Projection> targets;
  if (text == "all-linear") {
    for (size_t p = 0; p < kProjections; ++p) targets.push_back(static_cast<Projection>(p));
    return targets;
  }
  while (!text.empty()) {
    const size_t comma = std::min(text.find(','), text.size());
    const std::string_view name = text.substr(0, comma);
    text.remove_prefix(std::min(comma + 1, text.size()));
    size_t p = 0;
    while (p < kProjections && traits(static_cast<Projection>(p)).name != name) ++p;
    if (p == kProjections)
      throw Error(ErrorKind::usage, {.where = "--target-modules",
                                     .what = fmt::format("\"{}\" is no linear layer", name),
                                     .cure = "all-linear, or of " + names_of_all_targets()});
    targets.push_back(static_cast<Projection>(p));
  }
  if (targets.empty())
    throw Error(ErrorKind::usage, {.where = "--target-modules",
                                   .what = "names no layer",
                                   .cure = "all-linear, or of " + names_of_all_targets()});
  return targets;
}

std::vector<size_t> parse_layers(std::string_view text) {
  constexpr size_t kMaxLayers = 4096;
  const auto refuse = [&](std::string_view part) {
    throw Error(ErrorKind::usage, {.where = "--layers-to-transform",
                                   .what = fmt::format("\"{}\" is no layer, nor a range", part),
                                   .cure = "for example 0-3,7"});
  };
  std::set<size_t> layers;
  while (!text.empty()) {
    const size_t comma = std::min(text.find(','), text.size());
    const std::string_view part = text.substr(0, comma);
    text.remove_prefix(std::min(comma + 1, text.size()));
    const char* end = part.data() + part.size();
    const auto number = [&](const char* from, size_t& value) {
      const auto [stop, failed] = std::from_chars(from, end, value);
      return failed == std::errc{} ? stop : nullptr;
    };
    size_t first = 0;
    const char* at = number(part.data(), first);
    size_t last = first;
    if (at != nullptr && at != end && *at == '-') at = number(at + 1, last);
    if (at != end || last < first || last >= kMaxLayers) refuse(part);
    for (size_t l = first; l <= last; ++l) layers.insert(l);
  }
  return {layers.begin(), layers.end()};
}

Lora make_lora(const Config& config, const AdapterOptions& options, uint64_t seed) {
  if (!options.layers.empty() && options.layers.back() >= config.layers)
    throw Error(ErrorKind::usage,
                {.where = "--layers-to-transform",
                 .what = fmt::format("the model has {} layers, no layer {}", config.layers,
                                     options.layers.back()),
                 .cure = fmt::format("name layers of 0 to {}", config.layers - 1)});
  Lora lora;
  lora.rank_stabilised = options.rank_stabilised;
  lora.dora = options.dora;
  lora.layers.resize(config.layers);
  const std::vector<Projection> targets =
      options.targets.empty() ? parse_target_modules("all-linear") : options.targets;
  for (size_t l = 0; l < config.layers; ++l) {
    if (!options.layers.empty() && !std::ranges::binary_search(options.layers, l)) continue;
    for (const Projection target : targets) {
      lora.layers[l][static_cast<size_t>(target)].rank = options.rank;
      lora.layers[l][static_cast<size_t>(target)].alpha = options.alpha;
    }
  }
  lay_out(lora, config);
  uint64_t stream = 0;
  for (const LoraLayer& layer : lora.layers) {
    for (const LoraPair& pair : layer) {
      Random random(seed, stream++);
      const float bound = 1 / std::sqrt(static_cast<float>(pair.in));
      for (float& value : lora.a(pair)) value = (2 * random.uniform() - 1) * bound;
    }
  }
  return lora;
}

Lora read_peft_adapter(const std::filesystem::path& folder, const Config& config) {
  const std::filesystem::path config_file = folder / kConfigName;
  const PeftConfig peft = read_config(config_file);
  const SafetensorsFolder files(folder, "adapter_model");

  struct Parts {
    const Tensor *a = nullptr, *b = nullptr, *magnitude = nullptr;
  };
  std::vector<std::array<Parts, kProjections>> parts(config.layers);
  std::vector<const Tensor*> whole;
  Lora lora;
  lora.rank_stabilised = peft.rank_stabilised;
  lora.dora = peft.dora;
  lora.layers.resize(config.layers);
  const auto refuse = [&](const Tensor& tensor, std::string what) {
    throw Error(ErrorKind::bad_input,
                {.where = fmt::format("{}: {}", (folder / kWeightsName).string(), tensor.name),
                 .what = std::move(what),
                 .cure = "use the adapter with the model that it was trained on"});
  };
  for (const Tensor* tensor : files.tensors()) {
    constexpr std::pair<std::string_view, const Tensor * Parts::*> kSuffixes[] = {
        {".lora_A.weight", &Parts::a},
        {".lora_B.weight", &Parts::b},
        {".lora_magnitude_vector", &Parts::magnitude}};
    const std::string_view name = tensor->name;
    const auto found = std::find_if(std::begin(kSuffixes), std::end(kSuffixes),
                                    [&](const auto& s) { return name.ends_with(s.first); });
    if (found == std::end(kSuffixes)) {
      const std::string weight =
          gguf_name_of(family_of(config), name.substr(std::min(name.size(), kPeftPrefix.size())));
      if (!name.starts_with(kPeftPrefix) || weight.empty())
        refuse(*tensor, "is no LoRA matrix of a linear layer and no weight that moru knows");
      if (tensor->shape.empty() || tensor->shape.size() > 2 || !is_float(tensor->type))
        refuse(*tensor, "is not a matrix of floats");
      whole.push_back(tensor);
      lora.whole.push_back({.name = weight,
                            .rows = tensor->shape.size() == 2 ? tensor->shape[0] : 1,
                            .cols = tensor->shape.back()});
      continue;
    }
    const auto& [suffix, part] = *found;
    const auto place = place_of_module(name.substr(0, name.size() - suffix.size()));
    if (place && config.experts.count != 0 && place->projection >= Projection::gate)
      throw Error(ErrorKind::unsupported,
                  {.where = fmt::format("{}: {}", (folder / kWeightsName).string(), tensor->name),
                   .what = "adapts a feed-forward of experts, which moru does not compute",
                   .cure = "train an adapter of q_proj, k_proj, v_proj and o_proj alone"});
    if (!place || place->layer >= config.layers)
      refuse(*tensor, "the model has no such linear layer");
    const bool vector = part == &Parts::magnitude;
    if (vector && !peft.dora) refuse(*tensor, "is DoRA's, and use_dora is not set");
    if (tensor->shape.size() != (vector ? 1 : 2) || !is_float(tensor->type))
      refuse(*tensor, vector ? "is not a vector of floats" : "is not a matrix of floats");
    parts[place->layer][static_cast<size_t>(place->projection)].*part = tensor;
    if (part != &Parts::a) continue;
    LoraPair& pair = lora.layers[place->layer][static_cast<size_t>(place->projection)];
    pair.rank = tensor->shape[0];
    pair.alpha = static_cast<float>(alpha_of(peft, module_name(place->layer, place->projection)));
  }
  lay_out(lora, config);
  for (size_t l = 0; l < config.layers; ++l) {
    for (size_t p = 0; p < kProjections; ++p) {
      const auto [a, b, magnitude] = parts[l][p];
      if (a == nullptr && b == nullptr && magnitude == nullptr) continue;
      if (a == nullptr || b == nullptr)
        refuse(a != nullptr ? *a : b != nullptr ? *b : *magnitude, "its other half is missing");
      const LoraPair& pair = lora.layers[l][p];
      if (peft.dora && magnitude == nullptr) refuse(*a, "its lora_magnitude_vector is missing");
      if (peft.dora && magnitude->shape[0] != pair.out)
        refuse(*magnitude, fmt::format("is [{}], not [{}]", magnitude->shape[0], pair.out));
      if (a->shape != std::vector{pair.rank, pair.in})
        refuse(*a, fmt::format("is {} wide, the model {}", a->shape[1], pair.in));
      if (b->shape != std::vector{pair.out, pair.rank})
        refuse(*b, fmt::format("is [{}, {}], not [{}, {}]", b->shape[0], b->shape[1], pair.out,
                               pair.rank));
      copy_values(*a, lora.a(pair));
      copy_values(*b, lora.b(pair));
      if (peft.dora) copy_values(*magnitude, lora.magnitude(pair));
    }
  }
  for (size_t i = 0; i < whole.size(); ++i) {
    const std::span<float> values = lora.of(lora.whole[i]);
    copy_values(*whole[i], values);
    if (lora.whole[i].name.ends_with("norm.weight"))
      for (float& value : values) value += norm_offset_of(family_of(config));
  }
  if (config.tied_head) tie_head(config_file, peft.ties, lora);
  return lora;
}

std::string peft_module_of(const Config& config, std::string_view weight) {
  const std::string name = folder_name_of(family_of(config), weight);
  return name.empty() ? name : name.substr(0, name.rfind('.'));
}

void write_peft_adapter(const std::filesystem::path& folder, const Lora& lora, const Config& config,
                        const std::string& base_model) {
  if (!lora.has_pairs())
    throw Error(ErrorKind::unsupported, {.where = folder.string(),
                                         .what = "PEFT has no adapter without low-rank matrices",
                                         .cure = "merge it into its model instead"});
  make_folder(folder);
  std::vector<Tensor> tensors;
  std::map<std::string, size_t> ranks;
  std::map<std::string, float> alphas;
  std::array<bool, kProjections> adapted{};
  std::vector<size_t> layers;
  const LoraPair* first = nullptr;
  for (size_t l = 0; l < lora.layers.size(); ++l) {
    for (size_t p = 0; p < kProjections; ++p) {
      const LoraPair& pair = lora.layers[l][p];
      if (pair.rank == 0) continue;
      if (first == nullptr) first = &pair;
      adapted[p] = true;
      if (layers.empty() || layers.back() != l) layers.push_back(l);
      const std::string module = module_name(l, static_cast<Projection>(p));
      if (pair.rank != first->rank) ranks[module] = pair.rank;
      if (pair.alpha != first->alpha) alphas[module] = pair.alpha;
      const std::string prefix = std::string(kPeftPrefix) + module;
      tensors.push_back({prefix + ".lora_A.weight",
                         DType::f32,
                         {pair.rank, pair.in},
                         std::as_bytes(lora.a(pair))});
      tensors.push_back({prefix + ".lora_B.weight",
                         DType::f32,
                         {pair.out, pair.rank},
                         std::as_bytes(lora.b(pair))});
      if (lora.is_dora(pair))
        tensors.push_back({prefix + ".lora_magnitude_vector",
                           DType::f32,
                           {pair.out},
                           std::as_bytes(lora.magnitude(pair))});
    }
  }
  std::set<std::string> modules;
  std::vector<std::vector<float>> stored;  // norms as files have them
  for (const WholeWeight& weight : lora.whole) {
    const std::string name = folder_name_of(family_of(config), weight.name);
    MORU_CHECK(!name.empty());
    modules.insert(peft_module_of(config, weight.name));
    std::span<const float> values = lora.of(weight);
    const float offset = norm_offset_of(family_of(config));
    if (weight.name.ends_with("norm.weight") && offset != 0) {
      std::vector<float>& copy = stored.emplace_back(values.begin(), values.end());
      for (float& value : copy) value -= offset;
      values = copy;
    }
    const auto add = [&](std::string_view as) {
      std::vector<size_t> shape = {weight.cols};
      if (weight.rows > 1) shape.insert(shape.begin(), weight.rows);
      tensors.push_back({std::string(kPeftPrefix).append(as), DType::f32, std::move(shape),
                         std::as_bytes(values)});
    };
    add(name);
    // As PEFT writes a head that is the embedding.
    if (config.tied_head && weight.name == kEmbedding && lora.find_whole(kHead) == nullptr)
      add(folder_name_of(family_of(config), kHead));
  }
  // The smallest set of keys: readers take defaults for the rest, old ones refuse what they do not
  // know.
  json j = {{"alpha_pattern", alphas},  {"base_model_name_or_path", base_model},
            {"bias", "none"},           {"fan_in_fan_out", false},
            {"inference_mode", true},   {"lora_alpha", first->alpha},
            {"lora_dropout", 0.0},      {"peft_type", "LORA"},
            {"peft_version", "0.13.0"}, {"r", first->rank},
            {"rank_pattern", ranks},    {"target_modules", json::array()},
            {"task_type", "CAUSAL_LM"}, {"use_rslora", lora.rank_stabilised}};
  // PEFT's alpha is an integer by declaration.
  if (first->alpha == std::floor(first->alpha))
    j["lora_alpha"] = static_cast<int64_t>(first->alpha);
  for (size_t p = 0; p < kProjections; ++p)
    if (adapted[p]) j["target_modules"].push_back(traits(static_cast<Projection>(p)).name);
  if (layers.size() != lora.layers.size()) j["layers_to_transform"] = layers;
  if (lora.dora) j["use_dora"] = true;
  if (!modules.empty()) j["modules_to_save"] = modules;
  if (config.tied_head && modules.contains(peft_module_of(config, kEmbedding)) &&
      lora.find_whole(kHead) == nullptr)
    j["ensure_weight_tying"] = true;
  write_safetensors(folder / kWeightsName, tensors, {{"format", "pt"}});
  write_file(folder / kConfigName, j.dump(2) + "\n");
}

namespace {

// A projection whose rows stand in a tensor from row `first` on.
struct Stored {
  Projection projection;
  size_t first;
};
struct StoredPlaces {
  size_t layer = 0;
  std::vector<Stored> projections;
};
// What of a GGUF's tensor adapters change: one projection, or several that it holds row after row.
StoredPlaces places_of_tensor(const Tensor& tensor, const Config& c) {
  StoredPlaces places;
  if (const auto place = place_of_gguf_name(tensor.name)) {
    places.layer = place->layer;
    if (place->projection == Projection::up && tensor.shape[0] == 2 * c.ffn_width)
      places.projections = {{Projection::gate, 0}, {Projection::up, c.ffn_width}};
    else
      places.projections = {{place->projection, 0}};
  } else if (const auto layer = layer_of_gguf_name(tensor.name, "attn_qkv.weight")) {
    places.layer = *layer;
    places.projections = {{Projection::q, 0},
                          {Projection::k, c.q_width()},
                          {Projection::v, c.q_width() + c.kv_width()}};
  }
  return places;
}

// Whether a model whose head is its embedding gets one that is not.
bool has_own_head(const Config& config, const Lora& lora) {
  return config.tied_head && lora.find_whole(kHead) != nullptr;
}

// w [out, in] += s · B·A, its rows in the file's order; DoRA then gives each row its length.
void add_product(const Lora& lora, const LoraPair& pair, bool turned, size_t head_dim, float* w) {
  const std::span<const float> a = lora.a(pair), b = lora.b(pair);
  for (size_t row = 0; row < pair.out; ++row) {
    const size_t from = turned ? half_split_row(row, head_dim) : row;
    for (size_t i = 0; i < pair.rank; ++i) {
      const float factor = pair.scale * b[from * pair.rank + i];
      const float* line = a.data() + i * pair.in;
      for (size_t j = 0; j < pair.in; ++j) w[row * pair.in + j] += factor * line[j];
    }
    if (!lora.is_dora(pair)) continue;
    const std::span<float> sum(w + row * pair.in, pair.in);
    double squares = 0;
    for (const float x : sum) squares += double{x} * double{x};
    const double length = double{lora.magnitude(pair)[from]};
    const auto stretch = static_cast<float>(squares > 0 ? length / std::sqrt(squares) : 0);
    for (float& x : sum) x *= stretch;
  }
}

// What was learnt whole has a place in these files.
void check_whole(const ModelFiles& files, const Lora& lora) {
  for (const WholeWeight& weight : lora.whole) {
    const auto holds = [&](const Tensor& tensor) {
      if (tensor.name == weight.name) return tensor.count() == weight.count();
      const StoredPlaces places = places_of_tensor(tensor, files.config);
      return std::ranges::any_of(places.projections, [&](const Stored& stored) {
        const LoraPair& pair = lora.layers.at(places.layer)[static_cast<size_t>(stored.projection)];
        return weight.rows == pair.out && weight.cols == pair.in &&
               weight.name ==
                   fmt::format("blk.{}.{}.weight", places.layer, traits(stored.projection).gguf);
      });
    };
    const bool own_head = has_own_head(files.config, lora) && weight.name == kHead &&
                          weight.rows == files.config.vocab && weight.cols == files.config.width;
    if (!own_head && std::ranges::none_of(files.tensors, holds))
      throw Error(ErrorKind::bad_input,
                  {.where = files.path.string(),
                   .what = fmt::format("has no {} of [{}, {}], which the adapter learnt whole",
                                       weight.name, weight.rows, weight.cols),
                   .cure = "use the adapter with the model that it was trained on"});
  }
}

}  // namespace

void merged_values(const ModelFiles& files, const Lora& lora, const Tensor& tensor,
                   std::span<float> out) {
  const StoredPlaces places = places_of_tensor(tensor, files.config);
  const bool fused = places.projections.size() > 1;
  if (const WholeWeight* whole = lora.find_whole(tensor.name); whole != nullptr && !fused) {
    const std::span<const float> learnt = lora.of(*whole);
    MORU_CHECK(out.size() == learnt.size());
    const bool turned = files.qk_interleaved && is_query_or_key(tensor.name);
    const bool norm = tensor.name.ends_with("norm.weight");
    const size_t rows = tensor.shape[0], width = out.size() / rows;
    for (size_t row = 0; row < rows; ++row) {
      const size_t from = turned ? half_split_row(row, files.config.head_dim) : row;
      for (size_t i = 0; i < width; ++i)
        out[row * width + i] = learnt[from * width + i] - (norm ? files.norm_offset : 0);
    }
    return;
  }
  const size_t cols = tensor.shape.back();
  std::vector<std::byte> room;
  for (size_t row = 0; row < out.size() / cols; ++row)
    dequantize(tensor.type, files.row(tensor, row, room), out.subspan(row * cols, cols));
  for (const auto [projection, first] : places.projections) {
    // A projection that learnt whole is its rows of a tensor that holds several.
    const std::string name = fmt::format("blk.{}.{}.weight", places.layer, traits(projection).gguf);
    if (const WholeWeight* whole = lora.find_whole(name); whole != nullptr && fused) {
      const std::span<const float> learnt = lora.of(*whole);
      MORU_CHECK(first * cols + learnt.size() <= out.size());
      std::copy(learnt.begin(), learnt.end(),
                out.begin() + static_cast<std::ptrdiff_t>(first * cols));
    }
    const LoraPair& pair = lora.layers.at(places.layer)[static_cast<size_t>(projection)];
    if (pair.rank == 0) continue;
    MORU_CHECK(pair.in == cols && (first + pair.out) * cols <= out.size());
    add_product(lora, pair, files.qk_interleaved && projection <= Projection::k,
                files.config.head_dim, &out[first * cols]);
  }
}

namespace {

// Tensors on their way to a file, spilled to disk so that memory holds one at a time.
class Spill {
 public:
  explicit Spill(const std::filesystem::path& target) : path_(target.string() + ".values") {}
  ~Spill() {
    std::error_code ignored;
    std::filesystem::remove(path_, ignored);
  }
  Spill(const Spill&) = delete;
  Spill& operator=(const Spill&) = delete;

  void add(std::string name, DType type, std::vector<size_t> shape, std::span<const float> values) {
    Tensor tensor{std::move(name), type, std::move(shape), {}};
    bytes_.resize(bytes_of(type, values.size()));
    if (type == DType::f32) {
      std::memcpy(bytes_.data(), values.data(), bytes_.size());
    } else {
      auto* out = reinterpret_cast<uint16_t*>(bytes_.data());
      for (size_t i = 0; i < values.size(); ++i)
        out[i] = type == DType::bf16 ? bf16_from_f32(values[i]) : f16_from_f32(values[i]);
    }
    if (!out_) out_.emplace(path_);
    offsets_.push_back(out_->size());
    out_->write(bytes_);
    sizes_.push_back(bytes_.size());
    tensors_.push_back(std::move(tensor));
  }
  // All of them, with their data; valid while the object lives.
  std::span<const Tensor> finish() {
    if (!out_) return {};
    out_->commit();
    mapped_.emplace(path_);
    for (size_t i = 0; i < tensors_.size(); ++i)
      tensors_[i].data = mapped_->bytes().subspan(offsets_[i], sizes_[i]);
    return tensors_;
  }

 private:
  std::filesystem::path path_;
  std::optional<AtomicFile> out_;
  std::optional<MappedFile> mapped_;
  std::vector<std::byte> bytes_;
  std::vector<size_t> offsets_, sizes_;
  std::vector<Tensor> tensors_;
};

// Rows in half-split order to GGUF llama's order of adjacent pairs.
void interleave_rows(std::vector<float>& values, size_t rows, size_t head_dim) {
  const std::vector<float> from = values;
  const size_t cols = values.size() / rows;
  for (size_t row = 0; row < rows; ++row)
    std::copy_n(from.begin() + static_cast<std::ptrdiff_t>(half_split_row(row, head_dim) * cols),
                cols, values.begin() + static_cast<std::ptrdiff_t>(row * cols));
}

}  // namespace

void write_merged_gguf(const std::filesystem::path& path, const ModelFiles& files, const Lora& lora,
                       DType type) {
  check_whole(files, lora);
  const bool turn = !files.qk_interleaved && gguf_interleaves_qk(*files.family);
  Spill spill(path);
  std::vector<float> values;
  for (const Tensor& tensor : files.tensors) {
    values.resize(tensor.count());
    merged_values(files, lora, tensor, values);
    const bool matrix = tensor.shape.size() > 1;
    if (turn && is_query_or_key(tensor.name))
      interleave_rows(values, tensor.shape[0], files.config.head_dim);
    if (files.norm_offset != 0 && tensor.name.ends_with("norm.weight"))
      for (float& value : values) value += files.norm_offset;
    spill.add(tensor.name, matrix ? type : DType::f32, tensor.shape, values);
  }
  if (has_own_head(files.config, lora)) {
    const WholeWeight& head = *lora.find_whole(kHead);
    spill.add(head.name, type, {head.rows, head.cols}, lora.of(head));
  }
  // general.file_type as ggml counts it.
  GgufMetadata metadata = files.metadata;
  const uint32_t file_type = type == DType::f32 ? 0 : type == DType::f16 ? 1 : 32;
  metadata.set("general.file_type", GgufScalar{file_type});
  write_gguf(path, metadata, spill.finish());
}

namespace {

std::string_view dtype_name(DType type) {
  return type == DType::f32 ? "float32" : type == DType::f16 ? "float16" : "bfloat16";
}

// config.json's way to say the frequencies of a GGUF's rope_freqs.weight: Llama 3's scaling with
// the factor that the lowest frequency shows.
ordered_json rope_scaling_of(const ModelFiles& files) {
  const RopeConfig& rope = files.config.rope;
  const std::vector<float>& divisors = rope.divisors;
  const double factor = double{*std::max_element(divisors.begin(), divisors.end())};
  constexpr double kLow = 1, kHigh = 4, kOriginal = 8192;
  for (size_t i = 0; i < divisors.size(); ++i) {
    const double wavelength =
        2 * M_PI *
        std::pow(double{rope.theta}, static_cast<double>(2 * i) / static_cast<double>(rope.dims));
    double expected = 1;
    if (wavelength > kOriginal / kLow) {
      expected = factor;
    } else if (wavelength > kOriginal / kHigh) {
      const double smooth = (kOriginal / wavelength - kLow) / (kHigh - kLow);
      expected = 1 / ((1 - smooth) / factor + smooth);
    }
    if (std::abs(expected - double{divisors[i]}) > 1e-3 * expected)
      throw Error(ErrorKind::unsupported, {.where = files.path.string() + ": rope_freqs.weight",
                                           .what = "is no scaling that config.json has a name for",
                                           .cure = "merge to GGUF"});
  }
  return {{"rope_type", "llama3"},
          {"factor", factor},
          {"low_freq_factor", kLow},
          {"high_freq_factor", kHigh},
          {"original_max_position_embeddings", static_cast<size_t>(kOriginal)}};
}

// config.json of the plain families. Error unsupported: others have more to say.
ordered_json folder_config_of(const ModelFiles& files) {
  const Config& c = files.config;
  struct Plain {
    std::string_view family, architecture, type;
  };
  constexpr Plain kPlain[] = {{"llama", "LlamaForCausalLM", "llama"},
                              {"qwen2", "Qwen2ForCausalLM", "qwen2"},
                              {"qwen3", "Qwen3ForCausalLM", "qwen3"},
                              {"gemma3", "Gemma3ForCausalLM", "gemma3_text"}};
  const auto plain = std::find_if(std::begin(kPlain), std::end(kPlain),
                                  [&](const Plain& p) { return p.family == c.family; });
  const RopeConfig::Scaling scaling = c.rope.scaling;
  if (plain == std::end(kPlain) || c.experts.count != 0 || !c.rope.long_divisors.empty() ||
      c.rope.dims != c.head_dim || scaling == RopeConfig::Scaling::yarn ||
      scaling == RopeConfig::Scaling::longrope || (c.window != 0 && c.family != "gemma3"))
    throw Error(ErrorKind::unsupported,
                {.where = files.path.string(),
                 .what = "is a GGUF file of a model whose config.json moru does not write",
                 .cure = "merge to GGUF, or start from the model's Hugging Face folder"});
  ordered_json j = {{"architectures", {plain->architecture}},
                    {"model_type", plain->type},
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
                    {"tie_word_embeddings", c.tied_head}};
  const bool gemma = c.family == "gemma3";
  j[gemma ? "hidden_activation" : "hidden_act"] = gemma ? "gelu_pytorch_tanh" : "silu";
  if (scaling == RopeConfig::Scaling::linear)
    j["rope_scaling"] = {{"rope_type", "linear"}, {"factor", c.rope.factor}};
  if (scaling == RopeConfig::Scaling::llama3)
    j["rope_scaling"] = {{"rope_type", "llama3"},
                         {"factor", c.rope.factor},
                         {"low_freq_factor", c.rope.low_freq_factor},
                         {"high_freq_factor", c.rope.high_freq_factor},
                         {"original_max_position_embeddings", c.rope.original_context}};
  if (gemma) j["query_pre_attn_scalar"] = 1 / (c.attn_scale * c.attn_scale);
  if (c.window != 0) {
    j["sliding_window"] = c.window;
    j["rope_local_base_freq"] = c.local_rope.theta;
    for (const bool windowed : c.windowed)
      j["layer_types"].push_back(windowed ? "sliding_attention" : "full_attention");
  }
  return j;
}

// What a GGUF's metadata says, as the other files of a folder: their names and texts.
std::vector<std::pair<std::string, std::string>> folder_files_of(const ModelFiles& files,
                                                                 DType type, bool own_head) {
  const TokenizerFolder tokenizer = tokenizer_folder_of(files.metadata);
  const Tokenizer& ids = files.tokenizer;
  ordered_json config = folder_config_of(files);
  ordered_json generation = ordered_json::object();
  for (const auto& [key, id] : {std::pair{"bos_token_id", ids.bos()},
                                {"eos_token_id", ids.eos()},
                                {"pad_token_id", ids.pad()}})
    if (id) config[key] = generation[key] = *id;
  if (files.stop_ids.size() > 1) generation["eos_token_id"] = files.stop_ids;
  if (!files.config.rope.divisors.empty()) config["rope_scaling"] = rope_scaling_of(files);
  for (const Tensor& tensor : files.tensors)
    if (tensor.name == "blk.0.attn_q.bias") config["attention_bias"] = true;
  if (own_head) config["tie_word_embeddings"] = false;
  config["dtype"] = dtype_name(type);
  ordered_json about = tokenizer.config;
  about["model_max_length"] = files.config.context;
  return {{"config.json", config.dump(2) + "\n"},
          {"generation_config.json", generation.dump(2) + "\n"},
          {"tokenizer.json", tokenizer.tokenizer.dump(1) + "\n"},
          {"tokenizer_config.json", about.dump(2) + "\n"}};
}

// Those of a folder, as they are.
void copy_folder_files(const std::filesystem::path& folder, const ModelFiles& files, DType type,
                       bool own_head) {
  for (const auto& entry : std::filesystem::directory_iterator(files.path)) {
    const std::string name = entry.path().filename().string();
    if (!entry.is_regular_file() || name.ends_with(".safetensors") || name.ends_with(".bin") ||
        name.ends_with(".index.json") || name == "config.json")
      continue;
    write_file(folder / name, read_file(entry.path()));
  }
  ordered_json config = ordered_json::parse(read_file(files.path / "config.json"));
  config.erase("torch_dtype");
  config["dtype"] = dtype_name(type);
  if (own_head) config["tie_word_embeddings"] = false;
  write_file(folder / "config.json", config.dump(2) + "\n");
}

// Rows of GGUF llama's order of adjacent pairs to half-split order.
void split_rows(std::vector<float>& values, size_t rows, size_t head_dim) {
  const std::vector<float> from = values;
  const size_t cols = values.size() / rows;
  for (size_t row = 0; row < rows; ++row)
    std::copy_n(from.begin() + static_cast<std::ptrdiff_t>(row * cols), cols,
                values.begin() + static_cast<std::ptrdiff_t>(half_split_row(row, head_dim) * cols));
}

}  // namespace

void write_merged_folder(const std::filesystem::path& folder, const ModelFiles& files,
                         const Lora& lora, DType type, size_t shard_bytes) {
  // All that can be refused is, before anything is written.
  check_whole(files, lora);
  const Family& family = *files.family;
  const bool from_gguf = !files.folder, own_head = has_own_head(files.config, lora);
  std::vector<std::pair<std::string, std::string>> others;
  if (from_gguf) others = folder_files_of(files, type, own_head);
  std::vector<std::pair<const Tensor*, std::string>> named;
  for (const Tensor& tensor : files.tensors) {
    std::string name = folder_name_of(family, tensor.name);
    // Rotary factors, which stand in config.json.
    if (name.empty() && tensor.shape.size() == 1) continue;
    if (name.empty())
      throw Error(ErrorKind::unsupported, {.where = files.path.string() + ": " + tensor.name,
                                           .what = "has no name in a Hugging Face folder",
                                           .cure = "merge to GGUF"});
    named.emplace_back(&tensor, std::move(name));
  }
  make_folder(folder);
  for (const auto& [name, text] : others) write_file(folder / name, text);
  Spill spill(folder / "model");
  std::vector<float> values;
  for (const auto& [pointer, name] : named) {
    const Tensor& tensor = *pointer;
    values.resize(tensor.count());
    merged_values(files, lora, tensor, values);
    if (from_gguf && files.qk_interleaved && is_query_or_key(tensor.name))
      split_rows(values, tensor.shape[0], files.config.head_dim);
    if (from_gguf && tensor.name.ends_with("norm.weight"))
      for (float& value : values) value -= norm_offset_of(family);
    spill.add(name, type, tensor.shape, values);
  }
  if (own_head) {
    const WholeWeight& head = *lora.find_whole(kHead);
    spill.add(folder_name_of(family, kHead), type, {head.rows, head.cols}, lora.of(head));
  }
  write_safetensors_folder(folder, spill.finish(), shard_bytes);
  if (!from_gguf) copy_folder_files(folder, files, type, own_head);
}

void write_gguf_adapter(const std::filesystem::path& path, const ModelFiles& files,
                        const Lora& lora) {
  const auto refuse = [&](const char* what) {
    throw Error(ErrorKind::unsupported,
                {.where = path.string(), .what = what, .cure = "merge the adapter into the model"});
  };
  if (!lora.whole.empty()) refuse("an adapter file cannot hold weights that were learnt whole");
  if (lora.dora) refuse("an adapter file cannot hold DoRA's magnitudes");
  for (const Tensor& tensor : files.tensors)
    if (places_of_tensor(tensor, files.config).projections.size() > 1)
      refuse(
          "the model keeps several projections in one tensor, which an adapter file cannot split");
  const bool turn = gguf_interleaves_qk(*files.family);
  GgufMetadata metadata;
  metadata.set("general.type", GgufScalar{std::string("adapter")});
  metadata.set("general.architecture",
               GgufScalar{files.metadata.text("general.architecture").value_or("")});
  metadata.set("adapter.type", GgufScalar{std::string("lora")});
  std::vector<Tensor> tensors;
  std::vector<std::vector<float>> values;
  values.reserve(lora.layers.size() * kProjections);  // tensors point into it
  std::optional<float> alpha;
  for (size_t l = 0; l < lora.layers.size(); ++l) {
    for (size_t p = 0; p < kProjections; ++p) {
      const LoraPair& pair = lora.layers[l][p];
      if (pair.rank == 0) continue;
      const auto rank = static_cast<float>(pair.rank);
      if (!alpha) alpha = pair.scale * rank;
      const float fold = pair.scale * rank / *alpha;
      const std::span<const float> b = lora.b(pair);
      std::vector<float>& rows = values.emplace_back(b.size());
      const bool turned = turn && p <= static_cast<size_t>(Projection::k);
      for (size_t row = 0; row < pair.out; ++row) {
        const size_t from = turned ? half_split_row(row, files.config.head_dim) : row;
        for (size_t i = 0; i < pair.rank; ++i)
          rows[row * pair.rank + i] = fold * b[from * pair.rank + i];
      }
      const std::string name =
          fmt::format("blk.{}.{}.weight", l, traits(static_cast<Projection>(p)).gguf);
      tensors.push_back(
          {name + ".lora_a", DType::f32, {pair.rank, pair.in}, std::as_bytes(lora.a(pair))});
      tensors.push_back({name + ".lora_b",
                         DType::f32,
                         {pair.out, pair.rank},
                         std::as_bytes(std::span<const float>(rows))});
    }
  }
  if (!alpha)
    throw Error(ErrorKind::unsupported, {.where = path.string(),
                                         .what = "the adapter has no low-rank matrices",
                                         .cure = "merge it into the model"});
  metadata.set("adapter.lora.alpha", GgufScalar{*alpha});
  write_gguf(path, metadata, tensors);
}

}  // namespace moru
