// GGUF v2 and v3 files. Spec: ggml's docs/gguf.md.
//
//   | magic, version, counts | metadata | tensor table | pad | data of each tensor, aligned |
//
// Opening checks every length, shape, type and offset, so that no later call can fail. Spans and
// views point into the mapping and live as long as the GgufFile.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/files.h"
#include "base/text_list.h"
#include "formats/dtype.h"

namespace moru {

// A metadata value. Arrays keep their element type; arrays of arrays are refused.
using GgufScalar = std::variant<uint8_t, int8_t, uint16_t, int16_t, uint32_t, int32_t, float, bool,
                                std::string, uint64_t, int64_t, double>;
// Copies share the values, as a vocabulary is large and wanted in several places.
class GgufArray {
 public:
  using Values = std::variant<std::vector<uint8_t>, std::vector<int8_t>, std::vector<uint16_t>,
                              std::vector<int16_t>, std::vector<uint32_t>, std::vector<int32_t>,
                              std::vector<float>, std::vector<bool>, TextList,
                              std::vector<uint64_t>, std::vector<int64_t>, std::vector<double>>;
  explicit GgufArray(Values values) : values_(std::make_shared<const Values>(std::move(values))) {}
  const Values& values() const { return *values_; }

 private:
  std::shared_ptr<const Values> values_;
};
using GgufValue = std::variant<GgufScalar, GgufArray>;

struct GgufPair {
  std::string key;
  GgufValue value;
};

// Metadata in file order, with typed look-ups. An absent key is nullopt; a present key of another
// type is Error bad_input naming the key. Integer look-ups accept every integer width that fits.
class GgufMetadata {
 public:
  std::string where;  // the file, for errors
  std::vector<GgufPair> pairs;

  const GgufValue* find(std::string_view key) const;
  std::optional<uint64_t> integer(std::string_view key) const;
  std::optional<double> number(std::string_view key) const;  // any integer or float
  std::optional<bool> boolean(std::string_view key) const;
  std::optional<std::string> text(std::string_view key) const;
  // Empty if absent. The list lives as long as the pair's value.
  const TextList& texts(std::string_view key) const;
  std::vector<float> floats(std::string_view key) const;      // empty if absent
  std::vector<int64_t> integers(std::string_view key) const;  // empty if absent
  // Replaces the value of `key`, or appends it.
  void set(std::string_view key, GgufValue value);
  void erase(std::string_view key);
};

struct Tensor {
  std::string name;  // "blk.3.attn_q.weight"
  DType type;
  std::vector<size_t> shape;  // slowest first: [rows, cols]
  std::span<const std::byte> data;

  size_t count() const;  // product of the shape
};

class GgufFile {
 public:
  // Errors: bad_input, unsupported (a tensor type, by name), not_found, io.
  explicit GgufFile(const std::filesystem::path& path);
  // From bytes in memory that outlive the object; `where` names them in errors.
  GgufFile(std::string where, std::span<const std::byte> bytes);

  uint32_t version() const { return version_; }
  size_t alignment() const { return alignment_; }
  const GgufMetadata& metadata() const { return metadata_; }
  std::span<const Tensor> tensors() const { return tensors_; }
  const Tensor* find(std::string_view name) const;  // nullptr if absent

  // Gives back the memory of a tensor's data, which may still be read (base/files.h).
  void forget(std::span<const std::byte> data) const {
    if (file_) file_->forget(data);
  }

 private:
  void parse(std::span<const std::byte> bytes);

  std::string where_;
  std::optional<MappedFile> file_;
  uint32_t version_ = 0;
  size_t alignment_ = 32;
  GgufMetadata metadata_;
  std::vector<Tensor> tensors_;
};

// Writes a version 3 file (or `version` 2) through AtomicFile, tensors in the given order.
// Rewriting what GgufFile read from a canonical file gives the same bytes. Errors: io, no_space.
void write_gguf(const std::filesystem::path& path, const GgufMetadata& metadata,
                std::span<const Tensor> tensors, uint32_t version = 3);
// The size of the file that write_gguf would write; of the tensors only name, type and shape count.
uint64_t gguf_bytes(const GgufMetadata& metadata, std::span<const Tensor> tensors);

}  // namespace moru
