// Products of quantized weights, as a GGUF stores them, with activations of 16 or 8 bits.
//
// A row of activations becomes int16 codes with one f32 scale, 15 bits where bf16 has 8. Dots of
// weight and activation codes are exact integers and everything after them happens in one fixed
// order of f32 operations, so that a result depends on its row of weights and its row of
// activations alone: never on the number of rows beside it, of threads, or on the level of the
// instruction set. quant_kernels.h defines the product to the bit. Eight bits, with a scale for
// every 32 columns, are what other engines use: twice as fast where arithmetic is the limit, with
// an error a thousand times as large, and as reproducible.
//
// Weights are repacked without loss at load: sixteen rows are interleaved, so that a vector holds
// sixteen rows' codes and no horizontal sum is needed. Matrices that are packed one after the other
// lie one after the other in huge pages, so pack them in the order in which they will be used.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "base/memory.h"
#include "base/threads.h"
#include "engine/row_ops.h"
#include "engine/weight_pieces.h"
#include "formats/dtype.h"

namespace moru {

enum class Activations { int16, int8 };

// Activations [m, k] as int16 codes, one scale a row: x ≈ scale · code; or as int8 codes, one scale
// for each 32 columns. k is a multiple of 32.
class QuantizedRows {
 public:
  explicit QuantizedRows(Activations kind = Activations::int16) : kind_(kind) {}
  // Allocates only when m · k grows beyond what it was before.
  void resize(size_t m, size_t k);
  // Row i = round-to-nearest-even(x · (32639 / max|x|)), scale = max|x| / 32639, with x: [k].
  // A row whose largest magnitude is below 2^-100 counts as zero; one that holds an infinity or a
  // NaN gets a NaN scale, so every product with it is NaN. With int8 the same for each 32 columns
  // and 127. Different rows may be set at once by different threads.
  void set_row(size_t i, const float* x);

  size_t rows() const { return m_; }
  size_t cols() const { return k_; }
  Activations kind() const { return kind_; }
  // int16 only:
  std::span<const int16_t> codes(size_t i) const { return {codes_ + i * stride_, k_}; }
  float scale(size_t i) const { return scales_[i]; }

 private:
  friend struct QuantizedRowsView;
  Activations kind_;
  PageBuffer memory_;
  size_t m_ = 0, k_ = 0, stride_ = 0;
  int16_t* codes_ = nullptr;                         // [m, stride]; null where no kernel reads them
  int8_t* digits_ = nullptr;                         // [m, 2 stride], int8: [m, stride]; likewise
  float* scales_ = nullptr;                          // [m], int8: [m, k / 32]
  int32_t *sums16_ = nullptr, *sums32_ = nullptr;    // [m, k / 16], [m, k / 32]: sums of codes
  float *scaled16_ = nullptr, *scaled32_ = nullptr;  // int8: the same, scaled
};

// x: [m, k] with distance ldx between rows.
void quantize_rows(Pool& pool, const float* x, size_t ldx, size_t m, size_t k, QuantizedRows& out);

// A weight [rows, cols] of a quantized type; y = x · Wᵀ. Immutable: copies share its memory.
class QuantMatrix {
 public:
  // `data` is the tensor as a GGUF stores it, rows · cols elements; cols a multiple of the type's
  // block. `packed` hears, on any thread, of parts of it that are no longer needed. Errors:
  // no_space.
  static QuantMatrix pack(Pool& pool, DType type, size_t rows, size_t cols,
                          std::span<const std::byte> data,
                          const std::function<void(std::span<const std::byte>)>& packed = {});

  DType type() const { return type_; }
  size_t rows() const { return rows_; }
  size_t cols() const { return cols_; }
  size_t bytes() const { return bytes_; }  // of memory
  WeightItems items() const;               // as products of few rows read them

  // out: [count, cols], the f32 values of rows [first, first + count), the same bits as
  // dequantize() of the tensor. For embeddings, and for the float profile's panels.
  void unpack_rows(size_t first, size_t count, float* out) const;

 private:
  friend struct QuantMatrixView;
  DType type_{};
  size_t rows_ = 0, cols_ = 0, bytes_ = 0, panel_bytes_ = 0, codes_at_ = 0;
  std::shared_ptr<uint8_t> panels_;  // into a slab that matrices share
};

enum class Store {
  set,  // y = x · Wᵀ
  add,  // y += x · Wᵀ
};

// y: [m, w.rows()] f32 with distance ldy between rows; x: [m, w.cols()].
void matmul(Pool& pool, const QuantizedRows& x, const QuantMatrix& w, float* y, size_t ldy,
            Store store = Store::set);

// Several products of the same activations in one parallel phase: q, k, v; gate, up.
struct QuantProduct {
  const QuantMatrix* w;
  float* y;
  size_t ldy;
  Store store = Store::set;
};
// `next`: weights of the phase after this one, whose beginnings threads ask for while they wait.
void matmul(Pool& pool, const QuantizedRows& x, std::span<const QuantProduct> products,
            std::span<const WeightItems> next = {});

// h [m, gate.rows()] = act(x · gateᵀ) · (x · upᵀ), the same bits as gate_rows() of the two
// products, of which only parts that stay in the cache exist. False where nothing was done: for
// rows so few that they are multiplied otherwise, for matrices that do not match and for
// swiglu_oai.
bool matmul_gated(Pool& pool, const QuantizedRows& x, const QuantMatrix& gate,
                  const QuantMatrix& up, Activation act, float* h, size_t ldh);

}  // namespace moru
