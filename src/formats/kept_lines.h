// A file of JSON Lines that grows as work is done and survives a kill: a header that says what the
// lines are the results of, then one line for each piece of work.
//
//   {"moru": "samples", "version": 1, "key": {…}}
//   {…}
//
// Lines that end in a line break are whole: a line and its break are written at once, and a kill
// can only cut the end off. Opened again with the same key, the whole lines are given back and the
// rest is dropped; with another key, the file begins anew.
#pragma once
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string_view>
#include <vector>

namespace moru {

class KeptLines {
 public:
  // Errors: io; bad_input if the file is there but holds something else than `kind`.
  KeptLines(std::filesystem::path path, std::string_view kind, const nlohmann::ordered_json& key);

  // What it held when it was opened.
  const std::vector<nlohmann::ordered_json>& lines() const { return lines_; }
  // Written and synced when it returns. Error: io, no_space.
  void add(const std::vector<nlohmann::ordered_json>& lines);

 private:
  std::filesystem::path path_;
  std::vector<nlohmann::ordered_json> lines_;
};

}  // namespace moru
