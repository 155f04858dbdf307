// Rows of outside data: JSON Lines, a JSON array, or CSV (RFC 4180), found by content.
//
// Every row becomes a JSON object; CSV cells are strings under their header's name. Reading
// streams: memory holds one row, whatever the size of the file.
#pragma once
#include <cstdint>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

namespace moru {

struct Row {
  uint64_t line = 0;  // 1-based, where the row begins
  nlohmann::ordered_json value;
  size_t bytes = 0;  // about how long it is in the file
};

// A row that could not be read: it is counted and told, not thrown.
struct RowProblem {
  uint64_t line;
  std::string field;  // may be empty
  std::string what;
};

class RecordReader {
 public:
  // Errors: not_found, io; bad_input if the file is none of the three.
  explicit RecordReader(const std::filesystem::path& path);
  ~RecordReader();
  RecordReader(RecordReader&&) noexcept;

  // The next good row; nullopt at the end. Bad rows (broken JSON, invalid UTF-8, a row that is
  // not an object, a CSV row of another width) are added to problems(). BOM and CRLF are taken.
  std::optional<Row> next();
  const std::vector<RowProblem>& problems() const;
  // Columns in order of first appearance so far.
  const std::vector<std::string>& columns() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// All rows. Throws bad_input naming file, line and field if more than `max_bad` rows are bad.
std::vector<Row> read_records(const std::filesystem::path& path, size_t max_bad = 0);

}  // namespace moru
