#include "engine/lora.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "engine/row_ops.h"
#include "engine/weights.h"

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
  for (LoraLayer& layer : lora.layers) {
    for (LoraPair& pair : layer) {
      pair.magnitude = at;
      if (lora.is_dora(pair)) at += pair.out;
    }
  }
  for (WholeWeight& weight : lora.whole) {
    weight.at = at;
    at += weight.count();
  }
  lora.values.assign(at, 0.0f);
}

double squared_row_norm(const Matrix& matrix, size_t row) {
  static thread_local std::vector<float> values;
  values.resize(matrix.cols());
  matrix.read_rows(row, 1, values.data());
  double sum = 0;
  for (const float v : values) sum += double{v} * double{v};
  return sum;
}

bool Lora::has_pairs() const {
  return std::any_of(layers.begin(), layers.end(), [](const LoraLayer& layer) {
    return std::any_of(layer.begin(), layer.end(), [](const LoraPair& p) { return p.rank != 0; });
  });
}

const WholeWeight* Lora::find_whole(std::string_view name) const {
  const auto found = std::find_if(whole.begin(), whole.end(),
                                  [&](const WholeWeight& w) { return w.name == name; });
  return found == whole.end() ? nullptr : &*found;
}

size_t group_rank(const LoraLayer& layer, InputGroup group) {
  size_t rank = 0;
  for (size_t p = group.first; p < group.last; ++p) rank += layer[p].rank;
  return rank;
}

namespace {

// Calls visit(weight of the model, values learnt for it) for every weight that is learnt whole.
template <typename L, typename Visit>
void each_whole(Model& model, L& lora, Visit&& visit) {
  for (const NamedWeight& weight : weights_of(model)) {
    const WholeWeight* whole = lora.find_whole(weight.name);
    if (whole == nullptr) continue;
    MORU_CHECK(whole->count() == weight.count());
    visit(weight, lora.of(*whole));
  }
}

DenseMatrix dense_of(Pool& pool, const Matrix& matrix, DType type) {
  DenseMatrix dense{
      .type = type,
      .rows = matrix.rows(),
      .cols = matrix.cols(),
      .data = PageBuffer(matrix.rows() * matrix.cols() * (type == DType::f32 ? 4 : 2))};
  std::vector<float> row(dense.cols);
  for (size_t r = 0; r < dense.rows; ++r) {
    matrix.read_rows(r, 1, row.data());
    std::byte* to = static_cast<std::byte*>(dense.data.data());
    if (type == DType::f32)
      std::memcpy(to + r * dense.cols * 4, row.data(), dense.cols * 4);
    else
      round_to_bf16(pool, row.data(), dense.cols, reinterpret_cast<uint16_t*>(to) + r * dense.cols);
  }
  return dense;
}

}  // namespace

void take_magnitudes(Pool& pool, const Model& model, Lora& lora) {
  for (size_t l = 0; l < lora.layers.size(); ++l) {
    for (size_t p = 0; p < kProjections; ++p) {
      const Matrix& w = matrix_of(model.layers[l], static_cast<Projection>(p));
      const std::span<float> m = lora.magnitude(lora.layers[l][p]);
      pool.each(m.size(), [&](size_t row) {
        m[row] = static_cast<float>(std::sqrt(squared_row_norm(w, row)));
      });
    }
  }
}

void take_whole(Pool& pool, Model& model, DType type, Lora& lora) {
  each_whole(model, lora, [&](const NamedWeight& weight, std::span<float> values) {
    if (weight.vector != nullptr) {
      std::ranges::copy(*weight.vector, values.begin());
      return;
    }
    if (weight.matrix->dense() == nullptr)
      weight.matrix->form = dense_of(pool, *weight.matrix, type);
    weight.matrix->read_rows(0, weight.rows(), values.data());
  });
}

void put_whole(Pool& pool, const Lora& lora, Model& model) {
  each_whole(model, lora, [&](const NamedWeight& weight, std::span<const float> values) {
    if (weight.vector != nullptr) {
      std::ranges::copy(values, weight.vector->begin());
      return;
    }
    DenseMatrix& dense = std::get<DenseMatrix>(weight.matrix->form);
    if (dense.type == DType::f32)
      std::memcpy(dense.data.data(), values.data(), values.size_bytes());
    else
      round_to_bf16(pool, values.data(), values.size(), static_cast<uint16_t*>(dense.data.data()));
  });
}

}  // namespace moru
