#include "tune/text_data.h"

#include <algorithm>
#include <vector>

#include "base/error.h"
#include "base/files.h"
#include "base/hash.h"
#include "base/text.h"

namespace moru {
namespace {

void add_document(const ModelFiles& files, const DataOptions& options, std::string_view text,
                  uint64_t line, Dataset& into) {
  const Tokenizer& tokenizer = files.tokenizer;
  std::vector<TokenId> ids = tokenizer.encode(text);
  if (tokenizer.adds_bos() && tokenizer.bos() && (ids.empty() || ids.front() != *tokenizer.bos()))
    ids.insert(ids.begin(), *tokenizer.bos());
  if (const auto eos = tokenizer.eos(); eos && (ids.empty() || ids.back() != *eos))
    ids.push_back(*eos);
  const uint64_t hash = short_sha256(text);
  for (size_t at = 0; at < ids.size(); at += options.max_length) {
    const size_t count = std::min(options.max_length, ids.size() - at);
    if (count < 2) {  // a single token has nothing to be learnt from
      if (at == 0) ++into.counts.without_answer;
      continue;
    }
    Example e;
    e.ids.assign(ids.begin() + static_cast<std::ptrdiff_t>(at),
                 ids.begin() + static_cast<std::ptrdiff_t>(at + count));
    e.trained.assign(count, 1);
    e.trained[0] = 0;
    e.line = line;
    e.hash = hash;
    into.examples.push_back(std::move(e));
  }
}

}  // namespace

SourceReader::SourceReader(const std::filesystem::path& path, bool raw_text) {
  if (raw_text && std::filesystem::is_directory(path)) {
    for (const auto& entry : std::filesystem::directory_iterator(path))
      if (entry.is_regular_file() && entry.path().extension() == ".txt")
        texts_.push_back(entry.path());
    std::sort(texts_.begin(), texts_.end());
  } else if (raw_text && path.extension() == ".txt") {
    texts_.push_back(path);
  } else {
    records_.emplace(path);
  }
}

std::optional<Row> SourceReader::next() {
  if (records_) return records_->next();
  if (done_ == texts_.size()) return std::nullopt;
  const std::filesystem::path& path = texts_[done_++];
  std::string text = read_file(path);
  if (find_invalid_utf8(text))
    throw Error(ErrorKind::bad_input, {.where = path.string(),
                                       .what = "is not UTF-8 text",
                                       .cure = "convert it: iconv -t utf-8"});
  Row row{.line = done_, .value = {}, .bytes = text.size()};
  row.value = nlohmann::ordered_json::object({{"text", std::move(text)}});
  return row;
}

const std::vector<RowProblem>& SourceReader::problems() const {
  static const std::vector<RowProblem> kNone;
  return records_ ? records_->problems() : kNone;
}

void add_text(const ModelFiles& files, const DataOptions& options, const Row& row, Dataset& into) {
  ++into.counts.rows;
  nlohmann::ordered_json room;
  const auto& value = composed_row(row.value, options.nfc, room, into.counts);
  const auto text = value.find("text");
  if (text != value.end() && text->is_string())
    return add_document(files, options, text->get_ref<const std::string&>(), row.line, into);
  ++into.counts.bad;
  into.problems.push_back({row.line, "text", text == value.end() ? "is missing" : "is not a text"});
}

}  // namespace moru
