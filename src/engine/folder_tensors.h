// A Hugging Face folder's tensors under the names and in the shapes of a GGUF.
//
// Most tensors are stored alike. Experts are not: a GGUF has one tensor [experts, rows, cols] where
// a folder has one per expert, or one whose columns are gate and up in turns. Such a tensor has no
// bytes of its own; its rows are put together when they are read.
#pragma once
#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine/families.h"
#include "formats/safetensors.h"

namespace moru {

// Where the rows of such a tensor come from.
struct Assembly;

struct FolderTensors {
  std::vector<Tensor> tensors;  // under GGUF names; data is empty for assembled ones
  std::vector<std::shared_ptr<const Assembly>> assemblies;  // by tensor; null: stored alike
  std::vector<std::string> unmatched;                       // names that nothing uses
};

// `folder` must outlive what is made of it. Error bad_input: a shape that does not fit its form.
FolderTensors match_folder_tensors(const Family& family, const Config& config,
                                   const SafetensorsFolder& folder);

// The bytes of row `row` (of all experts' rows, counted through), in the tensor's type; may be
// written to `room`.
std::span<const std::byte> assembled_row(const Assembly& assembly, size_t row,
                                         std::vector<std::byte>& room);

}  // namespace moru
