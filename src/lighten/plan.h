// Which type each tensor of a model gets under a named preset: llama.cpp's rules for Q4_K_M and its
// kin, so that a file of that name is what its users expect, byte for byte as large.
//
// The rules spend more where rounding hurts most: the output head, the value projections and the
// way back down from the feed-forward layer, in the first, the last and every third layer between.
// Types with blocks of 256 need rows that 256 divides; where it does not, the next larger type with
// blocks of 32 steps in. On small models that is most of the file, so it is always reported.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "formats/gguf.h"

namespace moru {

struct Preset {
  std::string_view name;  // "Q4_K_M"
  DType base;             // what most tensors get
  uint32_t file_type;     // general.file_type of the written model
};
std::span<const Preset> presets();                 // from the largest to the smallest
const Preset* find_preset(std::string_view name);  // ignoring case; nullptr if there is none

// What the rules ask about the model, beside its tensors.
struct PlanFacts {
  size_t heads = 1, kv_heads = 1;
  size_t experts = 0;
  bool calibrated = false;  // whether importances will be given to the quantizer
};

struct TensorPlan {
  std::string name;
  DType type;
  std::string reason;  // "base type", "value projection, layers that matter more" …
};

struct Plan {
  std::vector<TensorPlan> tensors;  // in the order of the model
  std::vector<std::string> notes;   // fallbacks and what they cost, a line each, for the log
};

// Plans the tensors of a model (names as in GGUF; only name, type and shape are read).
Plan plan_preset(const Preset& preset, std::span<const Tensor> tensors, const PlanFacts& facts);

// The type that holds rows of `cols` elements: `wanted`, or what llama.cpp falls back to.
DType type_for_rows(DType wanted, size_t cols);

// Exactly how large the GGUF file will be that holds these tensors under this plan.
uint64_t planned_bytes(const GgufMetadata& metadata, std::span<const Tensor> tensors,
                       const Plan& plan);

}  // namespace moru
