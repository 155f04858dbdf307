#include "engine/folder_tensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <map>

#include "base/error.h"
#include "engine/family_table.h"

namespace moru {

// parts: one per expert, or the one tensor that holds all.
struct Assembly {
  FolderForm form;
  std::vector<const Tensor*> parts;
  size_t rows = 0, cols = 0;  // of one expert
  size_t first = 0, step = 1;
  const Tensor* scales = nullptr;  // of MXFP4, whose blocks stand in parts[0]
};

namespace {

// The names that a text model has inside of wrappers.
std::string plain_name(std::string_view name) {
  if (name.starts_with("language_model.")) name.remove_prefix(15);
  constexpr std::string_view kInner = "model.language_model.";
  if (name.starts_with(kInner)) return "model." + std::string(name.substr(kInner.size()));
  return std::string(name);
}

struct Matcher {
  const Config& config;
  std::map<std::string, const Tensor*, std::less<>> stored;
  std::map<const Tensor*, bool> used;
  FolderTensors out;

  const Tensor* take(const std::string& name) {
    const auto found = stored.find(name);
    if (found == stored.end()) return nullptr;
    used[found->second] = true;
    return found->second;
  }

  [[noreturn]] void misshapen(const Tensor& tensor) const {
    throw Error(ErrorKind::bad_input,
                {.where = tensor.name,
                 .what = fmt::format("has shape [{}]", fmt::join(tensor.shape, ", ")),
                 .cure = "tensors and configuration do not belong together"});
  }

  void add(std::string name, DType type, std::vector<size_t> shape, Assembly assembly) {
    out.tensors.push_back({std::move(name), type, std::move(shape), {}});
    out.assemblies.push_back(std::make_shared<const Assembly>(std::move(assembly)));
  }

  void match(const NamePair& pair, const std::string& gguf, const std::string& folder) {
    if (pair.form == FolderForm::plain) {
      const Tensor* tensor = take(folder);
      if (tensor == nullptr) return;
      out.tensors.push_back(*tensor);
      out.tensors.back().name = gguf;
      // A vector that a folder keeps as a matrix of one row.
      auto& shape = out.tensors.back().shape;
      if (shape.size() == 2 && shape[0] == 1) shape = {shape[1]};
      out.assemblies.emplace_back();
    } else if (pair.form == FolderForm::per_expert) {
      match_experts(gguf, folder);
    } else if (const Tensor* tensor = take(folder)) {
      match_columns(pair.form, gguf, *tensor);
    } else if (const Tensor* blocks = take(folder + "_blocks")) {
      match_mxfp4(pair.form, gguf, *blocks, take(folder + "_scales"));
    }
  }

  void match_experts(const std::string& gguf, const std::string& folder) {
    const size_t star = folder.find('*');
    Assembly assembly{.form = FolderForm::per_expert, .parts = {}};
    for (size_t e = 0; e < config.experts.count; ++e) {
      const std::string name = folder.substr(0, star) + std::to_string(e) + folder.substr(star + 1);
      const Tensor* part = take(name);
      if (part == nullptr && e == 0) return;  // a dense layer
      if (part == nullptr)
        throw Error(ErrorKind::bad_input, {.where = name,
                                           .what = "the tensor is missing",
                                           .cure = "the folder is incomplete: fetch it again"});
      if (part->shape.size() != 2 || (e > 0 && (part->shape != assembly.parts[0]->shape ||
                                                part->type != assembly.parts[0]->type)))
        misshapen(*part);
      assembly.parts.push_back(part);
    }
    const Tensor& one = *assembly.parts.at(0);
    assembly.rows = one.shape[0];
    assembly.cols = one.shape[1];
    add(gguf, one.type, {config.experts.count, one.shape[0], one.shape[1]}, std::move(assembly));
  }

  void match_columns(FolderForm form, const std::string& gguf, const Tensor& tensor) {
    const bool values = form == FolderForm::even_values || form == FolderForm::odd_values;
    if (tensor.shape.size() != (values ? 2 : 3) || !is_float(tensor.type)) misshapen(tensor);
    const bool odd = form == FolderForm::odd_columns || form == FolderForm::odd_values;
    const size_t step = form == FolderForm::columns ? 1 : 2, across = tensor.shape.back() / step;
    Assembly assembly{.form = form, .parts = {&tensor}, .first = odd ? size_t{1} : 0, .step = step};
    if (values) {
      assembly.rows = 1;
      assembly.cols = across;
      add(gguf, tensor.type, {tensor.shape[0], across}, std::move(assembly));
    } else {
      assembly.rows = across;
      assembly.cols = tensor.shape[1];
      add(gguf, tensor.type, {tensor.shape[0], across, tensor.shape[1]}, std::move(assembly));
    }
  }

  // [experts, rows, cols / 32, 16] bytes and [experts, rows, cols / 32] scales; not transposed.
  void match_mxfp4(FolderForm form, const std::string& gguf, const Tensor& blocks,
                   const Tensor* scales) {
    if (blocks.shape.size() != 4 || blocks.shape[3] != 16 || scales == nullptr ||
        scales->shape != std::vector(blocks.shape.begin(), blocks.shape.end() - 1))
      misshapen(blocks);
    const size_t step = form == FolderForm::columns ? 1 : 2;
    Assembly assembly{.form = form,
                      .parts = {&blocks},
                      .rows = blocks.shape[1] / step,
                      .cols = blocks.shape[2] * 32,
                      .first = form == FolderForm::odd_columns ? size_t{1} : 0,
                      .step = step,
                      .scales = scales};
    const std::vector<size_t> shape = {blocks.shape[0], assembly.rows, assembly.cols};
    add(gguf, DType::mxfp4, shape, std::move(assembly));
  }
};

// A folder's block holds values 2i and 2i + 1 in byte i, a GGUF's i and i + 16, after the scale.
void mxfp4_row(const Assembly& a, size_t row, std::vector<std::byte>& room) {
  const size_t blocks = a.cols / 32, stored = row * a.step + a.first;
  const std::byte* nibbles = a.parts[0]->data.data() + stored * blocks * 16;
  const std::byte* scales = a.scales->data.data() + stored * blocks;
  room.resize(blocks * 17);
  for (size_t b = 0; b < blocks; ++b) {
    std::byte* to = &room[b * 17];
    to[0] = scales[b];
    const auto value = [&](size_t i) {
      const auto byte = std::to_integer<unsigned>(nibbles[b * 16 + i / 2]);
      return i % 2 == 0 ? byte & 15 : byte >> 4;
    };
    for (size_t i = 0; i < 16; ++i)
      to[1 + i] = static_cast<std::byte>(value(i) | value(i + 16) << 4);
  }
}

}  // namespace

FolderTensors match_folder_tensors(const Family& family, const Config& config,
                                   const SafetensorsFolder& folder) {
  Matcher matcher{.config = config, .stored = {}, .used = {}, .out = {}};
  for (const Tensor* tensor : folder.tensors())
    matcher.stored.emplace(plain_name(tensor->name), tensor);
  for (const NamePair& pair : model_names())
    matcher.match(pair, std::string(pair.gguf), std::string(pair.folder));
  for (size_t layer = 0; layer < config.layers; ++layer)
    for (const auto& group : family.block_names)
      for (const NamePair& pair : group)
        matcher.match(pair, fmt::format("blk.{}.{}", layer, pair.gguf),
                      fmt::format("model.layers.{}.{}", layer, pair.folder));
  for (const Tensor* tensor : folder.tensors())
    if (!matcher.used.contains(tensor)) matcher.out.unmatched.push_back(tensor->name);
  return std::move(matcher.out);
}

std::span<const std::byte> assembled_row(const Assembly& a, size_t row,
                                         std::vector<std::byte>& room) {
  const size_t expert = row / a.rows, within = row % a.rows;
  if (a.form == FolderForm::per_expert) {
    const size_t bytes = bytes_of(a.parts[0]->type, a.cols);
    return a.parts[expert]->data.subspan(within * bytes, bytes);
  }
  if (a.scales != nullptr) {
    mxfp4_row(a, row, room);
    return room;
  }
  // Element c of the row stands `stride` after element c − 1.
  const bool values = a.form == FolderForm::even_values || a.form == FolderForm::odd_values;
  const size_t size = bytes_of(a.parts[0]->type, 1), across = a.parts[0]->shape.back();
  const size_t begin =
      values ? expert * across + a.first : expert * a.cols * across + within * a.step + a.first;
  const size_t stride = values ? a.step : across;
  room.resize(a.cols * size);
  const std::byte* from = a.parts[0]->data.data();
  for (size_t c = 0; c < a.cols; ++c)
    std::memcpy(&room[c * size], from + (begin + c * stride) * size, size);
  return room;
}

}  // namespace moru
