#include "formats/records.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <string_view>
#include <unordered_set>
#include <utility>

#include "base/error.h"
#include "base/text.h"

namespace moru {
namespace {

constexpr size_t kChunkBytes = size_t{256} << 10;
constexpr size_t kMaxRowBytes = size_t{256} << 20;
// Deeper or wider values would overflow the stack of whoever copies them, or cost the square of
// their width: an ordered object looks its members up one by one.
constexpr size_t kMaxDepth = 500;
constexpr size_t kMaxMembers = 10'000;
constexpr size_t kMaxColumns = 10'000;
constexpr size_t kMaxProblems = 1'000'000;
constexpr size_t kMaxDetailColumns = 160;

constexpr std::string_view kSpace = " \t\r\n";
constexpr std::string_view kNotUtf8Cure =
    "save the file as UTF-8; spreadsheets call it \"CSV UTF-8\"";

// The bytes of a file, unpacked where they are gzip, a chunk at a time.
class Source {
 public:
  explicit Source(const std::filesystem::path& path) : where_(path.string()) {
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) refuse_to_open(errno);
    struct stat status {};
    if (::fstat(fd, &status) == 0 && S_ISDIR(status.st_mode)) {
      ::close(fd);
      refuse_to_open(EISDIR);
    }
    file_ = ::gzdopen(fd, "rb");  // zlib passes what is not gzip through
    if (file_ == nullptr) {
      ::close(fd);
      refuse_to_open(ENOMEM);
    }
    ::gzbuffer(file_, kChunkBytes);
    chunk_.resize(kChunkBytes);
  }
  ~Source() { ::gzclose(file_); }
  Source(const Source&) = delete;
  Source& operator=(const Source&) = delete;

  const std::string& where() const { return where_; }

  // What is at hand, read when that is nothing; empty only at the end of the file.
  std::string_view peek() {
    if (at_ == size_) refill();
    return std::string_view(chunk_).substr(at_, size_ - at_);
  }
  void take(size_t count) { at_ += count; }

 private:
  void refill() {
    const int n = ::gzread(file_, chunk_.data(), static_cast<unsigned>(chunk_.size()));
    int code = Z_OK;
    const char* what = ::gzerror(file_, &code);
    if (n < 0 && code == Z_ERRNO)
      throw Error(ErrorKind::io, {.where = where_, .what = what, .cure = ""});
    if (n < 0 || code == Z_BUF_ERROR)
      throw Error(ErrorKind::bad_input,
                  {.where = where_,
                   .what = code == Z_BUF_ERROR ? "the gzip data ends early"
                                               : fmt::format("the gzip data is damaged: {}", what),
                   .cure = "copy the file again"});
    at_ = 0;
    size_ = static_cast<size_t>(n);
  }

  [[noreturn]] void refuse_to_open(int code) const {
    const bool absent = code == ENOENT || code == ENOTDIR;
    throw Error(absent ? ErrorKind::not_found : ErrorKind::io,
                {.where = where_,
                 .what = fmt::format("cannot open: {}", std::strerror(code)),
                 .cure = absent           ? "check the path"
                         : code == EISDIR ? "name a file, not a folder"
                                          : "check the permissions"});
  }

  std::string where_;
  gzFile file_ = nullptr;
  std::string chunk_;
  size_t at_ = 0, size_ = 0;
};

// Follows JSON text without judging it: which brackets are open, and whether a byte is in a string.
class JsonScan {
 public:
  void step(char c) {
    if (in_string_) {
      if (escaped_) {
        escaped_ = false;
      } else if (c == '\\') {
        escaped_ = true;
      } else if (c == '"') {
        in_string_ = false;
      }
    } else if (c == '"') {
      in_string_ = true;
    } else if (c == '{' || c == '[') {
      ++depth_;
    } else if ((c == '}' || c == ']') && depth_ > 0) {
      --depth_;
    }
  }
  bool in_string() const { return in_string_; }
  size_t depth() const { return depth_; }

 private:
  bool in_string_ = false, escaped_ = false;
  size_t depth_ = 0;
};

// Why `text` may not be parsed; empty if it may.
std::string over_bounds(std::string_view text) {
  JsonScan scan;
  std::array<uint32_t, kMaxDepth + 1> members{};
  for (const char c : text) {
    const size_t before = scan.depth();
    scan.step(c);
    if (scan.depth() > kMaxDepth) return fmt::format("nested deeper than {}", kMaxDepth);
    if (scan.depth() > before) members[scan.depth()] = 0;
    if (c == ':' && !scan.in_string() && ++members[scan.depth()] > kMaxMembers)
      return fmt::format("an object of more than {} members", kMaxMembers);
  }
  return {};
}

// The member of an object's text whose value byte `at` stands in; empty if in none. The name stands
// before what is broken, so it is UTF-8.
std::string member_at(std::string_view text, size_t at) {
  JsonScan scan;
  size_t name_begins = 0, name_ends = 0;
  std::string member;
  for (size_t i = 0; i < at; ++i) {
    const bool was_in_string = scan.in_string();
    scan.step(text[i]);
    if (scan.depth() == 0) member.clear();
    if (scan.depth() != 1) continue;
    if (!was_in_string && scan.in_string()) name_begins = i + 1;
    if (was_in_string && !scan.in_string()) name_ends = i;
    if (was_in_string || scan.in_string()) continue;
    if (text[i] == ':') member = text.substr(name_begins, name_ends - name_begins);
    if (text[i] == ',') member.clear();
  }
  return truncate_to_width(member, kMaxDetailColumns);
}

// Why `text` is no row, and in which member if that is known; empty if it is one, then in `value`.
std::string parse_object(std::string_view text, nlohmann::ordered_json& value,
                         std::string& member) {
  if (const auto bad = find_invalid_utf8(text)) {
    member = member_at(text, *bad);
    return fmt::format("not UTF-8 at byte {} of the row", *bad + 1);
  }
  if (std::string problem = over_bounds(text); !problem.empty()) return problem;
  try {
    value = nlohmann::ordered_json::parse(text);
  } catch (const nlohmann::json::parse_error& error) {
    std::string_view detail = error.what();
    if (const size_t at = detail.find("syntax error "); at != detail.npos) detail.remove_prefix(at);
    return fmt::format("broken JSON at byte {} of the row: {}", error.byte,
                       truncate_to_width(detail, kMaxDetailColumns));
  } catch (const nlohmann::json::exception& error) {
    std::string_view detail = error.what();
    if (const size_t at = detail.find("] "); at != detail.npos) detail.remove_prefix(at + 2);
    return truncate_to_width(detail, kMaxDetailColumns);
  }
  if (!value.is_object())
    return fmt::format("a JSON {} where an object belongs", value.type_name());
  return {};
}

// The file's name without .gz ends in one of `endings`: breaks a tie that the content leaves.
bool is_named(std::string_view name, std::initializer_list<std::string_view> endings) {
  if (name.ends_with(".gz")) name.remove_suffix(3);
  return std::any_of(endings.begin(), endings.end(),
                     [&](std::string_view ending) { return name.ends_with(ending); });
}

enum class Format { json_lines, json_array, csv };

// The one of , ; tab that is most frequent in the first row, outside of quotes.
char find_delimiter(std::string_view text) {
  constexpr std::string_view kDelimiters = ",;\t";
  std::array<size_t, kDelimiters.size()> counts{};
  bool quoted = false;
  for (const char c : text) {
    if (c == '"') quoted = !quoted;
    if (quoted) continue;
    if (c == '\n' || c == '\r') break;
    if (const size_t i = kDelimiters.find(c); i != kDelimiters.npos) ++counts[i];
  }
  const auto most = std::max_element(counts.begin(), counts.end());  // the first of equals
  return kDelimiters[static_cast<size_t>(most - counts.begin())];
}

}  // namespace

struct RecordReader::State {
  explicit State(const std::filesystem::path& path) : source(path) { find_format(); }

  Source source;
  Format format = Format::json_lines;
  uint64_t line = 1;  // of the next byte
  std::vector<RowProblem> problems;
  std::vector<std::string> columns;
  std::unordered_set<std::string> known_columns;
  std::string text;                // the row being read
  bool array_ended = false;        // JSON array: its ] has been read
  bool after_element = false;      // JSON array: a row has been read since the last comma
  char delimiter = ',';            // CSV
  std::vector<std::string> cells;  // CSV: of the row being read, those that have a column
  size_t cell_count = 0;           // CSV: all cells of that row
  size_t bad_cell = 0;             // CSV: which of them has a problem
  size_t row_bytes = 0;            // CSV: of that row
  size_t cells_max = kMaxColumns;

  void find_format();
  void read_header();
  std::optional<Row> next_line();
  std::optional<Row> next_element();
  std::optional<Row> next_cells();

  bool read_line();
  void read_element();
  bool read_cells(std::string& problem);
  bool skip_space();
  void end_array();

  [[noreturn]] void refuse(std::string what, std::string cure) const {
    throw Error(ErrorKind::bad_input,
                {.where = source.where(), .what = std::move(what), .cure = std::move(cure)});
  }
  void note(uint64_t at, std::string field, std::string what) {
    if (problems.size() == kMaxProblems)
      refuse(fmt::format("more than {} bad rows; the last at line {}: {}", kMaxProblems, at, what),
             "check that this is the file you meant");
    problems.push_back({at, std::move(field), std::move(what)});
  }
  void append(std::string_view piece) {
    // One byte past the limit is kept, so that the row can be told from one that just fits.
    text.append(piece.substr(0, std::min(piece.size(), kMaxRowBytes + 1 - text.size())));
  }
  bool overlong() const { return text.size() > kMaxRowBytes; }
  void note_overlong(uint64_t at) {
    note(at, "", fmt::format("longer than {} MiB", kMaxRowBytes >> 20));
  }
  std::optional<Row> row_from_text(uint64_t at);
};

void RecordReader::State::find_format() {
  if (source.peek().starts_with("\xEF\xBB\xBF")) source.take(3);
  while (!source.peek().empty() && source.peek().find_first_not_of(kSpace) == std::string::npos)
    skip_space();  // chunks of nothing else
  const std::string_view begin = source.peek();
  if (begin.starts_with("\xFF\xFE") || begin.starts_with("\xFE\xFF"))
    refuse("the text is UTF-16", std::string(kNotUtf8Cure));
  if (begin.find('\0') != begin.npos)
    refuse("a binary file where rows belong", "give JSON Lines, a JSON array or CSV");
  const size_t at = begin.find_first_not_of(kSpace);
  if (at == begin.npos) return;  // no rows yet: as good as JSON Lines
  if (begin[at] == '[') {
    format = Format::json_array;
    skip_space();
    source.take(1);
  } else if (begin[at] == '{' || is_named(source.where(), {".jsonl", ".ndjson"})) {
    format = Format::json_lines;
    const std::string_view first = begin.substr(at, begin.substr(at).find('\n'));
    if (first.substr(0, first.find_last_not_of(kSpace) + 1) == "{")
      refuse("a JSON object over several lines",
             "write one object per line, or an array of objects");
  } else {
    format = Format::csv;
    delimiter = find_delimiter(begin);
    read_header();
  }
}

void RecordReader::State::read_header() {
  std::string problem;
  do {
    if (!read_cells(problem)) return;
  } while (cell_count == 1 && cells[0].empty());  // blank lines
  if (!problem.empty()) refuse("the header: " + problem, "check the first line");
  if (cell_count > kMaxColumns)
    refuse(fmt::format("{} columns; at most {} are read", cell_count, kMaxColumns),
           "give fewer columns");
  for (const std::string& cell : cells)
    if (find_invalid_utf8(cell)) refuse("the header is not UTF-8", std::string(kNotUtf8Cure));
  // Any text would do as CSV of one column, so the file must also be called so.
  if (cell_count == 1 && !is_named(source.where(), {".csv", ".tsv", ".CSV", ".TSV"}))
    refuse("neither JSON Lines, a JSON array nor CSV", "give one of the three");
  for (size_t i = 0; i < cells.size(); ++i) {
    std::string name = cells[i].empty() ? fmt::format("column_{}", i + 1) : cells[i];
    if (!known_columns.insert(name).second)
      refuse(fmt::format("two columns are called {}", name), "rename one of them");
    columns.push_back(std::move(name));
  }
  cells_max = columns.size();
}

std::optional<Row> RecordReader::State::row_from_text(uint64_t at) {
  Row row{at, nullptr, text.size()};
  if (overlong()) {
    note_overlong(at);
    return std::nullopt;
  }
  std::string member;
  if (std::string problem = parse_object(text, row.value, member); !problem.empty()) {
    note(at, std::move(member), std::move(problem));
    return std::nullopt;
  }
  for (const auto& [key, value] : row.value.items())
    if (columns.size() < kMaxColumns && known_columns.insert(key).second) columns.push_back(key);
  return row;
}

// The next line without its end, in `text`; false at the end of the file.
bool RecordReader::State::read_line() {
  text.clear();
  bool any = false;
  for (;;) {
    const std::string_view view = source.peek();
    if (view.empty()) return any;
    any = true;
    const size_t end = view.find('\n');
    append(view.substr(0, end));
    source.take(std::min(view.size(), end == view.npos ? view.size() : end + 1));
    if (end != view.npos) {
      ++line;
      return true;
    }
  }
}

std::optional<Row> RecordReader::State::next_line() {
  for (;;) {
    const uint64_t at = line;
    if (!read_line()) return std::nullopt;
    if (text.find_first_not_of(kSpace) == text.npos) continue;
    if (std::optional<Row> row = row_from_text(at)) return row;
  }
}

// False at the end of the file.
bool RecordReader::State::skip_space() {
  for (;;) {
    const std::string_view view = source.peek();
    if (view.empty()) return false;
    const size_t end = std::min(view.find_first_not_of(kSpace), view.size());
    line += static_cast<uint64_t>(
        std::count(view.begin(), view.begin() + static_cast<ptrdiff_t>(end), '\n'));
    source.take(end);
    if (end < view.size()) return true;
  }
}

// One element, in `text`: to the bracket that closes it, or for what has none to , or ].
void RecordReader::State::read_element() {
  text.clear();
  JsonScan scan;
  for (;;) {
    const std::string_view view = source.peek();
    if (view.empty()) return;
    for (size_t i = 0; i < view.size(); ++i) {
      const char c = view[i];
      const size_t depth = scan.depth();
      if (depth == 0 && !scan.in_string() && (c == ',' || c == ']')) {
        append(view.substr(0, i));
        source.take(i);
        return;
      }
      scan.step(c);
      if (c == '\n') ++line;
      if (depth == 1 && scan.depth() == 0) {
        append(view.substr(0, i + 1));
        source.take(i + 1);
        return;
      }
    }
    append(view);
    source.take(view.size());
  }
}

void RecordReader::State::end_array() {
  source.take(1);
  array_ended = true;
  if (skip_space()) note(line, "", "text after the array's end; it is not read");
}

std::optional<Row> RecordReader::State::next_element() {
  while (!array_ended) {
    if (!skip_space()) {
      note(line, "", "the file ends before the array does");
      array_ended = true;
      break;
    }
    const char c = source.peek().front();
    if (c == ']') {
      end_array();
    } else if (c == ',') {
      if (!after_element) note(line, "", "a comma without a row before it");
      after_element = false;
      source.take(1);
    } else {
      if (after_element) note(line, "", "no comma before this row");
      const uint64_t at = line;
      read_element();
      after_element = true;
      if (std::optional<Row> row = row_from_text(at)) return row;
    }
  }
  return std::nullopt;
}

// One CSV row in `cells`; false at the end of the file. `problem` says what breaks RFC 4180.
bool RecordReader::State::read_cells(std::string& problem) {
  enum class At { cell_start, plain, quoted, quote_in_quoted };
  // The first problem counts: what follows it is guessed.
  const auto note_problem = [&](const char* what) {
    if (!problem.empty()) return;
    problem = what;
    bad_cell = cell_count;
  };
  problem.clear();
  cells.clear();
  cell_count = 0;
  text.clear();
  row_bytes = 0;
  At at = At::cell_start;
  const auto end_cell = [&] {
    if (cells.size() < cells_max) cells.push_back(text);
    ++cell_count;
    text.clear();
    at = At::cell_start;
  };
  bool any = false;
  const char stops[] = {delimiter, '\n', '\r', '"'};
  for (;;) {
    const std::string_view view = source.peek();
    if (view.empty()) {
      if (!any) return false;
      if (at == At::quoted) note_problem("a quote that is not closed");
      end_cell();
      break;
    }
    any = true;
    // A run of bytes that mean nothing, then perhaps one that does.
    const size_t run = std::min(
        view.size(), at == At::quoted ? view.find('"') : view.find_first_of({stops, sizeof stops}));
    if (run > 0) {
      const std::string_view piece = view.substr(0, run);
      if (at == At::quote_in_quoted) {
        note_problem("text after a closing quote");
        at = At::plain;
      } else if (at == At::cell_start) {
        at = At::plain;
      } else if (at == At::quoted) {
        line += static_cast<uint64_t>(std::count(piece.begin(), piece.end(), '\n'));
      }
      row_bytes += run;
      if (row_bytes <= kMaxRowBytes && cells.size() < cells_max) text += piece;
      source.take(run);
      continue;
    }
    const char c = view.front();
    source.take(1);
    ++row_bytes;
    if (c == '"') {
      if (at == At::quote_in_quoted) text += '"';  // "" inside quotes
      if (at == At::plain) {
        note_problem("a quote inside an unquoted cell");
        text += '"';
      } else {
        at = at == At::quoted ? At::quote_in_quoted : At::quoted;
      }
    } else if (c == delimiter) {
      end_cell();
    } else {  // the end of the row: \n, \r\n or \r
      if (c == '\r' && source.peek().starts_with('\n')) source.take(1);
      ++line;
      end_cell();
      break;
    }
  }
  if (row_bytes > kMaxRowBytes) {
    problem = fmt::format("longer than {} MiB", kMaxRowBytes >> 20);
    bad_cell = columns.size();
  }
  return true;
}

std::optional<Row> RecordReader::State::next_cells() {
  std::string problem;
  for (;;) {
    const uint64_t at = line;
    if (columns.empty() || !read_cells(problem)) return std::nullopt;
    if (cell_count == 1 && cells[0].empty() && problem.empty()) continue;  // a blank line
    if (!problem.empty()) {
      note(at, bad_cell < columns.size() ? columns[bad_cell] : "", std::move(problem));
      continue;
    }
    if (cell_count != columns.size()) {
      note(at, "", fmt::format("{} cells where the header has {}", cell_count, columns.size()));
      continue;
    }
    Row row{at, nlohmann::ordered_json::object(), row_bytes};
    const std::string* bad_column = nullptr;
    auto& object = row.value.get_ref<nlohmann::ordered_json::object_t&>();
    object.reserve(columns.size());
    for (size_t i = 0; i < cells.size() && bad_column == nullptr; ++i) {
      if (find_invalid_utf8(cells[i])) bad_column = &columns[i];
      // Names are unique, so no look-up: that would cost the square of the width.
      object.Container::emplace_back(columns[i], std::move(cells[i]));
    }
    if (bad_column == nullptr) return row;
    note(at, *bad_column, "not UTF-8");
  }
}

RecordReader::RecordReader(const std::filesystem::path& path)
    : state_(std::make_unique<State>(path)) {}
RecordReader::~RecordReader() = default;
RecordReader::RecordReader(RecordReader&&) noexcept = default;

std::optional<Row> RecordReader::next() {
  switch (state_->format) {
    case Format::json_lines:
      return state_->next_line();
    case Format::json_array:
      return state_->next_element();
    case Format::csv:
      return state_->next_cells();
  }
  return std::nullopt;
}

const std::vector<RowProblem>& RecordReader::problems() const { return state_->problems; }
const std::vector<std::string>& RecordReader::columns() const { return state_->columns; }

std::vector<Row> read_records(const std::filesystem::path& path, size_t max_bad) {
  RecordReader reader(path);
  std::vector<Row> rows;
  for (;;) {
    std::optional<Row> row = reader.next();
    if (reader.problems().size() > max_bad) {
      const RowProblem& bad = reader.problems()[max_bad];
      throw Error(ErrorKind::bad_input,
                  {.where = fmt::format("{}: line {}{}{}", path.string(), bad.line,
                                        bad.field.empty() ? "" : ": ", bad.field),
                   .what = bad.what,
                   .cure = max_bad == 0 ? "correct the row"
                                        : fmt::format("more than {} rows are bad", max_bad)});
    }
    if (!row) return rows;
    rows.push_back(std::move(*row));
  }
}

}  // namespace moru
