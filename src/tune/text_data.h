// Raw text for continued pre-training: documents become examples of at most max_length tokens,
// every token learnt, nothing cut away.
//
// A .txt file is one document, a folder holds one per .txt file in it (by name); other files are
// rows with a field "text". Each document ends with EOS and is cut into pieces of max_length
// tokens.
#pragma once
#include "formats/records.h"
#include "tune/data.h"

namespace moru {

// The rows of a source, one at a time: those of RecordReader, or of raw text, whose documents have
// a field "text".
class SourceReader {
 public:
  // Errors: as RecordReader.
  SourceReader(const std::filesystem::path& path, bool raw_text);
  // Error: also bad_input for a .txt file that is not UTF-8.
  std::optional<Row> next();
  const std::vector<RowProblem>& problems() const;

 private:
  std::optional<RecordReader> records_;
  std::vector<std::filesystem::path> texts_;
  size_t done_ = 0;  // of texts_
};

// Appends the pieces of a document, or a problem: what ExampleMaker::add is for other rows.
void add_text(const ModelFiles& files, const DataOptions& options, const Row& row, Dataset& into);

}  // namespace moru
