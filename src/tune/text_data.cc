#include "tune/text_data.h"

#include <fmt/format.h>

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
  const uint64_t hash = std::stoull(sha256(text).substr(0, 16), nullptr, 16);
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

void add_file(const ModelFiles& files, const DataOptions& options,
              const std::filesystem::path& path, Dataset& into) {
  const std::string text = read_file(path);
  if (find_invalid_utf8(text))
    throw Error(ErrorKind::bad_input, {.where = path.string(),
                                       .what = "is not UTF-8 text",
                                       .cure = "convert it: iconv -t utf-8"});
  ++into.counts.rows;
  add_document(files, options, text, into.counts.rows, into);
}

}  // namespace

LoadedExamples load_text(const ModelFiles& files, const LoadExamples& request) {
  Dataset data;
  LoadedExamples out;
  for (const DataSource& source : request.sources) {
    const std::filesystem::path& path = source.path;
    const size_t before = data.examples.size();
    const auto problem = [&](RowProblem row) {
      ++data.counts.bad;
      if (data.counts.bad > request.max_bad)
        throw Error(ErrorKind::bad_input,
                    {.where = fmt::format("{}: line {}{}{}", path.string(), row.line,
                                          row.field.empty() ? "" : ": ", row.field),
                     .what = fmt::format("{}; that is bad row {}", row.what, data.counts.bad),
                     .cure = "mend the rows, or allow more with --max-bad"});
      if (out.problems.size() < 100) out.problems.push_back({path, std::move(row)});
    };
    if (std::filesystem::is_directory(path)) {
      std::vector<std::filesystem::path> texts;
      for (const auto& entry : std::filesystem::directory_iterator(path))
        if (entry.is_regular_file() && entry.path().extension() == ".txt")
          texts.push_back(entry.path());
      std::sort(texts.begin(), texts.end());
      for (const std::filesystem::path& text : texts) add_file(files, request.rows, text, data);
    } else if (path.extension() == ".txt") {
      add_file(files, request.rows, path, data);
    } else {
      RecordReader reader(path);
      while (const std::optional<Row> row = reader.next()) {
        ++data.counts.rows;
        const auto text = row->value.find("text");
        if (text != row->value.end() && text->is_string())
          add_document(files, request.rows, text->get_ref<const std::string&>(), row->line, data);
        else
          problem({row->line, "text", text == row->value.end() ? "is missing" : "is not a text"});
      }
      for (const RowProblem& row : reader.problems()) {
        ++data.counts.rows;
        problem(row);
      }
    }
    for (size_t i = before; i < data.examples.size(); ++i)
      data.examples[i].source = static_cast<size_t>(&source - request.sources.data());
    if (data.examples.size() == before)
      refuse_unusable(path, data.counts, out.problems.empty() ? nullptr : &out.problems[0].row);
  }
  out.examples = Examples(data.examples);
  out.counts = data.counts;
  return out;
}

}  // namespace moru
