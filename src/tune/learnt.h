// What a run learns: adapters, weights learnt whole, or both, and how fast each of them moves.
#pragma once
#include <string>
#include <vector>

#include "engine/lora.h"
#include "engine/model.h"
#include "tune/optimizer.h"

namespace moru {

struct LearntOptions {
  bool full = false;         // every weight, and no adapters
  size_t frozen_layers = 0;  // full: so many blocks from below, and the embedding, stay as they are
  // Beside adapters: PEFT's names (lm_head, embed_tokens, norm) or those of GGUF tensors.
  std::vector<std::string> modules_to_save;
  double lora_plus_ratio = 1;  // learning rate of B over that of A (arXiv:2402.12354)
};

// Adds the weights to learn whole to `lora`, with the model's values; those that it has learnt
// whole already keep theirs. A quantized one becomes dense, of `type`. Errors: usage for a module
// that the model does not have, that is tied to another or that an adapter changes; bad_input for
// one of `lora` that the model does not have.
void add_whole(Pool& pool, Model& model, const LearntOptions& options, DType type, Lora& lora);

// Learning rates and decay of all that is learnt, in order and without gaps. As transformers does,
// norms and biases do not decay.
std::vector<ParameterGroup> parameter_groups(const Lora& lora, const LearntOptions& options);

}  // namespace moru
