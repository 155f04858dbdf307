// Forward and hand-written backward of the decoder block for training LoRA adapters on a frozen
// model: engine.md's straight line, once in each direction.
//
//   training_forward.cc    one block forward, keeping what its backward pass reads
//   training_backward.cc   the same lines, mirrored
//   training.cc            memory, batches, the head with its loss
//
// The model's matrices are dense: Profile::f32 is the reference, Profile::bf16 multiplies in bf16
// with f32 sums and keeps activations in bf16, the residual stream in f32. Results do not depend on
// the number of threads.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/threads.h"
#include "engine/lora.h"
#include "engine/model.h"

namespace moru {

// Tokens of one or more documents, one after the other. A document attends to itself alone and its
// positions begin at 0, so packing changes no result.
struct TrainingBatch {
  std::vector<int32_t> ids;       // [tokens]
  std::vector<int32_t> targets;   // [tokens]: the token that should follow, or kNoTarget
  std::vector<size_t> starts{0};  // of each document, and the end of the last

  static constexpr int32_t kNoTarget = -1;
  size_t tokens() const { return ids.size(); }
  size_t documents() const { return starts.size() - 1; }
  size_t trained() const;
  // Appends one document: `trained[i]` says whether token i is to be learnt (from those before it;
  // so trained[0] has no effect).
  void append(std::span<const int32_t> document, std::span<const uint8_t> trained);
};

// What the backward pass finds kept, and what it makes anew.
enum class Recompute {
  none,   // all kept
  light,  // norms and the gated hidden rows are remade: cheap
  block,  // only the input of each block is kept: 1.5 times the products
};

struct TrainingOptions {
  size_t tokens = 2048;  // of the largest batch
  Recompute recompute = Recompute::light;
};

class LoraTraining {
 public:
  // `model` and `lora` must outlive the object; lora.values may change between calls.
  // Errors: no_space; unsupported for a model that is not dense.
  LoraTraining(Pool& pool, const Model& model, const Lora& lora, const TrainingOptions& options);
  ~LoraTraining();

  // Bytes that the constructor takes.
  static size_t plan_bytes(const Model& model, const Lora& lora, const TrainingOptions& options);

  // Σ −log p(target) over the batch's trained tokens, and adds to gradients() the gradient of
  // scale · that sum. nll: [tokens] or empty; what is not trained is 0. Nothing flows below the
  // lowest adapted layer.
  double accumulate(const TrainingBatch& batch, float scale, std::span<float> nll = {});
  // The sum alone, forward only.
  double evaluate(const TrainingBatch& batch, std::span<float> nll = {});

  // Laid out as lora.values.
  std::span<float> gradients();
  void clear_gradients();

  struct State;  // training_block.h

 private:
  std::unique_ptr<State> state_;
};

// Multiplications and additions of one accumulate() over `batch`, counted as 2 each: frozen
// matrices forward and backward, adapters, attention within the causal mask, and the head on
// trained tokens. Work that is done twice (Recompute) is counted once.
double training_flops(const Model& model, const Lora& lora, const TrainingBatch& batch);

}  // namespace moru
