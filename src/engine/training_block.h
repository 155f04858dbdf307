// What the files of the training core share: rows in the core's precision, what a block keeps, and
// the memory that everything lives in. For training*.cc alone.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "base/memory.h"
#include "engine/attention.h"
#include "engine/dense.h"
#include "engine/training.h"

namespace moru {

// Rows of activations in the core's precision: f32 or bf16.
struct Rows {
  DType type = DType::f32;
  void* data = nullptr;
  size_t ld = 0;

  float* f32() const { return static_cast<float*>(data); }
  uint16_t* bf16() const { return static_cast<uint16_t*>(data); }
  // `cols` columns from column `first` of the first `rows` rows.
  DenseView view(size_t rows, size_t cols, size_t first = 0) const {
    return {type, at(first), rows, cols, ld};
  }
  DenseTarget target(size_t first = 0, float scale = 1) const {
    return {type, at(first), ld, false, scale};
  }
  void* at(size_t column) const {
    return static_cast<std::byte*>(data) + column * (type == DType::bf16 ? 2 : 4);
  }
};

// Hands out one buffer in order. Without memory behind it, it only counts.
class Arena {
 public:
  explicit Arena(std::byte* base = nullptr) : base_(base) {}
  template <typename T>
  T* take(size_t count) {
    std::byte* place = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(place);
  }
  Rows take_rows(DType type, size_t rows, size_t cols) {
    if (type == DType::bf16) return {type, take<uint16_t>(rows * cols), cols};
    return {type, take<float>(rows * cols), cols};
  }
  // Rows that products read twelve at a time where they stand: a distance of whole 2 KB, by which
  // all would fall into the same lines of L1, is made a cache line longer.
  Rows take_operand(DType type, size_t rows, size_t cols) {
    const size_t ld = type == DType::bf16 && cols % 1024 == 0 ? cols + 32 : cols;
    return take_rows(type, rows, ld);
  }
  size_t used() const { return used_; }

 private:
  std::byte* base_;
  size_t used_ = 0;
};

// What one block's backward pass reads. T tokens, d = width. Several blocks may share a buffer
// whose content is remade.
struct Kept {
  float* x_attn = nullptr;         // [T, d] the residual stream as it enters
  float* rms_attn = nullptr;       // [T] 1/rms of it
  Rows n_attn;                     // [T, d] norm(x_attn)
  Rows qkv;                        // q [T, …], then k, then v: projected, before norm and rope
  float* lse = nullptr;            // [T, heads]
  Rows mixed;                      // [T, heads · head_dim] what attention gives
  Rows attn_sub;                   // [T, d] its projection, where a norm follows, or of DoRA
  float* rms_attn_post = nullptr;  // [T]
  float* x_ffn = nullptr;          // [T, d] the stream between the halves
  float* rms_ffn = nullptr;        // [T]
  Rows n_ffn;                      // [T, d]
  Rows gate, up, hidden;           // [T, ffn]
  Rows ffn_sub;                    // [T, d] likewise
  float* rms_ffn_post = nullptr;   // [T]
  std::array<Rows, kInputGroups.size()> u;  // [T, group rank] s·x·Aᵀ of each input
};

// Buffers of one moment, used by one block after the other.
struct Scratch {
  float* qkv = nullptr;    // q, then k, then v: with norm and rope
  float* rms_q = nullptr;  // [T, heads] of the norm per head
  float* rms_k = nullptr;  // [T, kv_heads]
  float* wide = nullptr;   // [T, max(ffn, q + k + v)]
  float* mixed = nullptr;  // [T, heads · head_dim]
  float* sub = nullptr;    // [T, d]
  // backward
  float* dx = nullptr;       // [T, d] gradient by the residual stream
  float* dn = nullptr;       // [T, d] by a norm's output
  float* d_mixed = nullptr;  // [T, heads · head_dim]
  float* d_qkv = nullptr;    // q, then k, then v
  float* d_raw = nullptr;    // the same by what the norm per head read
  Rows d_out;                // [T, d] by a sub-layer's output
  Rows d_proj;               // q, then k, then v
  Rows du;                   // [T, largest group rank] by x·Aᵀ
  // head, `head_rows` trained tokens at a time
  float* head_x = nullptr;    // [C, d]
  float* head_rms = nullptr;  // [C]
  Rows head_n;                // [C, d]
  float* logits = nullptr;    // [C, vocab]
  float* capped = nullptr;    // [C, vocab] where logits are capped
  Rows d_logits;              // [C, vocab], where the logits stand
  float* head_dn = nullptr;   // [C, d]
  // by row of d_logits where filtered_product.h's lists of its stripes begin and the last one ends
  uint32_t* starts = nullptr;  // [C, stripes + 1]
};

// What DoRA needs besides. By magnitude: ‖W‖² of its row, and m/‖W + s·B·A‖.
struct Dora {
  size_t first = 0;  // where magnitudes begin in the array of floats
  float *squared_norms = nullptr, *scales = nullptr;
  float* low = nullptr;  // W·Aᵀ of one pair
  Rows gate, up;         // [T, ffn] while their gradients take their place
};

struct LoraTraining::State {
  Pool* pool = nullptr;
  Model* model = nullptr;
  const Lora* lora = nullptr;
  TrainingOptions options;
  DType type = DType::f32;  // of activations and operands
  size_t lowest = 0;        // the lowest layer that learns
  size_t head_rows = 0;
  size_t unpacked_rows = 0;             // of the head at a time, where it has to be unpacked
  std::map<const void*, size_t> whole;  // Matrix or Vector that is learnt whole → its place
  std::vector<uint8_t> learns_whole;    // by layer: some weight of it does

  PageBuffer memory;
  std::vector<Kept> kept;  // by layer
  Kept passing;            // of layers that keep nothing
  float* x_out = nullptr;  // [T, d] the stream after the last block
  Scratch scratch;
  Rows values;    // the pairs in the core's precision, [pair_values]
  Rows unpacked;  // a matrix in the core's precision that is not stored so
  size_t pair_values = 0;
  float* gradients = nullptr;
  Dora dora;

  EmbeddingNoise noise;

  // of the batch at hand
  size_t tokens = 0;
  std::vector<int32_t> positions;
  std::vector<PackedDocument> documents;

  const Config& config() const { return model->config; }
  size_t qkv_width() const { return config().q_width() + 2 * config().kv_width(); }
  AttentionShape attention(size_t layer) const;
  // A's of one group as one matrix, and B of one pair.
  DenseView stacked_a(size_t layer, InputGroup group) const;
  DenseView b(const LoraPair& pair) const;
  bool adapts(size_t layer, InputGroup group) const;
  const LoraPair& pair(size_t layer, Projection p) const {
    return lora->layers[layer][static_cast<size_t>(p)];
  }
  bool is_dora(size_t layer, Projection p) const { return lora->is_dora(pair(layer, p)); }
  // Where the gradient of a weight goes that is learnt whole; null for the others.
  float* gradient_of(const Matrix& matrix) const { return gradient_at(&matrix); }
  float* gradient_of(const Vector& vector) const { return gradient_at(&vector); }
  // Whether a weight is stored otherwise than in the core's precision.
  bool unpacks(const Matrix& matrix) const {
    return matrix.dense() == nullptr || matrix.dense()->type != type;
  }
  // Rows [first, first + rows) of a weight in the core's precision; where they are stored
  // otherwise, unpacked until the next call.
  DenseView dense(const Matrix& matrix, size_t first, size_t rows);
  // Whether the head's gradient leaves out what vanishes.
  bool filters() const;
  DenseView dense(const Matrix& matrix) { return dense(matrix, 0, matrix.rows()); }

  void lay_out(Arena& arena);

 private:
  float* gradient_at(const void* weight) const {
    const auto found = whole.find(weight);
    return found == whole.end() ? nullptr : gradients + found->second;
  }
};

// Copies or rounds f32 rows without gaps into the core's precision, and back.
void store(Pool& pool, const float* x, size_t rows, size_t cols, const Rows& y);
void load(Pool& pool, const Rows& x, size_t rows, size_t cols, float* y);

void copy_floats(Pool& pool, const float* x, size_t count, float* y);
void zero_floats(Pool& pool, float* x, size_t count);

// q, k and v of the batch at hand, each without gaps, one after the other in one buffer.
template <typename T>
struct Qkv {
  T *q, *k, *v;
};
template <>
struct Qkv<Rows> {
  Rows q, k, v;
};
Qkv<float> split_qkv(const LoraTraining::State& s, float* buffer);
Qkv<Rows> split_qkv(const LoraTraining::State& s, const Rows& buffer);

// norm(x) in the core's precision; m rows of n.
void norm_rows(Pool& pool, const float* x, size_t m, size_t n, const Vector& gain, float eps,
               const Rows& y, float* inverse_rms);

// scratch.qkv = rope(norm per head(kept qkv)): what attention reads, forward and again backward.
void finish_qkv(LoraTraining::State& s, size_t layer, const Kept& kept);
// kept.hidden = act(gate) · up.
void make_hidden(LoraTraining::State& s, const Kept& kept);

// training_dora.cc. ‖W‖² of all rows, which never change; then what follows from A, B and m.
void take_squared_norms(LoraTraining::State& s);
void refresh_scales(LoraTraining::State& s);
// y *= m/‖W + s·B·A‖, [T, out]: nothing for projections without DoRA.
void scale_output(LoraTraining::State& s, size_t layer, Projection projection, float* y, size_t ld);
// Adds the gradient of m, given y as it was scaled (and a bias added) and the gradient by it, and
// turns the latter into the gradient by what was scaled.
void magnitude_gradient(LoraTraining::State& s, size_t layer, Projection projection, const Rows& y,
                        const Vector& bias, const Rows& dy);

// One block forward. x_next: where the stream goes; null: it is not wanted (a block made anew).
void forward_layer(LoraTraining::State& s, size_t layer, const Kept& kept, float* x_next);
// One block backward: scratch.dx by its output becomes dx by its input (in the lowest layer, only
// as far as something learns). Adds to the gradients.
void backward_layer(LoraTraining::State& s, size_t layer, const Kept& kept);

}  // namespace moru
