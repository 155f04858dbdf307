#include "engine/lora.h"

#include <cmath>

#include "base/error.h"

namespace moru {
namespace {

constexpr std::array<ProjectionTraits, kProjections> kTraits = {{
    {"q_proj", "self_attn.q_proj", "attn_q"},
    {"k_proj", "self_attn.k_proj", "attn_k"},
    {"v_proj", "self_attn.v_proj", "attn_v"},
    {"o_proj", "self_attn.o_proj", "attn_output"},
    {"gate_proj", "mlp.gate_proj", "ffn_gate"},
    {"up_proj", "mlp.up_proj", "ffn_up"},
    {"down_proj", "mlp.down_proj", "ffn_down"},
}};

}  // namespace

const ProjectionTraits& traits(Projection projection) {
  return kTraits[static_cast<size_t>(projection)];
}

const Matrix& matrix_of(const Layer& layer, Projection projection) {
  switch (projection) {
    case Projection::q:
      return layer.q;
    case Projection::k:
      return layer.k;
    case Projection::v:
      return layer.v;
    case Projection::o:
      return layer.attn_out;
    case Projection::gate:
      return layer.gate;
    case Projection::up:
      return layer.up;
    case Projection::down:
      return layer.down;
  }
  MORU_CHECK(false);
}

void lay_out(Lora& lora, const Config& c) {
  MORU_CHECK(lora.layers.size() == c.layers);
  const std::array<size_t, kProjections> in = {c.width, c.width, c.width,    c.q_width(),
                                               c.width, c.width, c.ffn_width};
  const std::array<size_t, kProjections> out = {c.q_width(), c.kv_width(), c.kv_width(), c.width,
                                                c.ffn_width, c.ffn_width,  c.width};
  size_t at = 0;
  for (LoraLayer& layer : lora.layers) {
    for (size_t p = 0; p < kProjections; ++p) {
      const float rank = static_cast<float>(layer[p].rank);
      if (layer[p].rank != 0)
        layer[p].scale = layer[p].alpha / (lora.rank_stabilised ? std::sqrt(rank) : rank);
      layer[p].in = in[p];
      layer[p].out = out[p];
      layer[p].a = at;
      at += layer[p].rank * in[p];
    }
    for (size_t p = 0; p < kProjections; ++p) {
      layer[p].b = at;
      at += layer[p].rank * out[p];
    }
  }
  lora.values.assign(at, 0.0f);
}

size_t group_rank(const LoraLayer& layer, InputGroup group) {
  size_t rank = 0;
  for (size_t p = group.first; p < group.last; ++p) rank += layer[p].rank;
  return rank;
}

}  // namespace moru
