#include "engine/weights.h"

#include <fmt/format.h>

namespace moru {

std::vector<NamedWeight> weights_of(Model& model) {
  std::vector<NamedWeight> all;
  const auto matrix = [&](std::string name, Matrix& m) {
    if (!m.empty()) all.push_back({std::move(name), &m, nullptr});
  };
  const auto vector = [&](std::string name, Vector& v) {
    if (!v.empty()) all.push_back({std::move(name), nullptr, &v});
  };
  matrix("token_embd.weight", model.embedding);
  for (size_t i = 0; i < model.layers.size(); ++i) {
    Layer& l = model.layers[i];
    const auto name = [&](const char* part) { return fmt::format("blk.{}.{}", i, part); };
    vector(name("attn_norm.weight"), l.attn_norm);
    matrix(name("attn_q.weight"), l.q);
    matrix(name("attn_k.weight"), l.k);
    matrix(name("attn_v.weight"), l.v);
    vector(name("attn_q.bias"), l.q_bias);
    vector(name("attn_k.bias"), l.k_bias);
    vector(name("attn_v.bias"), l.v_bias);
    vector(name("attn_q_norm.weight"), l.q_norm);
    vector(name("attn_k_norm.weight"), l.k_norm);
    matrix(name("attn_output.weight"), l.attn_out);
    vector(name("attn_output.bias"), l.attn_out_bias);
    vector(name("post_attention_norm.weight"), l.attn_post_norm);
    vector(name("ffn_norm.weight"), l.ffn_norm);
    matrix(name("ffn_gate.weight"), l.gate);
    matrix(name("ffn_up.weight"), l.up);
    matrix(name("ffn_down.weight"), l.down);
    vector(name("post_ffw_norm.weight"), l.ffn_post_norm);
  }
  vector("output_norm.weight", model.final_norm);
  matrix("output.weight", model.head);
  return all;
}

}  // namespace moru
