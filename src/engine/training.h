// Forward and hand-written backward of the decoder block: LoRA adapters on frozen weights of any
// form, and weights that are learnt whole. engine.md's straight line, once in each direction.
//
//   training_forward.cc    one block forward, keeping what its backward pass reads
//   training_backward.cc   the same lines, mirrored
//   training_dora.cc       DoRA's factors and the gradients of its magnitudes
//   training.cc            memory, batches, the head with its loss
//
// Products are dense: Profile::f32 is the reference, Profile::bf16 multiplies in bf16 with f32 sums
// and keeps activations in bf16, the residual stream in f32. The weights of a quantized model
// (Profile::exact) are unpacked matrix by matrix, once for all tokens of a batch. Results do not
// depend on the number of threads.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "base/threads.h"
#include "engine/attention.h"
#include "engine/lora.h"
#include "engine/model.h"

namespace moru {

// Tokens of one or more documents, one after the other. A document attends to itself alone and its
// positions begin at 0, so packing changes no result.
struct TrainingBatch {
  std::vector<int32_t> ids;      // [tokens]
  std::vector<int32_t> targets;  // [tokens]: the token that should follow, or kNoTarget
  std::vector<PackedDocument> documents;
  std::vector<uint64_t> keys;  // [documents]: what the noise on their embeddings is a function of

  static constexpr int32_t kNoTarget = -1;
  size_t tokens() const { return ids.size(); }
  size_t trained() const;
  // Appends one document: `trained[i]` says whether token i is to be learnt (from those before it;
  // so trained[0] has no effect).
  void append(std::span<const int32_t> document, std::span<const uint8_t> trained,
              uint64_t key = 0);
  // Appends a document that goes on where the first `prefix` tokens of document `of` end: they are
  // computed once for both. No document of a chain: `of` has no prefix itself.
  void append_after(size_t of, size_t prefix, std::span<const int32_t> document,
                    std::span<const uint8_t> trained, uint64_t key = 0);
};

// NEFTune (arXiv:2310.05914): while a document of L tokens is learnt from, its embedded tokens move
// by uniform noise within ±alpha/√(L · width). The noise is a function of seed, step, the
// document's key and the place alone: how documents are dealt to batches, threads or processes
// changes nothing.
struct EmbeddingNoise {
  float alpha = 0;  // 0: none
  uint64_t seed = 0, step = 0;
};
// x [width], the token at `position` of a document of `length` tokens, += noise.
void add_noise(const EmbeddingNoise& noise, uint64_t key, size_t position, size_t length,
               std::span<float> x);

// What the backward pass finds kept, and what it makes anew.
enum class Recompute {
  none,   // all kept
  light,  // norms and the gated hidden rows are remade: cheap
  block,  // only the input of each block is kept: 1.5 times the products
};

struct TrainingOptions {
  size_t tokens = 2048;  // of the largest batch
  Recompute recompute = Recompute::light;
  // What a quantized model computes in: bf16 or f32. A dense one computes in its own type.
  DType quantized_type = DType::bf16;
  // Columns of the logits' gradient that one product of the head takes: with a large vocabulary at
  // a time every row is far from the one before it (Gemma 3: 300 GFLOP/s instead of 340).
  size_t head_columns = 8192;
  // In bf16, where the processor multiplies it, dX of the head leaves out what vanishes of the
  // softmax (filtered_product.h).
  bool filters = true;
};

// What the logits of one trained token looked like.
struct LogitStats {
  float mean = 0;     // over the vocabulary
  float entropy = 0;  // of the distribution, in nats
  bool top = false;   // the target was the likeliest
};
// By token of a batch; what is not trained stays 0.
struct TokenLosses {
  std::vector<float> nll;         // −log p(target)
  std::vector<LogitStats> stats;  // filled in if as long as the batch
};
// Given −log p of every token, sets the factor on each one's gradient: ∂loss/∂nll. [tokens] both;
// factors are 0 before the call.
using WeighTokens = std::function<void(std::span<const float> nll, std::span<float> factors)>;

class LoraTraining {
 public:
  // `model` and `lora` must outlive the object. Weights that are learnt whole are written into the
  // model. Error: no_space.
  LoraTraining(Pool& pool, Model& model, const Lora& lora, const TrainingOptions& options);
  ~LoraTraining();

  // Bytes that the constructor takes.
  static size_t plan_bytes(const Model& model, const Lora& lora, const TrainingOptions& options);

  // Takes up lora.values, as the constructor does: call it when they have changed.
  void refresh();

  // Of the accumulate() calls from here on; evaluate() knows no noise.
  void set_noise(const EmbeddingNoise& noise);

  // Σ −log p(target) over the batch's trained tokens, and adds to gradients() the gradient of
  // scale · that sum. nll: [tokens] or empty; what is not trained is 0. Nothing flows below the
  // lowest layer that learns.
  double accumulate(const TrainingBatch& batch, float scale, std::span<float> nll = {},
                    std::span<LogitStats> stats = {});
  // The same for a loss that is a function of all those log-probabilities: the gradient of
  // Σ factor · nll, factors constant.
  void accumulate(const TrainingBatch& batch, const WeighTokens& weigh, TokenLosses& losses);
  // The sum alone, forward only.
  double evaluate(const TrainingBatch& batch, std::span<float> nll = {});
  void evaluate(const TrainingBatch& batch, TokenLosses& losses);

  // Laid out as lora.values.
  std::span<float> gradients();
  void clear_gradients();

  struct State;  // training_block.h

 private:
  std::unique_ptr<State> state_;
};

// Multiplications and additions of one accumulate() over `batch`, counted as 2 each: matrices
// forward and backward (and once more where they are learnt whole), adapters, attention within the
// causal mask, and the head on trained tokens. Work that is done twice (Recompute) is counted once.
double training_flops(const Model& model, const Lora& lora, const TrainingBatch& batch);

}  // namespace moru
