// How far a model's next-token distributions are from a reference's, on a text: llama.cpp's
// protocol (chunks of 512 tokens, the second half of each is scored), computed side by side.
#pragma once
#include <cstddef>
#include <filesystem>

#include "engine/forward.h"
#include "engine/model_files.h"

namespace moru {

struct DivergenceOptions {
  size_t chunk = 512;  // tokens; positions chunk/2 … chunk − 2 are scored
  size_t chunks = 20;  // at most so many
};

struct Divergence {
  double mean = 0, mean_error = 0;  // KL(reference ‖ model) in nats, and its standard error
  double median = 0, p99 = 0, max = 0;
  double same_top = 0;  // share of positions where both prefer the same token
  double perplexity = 0, reference_perplexity = 0;
  size_t positions = 0;
};

// The text is tokenized whole and cut into chunks; the first token of a chunk is BOS where the
// model adds it. Both engines must have the same vocabulary. Errors: not_found; bad_input (a text
// of less than one chunk, another vocabulary).
Divergence divergence(Engine& model, Engine& reference, const ModelFiles& files,
                      const std::filesystem::path& text, const DivergenceOptions& options);

}  // namespace moru
