// A model as it lies on disk, GGUF file or Hugging Face folder, seen through one set of names.
//
// Names are GGUF's ("blk.3.attn_q.weight"); a folder's are translated by its family's row. The row
// order of q and k is given by `qk_interleaved`; everything else is stored alike.
#pragma once
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/config.h"
#include "engine/families.h"
#include "engine/folder_tensors.h"
#include "formats/chat_template.h"
#include "formats/gguf.h"
#include "formats/safetensors.h"
#include "formats/tokenizer.h"

namespace moru {

struct ModelFiles {
  std::filesystem::path path;
  const Family* family = nullptr;
  Config config;
  Tokenizer tokenizer;
  std::optional<ChatTemplate> chat_template;
  std::vector<TokenId> stop_ids;       // EOS list of the config, generation config and vocabulary
  bool qk_interleaved = false;         // rows of q and k are in adjacent-pair order
  float norm_offset = 0;               // add to norm gains: 1 for a Gemma folder
  GgufMetadata metadata;               // what a GGUF of this model carries
  std::vector<Tensor> tensors;         // under GGUF names, shapes [rows, cols], file order
  std::vector<std::string> unmatched;  // names of the folder that nothing uses

  const Tensor* find(std::string_view name) const;  // nullptr if absent
  // Row `row` of one of `tensors`, counted through all dimensions but the last, as it is stored. A
  // tensor whose `data` is empty has its rows put together, in `room`.
  std::span<const std::byte> row(const Tensor& tensor, size_t row,
                                 std::vector<std::byte>& room) const;

  std::optional<GgufFile> gguf;  // what `tensors` point into
  std::optional<SafetensorsFolder> folder;
  std::vector<std::shared_ptr<const Assembly>> assemblies;  // by tensor, null: stored whole
  std::vector<std::vector<float>> made;  // tensors that a GGUF has and the folder has not
};

// Where row `row` of q or k, in half-split order, stands in a file that keeps rotary pairs next to
// each other.
size_t interleaved_row(size_t row, size_t head_dim);
// Rows of q and k, weights and biases, turn with the rotary pairs.
bool is_query_or_key(std::string_view gguf_name);

// Errors: not_found, bad_input, unsupported (a family or flag, by name and value).
ModelFiles open_model(const std::filesystem::path& path);

}  // namespace moru
