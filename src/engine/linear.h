// Linear layers in whatever form their weights have: one operand prepared once, many products.
#pragma once
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "base/pieces.h"
#include "base/threads.h"
#include "engine/dense.h"
#include "engine/few_rows.h"
#include "engine/model.h"
#include "engine/quant_matrix.h"

namespace moru {

// y [m, ldy] (+)= x · wᵀ
struct LinearProduct {
  const Matrix* w;
  float* y;
  size_t ldy;
  Store store = Store::set;
};

// Rows of activations [m, k] and the forms of them that products have asked for. Reuses its memory
// from call to call.
class Operand {
 public:
  // How quantized weights see the rows.
  explicit Operand(Activations activations = Activations::int16) : quantized_(activations) {}
  // Room for `m` rows of `k`, so that later calls allocate nothing.
  void reserve(size_t m, size_t k);
  // x: [m, k]; must stay until the products are done.
  void set(const float* x, size_t m, size_t k);
  // The same of rows that do not exist yet: make_row(i) writes row i of x, and the thread that made
  // it gives it the form that products with `w` want while it is in the cache.
  template <typename MakeRow>
  void make(Pool& pool, float* x, size_t m, size_t k, const Matrix& w, MakeRow&& make_row) {
    constexpr size_t kLeastRows = 4;  // a few microseconds' work
    set(x, m, k);
    quantized_ready_ = w.quantized() != nullptr;
    if (quantized_ready_) quantized_.resize(m, k);
    each_piece(pool, m, kLeastRows, [&](size_t begin, size_t end) {
      for (size_t i = begin; i < end; ++i) {
        make_row(i);
        if (quantized_ready_) quantized_.set_row(i, x + i * k);
      }
    });
  }
  // All products of one operand in as few parallel phases as their forms allow. `next`: weights of
  // the phase after this one.
  void multiply(Pool& pool, std::initializer_list<LinearProduct> products,
                std::initializer_list<const Matrix*> next = {});
  // h = act(x · gateᵀ) · (x · upᵀ) without the two products in memory; false, with nothing done,
  // where their weights or the number of rows do not allow it.
  bool multiply_gated(Pool& pool, const Matrix& gate, const Matrix& up, Activation act, float* h,
                      size_t ldh);

 private:
  // The forms of the rows, made when first asked for.
  const uint16_t* bf16(Pool& pool);
  const QuantizedRows& quantized(Pool& pool);

  const float* x_ = nullptr;
  size_t m_ = 0, k_ = 0;
  bool quantized_ready_ = false, bf16_ready_ = false;
  QuantizedRows quantized_;
  std::vector<uint16_t> bf16_;
  std::vector<QuantProduct> quant_products_;
  std::vector<FewRowsProduct> few_rows_products_;
  std::vector<DenseProduct> f32_products_, bf16_products_;
  std::vector<WeightItems> next_;
};

}  // namespace moru
