// Raw text for continued pre-training: documents become examples of at most max_length tokens,
// every token learnt, nothing cut away.
#pragma once
#include <filesystem>

#include "tune/data.h"

namespace moru {

// A .txt file is one document, a folder holds one per .txt file in it (by name); other files are
// rows with a field "text". Each document ends with EOS and is cut into pieces of max_length
// tokens. Errors: as load_dataset; bad_input for a text that is not UTF-8.
Dataset load_text(const std::filesystem::path& path, const ModelFiles& files,
                  const DataOptions& options);

}  // namespace moru
