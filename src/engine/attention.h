// Causal attention, grouped over query heads: over the paged KV cache for inference, over packed
// documents for training. In f32, but for a cache of i16, whose codes are multiplied as they are.
//
// Inference is exact: keys are taken in tiles of 16 positions and blocks of 512, merged in order
// (online softmax, arXiv:2205.14135), so a token's result has the same bits whatever the batch,
// the chunking of its prompt or the number of threads.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>

#include "base/threads.h"
#include "engine/kv_cache.h"

namespace moru {

struct AttentionShape {
  size_t heads = 0, kv_heads = 0, head_dim = 0;  // head_dim: a multiple of 16
  float scale = 0;                               // of the scores, usually head_dim^-½
  float softcap = 0;                             // 0: none
  size_t window = 0;  // a query sees at most this many keys, itself included; 0: all
  // [heads] scores that join each head's softmax without a value, or null; inference alone.
  const float* sinks = nullptr;
  // Training alone: products of operands rounded to bf16 where the processor multiplies it.
  bool bf16 = false;
};

// Consecutive new tokens of one sequence whose keys and values are already in the cache.
struct AttentionSpan {
  size_t first_row;  // of q and out
  size_t tokens;
  size_t first_position;  // of the first of them
  const KvSequence* sequence;
};

// q, out: [rows, heads · head_dim] f32, rows `ld` apart. out may be q. Allocates nothing once its
// scratch memory (per thread some 300 KB, and the parts of long contexts) has grown.
void attend_cached(Pool& pool, const AttentionShape& shape, const KvCache& cache, size_t layer,
                   std::span<const AttentionSpan> spans, const float* q, size_t ldq, float* out,
                   size_t ldo);

// Rows [first, end) of a packed batch that attend to themselves, and before that to the `prefix`
// rows from prefix_first on, which belong to an earlier document without a prefix: two answers to
// one prompt share its rows. Positions count from the prefix's first row.
struct PackedDocument {
  size_t first = 0, end = 0;
  size_t prefix_first = 0, prefix = 0;

  size_t rows() const { return end - first; }
  size_t positions() const { return prefix + rows(); }
  size_t row_of(size_t position) const {
    return position < prefix ? prefix_first + position : first + position - prefix;
  }
  bool operator==(const PackedDocument&) const = default;
};

// Training: documents attend to themselves (and their prefixes) alone; the mask never exists. The
// documents cover the rows without gaps.
//   q [T, heads · head_dim], k and v [T, kv_heads · head_dim], out as q;
//   lse [T, heads]: log-sum-exp of each query's scores, kept for the backward pass.
void attend_packed(Pool& pool, const AttentionShape& shape,
                   std::span<const PackedDocument> documents, const float* q, size_t ldq,
                   const float* k, const float* v, size_t ldkv, float* out, size_t ldo, float* lse);
// Gradients of attend_packed; dq, dk, dv are overwritten, with the row distances of q, k and v.
// Sums run in a fixed order: the same bits for any number of threads. d_out and out as in the
// forward pass. A document longer than 512 tokens is split into up to 4 parts, which takes up to 3
// more floats of scratch memory per element of k; one with a prefix takes 2 per element that it
// sees.
void attend_packed_backward(Pool& pool, const AttentionShape& shape,
                            std::span<const PackedDocument> documents, const float* q, size_t ldq,
                            const float* k, const float* v, size_t ldkv, const float* out,
                            const float* d_out, size_t ldo, const float* lse, float* dq, float* dk,
                            float* dv);

}  // namespace moru
