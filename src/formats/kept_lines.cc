#include "formats/kept_lines.h"

#include <fmt/format.h>

#include "base/error.h"
#include "base/files.h"

namespace moru {
namespace {

using Json = nlohmann::ordered_json;

std::string dump(const Json& value) {
  return value.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace

KeptLines::KeptLines(std::filesystem::path path, std::string_view kind, const Json& key)
    : path_(std::move(path)) {
  const Json header = {{"moru", kind}, {"version", 1}, {"key", key}};
  const std::string content = std::filesystem::exists(path_) ? read_file(path_) : "";
  size_t whole = 0;
  bool same_key = false;
  for (size_t at = 0, end; (end = content.find('\n', at)) != std::string::npos; at = end + 1) {
    Json line = Json::parse(content.begin() + static_cast<ptrdiff_t>(at),
                            content.begin() + static_cast<ptrdiff_t>(end), nullptr, false);
    const bool ours = line.is_object() && (at > 0 || line.value("moru", "") == kind);
    if (!ours)
      throw Error(ErrorKind::bad_input, {.where = path_.string(),
                                         .what = fmt::format("does not hold {}", kind),
                                         .cure = "name another file, or remove this one"});
    if (at == 0) {
      same_key = line == header;
      if (!same_key) break;
    } else {
      lines_.push_back(std::move(line));
    }
    whole = end + 1;
  }
  if (same_key) {
    std::filesystem::resize_file(path_, whole);
  } else {
    write_file(path_, dump(header) + "\n");
  }
}

void KeptLines::add(const std::vector<Json>& lines) {
  if (lines.empty()) return;
  std::string text;
  for (const Json& line : lines) text += (text.empty() ? "" : "\n") + dump(line);
  append_line(path_, text);
}

}  // namespace moru
