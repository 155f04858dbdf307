// What each weight meets: the mean square of every input channel, over text that the model will
// work on. Rounding puts its errors where these are small (lighten/quantize.h).
#pragma once
#include <functional>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "engine/forward.h"
#include "formats/tokenizer.h"

namespace moru {

struct Importance {
  // E[x_j²] by GGUF name of the weight ("blk.3.ffn_up.weight"), [cols]. The head's stands under
  // output.weight and, for tied models, token_embd.weight as well.
  std::map<std::string, std::vector<float>, std::less<>> mean_square;
  size_t tokens = 0;

  // The channels' importance for a weight; empty (all alike) where nothing was collected.
  std::span<const float> of(std::string_view weight) const;
};

// Runs the sequences through the model, each by itself, at most `max_tokens` tokens in all. The
// first token of a sequence is left out: its activations are extreme and like no other's.
// progress(tokens done, tokens in all).
Importance collect_importance(Engine& engine, std::span<const std::vector<TokenId>> sequences,
                              size_t max_tokens,
                              const std::function<void(size_t, size_t)>& progress = {});

}  // namespace moru
