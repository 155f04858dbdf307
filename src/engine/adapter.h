// LoRA adapters at run time, beside weights that stay as they are: y += s·(x·Aᵀ)·Bᵀ.
//
// Many adapters serve at once over one model: every row of a step names its own. The low-rank part
// is f32 whatever the weights are, each row by itself in a fixed order, so a token's logits do not
// depend on the rows, threads or adapters beside it.
#pragma once
#include <array>
#include <cstddef>
#include <span>
#include <vector>

#include "base/threads.h"
#include "engine/lora.h"

namespace moru {

// What make_adapter makes of plain pairs (Error: usage, DoRA or weights learnt whole); it never
// changes while it serves.
struct Adapter {
  Lora lora;
  std::vector<float> b_columns;  // each B as [rank, out], scaled, at its place in lora.values

  const float* a(const LoraPair& p) const { return lora.values.data() + p.a; }
  const float* b(const LoraPair& p) const { return b_columns.data() + p.b; }
};
Adapter make_adapter(Lora lora);

// Consecutive rows of a step that share an adapter (nullptr: none).
struct AdapterSpan {
  const Adapter* adapter;
  size_t first, count;
};

// Where the products of one input group go: [rows, ld].
struct AdapterTarget {
  float* y = nullptr;
  size_t ld = 0;
};

// Adds what the spans' adapters contribute to the products of x [rows, width] with the matrices of
// `group` in this layer; `targets` are in the group's order. `low`: scratch that is reused.
void add_adapters(Pool& pool, std::span<const AdapterSpan> spans, size_t layer, InputGroup group,
                  const float* x, size_t ldx, std::span<const AdapterTarget> targets,
                  std::vector<float>& low);

}  // namespace moru
