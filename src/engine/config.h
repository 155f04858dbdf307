// A model's shape and the flags of the one decoder block. Families are rows of a table
// (families.cc): which names their files use and how keys set these flags. No other code names one.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "engine/row_ops.h"  // Activation

namespace moru {

enum class NormLayout {
  pre,       // x += f(norm(x))
  sandwich,  // x += norm(f(norm(x)))
};
enum class QkNorm { none, rms_before_rope };

struct RopeConfig {
  float theta = 10000;
  size_t dims = 0;  // how many of head_dim turn
  enum class Scaling { none, linear, llama3 } scaling = Scaling::none;
  float factor = 1;
  float low_freq_factor = 1, high_freq_factor = 4;  // llama3
  size_t original_context = 0;
  // Divisors of each frequency as a GGUF stores them (rope_freqs.weight), [dims / 2]; or empty.
  std::vector<float> divisors;
};

struct Config {
  std::string family;  // GGUF's general.architecture: "llama", "gemma3"
  size_t layers = 0, width = 0, ffn_width = 0, vocab = 0, context = 0;
  size_t heads = 0, kv_heads = 0, head_dim = 0;
  float norm_eps = 1e-5f;
  NormLayout norm_layout = NormLayout::pre;
  QkNorm qk_norm = QkNorm::none;
  Activation activation = Activation::silu;
  bool tied_head = false;                     // logits = head(x) with the embedding's weights
  float attn_scale = 0;                       // of the scores
  float attn_softcap = 0, final_softcap = 0;  // 0: none
  float embedding_scale = 1;
  float residual_scale = 1;    // of what each sub-layer adds to x
  float logit_scale = 1;       // always a multiplier
  RopeConfig rope;             // of full-attention layers
  RopeConfig local_rope;       // of windowed layers
  size_t window = 0;           // tokens a windowed layer sees; 0: no layer is windowed
  std::vector<bool> windowed;  // by layer; empty: none

  size_t q_width() const { return heads * head_dim; }
  size_t kv_width() const { return kv_heads * head_dim; }
  bool is_windowed(size_t layer) const {
    return window != 0 && !windowed.empty() && windowed[layer];
  }
};

}  // namespace moru
