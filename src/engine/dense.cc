#include "engine/dense.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <dnnl.hpp>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>

#include "base/cpu.h"
#include "base/error.h"
#include "base/memory.h"
#include "engine/bf16_product.h"
#include "engine/float_kernels.h"

// oneDNN's own parallelism is OpenMP; each of our threads tells it to stay alone.
extern "C" void omp_set_num_threads(int);

namespace moru {
namespace {

using dnnl::memory;

// oneDNN's grid: tiles of the output that one call computes, about equal ones. They follow from the
// shape, never from the pool. 512 rows amortise the packing of the weights inside a call; 192
// columns of them stay in L2.
constexpr size_t kTileRows = 512;
constexpr size_t kTileCols = 192;
// Fewer tiles than this are halved: two threads must not wait for the third of three.
constexpr size_t kFewTiles = 12;
constexpr size_t kFewOwnTiles = 8;
// Rows of a tile where several products share a phase.
constexpr size_t kSharedTileRows = 256;

const dnnl::engine& engine() {
  static const dnnl::engine one = [] {
    // Strict arithmetic, whatever the environment says.
    dnnl::set_default_fpmath_mode(dnnl::fpmath_mode::strict);
    // A lower level that was asked for is lower here too.
    if (isa() < processor_isa())
      dnnl::set_max_cpu_isa(isa() == Isa::avx2 ? dnnl::cpu_isa::avx2 : dnnl::cpu_isa::sse41);
    return dnnl::engine(dnnl::engine::kind::cpu, 0);
  }();
  return one;
}

size_t size_of(DType type) {
  MORU_CHECK(type == DType::f32 || type == DType::bf16);
  return type == DType::f32 ? 4 : 2;
}

// One product of one tile: dst [m, n] = src [m, k] · weights [k, n] in f32, each with its strides.
struct Shape {
  size_t m, n, k;
  std::array<size_t, 2> src, weights;  // strides of rows and of columns
  size_t dst;                          // distance between rows
  bool accumulate;
  float scale;

  auto operator<=>(const Shape&) const = default;
};

struct Product {
  dnnl::matmul primitive;
  memory::desc src, weights, dst, scratch;
};

memory::desc describe(size_t rows, size_t cols, size_t row_stride, size_t col_stride) {
  return {{static_cast<memory::dim>(rows), static_cast<memory::dim>(cols)},
          memory::data_type::f32,
          {static_cast<memory::dim>(row_stride), static_cast<memory::dim>(col_stride)}};
}

Product make_product(const Shape& s) {
  const memory::desc src = describe(s.m, s.k, s.src[0], s.src[1]);
  const memory::desc weights = describe(s.k, s.n, s.weights[0], s.weights[1]);
  const memory::desc dst = describe(s.m, s.n, s.dst, 1);
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  dnnl::post_ops after;
#if DNNL_VERSION_MAJOR >= 3
  if (s.scale != 1) after.append_eltwise(dnnl::algorithm::eltwise_linear, s.scale, 0);
#else
  if (s.scale != 1) after.append_eltwise(1, dnnl::algorithm::eltwise_linear, s.scale, 0);
#endif
  if (s.accumulate) after.append_sum(1);
  attributes.set_post_ops(after);
#if DNNL_VERSION_MAJOR >= 3
  const dnnl::matmul::primitive_desc description(engine(), src, weights, dst, attributes);
#else
  const dnnl::matmul::primitive_desc description({src, weights, dst}, attributes, engine());
#endif
  return {dnnl::matmul(description), src, weights, dst, description.scratchpad_desc()};
}

const Product& product_for(const Shape& shape) {
  static std::shared_mutex mutex;
  static std::map<Shape, std::unique_ptr<Product>> products;
  {
    const std::shared_lock lock(mutex);
    const auto found = products.find(shape);
    if (found != products.end()) return *found->second;
  }
  auto made = std::make_unique<Product>(make_product(shape));
  const std::unique_lock lock(mutex);
  return *products.emplace(shape, std::move(made)).first->second;
}

void run_tile(const Shape& shape, const void* src, const void* weights, void* dst) {
  thread_local const bool alone = [] {
    omp_set_num_threads(1);
    return true;
  }();
  static_cast<void>(alone);
  thread_local dnnl::stream stream(engine());
  thread_local std::vector<std::byte> scratch;

  const Product& product = product_for(shape);
  if (scratch.size() < product.scratch.get_size()) scratch.resize(product.scratch.get_size());
  product.primitive.execute(
      stream, {{DNNL_ARG_SRC, memory(product.src, engine(), const_cast<void*>(src))},
               {DNNL_ARG_WEIGHTS, memory(product.weights, engine(), const_cast<void*>(weights))},
               {DNNL_ARG_DST, memory(product.dst, engine(), dst)},
               {DNNL_ARG_SCRATCHPAD, memory(product.scratch, engine(), scratch.data())}});
  stream.wait();
}

// A matrix operand as the grid sees it: where element (row, col) stands, in elements.
struct Operand {
  const void* data;
  DType type;
  size_t row_stride, col_stride;

  const void* at(size_t row, size_t col) const {
    return static_cast<const std::byte*>(data) +
           (row * row_stride + col * col_stride) * size_of(type);
  }
};

// Rows and columns of an operand in f32: where they stand, or widened from bf16, which loses
// nothing. oneDNN has bf16 products for AVX-512 alone.
Operand in_f32(const Operand& from, size_t row, size_t col, size_t rows, size_t cols,
               std::vector<float>& memory) {
  const auto at = [&](size_t r, size_t c) { return from.at(row + r, col + c); };
  if (from.type == DType::f32) return {at(0, 0), DType::f32, from.row_stride, from.col_stride};
  if (memory.size() < rows * cols) memory.resize(rows * cols);
  const bool by_rows = from.col_stride == 1;
  MORU_CHECK(by_rows || from.row_stride == 1);
  const size_t lines = by_rows ? rows : cols, length = by_rows ? cols : rows;
  for (size_t i = 0; i < lines; ++i)
    float_kernels().widen_bf16(static_cast<const uint16_t*>(by_rows ? at(i, 0) : at(0, i)), length,
                               memory.data() + i * length);
  return {memory.data(), DType::f32, by_rows ? length : 1, by_rows ? 1 : length};
}

size_t divide_up(size_t n, size_t by) { return (n + by - 1) / by; }
// The size of equal parts of n, none above `most`, of whole `unit`s.
size_t part_of(size_t n, size_t most, size_t unit) {
  return divide_up(divide_up(n, divide_up(n, most)), unit) * unit;
}

static_assert(kDenseTerms == kBf16Terms);
struct Term {
  Operand a, b;
  size_t k;
};
struct Terms {
  std::array<Term, kDenseTerms> all;
  size_t count = 0;
  void add(const Operand& a, const Operand& b, size_t k) {
    MORU_CHECK(count < all.size());
    MORU_CHECK(a.type == b.type && (count == 0 || a.type == all[0].a.type));
    all[count++] = {a, b, k};
  }
};

// y [m, n] = Σ a [m, k] · b [k, n], or y [n, m] its transpose, as tiles.
class Grid {
 public:
  // `most_rows`: of oneDNN's tiles.
  Grid(const Terms& terms, size_t m, size_t n, const DenseTarget& y, size_t most_rows,
       bool transposed = false)
      : terms_(terms),
        m_(m),
        n_(n),
        y_(y),
        transposed_(transposed),
        own_(terms.all[0].a.type == DType::bf16 && isa() == Isa::avx512) {
    MORU_CHECK(!y.accumulate || (y.type == DType::f32 && y.scale == 1));
    MORU_CHECK(!transposed || own_);
    if (own_)
      lay_out_own();
    else
      lay_out(most_rows);
  }
  size_t tiles() const { return row_tiles() * divide_up(n_, tile_cols_); }
  void run(size_t tile) const {
    // Neighbouring items share the weights' stripe, which stays in the cache.
    const size_t row = tile % row_tiles() * tile_rows_, col = tile / row_tiles() * tile_cols_;
    const size_t m = std::min(tile_rows_, m_ - row), n = std::min(tile_cols_, n_ - col);
    const size_t at = transposed_ ? col * y_.ld + row : row * y_.ld + col;
    void* y = static_cast<std::byte*>(y_.data) + at * size_of(y_.type);
    const float* base = !y_.accumulate       ? nullptr
                        : y_.base != nullptr ? y_.base + at
                                             : static_cast<const float*>(y);
    if (own_)
      run_own(row, col, m, n, y, base);
    else
      run_onednn(row, col, m, n, y, base);
  }

 private:
  void lay_out(size_t most_rows) {
    constexpr size_t kUnit = 16;
    tile_rows_ = part_of(m_, most_rows, kUnit);
    tile_cols_ = part_of(n_, kTileCols, kUnit);
    for (; tiles() < kFewTiles && tile_rows_ > 64;
         tile_rows_ = part_of(m_, tile_rows_ / 2, kUnit)) {
    }
  }
  // Packing a stripe of b costs a tile as much as four to ten of its rows, and its rows of a as
  // much again where they are packed too.
  void lay_out_own() {
    const bool packs_rows = terms_.all[0].a.col_stride != 1;
    const size_t unit = packs_rows ? kBf16Panel : kBf16Rows;
    const size_t most_cols = packs_rows ? kBf16TileCols : 96;
    tile_cols_ = part_of(n_, most_cols, 2 * kBf16Lanes);
    tile_rows_ = part_of(m_, packs_rows ? 384 : kBf16TileCells / 96, unit);
    while (tiles() < kFewOwnTiles) {
      if (tile_rows_ > 264)
        tile_rows_ = part_of(m_, tile_rows_ / 2, unit);
      else if (tile_cols_ > 64)
        tile_cols_ = part_of(n_, tile_cols_ / 2, 2 * kBf16Lanes);
      else if (tile_rows_ > 96)
        tile_rows_ = part_of(m_, tile_rows_ / 2, unit);
      else
        break;
    }
  }
  size_t row_tiles() const { return divide_up(m_, tile_rows_); }

  void run_own(size_t row, size_t col, size_t m, size_t n, void* y, const float* base) const {
    thread_local PageBuffer workspace(kBf16WorkspaceBytes);
    std::array<Bf16Term, kBf16Terms> terms;
    for (size_t i = 0; i < terms_.count; ++i) {
      const Term& t = terms_.all[i];
      terms[i] = {.a = static_cast<const uint16_t*>(t.a.at(row, 0)),
                  .a_row = t.a.row_stride,
                  .a_step = t.a.col_stride,
                  .b = static_cast<const uint16_t*>(t.b.at(0, col)),
                  .b_col = t.b.col_stride,
                  .b_step = t.b.row_stride,
                  .k = t.k};
    }
    bf16_tile_avx512({.terms = terms.data(),
                      .term_count = terms_.count,
                      .m = m,
                      .n = n,
                      .y = y,
                      .ldy = y_.ld,
                      .bf16 = y_.type == DType::bf16,
                      .base = base,
                      .transposed = transposed_,
                      .scale = y_.scale,
                      .workspace = workspace.data()});
  }

  void run_onednn(size_t row, size_t col, size_t m, size_t n, void* y, const float* base) const {
    if (base != nullptr && base != y)
      for (size_t r = 0; r < m; ++r)
        std::copy_n(base + r * y_.ld, n, static_cast<float*>(y) + r * y_.ld);
    // A sum that ends in bf16 is made in f32 beside it; scales apply to each term.
    thread_local std::vector<float> sums, a_values, b_values;
    const bool aside = y_.type == DType::bf16;
    if (aside) sums.resize(m * n);
    for (size_t i = 0; i < terms_.count; ++i) {
      const Term& t = terms_.all[i];
      MORU_CHECK(i == 0 || y_.scale == 1);
      const Operand a = in_f32(t.a, row, 0, m, t.k, a_values),
                    b = in_f32(t.b, 0, col, t.k, n, b_values);
      const Shape shape{.m = m,
                        .n = n,
                        .k = t.k,
                        .src = {a.row_stride, a.col_stride},
                        .weights = {b.row_stride, b.col_stride},
                        .dst = aside ? n : y_.ld,
                        .accumulate = y_.accumulate || i > 0,
                        .scale = y_.scale};
      run_tile(shape, a.data, b.data, aside ? sums.data() : y);
    }
    if (!aside) return;
    for (size_t r = 0; r < m; ++r)
      float_kernels().round_to_bf16(&sums[r * n], n, static_cast<uint16_t*>(y) + r * y_.ld);
  }

  Terms terms_;
  size_t m_, n_;
  DenseTarget y_;
  bool transposed_, own_;
  size_t tile_rows_ = 0, tile_cols_ = 0;
};

void run_grid(Pool& pool, const Grid& grid) {
  pool.each(grid.tiles(), [&](size_t tile) { grid.run(tile); });
}

void multiply(Pool& pool, const Operand& a, const Operand& b, size_t m, size_t n, size_t k,
              const DenseTarget& y) {
  if (m == 0 || n == 0) return;
  Terms terms;
  terms.add(a, b, k);
  run_grid(pool, Grid(terms, m, n, y, kTileRows));
}

// Whether multiply_shared takes a product.
bool shares(const DenseGradient& g, const DenseView& x) {
  return g.y.type == DType::f32 && g.y.scale == 1 && g.y.base == nullptr &&
         g.a.type == DType::bf16 && x.type == DType::bf16 && isa() == Isa::avx512 &&
         g.a.cols > kBf16Panel && x.cols != 0 && x.rows != 0;
}
// y [a.cols, x.cols] = aᵀ · x of each, x packed once for all tiles: 96 rows each and all columns,
// or parts of these where that makes few tiles.
void multiply_shared(Pool& pool, std::span<const DenseGradient> gradients, const DenseView& x) {
  constexpr size_t kPanel = 2 * kBf16Lanes;
  thread_local PageBuffer packed;
  const size_t bytes = bf16_shared_elements(x.rows, x.cols) * sizeof(uint16_t);
  if (packed.bytes() < bytes) packed = PageBuffer(bytes);
  const auto product_of = [&, to = static_cast<uint16_t*>(packed.data())](const DenseView& a) {
    return Bf16Shared{.a = static_cast<const uint16_t*>(a.data),
                      .b = static_cast<const uint16_t*>(x.data),
                      .a_step = a.ld,
                      .b_step = x.ld,
                      .k = x.rows,
                      .n = x.cols,
                      .packed = to};
  };
  pool.each(divide_up(x.cols, kPanel), [&](size_t panel) {
    bf16_pack_shared_avx512(product_of(gradients[0].a), panel * kPanel,
                            std::min(kPanel, x.cols - panel * kPanel));
  });
  size_t row_tiles = 0;
  for (const DenseGradient& g : gradients) row_tiles += divide_up(g.a.cols, kBf16Panel);
  const size_t cols =
      part_of(x.cols, divide_up(x.cols, divide_up(kFewOwnTiles, row_tiles)), kPanel);
  const size_t col_tiles = divide_up(x.cols, cols);
  pool.each(row_tiles * col_tiles, [&](size_t tile) {
    thread_local PageBuffer workspace(kBf16WorkspaceBytes);
    size_t row = tile / col_tiles * kBf16Panel;
    const DenseGradient* g = &gradients[0];
    for (; row >= g->a.cols; ++g) row -= divide_up(g->a.cols, kBf16Panel) * kBf16Panel;
    const size_t col = tile % col_tiles * cols;
    bf16_shared_tile_avx512(product_of(g->a), row, std::min(kBf16Panel, g->a.cols - row), col,
                            std::min(cols, x.cols - col),
                            static_cast<float*>(g->y.data) + row * g->y.ld + col, g->y.ld,
                            g->y.accumulate, workspace.data());
  });
}

Operand plain(const DenseView& view) { return {view.data, view.type, view.ld, 1}; }
Operand transposed(const DenseView& view) { return {view.data, view.type, 1, view.ld}; }

}  // namespace

void matmul_nt(Pool& pool, const DenseView& x, const DenseView& w, const DenseTarget& y) {
  MORU_CHECK(x.cols == w.cols);
  multiply(pool, plain(x), transposed(w), x.rows, w.rows, x.cols, y);
}

void matmul_nt(Pool& pool, const DenseView& x, std::span<const DenseProduct> products) {
  if (x.rows == 0) return;
  const auto grid_of = [&](const DenseProduct& p) {
    MORU_CHECK(x.cols == p.w.cols);
    Terms terms;
    terms.add(plain(x), transposed(p.w), x.cols);
    return Grid(terms, x.rows, p.w.rows, p.y, kSharedTileRows);
  };
  size_t tiles = 0;
  for (const DenseProduct& p : products) tiles += grid_of(p).tiles();
  pool.each(tiles, [&](size_t tile) {
    for (const DenseProduct& p : products) {
      const Grid grid = grid_of(p);
      if (tile < grid.tiles()) return grid.run(tile);
      tile -= grid.tiles();
    }
  });
}

void matmul_nn(Pool& pool, const DenseView& x, const DenseView& w, const DenseTarget& y) {
  MORU_CHECK(x.cols == w.rows);
  multiply(pool, plain(x), plain(w), x.rows, w.cols, x.cols, y);
}

void matmul_tn(Pool& pool, const DenseView& a, const DenseView& x, const DenseTarget& y) {
  MORU_CHECK(a.rows == x.rows);
  // Twelve rows at a time: of two sides the narrow one should be rows, which are packed for every
  // tile.
  constexpr size_t kNarrow = 64;
  if (y.type == DType::f32 && a.type == DType::bf16 && isa() == Isa::avx512 && x.cols <= kNarrow &&
      a.cols > x.cols && x.cols != 0) {
    Terms terms;
    terms.add(transposed(x), plain(a), a.rows);
    run_grid(pool, Grid(terms, x.cols, a.cols, y, kTileRows, true));
    return;
  }
  const DenseGradient gradient{a, y};
  if (shares(gradient, x)) return multiply_shared(pool, std::span(&gradient, 1), x);
  multiply(pool, transposed(a), plain(x), a.cols, x.cols, a.rows, y);
}

void matmul_tn(Pool& pool, std::span<const DenseGradient> gradients, const DenseView& x) {
  for (const DenseGradient& g : gradients) MORU_CHECK(g.a.rows == x.rows);
  if (!gradients.empty() &&
      std::ranges::all_of(gradients, [&](const DenseGradient& g) { return shares(g, x); }))
    return multiply_shared(pool, gradients, x);
  for (const DenseGradient& g : gradients) matmul_tn(pool, g.a, x, g.y);
}

void matmul_nt(Pool& pool, std::span<const DenseTerm> sum, const DenseTarget& y) {
  MORU_CHECK(!sum.empty());
  Terms terms;
  for (const auto& [x, w] : sum) {
    MORU_CHECK(x.cols == w.cols && x.rows == sum[0].x.rows && w.rows == sum[0].w.rows);
    terms.add(plain(x), transposed(w), x.cols);
  }
  if (sum[0].x.rows == 0 || sum[0].w.rows == 0) return;
  run_grid(pool, Grid(terms, sum[0].x.rows, sum[0].w.rows, y, kTileRows));
}

void matmul_nn(Pool& pool, std::span<const DenseTerm> sum, const DenseTarget& y) {
  MORU_CHECK(!sum.empty());
  Terms terms;
  for (const auto& [x, w] : sum) {
    MORU_CHECK(x.cols == w.rows && x.rows == sum[0].x.rows && w.cols == sum[0].w.cols);
    terms.add(plain(x), plain(w), x.cols);
  }
  if (sum[0].x.rows == 0 || sum[0].w.cols == 0) return;
  run_grid(pool, Grid(terms, sum[0].x.rows, sum[0].w.cols, y, kTileRows));
}

}  // namespace moru
