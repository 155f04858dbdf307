// DoRA's part of the training core. Norms of W + s·B·A are found without ever forming B·A, in
// out · in · r operations a pair:
//
//   ‖W + s·B·A‖² = ‖W‖² + 2s · rowsum((W·Aᵀ) ⊙ B) + s² · rowsum((B·(A·Aᵀ)) ⊙ B)
#include <algorithm>
#include <cmath>

#include "base/half.h"
#include "engine/float_kernels.h"
#include "engine/training_block.h"

namespace moru {
namespace {

constexpr size_t kColumns = 64;  // of the outputs, that one thread takes at a time
constexpr size_t kRows = 64;     // of W likewise

// visit(layer, projection, pair, place of its magnitudes among all) for every adapted matrix.
template <typename Visit>
void each_pair(const LoraTraining::State& s, Visit&& visit) {
  if (!s.lora->dora) return;
  for (size_t l = 0; l < s.lora->layers.size(); ++l)
    for (size_t p = 0; p < kProjections; ++p) {
      const LoraPair& pair = s.lora->layers[l][p];
      if (pair.rank != 0) visit(l, static_cast<Projection>(p), pair, pair.magnitude - s.dora.first);
    }
}

// T: float, or uint16_t for bf16.
inline float value_of(float x) { return x; }
inline float value_of(uint16_t x) { return f32_from_bf16(x); }
inline void put(float x, float& to) { to = x; }
inline void put(float x, uint16_t& to) { to = bf16_from_f32(x); }

// sums[i] += Σ_t dy[t, i] · (y[t, i] − bias[i]), then dy[t, i] *= scales[i], of `count` columns.
template <typename T>
void sum_and_scale(const T* y, size_t ldy, const float* bias, const float* scales, size_t tokens,
                   size_t count, T* dy, size_t ld, float* sums) {
  for (size_t t = 0; t < tokens; ++t) {
    const T* row = y + t * ldy;
    T* d_row = dy + t * ld;
    for (size_t i = 0; i < count; ++i) {
      const float d = value_of(d_row[i]);
      sums[i] += d * (value_of(row[i]) - bias[i]);
      put(d * scales[i], d_row[i]);
    }
  }
}

}  // namespace

void take_squared_norms(LoraTraining::State& s) {
  each_pair(s, [&](size_t l, Projection p, const LoraPair& pair, size_t at) {
    const Matrix& w = matrix_of(s.model->layers[l], p);
    s.pool->each(pair.out, [&](size_t row) {
      s.dora.squared_norms[at + row] = static_cast<float>(squared_row_norm(w, row));
    });
  });
}

void refresh_scales(LoraTraining::State& s) {
  const FloatKernels& kernels = float_kernels();
  std::vector<float> gram;
  each_pair(s, [&](size_t l, Projection p, const LoraPair& pair, size_t at) {
    const size_t r = pair.rank, n = pair.in;
    const DenseView a{s.type, s.values.at(pair.a), r, n, n};
    matmul_nt(*s.pool, s.dense(matrix_of(s.model->layers[l], p)), a,
              {DType::f32, s.dora.low, r, false, 1});
    const float *a_rows = s.lora->a(pair).data(), *b = s.lora->b(pair).data(),
                *m = s.lora->magnitude(pair).data();
    gram.resize(r * r);  // A·Aᵀ
    s.pool->each(r, [&](size_t i) {
      for (size_t j = 0; j < r; ++j)
        gram[i * r + j] = kernels.dot(a_rows + i * n, a_rows + j * n, n);
    });
    s.pool->each((pair.out + kRows - 1) / kRows, [&](size_t tile) {
      const size_t first = tile * kRows, last = std::min(first + kRows, pair.out);
      for (size_t row = first; row < last; ++row) {
        const float* b_row = b + row * r;
        const double cross = double{kernels.dot(s.dora.low + row * r, b_row, r)};
        double square = 0;
        for (size_t i = 0; i < r; ++i)
          square += double{b_row[i]} * double{kernels.dot(&gram[i * r], b_row, r)};
        const double scale = double{pair.scale};
        const double norm = std::sqrt(double{s.dora.squared_norms[at + row]} + 2 * scale * cross +
                                      scale * scale * square);
        // A row of zeros has no direction; NaN is that of a rounded square below 0.
        s.dora.scales[at + row] = norm > 0 ? static_cast<float>(double{m[row]} / norm) : 0.0f;
      }
    });
  });
}

void scale_output(LoraTraining::State& s, size_t layer, Projection projection, float* y,
                  size_t ld) {
  if (!s.is_dora(layer, projection)) return;
  const LoraPair& pair = s.pair(layer, projection);
  const float* scales = s.dora.scales + (pair.magnitude - s.dora.first);
  s.pool->each(s.tokens, [&](size_t t) {
    for (size_t i = 0; i < pair.out; ++i) y[t * ld + i] *= scales[i];
  });
}

void magnitude_gradient(LoraTraining::State& s, size_t layer, Projection projection, const Rows& y,
                        const Vector& bias, const Rows& dy) {
  if (!s.is_dora(layer, projection)) return;
  const LoraPair& pair = s.pair(layer, projection);
  const float* m = s.lora->magnitude(pair).data();
  const float* scales = s.dora.scales + (pair.magnitude - s.dora.first);
  float* dm = s.gradients + pair.magnitude;
  s.pool->each((pair.out + kColumns - 1) / kColumns, [&](size_t tile) {
    const size_t first = tile * kColumns, count = std::min(kColumns, pair.out - first);
    float sums[kColumns] = {}, offsets[kColumns] = {};
    for (size_t i = 0; i < count && !bias.empty(); ++i) offsets[i] = bias[first + i];
    if (y.type == DType::bf16)
      sum_and_scale(y.bf16() + first, y.ld, offsets, scales + first, s.tokens, count,
                    dy.bf16() + first, dy.ld, sums);
    else
      sum_and_scale(y.f32() + first, y.ld, offsets, scales + first, s.tokens, count,
                    dy.f32() + first, dy.ld, sums);
    // y − bias = m/‖…‖ · z: its derivative by m is itself over m.
    for (size_t i = 0; i < count; ++i)
      if (m[first + i] != 0) dm[first + i] += sums[i] / m[first + i];
  });
}

}  // namespace moru
