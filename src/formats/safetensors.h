// Safetensors files: u64 header length | JSON header | data. Spec: huggingface/safetensors.
//
// A Hugging Face folder holds either one model.safetensors or shards that
// model.safetensors.index.json lists; SafetensorsFolder reads both.
#pragma once
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/files.h"
#include "formats/gguf.h"  // Tensor

namespace moru {

class SafetensorsFile {
 public:
  // Checks the header, every shape and offset, and that tensors cover the data without overlap.
  // Errors: bad_input, unsupported (a dtype, by name), not_found, io.
  explicit SafetensorsFile(const std::filesystem::path& path);
  SafetensorsFile(std::string where, std::span<const std::byte> bytes);

  std::span<const Tensor> tensors() const { return tensors_; }
  const Tensor* find(std::string_view name) const;  // nullptr if absent
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  // Gives back the memory of a tensor's data, which may still be read (base/files.h).
  void forget(std::span<const std::byte> data) const {
    if (file_) file_->forget(data);
  }

 private:
  void parse(std::span<const std::byte> bytes);

  std::string where_;
  std::optional<MappedFile> file_;
  std::vector<Tensor> tensors_;
  std::map<std::string, std::string> metadata_;
};

// All tensors of a Hugging Face folder, one file or many.
class SafetensorsFolder {
 public:
  // `stem`: "model" or "adapter_model".
  explicit SafetensorsFolder(const std::filesystem::path& folder, std::string_view stem = "model");

  std::vector<const Tensor*> tensors() const;
  const Tensor* find(std::string_view name) const;  // nullptr if absent

  // Gives back the memory of a tensor's data, whichever file has it.
  void forget(std::span<const std::byte> data) const {
    for (const SafetensorsFile& file : files_) file.forget(data);
  }

 private:
  std::vector<SafetensorsFile> files_;
};

// One file. `metadata` is usually {{"format", "pt"}}. Tensor types: f32, f16, bf16 and integers.
void write_safetensors(const std::filesystem::path& path, std::span<const Tensor> tensors,
                       const std::map<std::string, std::string>& metadata);
// model.safetensors, or shards of at most `shard_bytes` and their index.
void write_safetensors_folder(const std::filesystem::path& folder, std::span<const Tensor> tensors,
                              size_t shard_bytes);

}  // namespace moru
