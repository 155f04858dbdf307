// One step of a model over any mix of sequences: new tokens in, logits out.
//
// Serving, scoring, generating and calibrating are all steps; they differ in which tokens' logits
// they ask for and in what they watch. Under the exact profile a token's logits have the same bits
// whatever else shares the step.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "base/threads.h"
#include "engine/adapter.h"
#include "engine/kv_cache.h"
#include "engine/model.h"
#include "formats/tokenizer.h"

namespace moru {

// Consecutive new tokens of one sequence, at positions that follow what it already holds.
struct StepSpan {
  KvSequence* sequence;
  std::span<const TokenId> tokens;
  size_t logits_from;  // tokens[logits_from …] want logits; tokens.size(): none does
  const Adapter* adapter = nullptr;  // nullptr: the engine's
};

struct EngineOptions {
  size_t step_tokens = 512;     // most tokens of one step
  size_t cache_tokens = 16384;  // positions that the KV cache has room for, over all sequences
  size_t cache_bytes = 0;       // or its memory, never more; 0: what cache_tokens take
  KvType kv_type = KvType::i16;
  const Adapter* adapter = nullptr;  // of spans that name none; must outlive the engine
};

class Engine {
 public:
  // Takes all memory that steps will need. `pool` and `model` must outlive it. Errors: no_space;
  // usage (cache_bytes do not hold two pages of every layer).
  Engine(Pool& pool, const Model& model, const EngineOptions& options = {});
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Called for consecutive rows that want logits, in the order of spans and tokens, a few at a
  // time: `first` counts wanted rows, `logits` is [count, vocab] and may be overwritten.
  using LogitsVisitor = std::function<void(size_t first, size_t count, float* logits)>;
  // Runs the spans' tokens, at most step_tokens in all, and appends them to their sequences.
  // Error no_space: the KV cache has no room; nothing was changed.
  void step(std::span<const StepSpan> spans, const LogitsVisitor& visit);

  // What enters a product: [rows, cols] activations and the name of the weight that meets them
  // ("blk.3.ffn_down.weight"). Called by every later step while set: calibration watches this.
  using InputWatcher =
      std::function<void(std::string_view weight, const float* x, size_t rows, size_t cols)>;
  void watch_inputs(InputWatcher watcher);

  KvCache& cache();
  Pool& pool();
  const Model& model() const;
  size_t step_tokens() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace moru
