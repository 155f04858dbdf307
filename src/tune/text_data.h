// Raw text for continued pre-training: documents become examples of at most max_length tokens,
// every token learnt, nothing cut away.
#pragma once
#include "tune/examples.h"

namespace moru {

// A .txt file is one document, a folder holds one per .txt file in it (by name); other files are
// rows with a field "text". Each document ends with EOS and is cut into pieces of max_length
// tokens. They are kept in memory. Errors: as load_examples; bad_input for a text that is not
// UTF-8.
LoadedExamples load_text(const ModelFiles& files, const LoadExamples& request);

}  // namespace moru
