// Items of work and what they share; the arithmetic is in float_kernels_body.h.
//
// A query row is one query head of one token. Keys are cut into blocks of kKeyBlock positions, at
// fixed places: block b is [512·b, 512·(b + 1)). A block gives a row its maximum, the sum of
// exponentials and their product with the values; blocks are then merged in order:
//
//   keys     | block 0 | block 1 | block 2 |        an item may take all blocks of its rows, or
//   rows     |  m s o  →  m s o  →  m s o  → out    one block of them, merged in a second phase
//
// So neither the rows that share an item nor the split changes a row's bits.
#include "engine/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/cpu.h"
#include "base/error.h"
#include "base/memory.h"
#include "engine/attend_bf16.h"
#include "engine/float_kernels.h"

namespace moru {
namespace {

// Query rows per item of inference: enough to use a page of keys many times while it is in the
// first-level cache, few enough that the scores (rows · 2 KB) stay in the second.
constexpr size_t kCachedRows = 96;
// Query tokens per item of training's forward pass, and per tile of its backward pass.
constexpr size_t kForwardTokens = 96;
constexpr size_t kBackwardTokens = 96;
// A document longer than this is split over items in the backward pass.
constexpr size_t kBackwardChunk = 512;
constexpr size_t kBackwardChunksMax = 4;
constexpr float kLn2 = 0.693147181f;
constexpr size_t kPagesPerBlock = kKeyBlock / kKeyPage;

size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

// Memory of one thread that only grows: nothing is allocated once sizes repeat.
class Scratch {
 public:
  // Starts over with room for `floats` in all.
  void open(size_t floats) {
    if (memory_.bytes() < floats * sizeof(float)) memory_ = PageBuffer(floats * sizeof(float));
    next_ = static_cast<float*>(memory_.data());
    end_ = next_ + memory_.bytes() / sizeof(float);
  }
  float* take(size_t floats) {
    float* p = next_;
    next_ += ceil_div(floats, 16) * 16;
    MORU_DCHECK(next_ <= end_);
    return p;
  }
  static size_t padded(size_t floats) { return ceil_div(floats, 16) * 16; }

 private:
  PageBuffer memory_;
  float* next_ = nullptr;
  float* end_ = nullptr;
};
// Two per thread: what one item uses, and what all items of a call share (the caller's).
Scratch& item_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}
Scratch& call_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

void check(const AttentionShape& shape) {
  MORU_CHECK(shape.head_dim > 0 && shape.head_dim % 16 == 0);
  MORU_CHECK(shape.kv_heads > 0 && shape.heads % shape.kv_heads == 0);
}

// The first key that the query at `position` sees.
size_t first_seen(const AttentionShape& shape, size_t position) {
  return shape.window == 0 || position + 1 <= shape.window ? 0 : position + 1 - shape.window;
}

// Part of [first, end) within [from, from + size), relative to `from`; empty at one of its ends.
void clip(size_t first, size_t end, size_t from, size_t size, uint32_t& out_first,
          uint32_t& out_end) {
  out_first = static_cast<uint32_t>(std::clamp(first, from, from + size) - from);
  out_end = static_cast<uint32_t>(std::clamp(end, from, from + size) - from);
}

// What merging needs of the rows of one item: the result so far.
struct Rows {
  float *max, *sum, *out;
  static size_t floats(size_t rows, size_t head_dim) {
    return 2 * Scratch::padded(rows) + Scratch::padded(rows * head_dim);
  }
};
Rows take_rows(Scratch& scratch, size_t rows, size_t head_dim) {
  Rows r = {scratch.take(rows), scratch.take(rows), scratch.take(rows * head_dim)};
  return r;
}
void clear(const Rows& r, size_t rows, size_t head_dim) {
  std::fill_n(r.max, rows, -std::numeric_limits<float>::infinity());
  std::fill_n(r.sum, rows, 0.0f);
  std::fill_n(r.out, rows * head_dim, 0.0f);
}

// Scratch of attend_block for `rows` rows.
struct BlockScratch {
  float *scores, *page;
  uint32_t *first, *end;
  static size_t floats(size_t rows, size_t head_dim) {
    return rows * kKeyBlock + Scratch::padded(attend_scratch(rows, head_dim)) +
           2 * Scratch::padded(rows);
  }
};
BlockScratch take_block(Scratch& scratch, size_t rows, size_t head_dim) {
  BlockScratch b{};
  b.scores = scratch.take(rows * kKeyBlock);
  b.page = scratch.take(attend_scratch(rows, head_dim));
  b.first = reinterpret_cast<uint32_t*>(scratch.take(rows));
  b.end = reinterpret_cast<uint32_t*>(scratch.take(rows));
  return b;
}

// ---- Inference ----------------------------------------------------------------------------------

// Tokens [first, first + tokens) of a span, one KV head, blocks [block, block_end).
struct CachedItem {
  uint32_t span, kv_head;
  size_t first, tokens;
  size_t block, block_end;
  float* part;  // of a split item: its rows' max, sum, out; otherwise null
};

struct CachedCall {
  const AttentionShape& shape;
  const KvCache& cache;
  size_t layer;
  std::span<const AttentionSpan> spans;
  const float* q;
  size_t ldq;
  float* out;
  size_t ldo;
  size_t group;  // query heads per KV head
};

// Fills in which keys of block `b` each row sees. Rows are token by token, heads of the group
// inside.
void set_seen(const CachedCall& call, const CachedItem& item, size_t b, const BlockScratch& to) {
  const AttentionSpan& span = call.spans[item.span];
  for (size_t t = 0; t < item.tokens; ++t) {
    const size_t position = span.first_position + item.first + t;
    for (size_t g = 0; g < call.group; ++g)
      clip(first_seen(call.shape, position), position + 1, b * kKeyBlock, kKeyBlock,
           to.first[t * call.group + g], to.end[t * call.group + g]);
  }
}

// max, to base 2, and sum of each row; a sink adds its own exponential to the sum.
void write_out(const CachedCall& call, const CachedItem& item, const float* max, const float* sum,
               const float* weighted) {
  const FloatKernels& kernels = float_kernels();
  const size_t dim = call.shape.head_dim;
  for (size_t t = 0; t < item.tokens; ++t) {
    float* to = call.out + (call.spans[item.span].first_row + item.first + t) * call.ldo +
                item.kv_head * call.group * dim;
    for (size_t g = 0; g < call.group; ++g) {
      const size_t r = t * call.group + g;
      float total = sum[r];
      if (call.shape.sinks != nullptr) {
        const float sink = call.shape.sinks[item.kv_head * call.group + g] / kLn2;
        total += std::exp2(sink - max[r]);
      }
      kernels.scale(weighted + r * dim, dim, 1.0f / total, to + g * dim);
    }
  }
}

void attend_item(const CachedCall& call, const CachedItem& item) {
  const FloatKernels& kernels = float_kernels();
  const AttentionSpan& span = call.spans[item.span];
  const size_t dim = call.shape.head_dim, rows = item.tokens * call.group;
  // Keys that no kernel reads as they are stored are widened first, a block at a time.
  const KvType type = call.cache.shape().type;
  const size_t page_floats = kKeyPage * dim;
  const size_t wide_floats =
      type == KvType::bf16 || type == KvType::q8_0 ? 2 * kPagesPerBlock * page_floats : 0;
  Scratch& scratch = item_scratch();
  scratch.open(Scratch::padded(rows * dim) + BlockScratch::floats(rows, dim) +
               2 * Rows::floats(rows, dim) + wide_floats);
  float* wide = scratch.take(wide_floats);
  float* q = scratch.take(rows * dim);
  for (size_t t = 0; t < item.tokens; ++t)
    std::memcpy(
        q + t * call.group * dim,
        call.q + (span.first_row + item.first + t) * call.ldq + item.kv_head * call.group * dim,
        call.group * dim * sizeof(float));
  const BlockScratch room = take_block(scratch, rows, dim);
  const Rows part = take_rows(scratch, rows, dim), total = take_rows(scratch, rows, dim);
  const bool alone = item.block + 1 == item.block_end;

  const size_t first = span.first_position + item.first, last = first + item.tokens - 1;
  const size_t first_page = first_seen(call.shape, first) / kKeyPage;
  AttendBlock block{.q = q,
                    .ldq = dim,
                    .rows = rows,
                    .head_dim = dim,
                    .scale = call.shape.scale,
                    .softcap = call.shape.softcap,
                    .type = type == KvType::i16   ? PageType::i16
                            : type == KvType::f16 ? PageType::f16
                                                  : PageType::f32,
                    .pages = 0,
                    .keys = nullptr,
                    .values = nullptr,
                    .ldv = dim,
                    .next = nullptr,
                    .first = room.first,
                    .end = room.end,
                    .scores = room.scores,
                    .page = room.page,
                    .max = part.max,
                    .sum = part.sum,
                    .out = part.out};
  if (!alone) clear(total, rows, dim);
  for (size_t b = item.block; b < item.block_end; ++b) {
    const void* keys[kPagesPerBlock];
    const void* values[kPagesPerBlock];
    const size_t page = b * kPagesPerBlock, page_end = last / kKeyPage + 1;
    block.pages = std::min(page_end - page, kPagesPerBlock);
    for (size_t p = 0; p < block.pages; ++p) {
      if (wide_floats > 0) {
        float *k = wide + 2 * p * page_floats, *v = k + page_floats;
        keys[p] = k;
        values[p] = v;
        if (page + p >= first_page)
          call.cache.widen(*span.sequence, page + p, call.layer, item.kv_head, k, v);
        continue;
      }
      keys[p] = call.cache.keys(*span.sequence, page + p, call.layer, item.kv_head);
      values[p] = call.cache.values(*span.sequence, page + p, call.layer, item.kv_head);
    }
    block.keys = keys;
    block.values = values;
    block.next = b + 1 < item.block_end ? call.cache.keys(*span.sequence, page + kPagesPerBlock,
                                                          call.layer, item.kv_head)
                                        : keys[0];
    set_seen(call, item, b, room);
    if (item.part != nullptr) {  // one block
      block.max = item.part;
      block.sum = block.max + Scratch::padded(rows);
      block.out = block.sum + Scratch::padded(rows);
    }
    kernels.attend_block(block);
    if (!alone) kernels.merge_block(block, total.max, total.sum, total.out);
  }
  if (item.part == nullptr)
    write_out(call, item, alone ? part.max : total.max, alone ? part.sum : total.sum,
              alone ? part.out : total.out);
}

// Merges the parts of an item whose blocks were items of their own.
void merge_items(const CachedCall& call, const CachedItem& whole) {
  const FloatKernels& kernels = float_kernels();
  const size_t dim = call.shape.head_dim, rows = whole.tokens * call.group;
  Scratch& scratch = item_scratch();
  scratch.open(BlockScratch::floats(rows, dim) + Rows::floats(rows, dim));
  const BlockScratch room = take_block(scratch, rows, dim);
  const Rows total = take_rows(scratch, rows, dim);
  clear(total, rows, dim);
  AttendBlock block{};
  block.rows = rows;
  block.head_dim = dim;
  block.first = room.first;
  block.end = room.end;
  for (size_t b = whole.block; b < whole.block_end; ++b) {
    set_seen(call, whole, b, room);
    block.max = whole.part + (b - whole.block) * Rows::floats(rows, dim);
    block.sum = block.max + Scratch::padded(rows);
    block.out = block.sum + Scratch::padded(rows);
    kernels.merge_block(block, total.max, total.sum, total.out);
  }
  write_out(call, whole, total.max, total.sum, total.out);
}

}  // namespace

void attend_cached(Pool& pool, const AttentionShape& shape, const KvCache& cache, size_t layer,
                   std::span<const AttentionSpan> spans, const float* q, size_t ldq, float* out,
                   size_t ldo) {
  check(shape);
  MORU_CHECK(cache.shape().kv_heads == shape.kv_heads && cache.shape().head_dim == shape.head_dim);
  const CachedCall call{shape, cache, layer, spans, q, ldq, out, ldo, shape.heads / shape.kv_heads};
  const size_t tile = std::max<size_t>(1, kCachedRows / call.group);

  static thread_local std::vector<CachedItem> whole, parts;
  whole.clear();
  parts.clear();
  for (size_t s = 0; s < spans.size(); ++s) {
    const AttentionSpan& span = spans[s];
    MORU_DCHECK(span.first_position + span.tokens <=
                span.sequence->pages().size() / cache.groups() * kKeyPage);
    for (size_t first = 0; first < span.tokens; first += tile) {
      const size_t tokens = std::min(tile, span.tokens - first);
      const size_t position = span.first_position + first;
      for (size_t head = 0; head < shape.kv_heads; ++head)
        whole.push_back({.span = static_cast<uint32_t>(s),
                         .kv_head = static_cast<uint32_t>(head),
                         .first = first,
                         .tokens = tokens,
                         .block = first_seen(shape, position) / kKeyBlock,
                         .block_end = ceil_div(position + tokens, kKeyBlock),
                         .part = nullptr});
    }
  }
  // Too few items to keep all threads busy: every block becomes one.
  const bool few = pool.size() > 1 && whole.size() < 4 * pool.size();
  size_t part_floats = 0;
  if (few)
    for (const CachedItem& item : whole) {
      const size_t blocks = item.block_end - item.block;
      if (blocks > 1)
        part_floats += blocks * Rows::floats(item.tokens * call.group, shape.head_dim);
    }
  Scratch& shared = call_scratch();
  if (part_floats > 0) shared.open(part_floats);
  for (CachedItem& item : whole) {
    const size_t blocks = item.block_end - item.block;
    if (!few || blocks == 1) {
      parts.push_back(item);
      continue;
    }
    const size_t floats = Rows::floats(item.tokens * call.group, shape.head_dim);
    item.part = shared.take(blocks * floats);
    for (size_t b = 0; b < blocks; ++b) {
      parts.push_back(item);
      parts.back().block = item.block + b;
      parts.back().block_end = item.block + b + 1;
      parts.back().part = item.part + b * floats;
    }
  }
  // Later tokens see more keys: the longest items first, so that threads finish together.
  const std::span<const CachedItem> work(parts);
  pool.each(work.size(), [&](size_t i) { attend_item(call, work[work.size() - 1 - i]); });
  if (part_floats == 0) return;
  std::erase_if(whole, [](const CachedItem& item) { return item.part == nullptr; });
  const std::span<const CachedItem> split(whole);
  pool.each(split.size(), [&](size_t i) { merge_items(call, split[i]); });
}

// ---- Training -----------------------------------------------------------------------------------

namespace {

// Query tokens [first, first + tokens) of the document [start, end), one KV head.
struct PackedItem {
  PackedDocument document;
  uint32_t kv_head;
  size_t first, tokens;  // positions of its queries
  float *dk, *dv;        // backward: where sums of a part go; null: the result itself
};

struct PackedCall {
  const AttentionShape& shape;
  const float* q;
  size_t ldq;
  const float *k, *v;
  size_t ldkv;
  float* out;
  size_t ldo;
  float* lse;
  size_t group;
};

// Calls run(position, count, row) for the runs of neighbouring rows that hold positions [at, end).
template <typename Run>
void each_run(const PackedDocument& document, size_t at, size_t end, Run&& run) {
  if (at < document.prefix) {
    const size_t stop = std::min(end, document.prefix);
    run(at, stop - at, document.row_of(at));
    at = stop;
  }
  if (at < end) run(at, end - at, document.row_of(at));
}

static_assert(kForwardTokens <= kAttendBf16Rows && kBackwardTokens <= kAttendBf16Rows);
bool in_bf16(const AttentionShape& shape) {
  return shape.bf16 && shape.softcap == 0 && isa() == Isa::avx512;
}
// Floats of scratch memory that bf16 needs.
size_t bf16_floats(const AttentionShape& shape) {
  return in_bf16(shape) ? attend_bf16_bytes(shape.head_dim) / sizeof(float) : 0;
}

void attend_packed_item(const PackedCall& call, const PackedItem& item) {
  const FloatKernels& kernels = float_kernels();
  const AttentionShape& shape = call.shape;
  const size_t dim = shape.head_dim, rows = item.tokens;
  const size_t first_block = first_seen(shape, item.first) / kKeyBlock;
  const size_t block_end = ceil_div(item.first + rows, kKeyBlock);
  const bool alone = first_block + 1 == block_end;

  Scratch& scratch = item_scratch();
  // Values are read where they stand, unless a page of them may lie in two places.
  const bool gathers = item.document.prefix != 0;
  scratch.open((gathers ? 2 : 1) * kKeyBlock * dim + BlockScratch::floats(rows, dim) +
               (1 + call.group) * Rows::floats(rows, dim) + bf16_floats(shape));
  float* panels = scratch.take(kKeyBlock * dim);
  float* gathered = gathers ? scratch.take(kKeyBlock * dim) : nullptr;
  const BlockScratch room = take_block(scratch, rows, dim);
  const Rows part = take_rows(scratch, rows, dim);
  const Rows total = take_rows(scratch, call.group * rows, dim);
  if (!alone) clear(total, call.group * rows, dim);
  float* bf16_room = scratch.take(bf16_floats(shape));

  for (size_t b = first_block; b < block_end; ++b) {
    const size_t key = b * kKeyBlock, keys = std::min(kKeyBlock, item.first + rows - key);
    const void* key_pages[kPagesPerBlock];
    const void* value_pages[kPagesPerBlock];
    const size_t pages = ceil_div(keys, kKeyPage);
    for (size_t p = 0; p < pages; ++p) {
      const size_t at = key + p * kKeyPage, end = std::min(at + kKeyPage, key + keys);
      float* panel = panels + p * kKeyPage * dim;
      float* values = gathers ? gathered + p * kKeyPage * dim : nullptr;
      each_run(item.document, at, end, [&](size_t position, size_t count, size_t row) {
        const size_t from = row * call.ldkv + item.kv_head * dim;
        kernels.put_keys(call.k + from, call.ldkv, position - at, count, dim, PageType::f32, panel);
        if (gathers)
          kernels.put_values(call.v + from, call.ldkv, position - at, count, dim, PageType::f32,
                             values);
        else
          value_pages[p] = call.v + from;
      });
      key_pages[p] = panel;
      if (gathers) value_pages[p] = values;
    }
    for (size_t t = 0; t < rows; ++t) {
      const size_t position = item.first + t;
      clip(first_seen(shape, position), position + 1, key, kKeyBlock, room.first[t], room.end[t]);
    }
    for (size_t g = 0; g < call.group; ++g) {
      const size_t head = item.kv_head * call.group + g;
      const size_t row = item.document.row_of(item.first);
      const AttendBlock block{.q = call.q + row * call.ldq + head * dim,
                              .ldq = call.ldq,
                              .rows = rows,
                              .head_dim = dim,
                              .scale = shape.scale,
                              .softcap = shape.softcap,
                              .type = PageType::f32,
                              .pages = pages,
                              .keys = key_pages,
                              .values = value_pages,
                              .ldv = gathers ? dim : call.ldkv,
                              .next = nullptr,
                              .first = room.first,
                              .end = room.end,
                              .scores = room.scores,
                              .page = room.page,
                              .max = part.max,
                              .sum = part.sum,
                              .out = part.out};
      if (in_bf16(shape))
        attend_block_bf16_avx512(block, g > 0, bf16_room);
      else
        kernels.attend_block(block);
      const float *max = part.max, *sum = part.sum, *weighted = part.out;
      if (!alone) {
        float* group_out = total.out + g * rows * dim;
        kernels.merge_block(block, total.max + g * rows, total.sum + g * rows, group_out);
        max = total.max + g * rows;
        sum = total.sum + g * rows;
        weighted = group_out;
      }
      if (b + 1 < block_end) continue;
      for (size_t t = 0; t < rows; ++t) {
        call.lse[(row + t) * shape.heads + head] = max[t] * kLn2 + std::log(sum[t]);
        kernels.scale(weighted + t * dim, dim, 1.0f / sum[t],
                      call.out + (row + t) * call.ldo + head * dim);
      }
    }
  }
}

struct PackedBackward {
  const AttentionShape& shape;
  const float* q;
  size_t ldq;
  const float *k, *v;
  size_t ldkv;
  const float *out, *d_out;
  size_t ldo;
  const float* lse;
  float *dq, *dk, *dv;
  size_t group;
};

// The gradients that flow from the item's queries: dq is complete, dk and dv are its part of the
// sums, for keys [0, first + tokens).
void attend_packed_backward_item(const PackedBackward& call, const PackedItem& item) {
  const FloatKernels& kernels = float_kernels();
  const AttentionShape& shape = call.shape;
  const size_t dim = shape.head_dim, queries = item.tokens, page = kKeyPage * dim;
  const size_t query_end = item.first + queries;
  Scratch& scratch = item_scratch();
  const PackedDocument& document = item.document;
  const bool gathers = document.prefix != 0;  // a page of keys may lie in two places
  scratch.open((gathers ? 3 : 2) * page + 2 * Scratch::padded(kBackwardTokens * kKeyPage) +
               2 * Scratch::padded(kBackwardTokens) + 2 * call.group * Scratch::padded(queries) +
               bf16_floats(shape));
  float *k_page = scratch.take(page), *v_page = scratch.take(page);
  float* k_rows = gathers ? scratch.take(page) : nullptr;
  float* p = scratch.take(kBackwardTokens * kKeyPage);
  float* ds = scratch.take(kBackwardTokens * kKeyPage);
  auto* first = reinterpret_cast<uint32_t*>(scratch.take(kBackwardTokens));
  auto* end = reinterpret_cast<uint32_t*>(scratch.take(kBackwardTokens));
  float *lse = scratch.take(call.group * queries), *delta = scratch.take(call.group * queries);
  float* bf16_room = scratch.take(bf16_floats(shape));

  const size_t kv_column = item.kv_head * dim, query_row = document.row_of(item.first);
  float* dk = item.dk != nullptr ? item.dk : call.dk + document.first * call.ldkv + kv_column;
  float* dv = item.dv != nullptr ? item.dv : call.dv + document.first * call.ldkv + kv_column;
  const size_t lddkv = item.dk != nullptr ? dim : call.ldkv;
  for (size_t t = 0; t < query_end; ++t) {
    std::fill_n(dk + t * lddkv, dim, 0.0f);
    std::fill_n(dv + t * lddkv, dim, 0.0f);
  }
  for (size_t g = 0; g < call.group; ++g) {
    const size_t head = item.kv_head * call.group + g;
    for (size_t t = 0; t < queries; ++t) {
      const size_t row = query_row + t, at = row * call.ldo + head * dim;
      delta[g * queries + t] = kernels.dot(call.out + at, call.d_out + at, dim);
      lse[g * queries + t] = call.lse[row * shape.heads + head];
      std::fill_n(call.dq + row * call.ldq + head * dim, dim, 0.0f);
    }
  }

  const size_t first_key = first_seen(shape, item.first) / kKeyPage * kKeyPage;
  for (size_t key = first_key; key < query_end; key += kKeyPage) {
    const size_t keys = std::min(kKeyPage, query_end - key);
    const float* k = k_rows;
    bool packed = false;  // this page of keys, for bf16
    each_run(document, key, key + keys, [&](size_t position, size_t count, size_t row) {
      const size_t from = row * call.ldkv + kv_column;
      kernels.put_keys(call.k + from, call.ldkv, position - key, count, dim, PageType::f32, k_page);
      kernels.put_keys(call.v + from, call.ldkv, position - key, count, dim, PageType::f32, v_page);
      if (gathers)
        kernels.put_values(call.k + from, call.ldkv, position - key, count, dim, PageType::f32,
                           k_rows);
      else
        k = call.k + from;
    });
    // The first tile of queries that reaches this page.
    const size_t skipped = key > item.first ? (key - item.first) / kBackwardTokens : 0;
    for (size_t at = skipped * kBackwardTokens; at < queries; at += kBackwardTokens) {
      const size_t rows = std::min(kBackwardTokens, queries - at);
      if (first_seen(shape, item.first + at) >= key + keys) break;
      for (size_t t = 0; t < rows; ++t) {
        const size_t position = item.first + at + t;
        clip(first_seen(shape, position), position + 1, key, keys, first[t], end[t]);
      }
      for (size_t g = 0; g < call.group; ++g) {
        const size_t head = item.kv_head * call.group + g, row = query_row + at;
        const AttendBackwardTile tile{.rows = rows,
                                      .keys = keys,
                                      .head_dim = dim,
                                      .scale = shape.scale,
                                      .softcap = shape.softcap,
                                      .q = call.q + row * call.ldq + head * dim,
                                      .ldq = call.ldq,
                                      .d_out = call.d_out + row * call.ldo + head * dim,
                                      .ldo = call.ldo,
                                      .lse = lse + g * queries + at,
                                      .delta = delta + g * queries + at,
                                      .k = k,
                                      .ldkv = gathers ? dim : call.ldkv,
                                      .k_page = k_page,
                                      .v_page = v_page,
                                      .first = first,
                                      .end = end,
                                      .p = p,
                                      .ds = ds,
                                      .dq = call.dq + row * call.ldq + head * dim,
                                      .lddq = call.ldq,
                                      .dk = dk + key * lddkv,
                                      .dv = dv + key * lddkv,
                                      .lddkv = lddkv};
        if (in_bf16(shape)) {
          attend_backward_tile_bf16_avx512(tile, packed, bf16_room);
          packed = true;
        } else {
          kernels.attend_backward_tile(tile);
        }
      }
    }
  }
}

}  // namespace

namespace {

void check(std::span<const PackedDocument> documents) {
  size_t at = 0;
  for (const PackedDocument& d : documents) {
    MORU_CHECK(d.first == at && d.end >= d.first && d.prefix_first + d.prefix <= d.first);
    at = d.end;
  }
}

}  // namespace

void attend_packed(Pool& pool, const AttentionShape& shape,
                   std::span<const PackedDocument> documents, const float* q, size_t ldq,
                   const float* k, const float* v, size_t ldkv, float* out, size_t ldo,
                   float* lse) {
  check(shape);
  check(documents);
  const PackedCall call{shape, q, ldq, k, v, ldkv, out, ldo, lse, shape.heads / shape.kv_heads};
  static thread_local std::vector<PackedItem> items;
  items.clear();
  for (const PackedDocument& document : documents)
    for (size_t first = document.prefix; first < document.positions(); first += kForwardTokens)
      for (size_t head = 0; head < shape.kv_heads; ++head)
        items.push_back({.document = document,
                         .kv_head = static_cast<uint32_t>(head),
                         .first = first,
                         .tokens = std::min(kForwardTokens, document.positions() - first),
                         .dk = nullptr,
                         .dv = nullptr});
  const std::span<const PackedItem> work(items);
  pool.each(work.size(), [&](size_t i) { attend_packed_item(call, work[work.size() - 1 - i]); });
}

void attend_packed_backward(Pool& pool, const AttentionShape& shape,
                            std::span<const PackedDocument> documents, const float* q, size_t ldq,
                            const float* k, const float* v, size_t ldkv, const float* out,
                            const float* d_out, size_t ldo, const float* lse, float* dq, float* dk,
                            float* dv) {
  check(shape);
  check(documents);
  const PackedBackward call{shape, q,   ldq, k,  v,  ldkv, out,
                            d_out, ldo, lse, dq, dk, dv,   shape.heads / shape.kv_heads};
  const size_t dim = shape.head_dim;
  // A long document is up to four items per KV head, by query: the last writes dk and dv, which
  // are complete but for the other items' parts; those are added afterwards, in order. A document
  // with a prefix is all parts: most of what it sees is another's.
  static thread_local std::vector<PackedItem> items, parts;
  items.clear();
  parts.clear();
  size_t part_floats = 0;
  for (const PackedDocument& document : documents) {
    const size_t length = document.rows();
    if (length == 0) continue;
    const size_t chunks = std::min(kBackwardChunksMax, ceil_div(length, kBackwardChunk));
    const size_t chunk = ceil_div(ceil_div(length, chunks), kKeyPage) * kKeyPage;
    for (size_t at = 0; at < length; at += chunk)
      for (size_t head = 0; head < shape.kv_heads; ++head) {
        const PackedItem item{.document = document,
                              .kv_head = static_cast<uint32_t>(head),
                              .first = document.prefix + at,
                              .tokens = std::min(chunk, length - at),
                              .dk = nullptr,
                              .dv = nullptr};
        const bool whole = document.prefix == 0 && at + chunk >= length;
        (whole ? items : parts).push_back(item);
        if (!whole) part_floats += 2 * (item.first + item.tokens) * dim;
      }
  }
  Scratch& shared = call_scratch();
  if (!parts.empty()) shared.open(part_floats);
  for (PackedItem& part : parts) {
    part.dk = shared.take((part.first + part.tokens) * dim);
    part.dv = shared.take((part.first + part.tokens) * dim);
  }
  const std::span<const PackedItem> last(items), earlier(parts);
  pool.each(last.size() + earlier.size(), [&](size_t i) {
    attend_packed_backward_item(
        call, i < last.size() ? last[i] : earlier[last.size() + earlier.size() - 1 - i]);
  });
  if (parts.empty()) return;
  // `last` has one item per document without a prefix and KV head: it takes the parts of its own
  // document and of those that continue it, in order.
  pool.each(last.size(), [&](size_t i) {
    const PackedDocument& document = last[i].document;
    for (const PackedItem& part : earlier) {
      const PackedDocument& from = part.document;
      const size_t base = from.prefix == 0 ? from.first : from.prefix_first;
      if (part.kv_head != last[i].kv_head || base < document.first || base >= document.end)
        continue;
      const size_t column = part.kv_head * dim;
      if (from.prefix != 0 && part.first == from.prefix)
        for (size_t row = from.first; row < from.end; ++row) {
          std::fill_n(dk + row * ldkv + column, dim, 0.0f);
          std::fill_n(dv + row * ldkv + column, dim, 0.0f);
        }
      for (size_t t = 0; t < part.first + part.tokens; ++t) {
        const size_t to = from.row_of(t) * ldkv + column;
        float_kernels().add_scaled(part.dk + t * dim, dim, 1.0f, dk + to);
        float_kernels().add_scaled(part.dv + t * dim, dim, 1.0f, dv + to);
      }
    }
  });
}

}  // namespace moru
