// A row of the table of families, for the files that read it: families.cc (the rows),
// config_folder.cc and config_gguf.cc (from keys to Config and back), folder_tensors.cc.
#pragma once
#include <array>
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "engine/config.h"
#include "engine/families.h"

namespace moru {

// How a folder stores what a GGUF has as one tensor.
enum class FolderForm : uint8_t {
  plain,         // alike
  per_expert,    // [rows, cols] of each expert under its own name: '*' stands for its number
  columns,       // [experts, cols, rows]: transposed
  even_columns,  // transposed, and every second row, from the first
  odd_columns,   // transposed, and every second row, from the second
  even_values,   // [experts, 2 n]: every second value
  odd_values,
};

struct NamePair {
  std::string_view gguf, folder;  // within a block, or of the whole model
  FolderForm form = FolderForm::plain;
};

// Which layers see a window alone, where the file does not list them.
enum class Windows : uint8_t {
  never,
  always,    // all layers, if a window is given
  late,      // layers from max_window_layers on, if use_sliding_window
  periodic,  // all but every n-th
};

// Which layers do not rotate q and k at all.
enum class Placeless : uint8_t {
  none,
  full_layers,  // those without a window, in a model that has windows
  listed,       // no_rope_layers, or every n-th
};

enum class LogitScale : uint8_t { none, multiplies, divides };

// Keys of config.json that change the result and that a family may have; a family that does not
// name the feature refuses the key, unless its value is neutral.
enum Feature : unsigned {
  kNoFeature = 0,
  kMultipliers = 1,        // embedding_multiplier, attention_multiplier, residual_multiplier
  kSoftcaps = 2,           // attn_logit_softcapping, final_logit_softcapping
  kQueryScalar = 4,        // query_pre_attn_scalar
  kPartialRotary = 8,      // partial_rotary_factor
  kRopeAlpha = 16,         // rope type dynamic with a fixed alpha
  kOptionalPostNorm = 32,  // use_post_norm: sandwich if true, else pre
};

struct Family {
  std::string_view name;               // what people call it
  std::string_view gguf;               // general.architecture
  std::string_view architecture;       // config.json's architectures[0]
  bool gguf_interleaves_qk = false;    // the file's rotary pairs are neighbours
  bool folder_interleaves_qk = false;  // likewise
  float norm_offset = 0;               // to add to a folder's gains of norms
  NormLayout norm_layout = NormLayout::pre;
  NormKind norm = NormKind::rms;
  QkNorm qk_norm = QkNorm::none;
  Activation activation = Activation::silu;
  bool scales_embedding = false;  // by √width
  bool tied_by_default = false;
  double default_theta = 10000;
  Windows windows = Windows::never;
  size_t window_period = 0;   // of Windows::periodic and Placeless::listed
  size_t default_window = 0;  // where a file names none
  double local_theta = 0;     // of windowed layers, unscaled; 0: they rotate as the others do
  Placeless placeless = Placeless::none;
  LogitScale logit_scale = LogitScale::none;
  std::string_view logit_scale_key = "";  // of config.json
  double default_logit_scale = 1;
  float default_attn_softcap = 0, default_final_softcap = 0;
  // Its GGUF says nothing of the scores' scale; with so many layers it is (width / heads)^-½.
  size_t scale_of_width_layers = 0;
  bool yarn_truncates = true;
  bool has_sinks = false;
  bool has_experts = false;
  bool renormalises = true;  // where its GGUF does not say
  unsigned features = kNoFeature;
  std::array<std::span<const NamePair>, 5> block_names;
};

std::span<const NamePair> model_names();  // tensors outside of blocks

// Reads required and optional values, and says which key is at fault.
struct Keys {
  std::string where;

  [[noreturn]] void refuse(std::string_view key, std::string what, std::string cure = "") const;
  [[noreturn]] void unsupported(std::string_view key, std::string_view value) const;
  size_t size(std::string_view key, std::optional<uint64_t> value, uint64_t max) const;
  float positive(std::string_view key, double value) const;
};

inline constexpr uint64_t kMaxLayers = 1024, kMaxWidth = 1 << 20, kMaxVocab = 1 << 24,
                          kMaxHeads = 4096, kMaxContext = 1 << 28, kMaxExperts = 4096;

// A config with what the row alone decides.
Config begin_config(const Family& family);
// What holds for every source once the numbers are in: defaults that follow from others, and
// checks.
void finish_config(const Family& family, const Keys& keys, Config& config);
// The layers that see a window: all but every n-th; or from `first` on.
std::vector<bool> periodic_windows(size_t layers, size_t period);
std::vector<bool> late_windows(size_t layers, size_t first);

}  // namespace moru
