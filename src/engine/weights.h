// The weights of a loaded model under the names that files give them.
#pragma once
#include <string>
#include <vector>

#include "engine/model.h"

namespace moru {

// One of the two is set. A Vector holds what the model computes with (Gemma's norms: 1 + stored).
struct NamedWeight {
  std::string name;  // "blk.3.attn_q.weight", as ModelFiles has it
  Matrix* matrix = nullptr;
  Vector* vector = nullptr;

  size_t rows() const { return matrix != nullptr ? matrix->rows() : 1; }
  size_t cols() const { return matrix != nullptr ? matrix->cols() : vector->size(); }
  size_t count() const { return rows() * cols(); }
};
// In the order of the forward pass: embedding, blocks, last norm, head. Pointers into `model`.
std::vector<NamedWeight> weights_of(Model& model);

}  // namespace moru
