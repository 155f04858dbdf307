// The inner loops behind row_ops.h, attention.h and kv_cache.h, one table per level of the
// instruction set. Pure functions: no threads, no allocation, no exceptions.
//
// Every level gives the same bits. All of them compile the same text, float_kernels_body.h, over a
// vector of 16 floats: one AVX-512 register, two AVX2 registers, or an array of 16, which is the
// definition. Sums run over 16 lanes and then over a fixed tree; products are fused where the text
// says so; exp and tanh are polynomials of ours.
//
// The files of one level may hold no inline function that another file shares: the linker keeps one
// copy of such a function for the whole program, and it might be the one with AVX-512 in it. So
// this header includes nothing but integer types.
#pragma once
#include <cstddef>
#include <cstdint>

namespace moru {

enum class Isa;

// Keys per page of the KV cache and per tile of training's attention.
inline constexpr size_t kKeyPage = 64;
// Keys whose softmax is one unit; units are merged in order.
inline constexpr size_t kKeyBlock = 512;

// How a page of keys and values is stored.
//   f32, f16   keys [head_dim][64 keys], values [64 keys][head_dim]
//   i16        16-bit codes in pairs, as instructions that add up products of pairs take them: keys
//              [head_dim / 2][64 keys][2], a pair being two elements of a key; values
//              [64 / 2][head_dim][2], a pair being two keys; then 64 f32 scales, one a key
enum class PageType : uint8_t { f32, f16, i16 };

// The keys and values of one block of up to kKeyBlock positions against some query rows, which may
// belong to several tokens and to the heads of one group.
struct AttendBlock {
  const float* q;  // [rows, head_dim], ldq apart
  size_t ldq, rows, head_dim;
  float scale, softcap;
  PageType type;
  size_t pages;               // pages that hold keys of this block, at most 8
  const void* const* keys;    // [pages]
  const void* const* values;  // [pages]: rows of f32 are ldv apart
  size_t ldv;
  const void* next;             // what is read after this block, to be prefetched
  const uint32_t *first, *end;  // [rows]: the keys of the block that a row sees; none if equal
  float* scores;                // scratch [rows, kKeyBlock]
  float* page;                  // scratch: see attend_scratch
  // Results: the maximum of score · log2 e, the sum of 2^(score · log2 e − maximum), and that sum
  // weighted with the values.
  // Rows that see nothing get sum = 0, and their `out` is not written.
  float *max, *sum;  // [rows]
  float* out;        // [rows, head_dim]
};

// Floats of AttendBlock::page: a page widened from f16 to f32, or the codes and scales of the query
// rows.
constexpr size_t attend_scratch(size_t rows, size_t head_dim) {
  const size_t widened = kKeyPage * head_dim, coded = rows * head_dim / 2 + rows;
  return widened > coded ? widened : coded;
}

// One tile of the backward pass: query rows of one head against one page of keys.
struct AttendBackwardTile {
  size_t rows, keys, head_dim;
  float scale, softcap;
  const float* q;  // [rows, head_dim]
  size_t ldq;
  const float* d_out;  // [rows, head_dim]
  size_t ldo;
  const float *lse, *delta;      // [rows]
  const float* k;                // [keys, head_dim]
  size_t ldkv;                   // of k
  const float *k_page, *v_page;  // [head_dim][64]: transposed
  const uint32_t *first, *end;   // [rows]: the keys of the page that a row sees; both never fall
  float *p, *ds;                 // scratch [rows, 64] each
  float* dq;                     // += [rows, head_dim]
  size_t lddq;
  float *dk, *dv;  // += [keys, head_dim]
  size_t lddkv;
};

// The numbers of one update by AdamW (tune/optimizer.h), whose formula is
//   g = scale · g   m = β1·m + (1 − β1)·g   v = β2·v + (1 − β2)·g²
//   p = decay · p − rate · m / (√v / root + eps)
struct AdamWStep {
  float beta1, rest1, beta2, rest2;  // rest: 1 − β
  float scale, decay, rate, root, eps;
};

struct FloatKernels {
  // Row operations: shapes and formulas as in row_ops.h.
  void (*rms_norm)(const float* x, size_t ldx, size_t m, size_t n, const float* w, float eps,
                   float* y, size_t ldy, float* inverse_rms);
  void (*rms_norm_bf16)(const float* x, size_t ldx, size_t m, size_t n, const float* w, float eps,
                        uint16_t* y, size_t ldy, float* inverse_rms);
  void (*rms_norm_backward)(const float* x, size_t ldx, const float* inverse_rms, const float* dy,
                            size_t ldy, size_t m, size_t n, const float* w, float* dx, size_t lddx,
                            float* dw);
  void (*rope)(const float* cosines, const float* sines, size_t dims, const int32_t* positions,
               size_t m, float* x, size_t ldx, size_t heads, size_t head_dim, bool inverse);
  // One row; `gelu` chooses gelu_tanh, otherwise silu.
  void (*gate)(bool gelu, const float* gate, const float* up, size_t n, float* h);
  void (*gate_bf16)(bool gelu, const uint16_t* gate, const uint16_t* up, size_t n, uint16_t* h);
  void (*gate_backward)(bool gelu, const float* gate, const float* up, const float* dh, size_t n,
                        float* d_gate, float* d_up);
  void (*gate_backward_bf16)(bool gelu, const uint16_t* gate, const uint16_t* up, const float* dh,
                             size_t n, uint16_t* d_gate, uint16_t* d_up);
  void (*add_scaled)(const float* x, size_t n, float scale, float* y);  // y += scale · x
  void (*scale)(const float* x, size_t n, float factor, float* y);      // y = factor · x + 0
  void (*round_to_bf16)(const float* x, size_t n, uint16_t* y);         // y may begin where x does
  void (*widen_bf16)(const uint16_t* x, size_t n, float* y);
  void (*softcap)(float* x, size_t n, float cap);
  float (*dot)(const float* x, const float* y, size_t n);
  // max = the largest x, sum = Σ exp(x − max), and y = exp(x − max) unless y is null. A row of −∞
  // has max −∞ and sum 0.
  void (*exp_sum)(const float* x, size_t n, float* y, float* max, float* sum);
  void (*adamw)(const AdamWStep& step, const float* g, size_t n, float* m, float* v, float* p);

  // Keys and values of `count` tokens into a page, at places first …; f16 is saturated at ±65,504,
  // so that a value that a query does not see can be multiplied by its probability of 0.
  void (*put_keys)(const float* k, size_t ldk, size_t first, size_t count, size_t head_dim,
                   PageType type, void* page);
  void (*put_values)(const float* v, size_t ldv, size_t first, size_t count, size_t head_dim,
                     PageType type, void* page);
  // Pages of 8-bit codes as f32, each code times its token's scale, [64]: keys [head_dim][64],
  // values [64][head_dim].
  void (*widen_q8_keys)(const int8_t* codes, const float* scales, size_t head_dim, float* to);
  void (*widen_q8_values)(const int8_t* codes, const float* scales, size_t head_dim, float* to);
  void (*attend_block)(const AttendBlock& block);
  // Adds a block's result (max, sum, out) to those of the blocks before it.
  void (*merge_block)(const AttendBlock& block, float* max, float* sum, float* out);
  void (*attend_backward_tile)(const AttendBackwardTile& tile);
};

// The table of one level; this processor must have it.
const FloatKernels& float_kernels(Isa level);
// The table of the level in use, base/cpu.h's isa().
const FloatKernels& float_kernels();

extern const FloatKernels kScalarFloatKernels, kAvx2FloatKernels, kAvx512FloatKernels;

}  // namespace moru
