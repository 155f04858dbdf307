// Low-rank adapters (arXiv:2106.09685): y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ, W frozen, s = α/r or α/√r.
//
// All tensors of an adapter lie in one array of floats, so that optimisers, checkpoints and sums of
// gradients see one vector. Within a layer the A's that read the same input are neighbours
//
//   | A_q | A_k | A_v | A_o | A_gate | A_up | A_down | B_q | B_k | … | B_down |
//
// and so form one matrix [r_q + r_k + r_v, width] that a single thin product serves.
#pragma once
#include <array>
#include <cstddef>
#include <span>
#include <string_view>
#include <vector>

#include "engine/model.h"

namespace moru {

enum class Projection : size_t { q, k, v, o, gate, up, down };
inline constexpr size_t kProjections = 7;

struct ProjectionTraits {
  std::string_view name;    // as PEFT's target_modules spell it: "q_proj"
  std::string_view module;  // in a Hugging Face layer: "self_attn.q_proj"
  std::string_view gguf;    // in a GGUF block: "attn_q"
};
const ProjectionTraits& traits(Projection projection);
const Matrix& matrix_of(const Layer& layer, Projection projection);

// The projections that read one input, [first, last).
struct InputGroup {
  size_t first, last;
};
inline constexpr std::array<InputGroup, 4> kInputGroups = {{{0, 3}, {3, 4}, {4, 6}, {6, 7}}};

// One adapted matrix. rank 0: not adapted.
struct LoraPair {
  size_t rank = 0;
  float alpha = 0, scale = 0;
  size_t in = 0, out = 0;
  size_t a = 0, b = 0;  // where A [rank, in] and B [out, rank] begin in the array of floats
};
using LoraLayer = std::array<LoraPair, kProjections>;

struct Lora {
  bool rank_stabilised = false;  // scale = α/√r (arXiv:2312.03732) instead of α/r
  std::vector<LoraLayer> layers;
  std::vector<float> values;

  std::span<float> a(const LoraPair& p) { return {values.data() + p.a, p.rank * p.in}; }
  std::span<float> b(const LoraPair& p) { return {values.data() + p.b, p.out * p.rank}; }
  std::span<const float> a(const LoraPair& p) const { return {values.data() + p.a, p.rank * p.in}; }
  std::span<const float> b(const LoraPair& p) const {
    return {values.data() + p.b, p.out * p.rank};
  }
};

// Sets scale, in, out and the places of every pair whose rank and alpha are set, by the model's
// shapes, and sizes `values` (zeros).
void lay_out(Lora& lora, const Config& config);

// Rows of the stacked A of one group: the sum of its ranks.
size_t group_rank(const LoraLayer& layer, InputGroup group);

}  // namespace moru
