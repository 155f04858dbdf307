#include "engine/dense.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <dnnl.hpp>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>

#include "base/error.h"

// oneDNN's own parallelism is OpenMP; each of our threads tells it to stay alone.
extern "C" void omp_set_num_threads(int);

namespace moru {
namespace {

using dnnl::memory;

// The grid: tiles of the output that one call computes, about equal ones. They follow from the
// shape, never from the pool. 512 rows amortise the packing of the weights inside a call; 192
// columns of them stay in L2.
constexpr size_t kTileRows = 512;
constexpr size_t kTileCols = 192;
// Fewer tiles than this are halved: two threads must not wait for the third of three.
constexpr size_t kFewTiles = 12;
// Rows of a tile where several products share a phase.
constexpr size_t kSharedTileRows = 256;

const dnnl::engine& engine() {
  static const dnnl::engine one = [] {
    // Strict arithmetic, whatever the environment says.
    dnnl::set_default_fpmath_mode(dnnl::fpmath_mode::strict);
    return dnnl::engine(dnnl::engine::kind::cpu, 0);
  }();
  return one;
}

memory::data_type data_type(DType type) {
  MORU_CHECK(type == DType::f32 || type == DType::bf16);
  return type == DType::f32 ? memory::data_type::f32 : memory::data_type::bf16;
}
size_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }

// One product of one tile: dst [m, n] = src [m, k] · weights [k, n], each with its strides.
struct Shape {
  DType in, out;
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

memory::desc describe(size_t rows, size_t cols, DType type, size_t row_stride, size_t col_stride) {
  return {{static_cast<memory::dim>(rows), static_cast<memory::dim>(cols)},
          data_type(type),
          {static_cast<memory::dim>(row_stride), static_cast<memory::dim>(col_stride)}};
}

Product make_product(const Shape& s) {
  const memory::desc src = describe(s.m, s.k, s.in, s.src[0], s.src[1]);
  const memory::desc weights = describe(s.k, s.n, s.in, s.weights[0], s.weights[1]);
  const memory::desc dst = describe(s.m, s.n, s.out, s.dst, 1);
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

size_t divide_up(size_t n, size_t by) { return (n + by - 1) / by; }
// The size of equal parts of n, none above `most`, of whole vectors.
size_t part_of(size_t n, size_t most) {
  constexpr size_t kLanes = 16;
  return divide_up(divide_up(n, divide_up(n, most)), kLanes) * kLanes;
}

// y [m, n] = a [m, k] · b [k, n], as tiles of at most `most_rows` rows.
struct Grid {
  Operand a, b;
  size_t m, n, k;
  DenseTarget y;
  size_t tile_rows, tile_cols;

  Grid(const Operand& a_, const Operand& b_, size_t m_, size_t n_, size_t k_, const DenseTarget& y_,
       size_t most_rows)
      : a(a_),
        b(b_),
        m(m_),
        n(n_),
        k(k_),
        y(y_),
        tile_rows(part_of(m, most_rows)),
        tile_cols(part_of(n, kTileCols)) {
    for (; tiles() < kFewTiles && tile_rows > 64; tile_rows = part_of(m, tile_rows / 2)) {
    }
  }
  size_t row_tiles() const { return divide_up(m, tile_rows); }
  size_t tiles() const { return row_tiles() * divide_up(n, tile_cols); }
  void check() const {
    MORU_CHECK(a.type == b.type);
    MORU_CHECK(!y.accumulate || (y.type == DType::f32 && y.scale == 1));
  }
  void run(size_t tile) const {
    // Neighbouring items share the weights' stripe, which stays in the cache.
    const size_t row = tile % row_tiles() * tile_rows, col = tile / row_tiles() * tile_cols;
    const Shape shape{.in = a.type,
                      .out = y.type,
                      .m = std::min(tile_rows, m - row),
                      .n = std::min(tile_cols, n - col),
                      .k = k,
                      .src = {a.row_stride, a.col_stride},
                      .weights = {b.row_stride, b.col_stride},
                      .dst = y.ld,
                      .accumulate = y.accumulate,
                      .scale = y.scale};
    run_tile(shape, a.at(row, 0), b.at(0, col),
             static_cast<std::byte*>(y.data) + (row * y.ld + col) * size_of(y.type));
  }
};

void multiply(Pool& pool, const Operand& a, const Operand& b, size_t m, size_t n, size_t k,
              const DenseTarget& y) {
  if (m == 0 || n == 0) return;
  const Grid grid(a, b, m, n, k, y, kTileRows);
  grid.check();
  pool.each(grid.tiles(), [&](size_t tile) { grid.run(tile); });
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
    return Grid(plain(x), transposed(p.w), x.rows, p.w.rows, x.cols, p.y, kSharedTileRows);
  };
  size_t tiles = 0;
  for (const DenseProduct& p : products) {
    MORU_CHECK(x.cols == p.w.cols);
    grid_of(p).check();
    tiles += grid_of(p).tiles();
  }
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
  multiply(pool, transposed(a), plain(x), a.cols, x.cols, a.rows, y);
}

}  // namespace moru
