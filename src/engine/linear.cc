#include "engine/linear.h"

#include "base/error.h"
#include "engine/row_ops.h"

namespace moru {

void Operand::reserve(size_t m, size_t k) {
  quantized_.resize(m, k);
  bf16_.reserve(m * k);
  quant_products_.reserve(4);
  few_rows_products_.reserve(4);
  f32_products_.reserve(4);
  bf16_products_.reserve(4);
  next_.reserve(4);
}

void Operand::set(const float* x, size_t m, size_t k) {
  x_ = x;
  m_ = m;
  k_ = k;
  quantized_ready_ = bf16_ready_ = false;
}

void Operand::multiply(Pool& pool, std::initializer_list<LinearProduct> products,
                       std::initializer_list<const Matrix*> next) {
  if (m_ == 0) return;
  next_.clear();
  for (const Matrix* w : next) {
    if (const QuantMatrix* quantized = w->quantized())
      next_.push_back(quantized->items());
    else if (const DenseMatrix* dense = w->dense(); dense != nullptr && dense->type == DType::bf16)
      next_.push_back(few_rows_items(dense->bf16(), dense->rows, dense->cols));
  }
  quant_products_.clear();
  few_rows_products_.clear();
  f32_products_.clear();
  bf16_products_.clear();
  for (const LinearProduct& p : products) {
    const bool add = p.store == Store::add;
    if (const QuantMatrix* w = p.w->quantized()) {
      quant_products_.push_back({.w = w, .y = p.y, .ldy = p.ldy, .store = p.store});
      continue;
    }
    const DenseMatrix* w = p.w->dense();
    MORU_CHECK(w != nullptr);
    const DenseTarget target{.data = p.y, .ld = p.ldy, .accumulate = add};
    if (w->type == DType::f32) {
      f32_products_.push_back({DenseView::f32(w->f32(), w->rows, w->cols), target});
    } else if (m_ <= kFewRows) {
      few_rows_products_.push_back({w->bf16(), w->rows, p.y, p.ldy, add});
    } else {
      bf16_products_.push_back({DenseView::bf16(w->bf16(), w->rows, w->cols), target});
    }
  }
  if (!f32_products_.empty()) matmul_nt(pool, DenseView::f32(x_, m_, k_), f32_products_);
  if (!few_rows_products_.empty())
    multiply_few_rows(pool, bf16(pool), m_, k_, few_rows_products_, next_);
  if (!bf16_products_.empty()) matmul_nt(pool, DenseView::bf16(bf16(pool), m_, k_), bf16_products_);
  if (quant_products_.empty()) return;
  matmul(pool, quantized(pool), quant_products_, next_);
}

bool Operand::multiply_gated(Pool& pool, const Matrix& gate, const Matrix& up, Activation act,
                             float* h, size_t ldh) {
  const QuantMatrix *g = gate.quantized(), *u = up.quantized();
  if (m_ == 0 || g == nullptr || u == nullptr) return false;
  return matmul_gated(pool, quantized(pool), *g, *u, act, h, ldh);
}

const QuantizedRows& Operand::quantized(Pool& pool) {
  if (!quantized_ready_) {
    quantize_rows(pool, x_, k_, m_, k_, quantized_);
    quantized_ready_ = true;
  }
  return quantized_;
}

const uint16_t* Operand::bf16(Pool& pool) {
  if (!bf16_ready_) {
    bf16_.resize(m_ * k_);
    round_to_bf16(pool, x_, m_ * k_, bf16_.data());
    bf16_ready_ = true;
  }
  return bf16_.data();
}

}  // namespace moru
