#include "engine/adapter.h"

#include <algorithm>

#include "base/error.h"
#include "engine/float_kernels.h"

namespace moru {
namespace {

// Rows that read a slice of A or B together, while it lies in the nearest cache.
constexpr size_t kRows = 16;
// Multiplications of one item: a few microseconds, so that waking another thread pays. How a grid
// is cut does not show in the results: every sum is one item's alone.
constexpr size_t kItemProducts = size_t{32} << 10;

// work(first row, rows, first, count) over the rows of a span and [0, size), where a row and a unit
// of the second cost `products`.
template <typename Work>
void each_tile(Pool& pool, size_t rows, size_t size, size_t products, const Work& work) {
  if (rows == 0) return;
  const size_t tile = std::min(rows, kRows);
  const size_t step = std::clamp<size_t>(kItemProducts / (tile * products), 1, size);
  const size_t across = (size + step - 1) / step;
  pool.each((rows + tile - 1) / tile * across, [&](size_t item) {
    const size_t row = item / across * tile, first = item % across * step;
    work(row, std::min(tile, rows - row), first, std::min(step, size - first));
  });
}

}  // namespace

Adapter make_adapter(Lora lora) {
  if (!lora.whole.empty())
    throw Error(ErrorKind::usage, {.where = lora.whole.front().name,
                                   .what = "was learnt whole, which cannot lie beside the weights",
                                   .cure = "merge the adapter into its model first"});
  if (lora.dora)
    throw Error(ErrorKind::usage, {.where = "use_dora",
                                   .what = "the adapter is DoRA's, which cannot lie beside weights",
                                   .cure = "merge it first: moru adapter MODEL ADAPTER --to gguf"});
  Adapter adapter{std::move(lora), {}};
  const Lora& l = adapter.lora;
  adapter.b_columns.resize(l.values.size());
  for (const LoraLayer& layer : l.layers) {
    for (const LoraPair& p : layer) {
      const std::span<const float> b = l.b(p);
      for (size_t o = 0; o < p.out; ++o)
        for (size_t r = 0; r < p.rank; ++r)
          adapter.b_columns[p.b + r * p.out + o] = p.scale * b[o * p.rank + r];
    }
  }
  return adapter;
}

void add_adapters(Pool& pool, std::span<const AdapterSpan> spans, size_t layer, InputGroup group,
                  const float* x, size_t ldx, std::span<const AdapterTarget> targets,
                  std::vector<float>& low) {
  MORU_CHECK(targets.size() == group.last - group.first);
  // u = x·Aᵀ of every span, [count, rank of its group], one after the other; A's of a group are
  // neighbours.
  size_t total = 0;
  for (const AdapterSpan& s : spans)
    if (s.adapter != nullptr) total += s.count * group_rank(s.adapter->lora.layers[layer], group);
  if (total == 0) return;
  low.resize(std::max(low.size(), total));
  const FloatKernels& kernels = float_kernels();

  float* u = low.data();
  for (const AdapterSpan& s : spans) {
    if (s.adapter == nullptr) continue;
    const LoraLayer& pairs = s.adapter->lora.layers[layer];
    const size_t rank = group_rank(pairs, group), width = pairs[group.first].in;
    const float* a = s.adapter->a(pairs[group.first]);
    if (rank == 0) continue;
    each_tile(pool, s.count, rank, width, [&](size_t row, size_t rows, size_t r, size_t count) {
      for (size_t i = r; i < r + count; ++i)
        for (size_t t = row; t < row + rows; ++t)
          u[t * rank + i] = kernels.dot(x + (s.first + t) * ldx, a + i * width, width);
    });
    u += s.count * rank;
  }

  u = low.data();
  for (const AdapterSpan& s : spans) {
    if (s.adapter == nullptr) continue;
    const LoraLayer& pairs = s.adapter->lora.layers[layer];
    const size_t rank = group_rank(pairs, group);
    size_t before = 0;  // ranks of the group's matrices before this one
    for (size_t p = group.first; p < group.last; ++p) {
      const LoraPair& pair = pairs[p];
      if (pair.rank == 0) continue;
      const AdapterTarget& target = targets[p - group.first];
      const float* b = s.adapter->b(pair);
      const float* low_row = u + before;
      each_tile(pool, s.count, pair.out, pair.rank,
                [&](size_t row, size_t rows, size_t column, size_t count) {
                  for (size_t t = row; t < row + rows; ++t)
                    for (size_t r = 0; r < pair.rank; ++r)
                      kernels.add_scaled(b + r * pair.out + column, count, low_row[t * rank + r],
                                         target.y + (s.first + t) * target.ld + column);
                });
      before += pair.rank;
    }
    u += s.count * rank;
  }
}

}  // namespace moru
