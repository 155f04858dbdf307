// Low-rank adapters (arXiv:2106.09685): y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ, W frozen, s = α/r or α/√r.
//
// All tensors of an adapter lie in one array of floats, so that optimisers, checkpoints and sums of
// gradients see one vector. Within a layer the A's that read the same input are neighbours
//
//   | A_q | A_k | A_v | A_o | A_gate | A_up | A_down | B_q | B_k | … | B_down |
//
// and so form one matrix [r_q + r_k + r_v, width] that a single thin product serves. After the
// pairs of all layers come DoRA's magnitudes, and then the weights that are learnt whole: PEFT's
// modules_to_save; all of them and no pair is full fine-tuning.
#pragma once
#include <array>
#include <cstddef>
#include <span>
#include <string>
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
  size_t a = 0, b = 0;   // where A [rank, in] and B [out, rank] begin in the array of floats
  size_t magnitude = 0;  // and DoRA's m [out]
};
using LoraLayer = std::array<LoraPair, kProjections>;

// A weight that is learnt itself, in the model's own order of rows.
struct WholeWeight {
  std::string name;           // "token_embd.weight", as ModelFiles has it
  size_t rows = 0, cols = 0;  // a norm or a bias is one row
  size_t at = 0;              // where it begins in the array of floats
  size_t count() const { return rows * cols; }
};

struct Lora {
  bool rank_stabilised = false;  // scale = α/√r (arXiv:2312.03732) instead of α/r
  // DoRA (arXiv:2402.09353): y = m/‖W + s·B·A‖ ⊙ (x·Wᵀ + s·(x·Aᵀ)·Bᵀ) + bias, norms of rows, which
  // count as constants in the gradient.
  bool dora = false;
  std::vector<LoraLayer> layers;
  std::vector<WholeWeight> whole;
  std::vector<float> values;

  bool has_pairs() const;
  std::span<float> of(const WholeWeight& w) { return {values.data() + w.at, w.count()}; }
  std::span<const float> of(const WholeWeight& w) const {
    return {values.data() + w.at, w.count()};
  }
  const WholeWeight* find_whole(std::string_view name) const;  // nullptr if absent

  std::span<float> a(const LoraPair& p) { return {values.data() + p.a, p.rank * p.in}; }
  std::span<float> b(const LoraPair& p) { return {values.data() + p.b, p.out * p.rank}; }
  std::span<const float> a(const LoraPair& p) const { return {values.data() + p.a, p.rank * p.in}; }
  std::span<const float> b(const LoraPair& p) const {
    return {values.data() + p.b, p.out * p.rank};
  }
  bool is_dora(const LoraPair& p) const { return dora && p.rank != 0; }
  // Empty but for DoRA.
  std::span<float> magnitude(const LoraPair& p) {
    return {values.data() + p.magnitude, is_dora(p) ? p.out : 0};
  }
  std::span<const float> magnitude(const LoraPair& p) const {
    return {values.data() + p.magnitude, is_dora(p) ? p.out : 0};
  }
};

// Sets scale, in, out and the places of every pair whose rank and alpha are set, by the model's
// shapes, and those of the whole weights, and sizes `values` (zeros).
void lay_out(Lora& lora, const Config& config);

// Rows of the stacked A of one group: the sum of its ranks.
size_t group_rank(const LoraLayer& layer, InputGroup group);

double squared_row_norm(const Matrix& matrix, size_t row);

// DoRA's magnitudes become ‖W + s·B·A‖ for B = 0: a new adapter changes nothing.
void take_magnitudes(Pool& pool, const Model& model, Lora& lora);

// The whole weights' values from the model, and back to it (rounded to its type): what is learnt is
// what the model computes with. A quantized matrix becomes dense, of `type`, first.
void take_whole(Pool& pool, Model& model, DType type, Lora& lora);
void put_whole(Pool& pool, const Lora& lora, Model& model);

}  // namespace moru
