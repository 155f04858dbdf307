#include "engine/quant_matrix.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <mutex>
#include <type_traits>

#include "base/error.h"
#include "base/pieces.h"
#include "engine/quant_kernels.h"
#include "engine/quant_pack.h"

namespace moru {

const QuantKernels& quant_kernels(Isa level) {
  switch (level) {
    case Isa::scalar:
      return quant_kernels_scalar();
    case Isa::avx2:
      return quant_kernels_avx2();
    case Isa::avx512:
      return quant_kernels_avx512();
  }
  return quant_kernels_scalar();
}

namespace {

// From this many tokens on, a stripe is unpacked once for all of them; fewer are multiplied four at
// a time from the packed form, which costs unpacking each time but no round through memory.
// Measured at 32 tokens, where packed is 10 % ahead with int16 and int8, AVX-512 and AVX2.
constexpr size_t kStripeTokens = 64;
// Tokens that share one unpacking, which is one to two hundredths of the work at 256 of them. A
// thread that takes a block of its own finds in its L2 the codes that it quantized and leaves there
// what it will norm, gate or add next.
constexpr size_t kLeastBlock = 128, kMostBlock = 512;
// Weights that the direct kernel multiplies with all tokens, four at a time, before it goes on:
// they stay in L2 meanwhile.
constexpr size_t kDirectBytes = 64 << 10;

const QuantKernels& kernels() {
  static const QuantKernels& chosen = quant_kernels(isa());
  return chosen;
}

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }
size_t divide_up(size_t n, size_t by) { return (n + by - 1) / by; }

// Memory of weights. A small model's matrices are smaller than a huge page, so they share slabs:
// 5 to 10 % of the speed of one token, from fewer page walks and from prefetches that reach into
// the next matrix. A slab is not touched before it is used and goes with its last matrix.
std::shared_ptr<uint8_t> slab_memory(size_t bytes) {
  constexpr size_t kSlabBytes = 64 << 20;
  static std::mutex mutex;
  static std::weak_ptr<PageBuffer> current;
  static size_t used;
  const std::lock_guard lock(mutex);
  bytes = round_up(bytes, 64);
  std::shared_ptr<PageBuffer> slab = current.lock();
  if (slab == nullptr || bytes > slab->bytes() - used) {
    slab = std::make_shared<PageBuffer>(std::max(bytes, kSlabBytes));
    current = slab;
    used = 0;
  }
  auto* at = static_cast<uint8_t*>(slab->data()) + used;
  used += bytes;
  return {std::move(slab), at};
}

// One thread's unpacked stripe; grows to the widest matrix met, then stays.
class Scratch {
 public:
  Stripe stripe(size_t cols, size_t lanes) {
    const size_t codes = cols * lanes * sizeof(int16_t);
    const size_t scales = cols / 16 * lanes * sizeof(float);
    if (codes + 2 * scales > memory_.bytes()) memory_ = PageBuffer(codes + 2 * scales);
    auto* at = static_cast<std::byte*>(memory_.data());
    return {reinterpret_cast<int16_t*>(at), reinterpret_cast<float*>(at + codes),
            reinterpret_cast<float*>(at + codes + scales), lanes};
  }
  // Two stripes' products with the tokens of a block.
  std::array<float*, 2> products() {
    constexpr size_t kCount = kMostBlock * kStripeRows;
    if (products_.bytes() == 0) products_ = PageBuffer(2 * kCount * sizeof(float));
    auto* at = static_cast<float*>(products_.data());
    return {at, at + kCount};
  }

 private:
  PageBuffer memory_, products_;
};
thread_local Scratch scratch;

}  // namespace

void QuantizedRows::resize(size_t m, size_t k) {
  MORU_CHECK(k % kUnitCols == 0);
  const bool narrow = kind_ == Activations::int8, codes8 = kernels().codes8;
  m_ = m;
  k_ = k;
  // One cache line between rows, so that rows of 2^n codes do not fall on the same cache sets.
  stride_ = k + (narrow && !codes8 ? 64 : 32);
  // Digits of 16 bits are for the direct kernels alone, which do not take many rows.
  const bool few = m < kStripeTokens;
  size_t bytes = 0;
  // Where an array begins, or null if it is not wanted.
  const auto place = [&](auto*& array, size_t count) {
    using T = std::remove_reference_t<decltype(*array)>;
    auto* start = static_cast<std::byte*>(memory_.data());
    array = count == 0 || start == nullptr ? nullptr : reinterpret_cast<T*>(start + bytes);
    bytes += round_up(count * sizeof(T), 64);
  };
  const auto place_all = [&] {
    bytes = 0;
    place(codes_, !narrow || codes8 ? m * stride_ : 0);
    place(digits_, narrow ? (codes8 ? 0 : m * stride_) : few ? m * stride_ * 2 : 0);
    place(scales_, narrow ? m * (k / 32) : m);
    place(sums16_, m * (k / 16));
    place(sums32_, m * (k / 32));
    place(scaled16_, narrow ? m * (k / 16) : 0);
    place(scaled32_, narrow ? m * (k / 32) : 0);
  };
  place_all();
  if (bytes <= memory_.bytes()) return;
  memory_ = PageBuffer(bytes);
  place_all();
}

void QuantizedRows::set_row(size_t i, const float* x) {
  MORU_DCHECK(i < m_);
  const size_t at16 = i * (k_ / 16), at32 = i * (k_ / 32);
  int16_t* codes = codes_ == nullptr ? nullptr : codes_ + i * stride_;
  if (kind_ == Activations::int8) {
    kernels().quantize8(
        x, k_,
        {codes, digits_ == nullptr ? nullptr : digits_ + i * stride_, scales_ + at32,
         sums16_ + at16, sums32_ + at32, scaled16_ + at16, scaled32_ + at32});
    return;
  }
  int8_t* digits = digits_ == nullptr ? nullptr : digits_ + i * 2 * stride_;
  scales_[i] = kernels().quantize(x, k_, codes, digits, sums16_ + at16, sums32_ + at32);
}

void quantize_rows(Pool& pool, const float* x, size_t ldx, size_t m, size_t k, QuantizedRows& out) {
  out.resize(m, k);
  constexpr size_t kLeastRows = 4;  // about a microsecond's work
  each_piece(pool, m, kLeastRows, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) out.set_row(i, x + i * ldx);
  });
}

// What products see of the two classes.
struct QuantMatrixView {
  static Panels panels(const QuantMatrix& w, size_t panel, size_t count, size_t until) {
    const size_t rows = std::min(w.rows_ - panel * kPanelRows, count * kPanelRows);
    const uint8_t* data = w.panels_.get();
    return {data + panel * w.panel_bytes_, w.panel_bytes_, w.codes_at_,
            w.cols_ / kUnitCols,           rows,           data + until * w.panel_bytes_};
  }
};
struct QuantizedRowsView {
  static Tokens tokens(const QuantizedRows& x, size_t first, size_t count, size_t block) {
    const bool narrow = x.kind_ == Activations::int8;
    const auto from = [](auto* array, size_t at) {
      return array == nullptr ? nullptr : array + at;
    };
    Tokens out{};
    out.codes = from(x.codes_, first * x.stride_);
    out.stride = x.stride_;
    out.digits = from(x.digits_, first * x.stride_ * (narrow ? 1 : 2));
    out.sums_stride = x.k_ / block;
    out.sums = (block == 16 ? x.sums16_ : x.sums32_) + first * out.sums_stride;
    out.unit_stride = x.k_ / kUnitCols;
    out.scales = x.scales_ + first * (narrow ? out.unit_stride : 1);
    out.scaled_sums = from(block == 16 ? x.scaled16_ : x.scaled32_, first * out.sums_stride);
    out.count = count;
    return out;
  }
};

namespace {

const PanelFormat& format_of(const QuantMatrix& w) {
  return kPanelFormat[panel_format_index(w.type())];
}

bool by_stripes(size_t m) { return m >= kStripeTokens; }

size_t stripes_of(const QuantMatrix& w) { return divide_up(w.rows(), kStripeRows); }

// Panels [begin, end) times all tokens; panel `until` is another thread's.
void multiply_panels(const QuantizedRows& x, const QuantProduct& p, size_t begin, size_t end,
                     size_t until) {
  const QuantMatrix& w = *p.w;
  const FormatKernels& format = kernels().formats[panel_format_index(w.type())];
  const DirectKernel direct = x.kind() == Activations::int8 ? format.direct8 : format.direct;
  const size_t step = std::max<size_t>(1, kDirectBytes / w.items().item_bytes);
  for (size_t panel = begin; panel < end; panel += step) {
    const Panels panels = QuantMatrixView::panels(w, panel, std::min(step, end - panel), until);
    for (size_t t = 0; t < x.rows(); t += kDirectTokens) {
      const size_t count = std::min(kDirectTokens, x.rows() - t);
      direct(panels, QuantizedRowsView::tokens(x, t, count, format_of(w).block),
             {p.y + t * p.ldy + panel * kPanelRows, p.ldy, p.store == Store::add});
    }
  }
}

// One stripe of 32 rows times tokens [t, t + count); y is its first element.
void multiply_stripe(const QuantizedRows& x, const QuantMatrix& w, size_t stripe_at, size_t t,
                     size_t count, const Target& y) {
  const size_t row = stripe_at * kStripeRows;
  const size_t rows = std::min(kStripeRows, w.rows() - row);
  const PanelFormat& format = format_of(w);
  const Panels panels = QuantMatrixView::panels(w, row / kPanelRows, 2, 0);
  const Stripe stripe = scratch.stripe(w.cols(), kStripeRows);
  const bool narrow = x.kind() == Activations::int8;
  const FormatKernels& own = kernels().formats[panel_format_index(w.type())];
  const UnpackKernel unpack = narrow ? own.unpack8 : own.unpack;
  for (size_t half = 0; half < divide_up(rows, kPanelRows); ++half) {
    const uint8_t* panel = panels.data + half * panels.panel_bytes;
    const size_t lane = half * kPanelRows;
    unpack(panel, panel + panels.codes_at, panels.units,
           {stripe.codes + 2 * lane, stripe.scales + lane, stripe.mins + lane, stripe.lanes});
  }
  const auto& multiply = narrow ? kernels().stripe8 : kernels().stripe;
  multiply[format.block == 16][format.has_min](
      stripe, w.cols(), rows, QuantizedRowsView::tokens(x, t, count, format.block), y);
}

// work(stripe, t, count) for `stripes` stripes and all tokens, a block of them at a time.
template <typename Work>
void each_stripe(Pool& pool, size_t stripes, size_t m, Work&& work) {
  const size_t block = std::clamp(round_up(divide_up(m, pool.size()), 4), kLeastBlock, kMostBlock);
  each_piece(pool, stripes * divide_up(m, block), 1, [&](size_t begin, size_t end) {
    for (size_t item = begin; item < end; ++item) {
      const size_t t = item / stripes * block;
      work(item % stripes, t, std::min(block, m - t));
    }
  });
}

}  // namespace

QuantMatrix QuantMatrix::pack(Pool& pool, DType type, size_t rows, size_t cols,
                              std::span<const std::byte> data,
                              const std::function<void(std::span<const std::byte>)>& packed) {
  MORU_CHECK(is_quantized(type) && cols % traits(type).block == 0);
  MORU_CHECK(data.size() == bytes_of(type, rows * cols));
  const PanelSize size = panel_size(type, cols);
  QuantMatrix out;
  out.type_ = type;
  out.rows_ = rows;
  out.cols_ = cols;
  out.panel_bytes_ = size.bytes;
  out.codes_at_ = size.codes_at;
  out.bytes_ = divide_up(rows, kPanelRows) * size.bytes;
  out.panels_ = slab_memory(out.bytes_);
  const size_t row_bytes = bytes_of(type, cols);
  constexpr size_t kItemBytes = 256 << 10;
  const size_t item_rows = std::max<size_t>(kItemBytes / row_bytes / kPanelRows, 1) * kPanelRows;
  pool.each(divide_up(rows, item_rows), [&](size_t item) {
    const size_t first = item * item_rows, end = std::min(rows, first + item_rows);
    for (size_t row = first; row < end; row += kPanelRows)
      pack_panel(type, data.data() + row * row_bytes, std::min(kPanelRows, rows - row), cols,
                 out.panels_.get() + row / kPanelRows * size.bytes);
    if (packed) packed(data.subspan(first * row_bytes, (end - first) * row_bytes));
  });
  return out;
}

void QuantMatrix::unpack_rows(size_t first, size_t count, float* out) const {
  MORU_CHECK(first <= rows_ && count <= rows_ - first);
  const PanelFormat& format = kPanelFormat[panel_format_index(type_)];
  const auto unpack = kernels().formats[panel_format_index(type_)].unpack;
  // 256 columns at a time: a whole number of every format's scale records, and 8 KB of codes.
  constexpr size_t kCols = 256, kBlocks = kCols / 16;
  alignas(64) int16_t codes[kCols * kPanelRows];
  alignas(64) float scales[kBlocks * kPanelRows], mins[kBlocks * kPanelRows];
  const Stripe part{codes, scales, mins, kPanelRows};
  const Stripe value{codes, scales, format.has_min ? mins : nullptr, kPanelRows};
  for (size_t row = first; row < first + count;) {
    const size_t in_panel = row % kPanelRows;
    const size_t n = std::min(kPanelRows - in_panel, first + count - row);
    const uint8_t* panel = panels_.get() + row / kPanelRows * panel_bytes_;
    for (size_t c = 0; c < cols_; c += kCols) {
      const size_t width = std::min(kCols, cols_ - c);
      unpack(panel + c / format.scale_cols * format.scale_bytes,
             panel + codes_at_ + c / kUnitCols * format.unit_bytes, width / kUnitCols, part);
      kernels().dequantize(value, width, format.block, in_panel, n, out + (row - first) * cols_ + c,
                           cols_);
    }
    row += n;
  }
}

WeightItems QuantMatrix::items() const {
  return {panels_.get(), divide_up(rows_, kPanelRows), panel_bytes_};
}

void matmul(Pool& pool, const QuantizedRows& x, std::span<const QuantProduct> products,
            std::span<const WeightItems> next) {
  const size_t m = x.rows();
  if (m == 0) return;
  MORU_CHECK(products.size() <= kPhaseProducts);
  size_t stripes = 0;
  std::array<WeightItems, kPhaseProducts> items;
  for (size_t i = 0; i < products.size(); ++i) {
    MORU_CHECK(products[i].w->cols() == x.cols());
    stripes += stripes_of(*products[i].w);
    items[i] = products[i].w->items();
  }
  if (!by_stripes(m)) {
    return each_weight_piece(pool, std::span(items).first(products.size()), next,
                             [&](size_t product, size_t begin, size_t end, size_t until) {
                               multiply_panels(x, products[product], begin, end, until);
                             });
  }
  each_stripe(pool, stripes, m, [&](size_t stripe, size_t t, size_t count) {
    const QuantProduct* p = products.data();
    for (; stripe >= stripes_of(*p->w); ++p) stripe -= stripes_of(*p->w);
    multiply_stripe(x, *p->w, stripe, t, count,
                    {p->y + t * p->ldy + stripe * kStripeRows, p->ldy, p->store == Store::add});
  });
}

bool matmul_gated(Pool& pool, const QuantizedRows& x, const QuantMatrix& gate,
                  const QuantMatrix& up, Activation act, float* h, size_t ldh) {
  if (!by_stripes(x.rows()) || act == Activation::swiglu_oai || gate.rows() != up.rows())
    return false;
  MORU_CHECK(gate.cols() == x.cols() && up.cols() == x.cols());
  each_stripe(pool, stripes_of(gate), x.rows(), [&](size_t stripe, size_t t, size_t count) {
    const auto [g, u] = scratch.products();
    multiply_stripe(x, gate, stripe, t, count, {g, kStripeRows, false});
    multiply_stripe(x, up, stripe, t, count, {u, kStripeRows, false});
    gate_elements(act, g, u, count * kStripeRows, g);
    const size_t row = stripe * kStripeRows, rows = std::min(kStripeRows, gate.rows() - row);
    for (size_t i = 0; i < count; ++i)
      std::copy_n(g + i * kStripeRows, rows, h + (t + i) * ldh + row);
  });
  return true;
}

void matmul(Pool& pool, const QuantizedRows& x, const QuantMatrix& w, float* y, size_t ldy,
            Store store) {
  const QuantProduct product{&w, y, ldy, store};
  matmul(pool, x, std::span(&product, 1));
}

}  // namespace moru
