// Runs of moru tune on the tiny model, and what they leave: for tests of runs that are killed or
// dealt to several processes.
#pragma once
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/files.h"

namespace moru {

// Rows as a method reads them.
inline std::string rows_for(const std::string& method, size_t count) {
  std::string text;
  for (size_t i = 0; i < count; ++i) {
    const std::string answer(1 + i % 5, static_cast<char>('a' + i % 26));
    nlohmann::json row = {{"prompt", "say " + std::to_string(i * 7 % 10)}};
    if (method == "dpo") {
      row["chosen"] = answer;
      row["rejected"] = std::string(2 + i % 3, static_cast<char>('A' + i % 26));
    } else if (method == "text") {
      row = {{"text", "say it " + answer}};
    } else {
      row["completion"] = answer;
      if (method == "kto") row["label"] = i % 3 != 0;
    }
    text += row.dump() + "\n";
  }
  return text;
}

// The adapter or the model that a run has written.
inline std::string learnt_by(const std::filesystem::path& out) {
  for (const char* name :
       {"adapter/adapter_model.safetensors", "model/model.safetensors", "model.gguf"})
    if (std::filesystem::exists(out / name)) return read_file(out / name);
  return "";
}

// A run's log without what depends on the clock. A line that is being written is null.
inline std::vector<nlohmann::json> log_of(const std::filesystem::path& out) {
  std::ifstream in(out / "log.jsonl");
  std::vector<nlohmann::json> lines;
  for (std::string line; std::getline(in, line);) {
    lines.push_back(nlohmann::json::parse(line, nullptr, false));
    if (lines.back().is_object()) lines.back().erase("tokens_per_second");
  }
  return lines;
}

}  // namespace moru
