// Products of dense float matrices: training, BF16/F16/F32 models, calibration. bf16 by kernels of
// our own where the processor multiplies it (bf16_product.h), everything else in f32 by oneDNN.
//
// The output is cut into a fixed grid of tiles that the pool's threads compute one at a time, so
// results do not depend on the number of threads. Products accumulate in f32. Only dense.cc speaks
// to oneDNN.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>

#include "base/threads.h"
#include "formats/dtype.h"

namespace moru {

// A row-major view; `type` is f32 or bf16, `ld` the distance between rows in elements.
struct DenseView {
  DType type = DType::f32;
  const void* data = nullptr;
  size_t rows = 0, cols = 0, ld = 0;

  static DenseView f32(const float* data, size_t rows, size_t cols, size_t ld = 0) {
    return {DType::f32, data, rows, cols, ld == 0 ? cols : ld};
  }
  static DenseView bf16(const uint16_t* data, size_t rows, size_t cols, size_t ld = 0) {
    return {DType::bf16, data, rows, cols, ld == 0 ? cols : ld};
  }
};

// Where a product goes. `type` f32 or bf16; accumulate only with f32.
struct DenseTarget {
  DType type = DType::f32;
  void* data = nullptr;
  size_t ld = 0;
  bool accumulate = false;
  float scale = 1;  // of the product; 1 where it is added: oneDNN has no fast way to do both
  const float* base = nullptr;  // what accumulate adds to, as `data` is laid out; null: `data`
};

// All operands of one call have the same type.
// y [m, n] = x [m, k] · w [n, k]ᵀ       a linear layer forward
void matmul_nt(Pool& pool, const DenseView& x, const DenseView& w, const DenseTarget& y);
// Several products of the same activations in one parallel phase, on a finer grid, for steps of
// inference: q, k and v of a small model are few tiles, and a phase ends with its last one.
struct DenseProduct {
  DenseView w;
  DenseTarget y;
};
void matmul_nt(Pool& pool, const DenseView& x, std::span<const DenseProduct> products);
// y [m, k] = x [m, n] · w [n, k]        its input gradient: x = dY, y = dX
void matmul_nn(Pool& pool, const DenseView& x, const DenseView& w, const DenseTarget& y);
// y [n, k] = a [m, n]ᵀ · x [m, k]       a weight gradient: a = dY
// The sum over m is one call per tile of y: its order is fixed for a shape.
void matmul_tn(Pool& pool, const DenseView& a, const DenseView& x, const DenseTarget& y);
// Those of several matrices that read the same x.
struct DenseGradient {
  DenseView a;
  DenseTarget y;
};
void matmul_tn(Pool& pool, std::span<const DenseGradient> gradients, const DenseView& x);

// Sums of up to kDenseTerms products, which pass through y once:
//   nt: y [m, n] = Σ x [m, k] · w [n, k]ᵀ     nn: y [m, n] = Σ x [m, k] · w [k, n]
// Each term has its own k.
inline constexpr size_t kDenseTerms = 4;
struct DenseTerm {
  DenseView x, w;
};
void matmul_nt(Pool& pool, std::span<const DenseTerm> terms, const DenseTarget& y);
void matmul_nn(Pool& pool, std::span<const DenseTerm> terms, const DenseTarget& y);

}  // namespace moru
