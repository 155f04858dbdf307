// A model ready to compute: weights in the form that its numeric profile multiplies with.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <variant>
#include <vector>

#include "base/memory.h"
#include "base/threads.h"
#include "engine/config.h"
#include "engine/model_files.h"
#include "engine/quant_matrix.h"
#include "engine/rope.h"
#include "formats/dtype.h"

namespace moru {

// How a model computes (docs/architecture.md, "Two numeric profiles").
enum class Profile {
  exact,  // quantized weights as stored, int16 activations: as good as f32 on the file
  bf16,   // weights rounded to bf16, bf16 products with f32 sums
  f32,    // the reference
};

// A dense weight [rows, cols], f32 or bf16.
struct DenseMatrix {
  DType type = DType::f32;
  size_t rows = 0, cols = 0;
  PageBuffer data;

  const float* f32() const { return static_cast<const float*>(data.data()); }
  const uint16_t* bf16() const { return static_cast<const uint16_t*>(data.data()); }
};

// [rows, cols]; empty (rows 0) where a family has no such weight.
struct Matrix {
  std::variant<std::monostate, QuantMatrix, DenseMatrix> form;

  size_t rows() const;
  size_t cols() const;
  size_t bytes() const;
  bool empty() const { return form.index() == 0; }
  const QuantMatrix* quantized() const { return std::get_if<QuantMatrix>(&form); }
  const DenseMatrix* dense() const { return std::get_if<DenseMatrix>(&form); }
  // out: [count, cols] f32, the values of `count` rows from `first`.
  void read_rows(size_t first, size_t count, float* out) const;
};

using Vector = std::vector<float>;  // a norm's gain or a bias; empty where there is none

// The experts of one layer (engine/moe.h).
struct Experts {
  std::vector<float> router;             // [experts, width]
  Vector router_bias;                    // [experts]
  std::vector<Matrix> gate, up, down;    // by expert
  Vector gate_bias, up_bias, down_bias;  // [experts, …]
  Matrix shared_gate, shared_up, shared_down;
  Vector shared_router;  // [width]: how much of the shared expert, before the sigmoid
  bool empty() const { return router.empty(); }
};

// One decoder block. Rows of q and k stand in half-split order whatever the file's order was.
struct Layer {
  Vector attn_norm, ffn_norm;            // empty where the layout has none
  Vector attn_post_norm, ffn_post_norm;  // likewise
  Matrix q, k, v, attn_out;
  Vector q_bias, k_bias, v_bias, attn_out_bias;
  Vector q_norm, k_norm;  // [head_dim] of each head, or of all together
  Vector sinks;           // [heads]
  Matrix gate, up, down;  // empty where there are experts
  Experts experts;
};

struct Model {
  Config config;
  Profile profile;
  Activations activations;  // of the exact profile
  Matrix embedding;         // [vocab, width]
  std::vector<Layer> layers;
  Vector final_norm;
  Matrix head;  // [vocab, width]; empty: tied to the embedding
  RopeTables rope, local_rope;

  const Matrix& output() const { return head.empty() ? embedding : head; }
  const RopeTables& rope_of(size_t layer) const {
    return config.is_windowed(layer) ? local_rope : rope;
  }
  size_t weight_bytes() const;
};

struct LoadOptions {
  // The default: exact for quantized files, bf16 for BF16 and F16, f32 for F32.
  std::optional<Profile> profile;
  Activations activations = Activations::int16;
  size_t context =
      0;  // positions to prepare for; 0: what the model was trained for, at most 32,768
};

// Whether any of the weights is quantized.
bool is_quantized(const ModelFiles& files);
// Error usage where none is: what `flag`, as people write it, asks for would silently not be done.
void refuse_unquantized(const ModelFiles& files, std::string_view flag);

// Errors: bad_input naming the tensor (missing, or of another shape), no_space; usage (the exact
// profile or int8 activations, and nothing is quantized).
Model load_model(Pool& pool, const ModelFiles& files, const LoadOptions& options = {});

}  // namespace moru
