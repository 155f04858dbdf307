#include "engine/model.h"

#include <fmt/format.h>
#include <malloc.h>

#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "base/half.h"

namespace moru {
namespace {

constexpr size_t kMaxPrepared = 32768;  // positions prepared for unless more are asked for
constexpr size_t kRowsPerItem = 64;     // of a matrix that one thread converts at a time

// Weights are read once: what the file's pages took must not be held beside what became of them.
void forget(const ModelFiles& files, std::span<const std::byte> data) {
  if (files.gguf) files.gguf->forget(data);
  if (files.folder) files.folder->forget(data);
}
struct Forget {
  const ModelFiles& files;
  const Tensor& tensor;
  ~Forget() { forget(files, tensor.data); }
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

  // All values of a small tensor.
  Vector values(const std::string& name, const std::vector<size_t>& shape, float offset = 0) const {
    const Tensor& tensor = require(name);
    check_shape(tensor, shape);
    const size_t cols = shape.back();
    Vector values(tensor.count());
    std::vector<std::byte> room;
    for (size_t r = 0; r < values.size() / cols; ++r)
      dequantize(tensor.type, files.row(tensor, r, room),
                 std::span(values).subspan(r * cols, cols));
    for (float& value : values) value += offset;
    return values;
  }
  Vector norm(const std::string& name, size_t size) const {
    return values(name, {size}, files.norm_offset);
  }
  Vector optional_values(const std::string& name, const std::vector<size_t>& shape) const {
    return files.find(name) == nullptr ? Vector() : values(name, shape);
  }
  Vector bias(const std::string& name, size_t size, bool q_or_k = false) const {
    const Vector stored = optional_values(name, {size});
    if (stored.empty() || !q_or_k || !files.qk_interleaved) return stored;
    Vector turned(size);
    for (size_t i = 0; i < size; ++i) turned[i] = stored[interleaved_row(i, files.config.head_dim)];
    return turned;
  }

  // Rows [first, first + rows) of a tensor, whose dimensions but the last count through.
  struct Part {
    const Tensor& tensor;
    size_t first, rows, cols;
    bool turn = false;  // from adjacent pairs to half-split order
  };
  Matrix matrix(const Part& part) const {
    const Tensor& tensor = part.tensor;
    const Forget forget_all{files, tensor};  // also what parts, rounded to pages, left
    const auto forget_part = [&](std::span<const std::byte> data) { forget(files, data); };
    const size_t rows = part.rows, cols = part.cols;
    const auto stored = [&](size_t row) {
      return part.first + (part.turn ? interleaved_row(row, files.config.head_dim) : row);
    };
    if (profile == Profile::exact && is_quantized(tensor.type)) {
      const size_t row_bytes = moru::bytes_of(tensor.type, cols);
      if (!part.turn && !tensor.data.empty())
        return {QuantMatrix::pack(pool, tensor.type, rows, cols,
                                  tensor.data.subspan(part.first * row_bytes, rows * row_bytes),
                                  forget_part)};
      std::vector<std::byte> ordered(rows * row_bytes), room;
      for (size_t r = 0; r < rows; ++r)
        std::memcpy(&ordered[r * row_bytes], files.row(tensor, stored(r), room).data(), row_bytes);
      return {QuantMatrix::pack(pool, tensor.type, rows, cols, ordered)};
    }
    DenseMatrix dense{.type = profile == Profile::bf16 ? DType::bf16 : DType::f32,
                      .rows = rows,
                      .cols = cols,
                      .data = PageBuffer(rows * cols * (profile == Profile::bf16 ? 2 : 4))};
    pool.each((rows + kRowsPerItem - 1) / kRowsPerItem, [&](size_t item) {
      std::vector<float> row(cols);
      std::vector<std::byte> room;
      for (size_t r = item * kRowsPerItem; r < std::min(rows, (item + 1) * kRowsPerItem); ++r) {
        const std::span<const std::byte> bytes = files.row(tensor, stored(r), room);
        if (dense.type == DType::f32) {
          dequantize(tensor.type, bytes, {static_cast<float*>(dense.data.data()) + r * cols, cols});
          continue;
        }
        dequantize(tensor.type, bytes, row);
        uint16_t* out = static_cast<uint16_t*>(dense.data.data()) + r * cols;
        for (size_t c = 0; c < cols; ++c) out[c] = bf16_from_f32(row[c]);
      }
      if (!part.turn && !tensor.data.empty()) {
        const size_t row_bytes = moru::bytes_of(tensor.type, cols);
        const size_t begin = item * kRowsPerItem, end = std::min(rows, begin + kRowsPerItem);
        forget_part(
            tensor.data.subspan((part.first + begin) * row_bytes, (end - begin) * row_bytes));
      }
    });
    return {std::move(dense)};
  }
  Matrix matrix(const std::string& name, size_t rows, size_t cols, bool q_or_k = false) const {
    const Tensor& tensor = require(name);
    check_shape(tensor, {rows, cols});
    return matrix(Part{tensor, 0, rows, cols, q_or_k && files.qk_interleaved});
  }

  // Several matrices that one tensor holds, row after row.
  void split(const std::string& name, size_t cols,
             std::initializer_list<std::pair<Matrix*, size_t>> parts) const {
    const Tensor& tensor = require(name);
    size_t rows = 0;
    for (const auto& [to, count] : parts) rows += count;
    check_shape(tensor, {rows, cols});
    size_t first = 0;
    for (const auto& [to, count] : parts) {
      *to = matrix(Part{tensor, first, count, cols});
      first += count;
    }
  }
  std::vector<Matrix> experts(const std::string& name, size_t rows, size_t cols) const {
    const size_t count = files.config.experts.count;
    const Tensor& tensor = require(name);
    check_shape(tensor, {count, rows, cols});
    std::vector<Matrix> each;
    for (size_t e = 0; e < count; ++e) each.push_back(matrix(Part{tensor, e * rows, rows, cols}));
    return each;
  }

  Layer layer(size_t index) const {
    const Config& c = files.config;
    const auto name = [&](std::string_view part) { return fmt::format("blk.{}.{}", index, part); };
    Layer l;
    norms(name, l);
    if (files.find(name("attn_qkv.weight")) != nullptr) {
      split(name("attn_qkv.weight"), c.width,
            {{&l.q, c.q_width()}, {&l.k, c.kv_width()}, {&l.v, c.kv_width()}});
    } else {
      l.q = matrix(name("attn_q.weight"), c.q_width(), c.width, true);
      l.k = matrix(name("attn_k.weight"), c.kv_width(), c.width, true);
      l.v = matrix(name("attn_v.weight"), c.kv_width(), c.width);
    }
    l.attn_out = matrix(name("attn_output.weight"), c.width, c.q_width());
    l.q_bias = bias(name("attn_q.bias"), c.q_width(), true);
    l.k_bias = bias(name("attn_k.bias"), c.kv_width(), true);
    l.v_bias = bias(name("attn_v.bias"), c.kv_width());
    l.attn_out_bias = bias(name("attn_output.bias"), c.width);
    if (c.attn_sinks) l.sinks = values(name("attn_sinks.weight"), {c.heads});
    if (c.experts.count != 0 && files.find(name("ffn_gate_inp.weight")) != nullptr) {
      l.experts = experts_of(name);
      return l;
    }
    if (files.find(name("ffn_gate.weight")) == nullptr) {
      split(name("ffn_up.weight"), c.width, {{&l.gate, c.ffn_width}, {&l.up, c.ffn_width}});
    } else {
      l.gate = matrix(name("ffn_gate.weight"), c.ffn_width, c.width);
      l.up = matrix(name("ffn_up.weight"), c.ffn_width, c.width);
    }
    l.down = matrix(name("ffn_down.weight"), c.width, c.ffn_width);
    return l;
  }

  template <typename Name>
  void norms(const Name& name, Layer& l) const {
    const Config& c = files.config;
    const NormLayout layout = c.norm_layout;
    if (layout != NormLayout::post) l.attn_norm = norm(name("attn_norm.weight"), c.width);
    if (layout == NormLayout::pre || layout == NormLayout::sandwich) {
      // gpt-oss's files name the norm between the halves by the half before it.
      const bool between =
          files.find(name("ffn_norm.weight")) == nullptr && layout == NormLayout::pre;
      l.ffn_norm = norm(name(between ? "post_attention_norm.weight" : "ffn_norm.weight"), c.width);
    }
    if (layout == NormLayout::post || layout == NormLayout::sandwich) {
      l.attn_post_norm = norm(name("post_attention_norm.weight"), c.width);
      l.ffn_post_norm = norm(name("post_ffw_norm.weight"), c.width);
    }
    if (c.qk_norm == QkNorm::none) return;
    const bool whole = c.qk_norm == QkNorm::rms_whole_before_rope;
    l.q_norm = norm(name("attn_q_norm.weight"), whole ? c.q_width() : c.head_dim);
    l.k_norm = norm(name("attn_k_norm.weight"), whole ? c.kv_width() : c.head_dim);
  }

  template <typename Name>
  Experts experts_of(const Name& name) const {
    const Config& c = files.config;
    const size_t count = c.experts.count, width = c.experts.width, shared = c.experts.shared_width;
    Experts e;
    e.router = values(name("ffn_gate_inp.weight"), {count, c.width});
    e.router_bias = optional_values(name("ffn_gate_inp.bias"), {count});
    e.gate = experts(name("ffn_gate_exps.weight"), width, c.width);
    e.up = experts(name("ffn_up_exps.weight"), width, c.width);
    e.down = experts(name("ffn_down_exps.weight"), c.width, width);
    e.gate_bias = optional_values(name("ffn_gate_exps.bias"), {count, width});
    e.up_bias = optional_values(name("ffn_up_exps.bias"), {count, width});
    e.down_bias = optional_values(name("ffn_down_exps.bias"), {count, c.width});
    if (shared == 0) return e;
    e.shared_gate = matrix(name("ffn_gate_shexp.weight"), shared, c.width);
    e.shared_up = matrix(name("ffn_up_shexp.weight"), shared, c.width);
    e.shared_down = matrix(name("ffn_down_shexp.weight"), c.width, shared);
    e.shared_router = optional_values(name("ffn_gate_inp_shexp.weight"), {c.width});
    return e;
  }
};

Profile default_profile(const ModelFiles& files) {
  bool any_half = false;
  for (const Tensor& tensor : files.tensors)
    any_half |= tensor.shape.size() == 2 && tensor.type != DType::f32;
  return is_quantized(files) ? Profile::exact : any_half ? Profile::bf16 : Profile::f32;
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
  for (const Layer& l : layers) {
    const Experts& e = l.experts;
    for (const Matrix* m : {&l.q, &l.k, &l.v, &l.attn_out, &l.gate, &l.up, &l.down, &e.shared_gate,
                            &e.shared_up, &e.shared_down})
      total += m->bytes();
    for (const auto* matrices : {&e.gate, &e.up, &e.down})
      for (const Matrix& m : *matrices) total += m.bytes();
  }
  return total;
}

bool is_quantized(const ModelFiles& files) {
  return std::any_of(files.tensors.begin(), files.tensors.end(),
                     [](const Tensor& tensor) { return is_quantized(tensor.type); });
}

void refuse_unquantized(const ModelFiles& files, std::string_view flag) {
  if (is_quantized(files)) return;
  throw Error(
      ErrorKind::usage,
      {.where = std::string(flag),
       .what = fmt::format("is about quantized weights, and {} has none", files.path.string()),
       .cure = "leave it out, or take a quantized model: moru lighten makes one"});
}

Model load_model(Pool& pool, const ModelFiles& files, const LoadOptions& options) {
  if (options.profile == Profile::exact) refuse_unquantized(files, "--precision exact");
  if (options.activations == Activations::int8) refuse_unquantized(files, "--activations int8");
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
  // Longrope's short factors, which are the better ones, serve as far as they reach.
  const bool is_long = c.rope.scaling == RopeConfig::Scaling::longrope;
  const size_t usual = std::min(is_long ? c.rope.original_context : c.context, kMaxPrepared);
  const size_t positions = options.context != 0 ? options.context : usual;
  model.config.context = positions;
  model.rope = RopeTables(c.rope, positions);
  if (c.window != 0) model.local_rope = RopeTables(c.local_rope, positions);
  ::malloc_trim(0);  // what reading the files took
  return model;
}

}  // namespace moru
