#include "engine/model.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "base/half.h"

namespace moru {
namespace {

constexpr size_t kMaxPrepared = 32768;  // positions prepared for unless more are asked for
constexpr size_t kRowsPerItem = 64;     // of a matrix that one thread converts at a time

// Weights are read once: what the file's pages took must not be held beside what became of them.
struct Forget {
  const ModelFiles& files;
  const Tensor& tensor;
  ~Forget() {
    if (files.gguf) files.gguf->forget(tensor.data);
  }
};

struct Loader {
  Pool& pool;
  const ModelFiles& files;
  Profile profile;

  const Tensor& require(const std::string& name) const {
    const Tensor* tensor = files.find(name);
    if (tensor == nullptr)
      throw Error(ErrorKind::bad_input, {.where = files.path.string() + ": " + name,
                                         .what = "the tensor is missing",
                                         .cure = "the file is incomplete: convert it again"});
    return *tensor;
  }

  void check_shape(const Tensor& tensor, const std::vector<size_t>& shape) const {
    if (tensor.shape == shape) return;
    throw Error(ErrorKind::bad_input,
                {.where = files.path.string() + ": " + tensor.name,
                 .what = fmt::format("has shape [{}], not [{}]", fmt::join(tensor.shape, ", "),
                                     fmt::join(shape, ", ")),
                 .cure = "tensors and configuration do not belong together"});
  }

  Vector vector(const std::string& name, size_t size, float offset = 0) const {
    const Tensor& tensor = require(name);
    check_shape(tensor, {size});
    Vector values(size);
    dequantize(tensor.type, tensor.data, values);
    for (float& value : values) value += offset;
    return values;
  }
  Vector norm(const std::string& name, size_t size) const {
    return vector(name, size, files.norm_offset);
  }
  Vector optional_vector(const std::string& name, size_t size, bool q_or_k) const {
    if (files.find(name) == nullptr) return {};
    const Vector stored = vector(name, size);
    if (!q_or_k || !files.qk_interleaved) return stored;
    Vector turned(size);
    for (size_t i = 0; i < size; ++i) turned[i] = stored[interleaved_row(i, files.config.head_dim)];
    return turned;
  }

  Matrix matrix(const std::string& name, size_t rows, size_t cols, bool q_or_k = false) const {
    const Tensor& tensor = require(name);
    check_shape(tensor, {rows, cols});
    const Forget forget_when_done{files, tensor};
    const size_t row_bytes = moru::bytes_of(tensor.type, cols);
    const bool reorder = q_or_k && files.qk_interleaved;
    const auto row_data = [&](size_t row) {
      const size_t stored = reorder ? interleaved_row(row, files.config.head_dim) : row;
      return tensor.data.subspan(stored * row_bytes, row_bytes);
    };
    if (profile == Profile::exact && is_quantized(tensor.type)) {
      if (!reorder) return {QuantMatrix::pack(pool, tensor.type, rows, cols, tensor.data)};
      std::vector<std::byte> ordered(rows * row_bytes);
      for (size_t r = 0; r < rows; ++r)
        std::memcpy(&ordered[r * row_bytes], row_data(r).data(), row_bytes);
      return {QuantMatrix::pack(pool, tensor.type, rows, cols, ordered)};
    }
    DenseMatrix dense{.type = profile == Profile::bf16 ? DType::bf16 : DType::f32,
                      .rows = rows,
                      .cols = cols,
                      .data = PageBuffer(rows * cols * (profile == Profile::bf16 ? 2 : 4))};
    pool.each((rows + kRowsPerItem - 1) / kRowsPerItem, [&](size_t item) {
      std::vector<float> row(cols);
      for (size_t r = item * kRowsPerItem; r < std::min(rows, (item + 1) * kRowsPerItem); ++r) {
        if (dense.type == DType::f32) {
          dequantize(tensor.type, row_data(r),
                     {static_cast<float*>(dense.data.data()) + r * cols, cols});
          continue;
        }
        dequantize(tensor.type, row_data(r), row);
        uint16_t* out = static_cast<uint16_t*>(dense.data.data()) + r * cols;
        for (size_t c = 0; c < cols; ++c) out[c] = bf16_from_f32(row[c]);
      }
    });
    return {std::move(dense)};
  }

  Layer layer(size_t index) const {
    const Config& c = files.config;
    const auto name = [&](std::string_view part) { return fmt::format("blk.{}.{}", index, part); };
    Layer l;
    l.attn_norm = norm(name("attn_norm.weight"), c.width);
    l.ffn_norm = norm(name("ffn_norm.weight"), c.width);
    if (c.norm_layout == NormLayout::sandwich) {
      l.attn_post_norm = norm(name("post_attention_norm.weight"), c.width);
      l.ffn_post_norm = norm(name("post_ffw_norm.weight"), c.width);
    }
    if (c.qk_norm != QkNorm::none) {
      l.q_norm = norm(name("attn_q_norm.weight"), c.head_dim);
      l.k_norm = norm(name("attn_k_norm.weight"), c.head_dim);
    }
    l.q = matrix(name("attn_q.weight"), c.q_width(), c.width, true);
    l.k = matrix(name("attn_k.weight"), c.kv_width(), c.width, true);
    l.v = matrix(name("attn_v.weight"), c.kv_width(), c.width);
    l.attn_out = matrix(name("attn_output.weight"), c.width, c.q_width());
    l.q_bias = optional_vector(name("attn_q.bias"), c.q_width(), true);
    l.k_bias = optional_vector(name("attn_k.bias"), c.kv_width(), true);
    l.v_bias = optional_vector(name("attn_v.bias"), c.kv_width(), false);
    l.attn_out_bias = optional_vector(name("attn_output.bias"), c.width, false);
    l.gate = matrix(name("ffn_gate.weight"), c.ffn_width, c.width);
    l.up = matrix(name("ffn_up.weight"), c.ffn_width, c.width);
    l.down = matrix(name("ffn_down.weight"), c.width, c.ffn_width);
    return l;
  }
};

// Frequencies as transformers has them: f32 from the powers on, so that long positions turn by the
// same angles as in training.
RopeTables make_tables(const RopeConfig& rope, size_t positions) {
  const size_t half = rope.dims / 2;
  std::vector<float> frequencies(half);
  for (size_t i = 0; i < half; ++i) {
    const double exponent = 2.0 * static_cast<double>(i) / static_cast<double>(rope.dims);
    float f = static_cast<float>(1.0 / std::pow(double{rope.theta}, exponent));
    if (rope.scaling == RopeConfig::Scaling::linear) f /= rope.factor;
    if (rope.scaling == RopeConfig::Scaling::llama3) {
      // Long waves turn slower by `factor`, short ones as they did, a ramp between.
      const double wave = 2 * M_PI / double{f};
      const double turns = static_cast<double>(rope.original_context) / wave;
      const double ramp = std::clamp((turns - double{rope.low_freq_factor}) /
                                         double{rope.high_freq_factor - rope.low_freq_factor},
                                     0.0, 1.0);
      f = static_cast<float>(double{f} * ((1 - ramp) / double{rope.factor} + ramp));
    }
    if (!rope.divisors.empty()) f /= rope.divisors[i];
    frequencies[i] = f;
  }
  RopeTables tables{.cosines = std::vector<float>(positions * half),
                    .sines = std::vector<float>(positions * half),
                    .dims = rope.dims};
  for (size_t p = 0; p < positions; ++p) {
    for (size_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(p) * frequencies[i];
      tables.cosines[p * half + i] = static_cast<float>(std::cos(double{angle}));
      tables.sines[p * half + i] = static_cast<float>(std::sin(double{angle}));
    }
  }
  return tables;
}

Profile default_profile(const ModelFiles& files) {
  bool any_quantized = false, any_half = false;
  for (const Tensor& tensor : files.tensors) {
    any_quantized |= is_quantized(tensor.type);
    any_half |= tensor.shape.size() == 2 && tensor.type != DType::f32;
  }
  return any_quantized ? Profile::exact : any_half ? Profile::bf16 : Profile::f32;
}

}  // namespace

size_t Matrix::rows() const {
  if (const QuantMatrix* q = quantized()) return q->rows();
  return dense() != nullptr ? dense()->rows : 0;
}
size_t Matrix::cols() const {
  if (const QuantMatrix* q = quantized()) return q->cols();
  return dense() != nullptr ? dense()->cols : 0;
}
size_t Matrix::bytes() const {
  if (const QuantMatrix* q = quantized()) return q->bytes();
  return dense() != nullptr ? dense()->data.bytes() : 0;
}

void Matrix::read_rows(size_t first, size_t count, float* out) const {
  if (const QuantMatrix* q = quantized()) return q->unpack_rows(first, count, out);
  const DenseMatrix& d = std::get<DenseMatrix>(form);
  const size_t from = first * d.cols, values = count * d.cols;
  if (d.type == DType::f32) {
    std::copy_n(d.f32() + from, values, out);
  } else {
    for (size_t i = 0; i < values; ++i) out[i] = f32_from_bf16(d.bf16()[from + i]);
  }
}

size_t Model::weight_bytes() const {
  size_t total = embedding.bytes() + head.bytes();
  for (const Layer& l : layers)
    for (const Matrix* m : {&l.q, &l.k, &l.v, &l.attn_out, &l.gate, &l.up, &l.down})
      total += m->bytes();
  return total;
}

Model load_model(Pool& pool, const ModelFiles& files, const LoadOptions& options) {
  const Config& c = files.config;
  const Loader load{pool, files, options.profile.value_or(default_profile(files))};
  Model model{.config = c,
              .profile = load.profile,
              .activations = options.activations,
              .embedding = load.matrix("token_embd.weight", c.vocab, c.width)};
  model.layers.reserve(c.layers);
  for (size_t i = 0; i < c.layers; ++i) model.layers.push_back(load.layer(i));
  model.final_norm = load.norm("output_norm.weight", c.width);
  if (!c.tied_head) model.head = load.matrix("output.weight", c.vocab, c.width);
  const size_t positions =
      options.context != 0 ? options.context : std::min(c.context, kMaxPrepared);
  model.config.context = positions;
  model.rope = make_tables(c.rope, positions);
  if (c.window != 0) model.local_rope = make_tables(c.local_rope, positions);
  return model;
}

}  // namespace moru
