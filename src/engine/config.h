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
  post,      // x += norm(f(x))
  sandwich,  // x += norm(f(norm(x)))
  parallel,  // x += attention(n) + ffn(n), n = norm(x)
};
enum class NormKind {
  rms,    // x / rms(x) · gain
  layer,  // the same of x − mean(x)
};
enum class QkNorm {
  none,
  rms_before_rope,        // of each head
  rms_after_rope,         // of each head
  rms_whole_before_rope,  // of all heads together
};

struct RopeConfig {
  float theta = 10000;
  size_t dims = 0;  // how many of head_dim turn
  enum class Scaling { none, linear, llama3, yarn, longrope } scaling = Scaling::none;
  float factor = 1;
  float low_freq_factor = 1, high_freq_factor = 4;  // llama3
  float beta_fast = 32, beta_slow = 1;              // yarn
  bool truncate = true;                             // yarn: the ramp's ends at whole dimensions
  float magnitude = 1;                              // of cosines and sines (yarn, longrope)
  size_t original_context = 0;                      // llama3, yarn, longrope
  // Divisors of each frequency, [dims / 2], or empty: as a GGUF stores them (rope_freqs.weight), or
  // longrope's for contexts up to original_context.
  std::vector<float> divisors;
  std::vector<float> long_divisors;  // longrope's for longer ones
};

// A layer whose feed-forward part is many experts, of which each token takes a few.
struct ExpertsConfig {
  size_t count = 0;         // 0: the model has no such layers
  size_t chosen = 0;        // of each token
  size_t width = 0;         // of an expert's hidden rows
  size_t shared_width = 0;  // of the expert that every token takes; 0: there is none
  bool renormalise = true;  // the chosen experts' weights sum to 1
};

struct Config {
  std::string family;  // the row of the table: "llama", "gemma3"
  size_t layers = 0, width = 0, ffn_width = 0, vocab = 0, context = 0;
  size_t heads = 0, kv_heads = 0, head_dim = 0;
  float norm_eps = 1e-5f;
  NormLayout norm_layout = NormLayout::pre;
  NormKind norm = NormKind::rms;
  QkNorm qk_norm = QkNorm::none;
  Activation activation = Activation::silu;
  bool tied_head = false;                     // logits = head(x) with the embedding's weights
  float attn_scale = 0;                       // of the scores
  float attn_softcap = 0, final_softcap = 0;  // 0: none
  float embedding_scale = 1;
  float residual_scale = 1;  // of what each sub-layer adds to x
  float logit_scale = 1;     // always a multiplier
  bool attn_sinks = false;   // a learnt term in each head's softmax sum
  ExpertsConfig experts;
  RopeConfig rope;              // of full-attention layers
  RopeConfig local_rope;        // of windowed layers
  size_t window = 0;            // tokens a windowed layer sees; 0: no layer is windowed
  std::vector<bool> windowed;   // by layer; empty: none
  std::vector<bool> placeless;  // by layer: no rotation at all; empty: none

  size_t q_width() const { return heads * head_dim; }
  size_t kv_width() const { return kv_heads * head_dim; }
  bool is_windowed(size_t layer) const {
    return window != 0 && !windowed.empty() && windowed[layer];
  }
  bool rotates(size_t layer) const { return placeless.empty() || !placeless[layer]; }
};

}  // namespace moru
